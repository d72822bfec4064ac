"""dual_dit.py: Wan number for number, then what the second expert adds to it."""

import math
import re
from dataclasses import replace

import pytest
import torch
from test_rope import complex_rotation
from torch import Tensor, nn

import dual_dit
from dual_dit import PRESETS, Context, DualDiT, DualDiTConfig
from flow import Role, Task
from motion_tokens import MOTION_DIM
from rope import motion_positions, rope_table, video_positions

TINY = DualDiTConfig(
    layers=2, width=48, heads=4, ffn=80, channels=4, text_dim=8, patch=(1, 2, 2), freq_dim=16
)
CONFIGS = {"dual": TINY, "hybrid": replace(TINY, dual=(1,)), "single-stream": replace(TINY, shared=True)}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_task = pytest.mark.parametrize("task", Task, ids=[task.name for task in Task])


def randomised(config: DualDiTConfig = TINY) -> DualDiT:
    """Every parameter is random: nothing is hidden behind a layer that starts at zero."""
    torch.manual_seed(0)
    model = DualDiT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture
def model():
    return randomised()


def inputs(b: int = 3, task: Task = Task.JOINT) -> dict:
    """Arguments of a call for this task: absent, clean or noisy modalities, a different t for each sample."""
    torch.manual_seed(1)
    times = torch.rand(b), torch.rand(b)
    t_video, t_motion = (
        t if role is Role.NOISY else 0 * t for t, role in zip(times, (task.video, task.motion), strict=True)
    )
    arguments = {
        "video": torch.randn(b, 4, 3, 4, 6),
        "motion": torch.randn(b, 9, MOTION_DIM),
        "t_video": t_video,
        "t_motion": t_motion,
        "text": torch.randn(b, 5, 8),
        "task": task,
    }
    for name in ("video", "motion"):
        if getattr(task, name) is Role.ABSENT:
            arguments[name] = arguments[f"t_{name}"] = None
    return arguments


# ---------------------------------------------------------------- Wan, number for number


def wan(model: DualDiT, video: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Wan2.1's forward pass after its published code, in float64, on the weights of the video expert."""
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    names = {"patch_embedding", "text_embedding", "time_embedding", "time_projection", "head"}

    def get(name: str) -> Tensor:
        """A weight by the name that Wan's checkpoint gives it."""
        if name.split(".")[0] in names:
            return weights[f"video.{name}"]
        _, block, rest = name.split(".", 2)
        return weights[f"blocks.{block}.video.{rest}"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def gelu(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + config.eps).sqrt()

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * get(f"{name}.weight")

    def attention(x: Tensor, context: Tensor, name: str, places: Tensor | None) -> Tensor:
        q = rms(linear(x, f"{name}.q"), f"{name}.norm_q")
        k = rms(linear(context, f"{name}.k"), f"{name}.norm_k")
        v = linear(context, f"{name}.v")
        q, k, v = (y.unflatten(-1, (config.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (b heads n k)
        if places is not None:
            q, k = complex_rotation(q, places), complex_rotation(k, places)
        weight = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return linear((weight @ v).transpose(1, 2).flatten(2), f"{name}.o")

    video, t, text = video.double(), t.double(), text.double()
    half = config.freq_dim // 2
    angles = 1000 * t[:, None] * 10_000.0 ** -(torch.arange(half).double() / half)
    sinusoid = torch.cat((angles.cos(), angles.sin()), dim=1)
    e = linear(silu(linear(sinusoid, "time_embedding.0")), "time_embedding.2")
    e6 = linear(silu(e), "time_projection.1").unflatten(1, (6, -1))
    context = linear(gelu(linear(text, "text_embedding.0")), "text_embedding.2")

    _, ph, pw = config.patch
    b, c, frames, height, width = video.shape
    grid = (frames, height // ph, width // pw)
    places = torch.cartesian_prod(*(torch.arange(size).double() for size in grid))
    patches = video.view(b, c, grid[0], grid[1], ph, grid[2], pw).permute(0, 2, 3, 5, 1, 4, 6)
    x = patches.reshape(b, math.prod(grid), -1) @ get("patch_embedding.weight").flatten(1).T
    x = x + get("patch_embedding.bias")
    for i in range(config.layers):
        e0, e1, e2, e3, e4, e5 = (get(f"blocks.{i}.modulation") + e6).chunk(6, dim=1)
        y = norm(x) * (1 + e1) + e0
        x = x + attention(y, y, f"blocks.{i}.self_attn", places) * e2
        y = norm(x) * get(f"blocks.{i}.norm3.weight") + get(f"blocks.{i}.norm3.bias")
        x = x + attention(y, context, f"blocks.{i}.cross_attn", None)
        y = gelu(linear(norm(x) * (1 + e4) + e3, f"blocks.{i}.ffn.0"))
        x = x + linear(y, f"blocks.{i}.ffn.2") * e5
    shift, scale = (get("head.modulation") + e[:, None]).chunk(2, dim=1)
    x = linear(norm(x) * (1 + scale) + shift, "head.head")
    return x.view(b, *grid, 1, ph, pw, c).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(video.shape)


@every_config
@torch.no_grad()
def test_a_video_alone_is_wan(config):
    model = randomised(config)
    for parameter in model.task_hint[-1].parameters():  # as it starts
        nn.init.zeros_(parameter)
    call = inputs(task=Task.VIDEO_ONLY)
    velocity, _ = model(**call)
    expected = wan(model, call["video"], call["t_video"], call["text"])
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity.double(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("preset", "dual", "wan_parameters", "parameters", "head"),
    [
        # Wan's own count to the last; the paper says 2.6 and 7.5 billion with the motion expert
        ("wan2.1-1.3b", range(30), 1_418_996_800, 2.8313e9, (4 * 16, 1536)),
        ("wan2.2-5b", range(1, 30, 2), 4_999_787_712, 7.5305e9, (4 * 48, 3072)),
    ],
)
def test_presets_are_the_released_models_and_motion_experts(preset, dual, wan_parameters, parameters, head):
    with torch.device("meta"):
        model = DualDiT(PRESETS[preset])
    assert [i for i, block in enumerate(model.blocks) if block.motion is not None] == list(dual)
    assert len(model.blocks) == 30 and model.config.width // model.config.heads == 128
    assert tuple(model.video.head.head.weight.shape) == head
    assert sum(p.numel() for p in model.video_parameters()) == wan_parameters
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-4)


# ---------------------------------------------------------------- how training starts


@every_task
def test_a_fresh_model_predicts_exactly_zero(task):
    model = DualDiT(TINY)
    assert not model.task_hint(torch.arange(len(Task))).any()
    assert all(u is None or not u.any() for u in model(**inputs(task=task)))


def test_nothing_is_dead_at_the_start():
    # catches a layer that starts at zero behind another that does
    model = DualDiT(TINY)
    for parameter in model.video_parameters():  # what a checkpoint of Wan would fill
        nn.init.normal_(parameter, std=0.15)
    u_video, u_motion = model(**inputs())
    (u_video.square().mean() + (u_motion - 1).square().mean()).backward()
    for layer in (model.task_hint[-1], *(mlp[-1] for mlp in model.motion.head.head.mlps.values())):
        assert layer.weight.grad.abs().max() > 1e-6


# ---------------------------------------------------------------- two experts


@pytest.mark.parametrize(("task", "other"), [(Task.VIDEO_ONLY, "motion"), (Task.MOTION_ONLY, "video")])
def test_an_absent_expert_takes_no_part(model, task, other):
    before = model(**inputs(task=task))
    for name, parameter in model.named_parameters():
        if other in name.split(".") and not re.search("text_embedding|time_", name):  # these serve both
            nn.init.constant_(parameter, math.nan)
    after = model(**inputs(task=task))
    index = 0 if other == "motion" else 1
    assert before[1 - index] is None and after[1 - index] is None
    assert before[index].std() > 0.01 and torch.equal(before[index], after[index])


@every_config
def test_video_parameters_are_what_a_video_needs_but_the_hint(config):
    model = randomised(config)
    model(**inputs(task=Task.VIDEO_ONLY))[0].square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in model.video_parameters()} == {n for n in trained if "task_hint" not in n}
    assert any("task_hint" in name for name in trained)


@torch.no_grad()
@pytest.mark.parametrize("changed", ["video", "motion", "t_video", "t_motion", "text", "task"])
def test_every_input_reaches_both_outputs(model, changed):
    call = inputs()
    before = model(**call)
    call[changed] = Task.VIDEO_TO_MOTION if changed == "task" else call[changed] + 0.3
    for u, v in zip(before, model(**call), strict=True):
        assert ((u - v).flatten(1).abs().amax(dim=1) > 1e-3).all()  # in every sample


def streams() -> tuple[dict[str, Tensor], dict[str, Context]]:
    """Tokens of both modalities and what a block of TINY is told of them."""
    positions = {"video": video_positions(2, 2, 3), "motion": motion_positions(5, 2, 3)}
    xs = {name: torch.randn(2, len(at), 48) for name, at in positions.items()}
    contexts = {
        name: Context(torch.randn(2, 6, 48), torch.randn(2, 5, 48), rope_table(at, 12))
        for name, at in positions.items()
    }
    return xs, contexts


@torch.no_grad()
@pytest.mark.parametrize("name", ["dual", "single-stream"])
def test_each_stream_attends_to_both(name):
    # catches streams that exchange their rows, attend to themselves alone, or use the other's weights
    block, (xs, contexts) = randomised(CONFIGS[name]).blocks[0], streams()
    experts = {"video": block.video, "motion": block.video if name == "single-stream" else block.motion}
    parts = {m: experts[m].before_attention(xs[m], contexts[m]) for m in xs}
    keys, values = (torch.cat([parts[m][i] for m in xs], dim=2) for i in (1, 2))
    out = block(xs, contexts)
    for m, (q, _, _) in parts.items():
        attended = ((q @ keys.mT / 12**0.5).softmax(-1) @ values).transpose(1, 2).flatten(2)
        expected = experts[m].after_attention(xs[m], attended, contexts[m])
        torch.testing.assert_close(out[m], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_motion_passes_a_video_only_block_unchanged():
    # catches motion that is attended to there, dropped, or lost where it is alone
    block, (xs, contexts) = randomised(CONFIGS["hybrid"]).blocks[0], streams()
    assert block.motion is None
    out = block(xs, contexts)
    assert torch.equal(out["motion"], xs["motion"])
    alone = block({"video": xs["video"]}, contexts)
    assert torch.equal(out["video"], alone["video"]) and not torch.equal(out["video"], xs["video"])
    assert torch.equal(block({"motion": xs["motion"]}, contexts)["motion"], xs["motion"])


def test_a_single_stream_has_one_set_of_block_weights():
    single, dual = DualDiT(CONFIGS["single-stream"]), DualDiT(TINY)
    extra = dual.state_dict().keys() - single.state_dict().keys()
    assert extra == {n for n in dual.state_dict() if n.startswith("blocks.") and ".motion." in n}
    for task in (Task.VIDEO_ONLY, Task.MOTION_ONLY):  # either modality trains them
        model = randomised(CONFIGS["single-stream"])
        u = next(u for u in model(**inputs(task=task)) if u is not None)
        u.square().mean().backward()
        assert all(p.grad.any() for p in model.blocks.parameters())


# ---------------------------------------------------------------- positions


@torch.no_grad()
def test_positions_count_patches_not_latents(model, monkeypatch):
    asked, tables = [], dual_dit.rope_tables
    monkeypatch.setattr(dual_dit, "rope_tables", lambda *given: asked.append(given) or tables(*given))
    model(**inputs())
    assert asked == [(TINY, (3, 2, 3), 9, torch.device("cpu"))]
    expected = tuple(rope_table(at, 12) for at in (video_positions(3, 2, 3), motion_positions(9, 2, 3)))
    torch.testing.assert_close(tuple(tables(*asked[0])), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["synced", "apart"])
def test_an_ablation_matters_exactly_where_there_is_motion_and_video(model, ablation):
    # catches an ablation that the network does not read, and one that touches Wan
    ablated = DualDiT(replace(TINY, **{ablation: False}))
    ablated.load_state_dict(model.state_dict())
    for a, b in zip(model(**inputs()), ablated(**inputs()), strict=True):
        assert (a - b).abs().max() > 1e-4  # rounding is below 1e-5
    video_only = inputs(task=Task.VIDEO_ONLY)
    assert torch.equal(model(**video_only)[0], ablated(**video_only)[0])


@torch.no_grad()
def test_without_video_the_place_of_the_diagonal_does_not_matter(model):
    # RoPE sees differences only: so a stage 1 without video fits any grid
    call = inputs(task=Task.MOTION_ONLY)
    before = model(**call)[1]
    model.grid = lambda video: (0, 30, 52)
    torch.testing.assert_close(model(**call)[1], before, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- batches, shapes, precision


@torch.no_grad()
@every_task
def test_a_batch_is_its_samples(model, task):
    # catches samples that mix, and outputs of another shape than the inputs
    call = inputs(task=task)
    together = model(**call)
    for i in range(3):
        single = {name: x[i : i + 1] for name, x in call.items() if isinstance(x, Tensor)}
        for x, u, v in zip((call["video"], call["motion"]), together, model(**call | single), strict=True):
            assert (x is None) == (u is None) == (v is None)
            if u is not None:
                assert v.std() > 0.01 and u.shape == x.shape
                torch.testing.assert_close(u[i : i + 1], v, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_autocast_leaves_the_time_in_fp32(model):
    call = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        time, context = model.video.context(call["t_video"], call["text"], None)
        low = model(**call)
    exact = model.video.context(call["t_video"], call["text"], None)
    assert torch.equal(time, exact[0]) and torch.equal(context.time, exact[1].time)
    for u, v in zip(low, model(**call), strict=True):
        assert (u - v).std() < 0.05 * v.std()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None, "motion": None}, "nothing to denoise"),
        ({"motion": torch.zeros(3, 8, MOTION_DIM)}, "3 video latents span 9 frames, but motion has 8"),
        ({"motion": torch.zeros(3, 9, 263)}, r"motion: expected \(3, f, 235\), got \(3, 9, 263\)"),
        ({"motion": torch.zeros(2, 9, MOTION_DIM)}, r"motion: expected \(3, f, 235\), got \(2, 9, 235\)"),
        ({"video": torch.zeros(3, 16, 3, 4, 6)}, r"expected \(3, 4, T, h, w\).*got \(3, 16, 3, 4, 6\)"),
        ({"video": torch.zeros(3, 4, 3, 4, 7)}, r"got \(3, 4, 3, 4, 7\)"),
        ({"text": torch.zeros(2, 5, 8)}, r"video: expected \(2, 4, T"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 48 must divide into 5 heads"),
        ({"heads": 16}, "heads of an even size"),
        ({"patch": (2, 2, 2)}, "one latent frame"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)

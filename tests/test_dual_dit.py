import copy
import math
import runpy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dual_dit
from dual_dit import PRESETS, DualDiT, DualDiTConfig, ExpertBlock, Stream
from flow import Role, Task
from kit import flops
from motion_tokens import MOTION_DIM
from rope import motion_positions, rope_table, video_positions

TINY = DualDiTConfig(
    layers=2, width=48, heads=4, ffn=80, channels=4, text_dim=8, patch=(1, 2, 2), freq_dim=16
)
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


def expert_parameters(model: DualDiT, modality: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if modality in name.split(".")}


# ---------------------------------------------------------------- Wan, number for number


def complex_rope(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Wan's rope_apply: x (b n heads k) of a t x h x w grid, by one complex multiplication."""
    k = x.shape[-1]
    dims = (k - 4 * (k // 6), 2 * (k // 6), 2 * (k // 6))
    places = torch.cartesian_prod(*(torch.arange(size).double() for size in grid))
    frequencies = [10_000.0 ** -(torch.arange(0, dim, 2).double() / dim) for dim in dims]
    angles = [places[:, axis, None] * frequency for axis, frequency in enumerate(frequencies)]
    turns = torch.polar(torch.ones(len(places), k // 2).double(), torch.cat(angles, dim=1))
    rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns[:, None]
    return torch.view_as_real(rotated).flatten(-2)


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

    def attention(x: Tensor, context: Tensor, name: str, grid: tuple[int, int, int] | None) -> Tensor:
        q = rms(linear(x, f"{name}.q"), f"{name}.norm_q").unflatten(-1, (config.heads, -1))
        k = rms(linear(context, f"{name}.k"), f"{name}.norm_k").unflatten(-1, (config.heads, -1))
        v = linear(context, f"{name}.v").unflatten(-1, (config.heads, -1))
        if grid:
            q, k = complex_rope(q, grid), complex_rope(k, grid)
        weight = (torch.einsum("bnhk,bmhk->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return linear(torch.einsum("bhnm,bmhk->bnhk", weight, v).flatten(-2), f"{name}.o")

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
    patches = video.view(b, c, grid[0], grid[1], ph, grid[2], pw).permute(0, 2, 3, 5, 1, 4, 6)
    x = patches.reshape(b, math.prod(grid), -1) @ get("patch_embedding.weight").flatten(1).T
    x = x + get("patch_embedding.bias")
    for i in range(config.layers):
        e0, e1, e2, e3, e4, e5 = (get(f"blocks.{i}.modulation") + e6).chunk(6, dim=1)
        y = norm(x) * (1 + e1) + e0
        x = x + attention(y, y, f"blocks.{i}.self_attn", grid) * e2
        y = norm(x) * get(f"blocks.{i}.norm3.weight") + get(f"blocks.{i}.norm3.bias")
        x = x + attention(y, context, f"blocks.{i}.cross_attn", None)
        y = gelu(linear(norm(x) * (1 + e4) + e3, f"blocks.{i}.ffn.0"))
        x = x + linear(y, f"blocks.{i}.ffn.2") * e5
    shift, scale = (get("head.modulation") + e[:, None]).chunk(2, dim=1)
    x = linear(norm(x) * (1 + scale) + shift, "head.head")
    return x.view(b, *grid, 1, ph, pw, c).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(video.shape)


def test_video_only_is_wan(model):
    nn.init.zeros_(model.task_hint[-1].weight)  # as it starts
    nn.init.zeros_(model.task_hint[-1].bias)
    call = inputs(task=Task.VIDEO_ONLY)
    with torch.no_grad():
        velocity, _ = model(**call)
        expected = wan(model, call["video"], call["t_video"], call["text"])
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "total", "shapes"),
    [
        (
            "wan2.1-1.3b",
            1_418_996_800,
            {
                "video.patch_embedding.weight": (1536, 16, 1, 2, 2),
                "video.text_embedding.0.weight": (1536, 4096),
                "video.time_embedding.0.weight": (1536, 256),
                "video.time_projection.1.weight": (6 * 1536, 1536),
                "video.head.head.weight": (4 * 16, 1536),
                "video.head.modulation": (1, 2, 1536),
                "blocks.29.video.modulation": (1, 6, 1536),
                "blocks.29.video.self_attn.norm_q.weight": (1536,),
                "blocks.29.video.cross_attn.k.weight": (1536, 1536),
                "blocks.29.video.ffn.0.weight": (8960, 1536),
            },
        ),
        (
            "wan2.2-5b",
            4_999_787_712,
            {
                "video.patch_embedding.weight": (3072, 48, 1, 2, 2),
                "video.head.head.weight": (4 * 48, 3072),
                "blocks.29.video.ffn.2.weight": (3072, 14336),
            },
        ),
    ],
)
def test_presets_have_the_parameters_of_the_released_models(preset, total, shapes):
    with torch.device("meta"):
        model = DualDiT(PRESETS[preset])
    parameters = dict(model.named_parameters())
    assert {name: tuple(parameters[name].shape) for name in shapes} == shapes
    assert len(model.blocks) == 30 and model.config.width // model.config.heads == 128
    assert sum(p.numel() for p in expert_parameters(model, "video").values()) == total


def test_preset_names():
    assert set(PRESETS) == {"puppet", "wan2.1-1.3b", "wan2.2-5b"}


def test_json_patch_is_the_same_configuration():
    assert replace(TINY, patch=[1, 2, 2]) == TINY


# ---------------------------------------------------------------- how training starts


@every_task
def test_fresh_model_predicts_exactly_zero(task):
    model = DualDiT(TINY)
    assert not model.task_hint(torch.arange(len(Task))).any()
    assert all(u is None or not u.any() for u in model(**inputs(task=task)))


def test_training_starts_from_wan_and_moves():
    model = DualDiT(TINY)
    for parameter in model.video_parameters():  # what a checkpoint of Wan would fill
        nn.init.normal_(parameter, std=0.15)
    call = inputs(task=Task.VIDEO_ONLY)
    velocity, _ = model(**call)
    torch.testing.assert_close(
        velocity.double(), wan(model, call["video"], call["t_video"], call["text"]), atol=3e-6, rtol=3e-6
    )
    assert velocity.std() > 0.1
    # nothing is dead: the layers that start at zero receive a gradient
    u_video, u_motion = model(**inputs())
    (u_video.square().mean() + (u_motion - 1).square().mean()).backward()
    for layer in (model.task_hint[-1], *(mlp[-1] for mlp in model.motion.head.head.mlps.values())):
        assert layer.weight.grad.abs().max() > 1e-6


# ---------------------------------------------------------------- two experts


@pytest.mark.parametrize(("task", "other"), [(Task.VIDEO_ONLY, "motion"), (Task.MOTION_ONLY, "video")])
def test_absent_expert_takes_no_part(model, task, other):
    before = model(**inputs(task=task))
    for parameter in expert_parameters(model, other).values():
        nn.init.constant_(parameter, math.nan)
    after = model(**inputs(task=task))
    index = 0 if other == "motion" else 1
    assert before[1 - index] is None and after[1 - index] is None
    assert before[index].std() > 0.01 and torch.equal(before[index], after[index])


def test_video_parameters_are_what_a_video_needs_but_the_hint(model):
    velocity, _ = model(**inputs(task=Task.VIDEO_ONLY))
    velocity.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)] for p in model.video_parameters()} == {
        name for name in trained if not name.startswith("task_hint.")
    }
    assert any(name.startswith("task_hint.") for name in trained)


@torch.no_grad()
@pytest.mark.parametrize("changed", ["video", "motion", "t_video", "t_motion", "text", "task"])
def test_every_input_reaches_both_outputs(model, changed):
    call = inputs()
    before = model(**call)
    call[changed] = Task.VIDEO_TO_MOTION if changed == "task" else call[changed] + 0.3
    after = model(**call)
    for u, v in zip(before, after, strict=True):
        assert ((u - v).flatten(1).abs().amax(dim=1) > 1e-3).all()  # in every sample


@pytest.mark.parametrize("condition", ["video", "motion"])
def test_without_a_time_a_modality_is_clean_and_only_read(model, condition):
    # catches a condition that is not read in the last block, or whose tokens are at another time than 0
    asked = {"video": "motion", "motion": "video"}[condition]
    call = inputs() | {f"t_{condition}": torch.zeros(3)}
    full = dict(zip(("video", "motion"), model(**call), strict=True))
    given = dict(zip(("video", "motion"), model(**call | {f"t_{condition}": None}), strict=True))
    assert given[condition] is None
    torch.testing.assert_close(given[asked], full[asked])
    gradients = []
    for u in (full, given):
        model.zero_grad()
        u[asked].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        without = gradients[1].get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(without, gradient, atol=1e-5, rtol=1e-4)


@every_task
@torch.no_grad()
def test_several_texts_for_each_sample_are_several_calls(model, task):
    # catches texts that get another's sample, and samples that get another's text
    call = inputs(task=task) | {"t_video": torch.full((3,), 0.5), "t_motion": torch.full((3,), 0.5)}
    texts = [call["text"], -call["text"]]
    alone = [model(**call | {"text": text}) for text in texts]
    shared = {name: call[name][:1] for name in ("t_video", "t_motion")}
    for text in (torch.cat(texts), model.read_text(torch.cat(texts))):
        for u, *terms in zip(model(**call | shared | {"text": text}), *alone, strict=True):
            assert u is None if terms[0] is None else (terms[0] - terms[1]).abs().max() > 1e-3
            if u is not None:
                torch.testing.assert_close(u, torch.cat(terms))


@pytest.mark.parametrize("absent", [(), ("video",), ("motion",)])
def test_without_a_time_there_is_nothing_to_denoise(model, absent):
    given = inputs() | {"t_video": None, "t_motion": None}
    given |= {name: None for name in absent}
    given |= {f"t_{name}": torch.zeros(3) for name in absent}  # a time, but of nothing
    with pytest.raises(ValueError, match="nothing to denoise"):
        model(**given)


@pytest.mark.parametrize("heads", [1, 4, 100])  # at a time, of 6
def test_attention_by_parts_is_attention(heads):
    # catches a part left out, heads of two samples mixed, a forgotten scale
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    found = dual_dit.attend_by_parts(q, k, v, heads)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attention_by_parts_keeps_scores_once():
    # catches scores kept beside their softmax
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (12, 10, 10))
    kept = flops.kept_bytes(lambda: dual_dit.attend_by_parts(q, k, v, 2), (k, v))
    assert kept == 2 * (2 * 3) * (12 * 10 + 12 * 8)  # the softmax, and the scaled queries


@pytest.mark.parametrize(
    ("dtype", "grad", "parts"),
    [
        (torch.float32, False, []),
        (torch.bfloat16, False, [2]),  # two heads' scores fit, 2 x 12 x 10 bytes each
        (torch.bfloat16, True, []),  # but not those of all three that a backward pass needs
    ],
)
def test_scores_are_written_down_only_where_they_fit(monkeypatch, dtype, grad, parts):
    found, by_parts = [], dual_dit.attend_by_parts
    monkeypatch.setattr(dual_dit, "CACHE", 2 * 240 + 200)
    monkeypatch.setattr(dual_dit, "attend_by_parts", lambda *x: found.append(x[-1]) or by_parts(*x))
    q, k, v = (torch.randn(1, 3, n, 8, dtype=dtype) for n in (12, 10, 10))
    with torch.set_grad_enabled(grad):
        assert dual_dit.attend(q, k, v).shape == (1, 12, 24)
    assert found == parts


@pytest.mark.parametrize(("capability", "in_parts"), [("AVX2", False), ("AVX512", True), ("DEFAULT", False)])
def test_cpus_without_bf16_units_do_not_emulate_plain_products(monkeypatch, capability, in_parts):
    # these take ten times as long as the fused kernel, or more
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (runpy.run_path(dual_dit.__file__)["CACHE"] > 0) == in_parts


@torch.no_grad()
def test_each_stream_attends_to_both(model):
    streams = [
        Stream(torch.randn(2, len(at), 48), torch.randn(2, 6, 48), torch.randn(2, 5, 48), *rope_table(at, 12))
        for at in (video_positions(2, 2, 3), motion_positions(1, 2, 3))
    ]
    block = model.blocks[0]
    experts = block.video, block.motion
    queries, keys, values = zip(*map(ExpertBlock.before_attention, experts, streams), strict=True)
    keys, values = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    for expert, stream, q, out in zip(experts, streams, queries, block(*streams), strict=True):
        attended = (q @ keys.mT / 12**0.5).softmax(-1) @ values
        expected = expert.after_attention(stream, attended.transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("task", [Task.VIDEO_ONLY, Task.MOTION_ONLY])
def test_hint_reaches_each_modality_alone(model, task):
    call = inputs(task=task)
    for hinted, other in zip(model(**call), model(**call | {"task": Task.JOINT}), strict=True):
        assert hinted is other is None or (hinted - other).abs().max() > 1e-3


@torch.no_grad()
def test_positions_count_patches_not_latents(model, monkeypatch):
    grids = []

    def record(function):
        return lambda *grid, **options: grids.append(grid) or function(*grid, **options)

    monkeypatch.setattr("dual_dit.video_positions", record(video_positions))
    monkeypatch.setattr("dual_dit.motion_positions", record(motion_positions))
    model(**inputs())
    assert grids == [(3, 2, 3), (9, 2, 3)]


@torch.no_grad()
@pytest.mark.parametrize("changed", ["video", "motion"])
def test_samples_of_a_batch_do_not_mix(model, changed):
    call = inputs()
    before = model(**call)
    call[changed] = call[changed].clone()
    call[changed][1] += 1
    after = model(**call)
    for u, v in zip(before, after, strict=True):
        assert [torch.equal(a, b) for a, b in zip(u, v, strict=True)] == [True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("task", [*Task, "mixed"])
def test_batch_equals_its_samples(model, task):
    if task == "mixed":
        call = inputs()
        tasks = torch.tensor([Task.VIDEO_TO_MOTION, Task.JOINT, Task.MOTION_TO_VIDEO])
    else:
        call = inputs(task=task)
        tasks = torch.full((3,), int(task))
    together = model(**call | {"task": tasks})
    for i in range(3):
        single = {name: x[i : i + 1] for name, x in call.items() if isinstance(x, Tensor)}
        alone = model(**call | single | {"task": Task(int(tasks[i]))})
        for u, v in zip(together, alone, strict=True):
            assert (u is None) == (v is None)
            if u is not None:
                assert v.std() > 0.01
                torch.testing.assert_close(u[i : i + 1], v, atol=1e-5, rtol=1e-5)


@every_task
def test_absent_input_gives_none_and_outputs_have_the_inputs_shapes(model, task):
    call = inputs(task=task)
    for x, u in zip((call["video"], call["motion"]), model(**call), strict=True):
        assert u is None if x is None else u.shape == x.shape


@torch.no_grad()
def test_sync_matters_exactly_where_there_is_motion(model):
    unsynced = DualDiT(replace(TINY, synced=False))
    unsynced.load_state_dict(model.state_dict())
    for a, b in zip(model(**inputs()), unsynced(**inputs()), strict=True):
        assert (a - b).abs().max() > 1e-3
    video_only = inputs(task=Task.VIDEO_ONLY)
    assert torch.equal(model(**video_only)[0], unsynced(**video_only)[0])


@torch.no_grad()
def test_without_video_the_place_of_the_diagonal_does_not_matter(model, monkeypatch):
    call = inputs(task=Task.MOTION_ONLY)
    before = model(**call)[1]
    monkeypatch.setattr(
        "dual_dit.motion_positions", lambda f, h, w, synced: motion_positions(f, 30, 52, synced)
    )
    torch.testing.assert_close(model(**call)[1], before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", [Task.JOINT, Task.VIDEO_ONLY, Task.MOTION_ONLY])
def test_checkpointing_changes_nothing(model, task):
    other = copy.deepcopy(model)
    other.checkpointing = True
    outputs = []
    for each in (model, other):
        u = [x for x in each(**inputs(task=task)) if x is not None]
        sum(x.square().mean() for x in u).backward()
        outputs.append(u)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    gradients = [{name: p.grad for name, p in each.named_parameters()} for each in (model, other)]
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


def test_checkpointing_stores_less(model):
    def stored(checkpointing: bool) -> int:
        model.checkpointing, sizes = checkpointing, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(**inputs())
        return sum(sizes)

    assert stored(True) < stored(False) / 3


@torch.no_grad()
def test_autocast_leaves_the_time_in_fp32(model):
    call = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        embedded = model.video.embed_time(call["t_video"])
        low = model(**call)
    for a, b in zip(embedded, model.video.embed_time(call["t_video"]), strict=True):
        assert torch.equal(a, b)
    for u, v in zip(low, model(**call), strict=True):
        assert (u - v).std() < 0.05 * v.std()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None, "motion": None}, "nothing to denoise"),
        ({"motion": torch.zeros(3, 8, MOTION_DIM)}, "3 video latents span 9 frames, but motion has 8"),
        ({"motion": torch.zeros(3, 9, 263)}, r"motion: expected \(b, f, 235\), got \(3, 9, 263\)"),
        ({"motion": torch.zeros(9, MOTION_DIM)}, r"motion: expected \(b, f, 235\), got \(9, 235\)"),
        ({"video": torch.zeros(3, 16, 3, 4, 6)}, r"expected \(b, 4, t, h, w\), got \(3, 16, 3, 4, 6\)"),
        ({"video": torch.zeros(4, 3, 4, 6)}, r"expected \(b, 4, t, h, w\), got \(4, 3, 4, 6\)"),
        ({"video": torch.zeros(3, 4, 3, 5, 6)}, r"\(5, 6\) must be a multiple of the patch \(2, 2\)"),
        ({"video": torch.zeros(3, 4, 3, 4, 7)}, r"\(4, 7\) must be a multiple of the patch \(2, 2\)"),
        ({"text": torch.zeros(1, 5, 8)}, "1 texts for 3 samples: expected one or more for each"),
        ({"text": torch.zeros(4, 5, 8)}, "4 texts for 3 samples: expected one or more for each"),
        ({"motion": torch.zeros(2, 9, MOTION_DIM)}, "3 videos, but 2 motions"),
        ({"t_video": torch.zeros(2)}, r"times \(2,\) for 3 samples of 1 texts"),
        ({"text": torch.zeros(6, 5, 8)}, r"times \(3,\) for 3 samples of 2 texts: expected one of {\(1,\)}"),
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

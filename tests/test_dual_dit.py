"""dual_dit.py: what the second expert adds to Wan; without it, see tests/kit/wan/test_wan.py."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dual_dit
from dual_dit import PRESETS, Context, DualDiT, DualDiTConfig
from flow import Role, Task
from motion_tokens import MOTION_DIM
from rope import motion_positions, rope_table, video_positions

TINY = DualDiTConfig(layers=2, width=48, heads=4, ffn=80, channels=4, text_dim=8, freq_dim=16)
CONFIGS = {"dual": TINY, "hybrid": replace(TINY, dual=(1,)), "single-stream": replace(TINY, shared=True)}


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


def inputs(task: Task = Task.JOINT) -> dict:
    """Arguments of a call for this task: absent, clean or noisy modalities, a different t for each sample."""
    torch.manual_seed(1)
    call = {"t_video": torch.rand(3), "t_motion": torch.rand(3), "text": torch.randn(3, 5, 8), "task": task}
    call |= {"video": torch.randn(3, 4, 3, 4, 6), "motion": torch.randn(3, 9, MOTION_DIM)}
    for name, role in (("video", task.video), ("motion", task.motion)):
        if role is Role.CLEAN:
            call[f"t_{name}"].zero_()
        elif role is Role.ABSENT:
            call[name] = call[f"t_{name}"] = None
    return call


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("preset", "dual", "wan_parameters", "parameters"),
    [
        # Wan's own count to the last; the paper says 2.6 and 7.5 billion with the motion expert
        ("wan2.1-1.3b", range(30), 1_418_996_800, 2.8313e9),
        ("wan2.2-5b", range(1, 30, 2), 4_999_787_712, 7.5305e9),
    ],
)
def test_presets_are_the_released_models_and_motion_experts(preset, dual, wan_parameters, parameters):
    with torch.device("meta"):
        model = DualDiT(PRESETS[preset])
    assert [i for i, block in enumerate(model.blocks) if block.motion is not None] == list(dual)
    assert sum(p.numel() for p in model.video_parameters()) == wan_parameters
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-4)


# ---------------------------------------------------------------- how training starts


def test_a_fresh_model_predicts_zero_and_nothing_is_dead():
    # catches a layer that starts at zero behind another that does
    model = DualDiT(TINY)
    assert not model.task_hint(torch.arange(len(Task))).any()
    assert not any(u.any() for u in model(**inputs()))
    for parameter in model.video_parameters():  # what a checkpoint of Wan would fill
        nn.init.normal_(parameter, std=0.15)
    u_video, u_motion = model(**inputs())
    (u_video.square().mean() + (u_motion - 1).square().mean()).backward()
    for layer in (model.task_hint[-1], *(mlp[-1] for mlp in model.motion.head.head.mlps.values())):
        assert layer.weight.grad.abs().max() > 1e-6


# ---------------------------------------------------------------- two experts


@pytest.mark.parametrize(("task", "index"), [(Task.VIDEO_ONLY, 0), (Task.MOTION_ONLY, 1)])
def test_an_absent_expert_takes_no_part(model, task, index):
    call, other = inputs(task=task), ("motion", "video")[index]
    before = model(**call)
    # catches a task hint that this modality gets by way of the other only
    assert not torch.allclose(model(**call | {"task": Task.JOINT})[index], before[index], atol=1e-3)
    for name, parameter in model.named_parameters():
        if other in name.split(".") and not re.search("text_embedding|time_", name):  # these serve both
            nn.init.constant_(parameter, math.nan)
    after = model(**call)
    assert before[1 - index] is None and after[1 - index] is None
    assert before[index].std() > 0.01 and torch.equal(before[index], after[index])


def test_video_parameters_are_what_a_video_needs_but_the_hint(model):
    model(**inputs(task=Task.VIDEO_ONLY))[0].square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in model.video_parameters()} == {n for n in trained if "task_hint" not in n}


@torch.no_grad()
@pytest.mark.parametrize("changed", ["video", "motion", "t_video", "t_motion", "text", "task"])
def test_every_input_reaches_both_outputs(model, changed):
    call = inputs()
    before = model(**call)
    call[changed] = Task.VIDEO_TO_MOTION if changed == "task" else call[changed] + 0.3
    for u, v in zip(before, model(**call), strict=True):
        assert ((u - v).flatten(1).abs().amax(dim=1) > 1e-3).all()  # in every sample


@torch.no_grad()
@pytest.mark.parametrize(("changed", "own"), [("video", 0), ("t_video", 0), ("motion", 1), ("t_motion", 1)])
def test_streams_that_never_meet_do_not_cross(changed, own):
    # catches a head, or a block, that gets the other modality's noise level
    model, call = randomised(replace(TINY, dual=())), inputs()
    before, after = model(**call), model(**call | {changed: call[changed] + 0.3})
    assert not torch.allclose(before[own], after[own], atol=1e-3)
    assert torch.equal(before[1 - own], after[1 - own])


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
    assert (block.motion is None) == (name == "single-stream")
    experts = {"video": block.video, "motion": block.motion or block.video}
    parts = {m: experts[m].before_attention(xs[m], contexts[m]) for m in xs}
    keys, values = (torch.cat([parts[m][i] for m in xs], dim=2) for i in (1, 2))
    out = block(xs, contexts)
    for m, (q, _, _) in parts.items():
        attended = ((q @ keys.mT / 12**0.5).softmax(-1) @ values).transpose(1, 2).flatten(2)
        expected = experts[m].after_attention(xs[m], attended, contexts[m])
        torch.testing.assert_close(out[m], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_motion_passes_a_video_only_block_unchanged(shared):
    # catches motion that is attended to there, dropped, or lost where it is alone
    block, (xs, contexts) = randomised(replace(CONFIGS["hybrid"], shared=shared)).blocks[0], streams()
    assert block.motion is None
    out = block(xs, contexts)
    assert torch.equal(out["motion"], xs["motion"])
    alone = block({"video": xs["video"]}, contexts)
    assert torch.equal(out["video"], alone["video"]) and not torch.equal(out["video"], xs["video"])
    assert torch.equal(block({"motion": xs["motion"]}, contexts)["motion"], xs["motion"])


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


# ---------------------------------------------------------------- batches, shapes, precision


@torch.no_grad()
@pytest.mark.parametrize("task", Task, ids=[task.name for task in Task])
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
def test_autocast_leaves_the_noise_level_in_fp32(model):
    call = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        temb, context = model.video.context(call["t_video"], call["text"], None)
        low = model(**call)
    exact = model.video.context(call["t_video"], call["text"], None)
    assert torch.equal(temb, exact[0]) and torch.equal(context.timestep_proj, exact[1].timestep_proj)
    for u, v in zip(low, model(**call), strict=True):
        assert (u - v).std() < 0.05 * v.std()


def test_motion_of_another_length_than_the_video_is_refused(model):
    with pytest.raises(ValueError, match="3 video latents span 9 frames, but motion has 8"):
        model(**inputs() | {"motion": torch.zeros(3, 8, MOTION_DIM)})


def test_modulation_divides_by_wans_eps():
    # catches torch's default, 1e-5, which shows where activations are small
    x, zero = 1e-3 * torch.randn(1, 2, 48), torch.zeros(1, 1, 48)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    exact = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(dual_dit.modulate(x, zero, zero, TINY.eps).double(), exact, atol=1e-4, rtol=0)


def test_a_fresh_model_tells_tokens_and_frames_apart():
    # catches embeddings that start at zero: joints share an MLP, and RoPE knows no f mod 4
    encoder = DualDiT(TINY).motion["encoder"]
    assert all(torch.pdist(rows.detach()).min() > 1 for rows in (encoder.token, encoder.phase))


def test_modulation_starts_as_wans():
    # randn / sqrt(width): catches gates that let six times too much through
    for name, p in DualDiT(TINY).named_parameters():
        if name.endswith("modulation"):
            assert p.std().item() == pytest.approx(TINY.width**-0.5, rel=0.3), name

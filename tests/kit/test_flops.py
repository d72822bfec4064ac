"""kit/flops.py: counted FLOPs against torch's own counter, counted memory against what autograd keeps."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dual_dit
from dual_dit import PRESETS, DualDiT, DualDiTConfig
from flow import Task
from kit import flops

SMALL = DualDiTConfig(layers=2, width=96, heads=2, ffn=160, channels=6, text_dim=40, freq_dim=32)
GRID, TEXT = (3, 4, 6), 7
FRAMES = 4 * (GRID[0] - 1) + 1


def call(model: DualDiT, batch: int, video: bool = True, motion: bool = True):
    t, text = torch.rand(batch), torch.randn(batch, TEXT, model.config.text_dim)
    seen = (torch.randn(batch, model.config.channels, *GRID), t) if video else (None, None)
    moving = (torch.randn(batch, FRAMES, 235), t) if motion else (None, None)
    return model(seen[0], moving[0], seen[1], moving[1], text, Task.JOINT)


@pytest.mark.parametrize(("video", "motion"), ((True, True), (True, False), (False, True)))
def test_flops_are_torchs_own_count(video, motion):
    model = DualDiT(SMALL)
    # torch's counter knows matrix products; this backend is made of them
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(model, 2, video, motion)
    tokens = flops.Tokens(GRID[0] * 2 * 3 * video, 51 * FRAMES * motion, TEXT)
    counted = 2 * sum(flops.forward_flops(SMALL, tokens).values())
    hint = 2 * 2 * 2 * SMALL.width**2  # the task hint's MLP, left out as too small to show
    assert counter.get_total_flops() == pytest.approx(counted + hint, rel=1e-3)


def test_parts_are_what_their_names_say():
    # catches products that are counted, but as another part
    n, d, tokens = 48 + 255, SMALL.width, flops.Tokens(48, 255, TEXT)
    parts = flops.forward_flops(SMALL, tokens)
    assert parts["projections"] == 2 * 2 * d * d * (6 * n + 4 * TEXT)
    assert parts["feed-forward"] == 2 * 4 * n * d * SMALL.ffn
    assert parts["self-attention"] == 2 * 4 * n * n * d
    assert parts["cross-attention"] == 2 * 4 * n * TEXT * d


def test_a_step_is_three_forwards_and_a_recomputation():
    tokens = flops.tokens_of(PRESETS["wan2.1-1.3b"], 81, (480, 832), 8)
    assert tokens == (21 * 30 * 52, 51 * 81, 512)
    forward = sum(flops.forward_flops(PRESETS["wan2.1-1.3b"], tokens).values())
    stored, recomputed = (flops.step_flops(PRESETS["wan2.1-1.3b"], tokens, ck) for ck in (False, True))
    assert stored == 3 * forward and 0 < recomputed - stored < forward


def test_published_sizes_have_published_parameter_counts():
    # 1.3 and 5 billion are the video experts; the motion experts are as large
    assert 2.7e9 < flops.parameter_count(PRESETS["wan2.1-1.3b"]) < 3.0e9
    assert 9.9e9 < flops.parameter_count(PRESETS["wan2.2-5b"]) < 10.2e9


def kept_bytes(model: DualDiT, batch: int) -> int:
    """What a real call keeps for its backward pass: distinct memory that is not the weights'."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault((x.untyped_storage().data_ptr(), id(x.grad_fn)), x), lambda x: x
        ),
        torch.autocast("cpu", torch.bfloat16),
    ):
        result = call(model, batch)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept.values()}
    del result
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_counted_activations_are_what_a_real_call_keeps(monkeypatch):
    monkeypatch.setattr(dual_dit, "CACHE", 0)  # attention is fused, as on a GPU
    config = dataclasses.replace(SMALL, layers=3, width=192, ffn=400)
    counted = flops.saved_bytes(config, GRID, 2, TEXT)
    assert counted == pytest.approx(kept_bytes(DualDiT(config), 2), rel=0.01)


def test_sharding_divides_state_and_checkpointing_saves_activations():
    one = flops.training_memory(SMALL, GRID, 2, text=TEXT)
    four = flops.training_memory(SMALL, GRID, 2, gpus=4, checkpointing=True, text=TEXT)
    assert one.parameters == 4 * sum(p.numel() for p in DualDiT(SMALL).parameters())
    for name in ("parameters", "gradients", "optimizer", "average"):
        assert getattr(four, name) == pytest.approx(getattr(one, name) / 4, abs=4)
    assert one.gathered == 0 < four.gathered
    assert four.activations < one.activations
    deep = dataclasses.replace(SMALL, layers=8)
    growth = [
        flops.training_memory(deep, GRID, 2, checkpointing=ck, text=TEXT).activations
        - flops.training_memory(SMALL, GRID, 2, checkpointing=ck, text=TEXT).activations
        for ck in (False, True)
    ]
    tokens = torch.tensor((GRID[0] * 6, 51 * FRAMES))
    entering = SMALL.width * (tokens * torch.tensor((2, 4))).sum()  # video in bf16, motion in fp32
    attended = 2 * tokens.sum() * (2 * SMALL.width + 4 * SMALL.heads)
    assert growth[1] == 6 * 2 * (entering + attended) < growth[0] / 3

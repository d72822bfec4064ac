"""kit/flops.py against torch's own counter, bench/memory.py against what autograd keeps."""

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import memory
from dual_dit import PRESETS, DualDiT, DualDiTConfig
from flow import Task
from kit import distributed, flops

SMALL = DualDiTConfig(layers=2, width=96, heads=2, ffn=160, channels=6, text_dim=40, freq_dim=32)
HYBRID = dataclasses.replace(SMALL, layers=3, dual=(2,))
GRID, TEXT = (3, 4, 6), 7
FRAMES = 4 * (GRID[0] - 1) + 1
VIDEO, MOTION = GRID[0] * 2 * 3, 51 * FRAMES  # tokens


def call(model: DualDiT, batch: int, video: bool = True, motion: bool = True):
    t, text = torch.rand(batch), torch.randn(batch, TEXT, model.config.text_dim)
    latents = torch.randn(batch, model.config.channels, *GRID) if video else None
    moving = torch.randn(batch, FRAMES, 235) if motion else None
    return model(latents, moving, t if video else None, t if motion else None, text, Task.JOINT)


@pytest.mark.parametrize("config", (SMALL, HYBRID), ids=("all dual", "hybrid"))
@pytest.mark.parametrize(("video", "motion"), ((True, True), (True, False), (False, True)))
def test_flops_are_torchs_own_count(config, video, motion):
    # catches motion counted in blocks that it does not enter
    model = DualDiT(config)
    # torch's counter knows matrix products; this backend is made of them
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(model, 2, video, motion)
    tokens = flops.Tokens(VIDEO * video, MOTION * motion, TEXT)
    counted = 2 * sum(flops.forward_flops(config, tokens).values())
    hint = 2 * 2 * config.width**2  # the task hint's MLP, of one row: left out as too small to show
    assert counter.get_total_flops() - counted == pytest.approx(hint, rel=0.01)


def test_a_step_is_three_forwards():
    tokens = flops.tokens_of(PRESETS["wan2.1-1.3b"], (21, 60, 104))
    assert tokens == (21 * 30 * 52, 51 * 81, 512)
    forward = sum(flops.forward_flops(PRESETS["wan2.1-1.3b"], tokens).values())
    assert flops.step_flops(PRESETS["wan2.1-1.3b"], tokens) == 3 * forward


@pytest.mark.parametrize("dual", (None, (2,), (0, 2)), ids=str)
def test_counted_activations_are_what_a_real_call_keeps(dual):
    # catches motion's share counted in blocks that have no motion expert
    config = dataclasses.replace(SMALL, layers=3, width=192, ffn=400, dual=dual)
    counted = memory.saved_bytes(config, GRID, 2, TEXT)
    assert counted == memory.saved_bytes(config, GRID, 2, TEXT)  # and leaves nothing behind
    model = DualDiT(config)
    with torch.autocast("cpu", torch.bfloat16):
        real = memory.kept_bytes(lambda: call(model, 2), model.parameters())
    assert counted == pytest.approx(real, rel=0.01)


class Made(TorchDispatchMode):
    """Weak references to the memory of every result of an operation."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def alive_bytes(config: DualDiTConfig) -> int:
    """What is alive between the forward and the backward pass of a checkpointed call."""
    model = DualDiT(config)
    distributed.recompute_blocks(model)
    with Made() as made, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        result = call(model, 2)
        alive = made.alive()
    del result
    return alive


@pytest.mark.parametrize("dual", (None, (3, 5)), ids=("all dual", "hybrid"))
def test_a_checkpointed_block_keeps_what_is_counted(dual):
    # catches what a video-only block keeps of motion: nothing, its tokens pass unchanged
    shallow = dataclasses.replace(SMALL, dual=None if dual is None else ())
    deep = dataclasses.replace(SMALL, layers=6, dual=dual)
    how = {"checkpointing": True, "text": TEXT}
    counts = [memory.training_memory(c, GRID, 2, **how).activations for c in (deep, shallow)]
    assert counts[0] - counts[1] == pytest.approx(alive_bytes(deep) - alive_bytes(shallow), rel=0.02)


def test_sharding_divides_state_and_checkpointing_saves_activations():
    one = memory.training_memory(SMALL, GRID, 2, text=TEXT)
    four = memory.training_memory(SMALL, GRID, 2, gpus=4, checkpointing=True, text=TEXT)
    assert one.parameters == 4 * sum(p.numel() for p in DualDiT(SMALL).parameters())
    for name in ("parameters", "gradients", "optimizer", "average"):
        assert getattr(four, name) == pytest.approx(getattr(one, name) / 4, abs=4)
    assert one.gathered == 0 < four.gathered
    assert four.activations < one.activations

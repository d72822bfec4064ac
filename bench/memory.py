"""What a training run keeps in memory, counted from shapes, without allocating it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dual_dit
from dual_dit import DualDiT, DualDiTConfig
from kit import devices
from kit.flops import dual_blocks, tokens_of
from kit.weights import empty
from motion_tokens import MOTION_DIM
from rope import frames_of


def parameter_count(config: DualDiTConfig) -> int:
    return sum(p.numel() for p in empty(config).parameters())


def kept_bytes(call: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that a call keeps for its backward pass: each storage once, without the parameters'."""
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.enable_grad():
        call()
    return sum(storage.nbytes() for storage in kept.values())


def saved_bytes(config: DualDiTConfig, grid: tuple[int, int, int], batch: int, text: int) -> int:
    """Bytes that a joint call keeps for its backward pass, under bf16 autocast; grid (T h w) of the latents.

    Measured on small networks of fake tensors, which have shapes but no memory. Attention is fused, as on a
    GPU: no scores are kept.
    """
    dual = dual_blocks(config)
    kept = []
    with (
        FakeTensorMode(),
        mock.patch.object(dual_dit, "attention", devices.fused_attention),
        # without its cache, which must not keep fake tensors
        mock.patch.object(dual_dit, "rope_tables", dual_dit.rope_tables.__wrapped__),
    ):
        video = torch.randn(batch, config.channels, *grid)
        motion = torch.randn(batch, frames_of(grid[0]), MOTION_DIM)
        time, features = torch.rand(batch), torch.randn(batch, text, config.text_dim)
        for blocks in ((0,), (0, 1), (0,)):  # a dual block; two; one and a video-only block
            small = dataclasses.replace(config, layers=1 + bool(kept), dual=blocks)
            model = DualDiT(small)
            with torch.autocast("cpu", torch.bfloat16):
                call = functools.partial(model, video, motion, time, time, features, 0)
                kept.append(kept_bytes(call, model.parameters()))
    one, two, mixed = kept
    return one + (dual - 1) * (two - one) + (config.layers - dual) * (mixed - one)


class Memory(NamedTuple):
    """Bytes on one GPU at the peak of a training step, by what they are for."""

    parameters: int  # fp32, this GPU's share
    gradients: int  # fp32, this GPU's share
    optimizer: int  # AdamW's two moments, fp32, this GPU's share
    average: int  # EMA, fp32, this GPU's share
    gathered: int  # unsharded at a time: this block and the next in bf16, and the ends in fp32
    activations: int


def training_memory(
    config: DualDiTConfig,
    grid: tuple[int, int, int],
    batch: int,
    gpus: int = 1,
    checkpointing: bool = False,
    text: int = 512,
) -> Memory:
    """Of stage 2 with `batch` samples a GPU, everything sharded over `gpus`; grid (T h w) of the latents."""
    share = 4 * parameter_count(config) // gpus
    none, one = (dataclasses.replace(config, layers=n, dual=None) for n in (0, 1))
    ends = parameter_count(none)
    block = parameter_count(one) - ends
    gathered = 4 * (block + ends) if gpus > 1 else 0  # two blocks in bf16, the ends in fp32
    if not checkpointing:
        activations = saved_bytes(config, grid, batch, text)
    else:
        # what the ends and one block keep, and of every expert in every block the tokens that enter it
        # (motion's in fp32) and the results of its two attentions, with their fp32 log-sum-exp
        tokens = tokens_of(config, grid)
        video, motion = tokens.video * config.layers, tokens.motion * dual_blocks(config)
        entering = config.width * (2 * video + 4 * motion)
        attended = 2 * (video + motion) * (2 * config.width + 4 * config.heads)
        activations = saved_bytes(one, grid, batch, text) + batch * (entering + attended)
    return Memory(share, share, 2 * share, share, gathered, activations)

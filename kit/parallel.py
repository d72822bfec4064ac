"""Devices and ranks: one run over many of them, and training state that survives.

`torchrun` starts the processes and names them in the environment; without it there is one.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kit.files import whole_file


def start(device: str) -> tuple[torch.device, int, int]:
    """Join the process group that torchrun describes, if any -> (this rank's device, rank, ranks)."""
    if "RANK" not in os.environ:
        return torch.device(device), 0, 1
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device), dist.get_rank(), dist.get_world_size()


def faster_in_bf16(device: torch.device) -> bool:
    """Whether this machine multiplies bf16 matrices faster than fp32."""
    if device.type == "cuda":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):  # first round warms up
        x = torch.ones(1024, 1024, dtype=dtype)
        start = time.perf_counter()
        for _ in range(3):
            x @ x
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


def wrap(model: nn.Module, ranks: int) -> nn.Module:
    """Average gradients over ranks. Each task leaves another part of the network unused."""
    return DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model


def mean_over_ranks(value: torch.Tensor, ranks: int) -> torch.Tensor:
    if ranks > 1:
        dist.all_reduce(value)
    return value / ranks


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def save_state(path: Path, state: dict) -> None:
    """torch.save, whole or not at all."""
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> dict:
    """Read save_state's file; only tensors and plain containers are accepted."""
    if not path.is_file():
        raise FileNotFoundError(
            f"nothing to resume: no {path}; start without --resume, or point --out at a run"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and start again") from error

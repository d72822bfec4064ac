"""One run over many ranks, and training state that survives.

`torchrun` starts the processes and names them in the environment; without it there is one.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def start(device: str) -> tuple[torch.device, int, int]:
    """Join the process group that torchrun describes, if any -> (this rank's device, rank, ranks)."""
    if "RANK" not in os.environ:
        return torch.device(device), 0, 1
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device), dist.get_rank(), dist.get_world_size()


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
    """torch.save to a temporary name, then rename: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


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

"""Measuring: calls timed by turns, so that what else the machine does falls on all of them alike."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dual_dit import DualDiT, DualDiTConfig
from kit.weights import stored_dtype

ROUNDS = 7
CPU = torch.device("cpu")


def ratio(above: Sequence[float], below: Sequence[float], by: float = 1.0) -> list[float]:
    """Of the times of two calls, round by round, over `by`."""
    return [a / b / by for a, b in zip(above, below, strict=True)]


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call in every round, A B A B ..., after a round that warms up."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in times.items()}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", known)
    return f"{torch.get_num_threads()} threads of {name[1] if name else 'this CPU'}"


def random_model(config: DualDiTConfig, device: torch.device, dtype: torch.dtype) -> DualDiT:
    """A network of this size with random weights, stored as a loaded one, made without a second copy.

    As in a fresh one the task hint is zero: a video-only call is Wan's.
    """
    with torch.device("meta"):
        model = DualDiT(config)
    state = {
        name: torch.empty(tensor.shape, dtype=stored_dtype(name, dtype), device=device)
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in state.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        else:
            tensor.normal_(std=0.0 if "task_hint" in name else 0.02)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)

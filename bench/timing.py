"""Measuring: calls timed by turns, so that what else the machine does falls on all of them alike."""

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dual_dit import DualDiT, DualDiTConfig
from kit.weights import empty, stored_dtype

ROUNDS = 15  # more make no figure better
CPU = torch.device("cpu")


class Figure(NamedTuple):
    """What a measurement says, and how far its rounds are apart."""

    median: float
    low: float
    high: float


def figure(values: Sequence[float]) -> Figure:
    return Figure(statistics.median(values), min(values), max(values))


def ratio(above: Sequence[float], below: Sequence[float], by: float = 1.0) -> Figure:
    """above / below, round by round, divided by `by`."""
    return figure([a / b / by for a, b in zip(above, below, strict=True)])


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], object]], budget: float = 0.0, least: int = 3, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of each call in every round, A B A B ..., after a round that warms up.

    Rounds go on while the next one is likely to end within `budget` seconds, but there are `least` of them.
    """
    begin, times = time.perf_counter(), {name: [] for name in calls}
    for rounds in range(ROUNDS + 1):
        spent = time.perf_counter() - begin
        if rounds > least and spent * (rounds + 1) / rounds > budget:
            break
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in times.items()}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call, the median of three after one that warms up."""
    return statistics.median(interleaved({"call": call}, device=device)["call"])


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
    model = empty(config)
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

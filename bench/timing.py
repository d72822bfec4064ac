"""Measuring: calls timed in turn, so that other load on the machine affects all of them alike."""

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dual_dit import DualDiT, DualDiTConfig
from kit.weights import empty, stored_dtype

ROUNDS = 15  # at most: more do not improve a median
CPU = torch.device("cpu")


class Figure(NamedTuple):
    """The median of a measurement, and the extremes of its rounds."""

    median: float
    low: float
    high: float


def figure(values: Sequence[float]) -> Figure:
    return Figure(statistics.median(values), min(values), max(values))


def ratio(above: Sequence[float], below: Sequence[float], by: float = 1.0) -> Figure:
    """above / below, round by round, divided by `by`."""
    return figure([a / b / by for a, b in zip(above, below, strict=True)])


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], object]], budget: float = 0.0, least: int = 3, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of each call in every round, A B A B ..., after a warm-up round.

    Rounds go on while the next one is likely to end within `budget` seconds; there are at least `least`.
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
    """Median time of three calls, after a warm-up call."""
    return statistics.median(interleaved({"call": call}, device=device)["call"])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", known)
    return f"{torch.get_num_threads()} threads of {name[1] if name else 'this CPU'}"


def random_model(config: DualDiTConfig, device: torch.device, dtype: torch.dtype) -> DualDiT:
    """A network of this size with random weights, in the dtypes of a loaded one, made without a second copy.

    As in a new network the task hint is zero: a video-only call is Wan's.
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

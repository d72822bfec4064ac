"""The puppet's speed: a guided sample, a training step as train.py does it, the clips that feed it."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

import flow
import train
from bench.speed import Row, Setting
from bench.timing import figure, ratio, wait
from flow import Task
from kit import devices, distributed, puppet, weights
from kit.backbone import PUPPET_DEFAULTS, SHIPPED
from kit.data import batch as batches
from kit.data.sources import open_sources
from kit.geometry import PUPPET
from motion_tokens import MOTION_DIM
from sample import denoise

GUIDED, TRAINING = 15, 25  # seconds
BATCH = 16  # clips a step, train.py's default
STAGE = 2


class Parts(NamedTuple):
    """What a training step does, one after the other."""

    data: Callable[[], None]
    gradients: Callable[[], None]
    optimizers: Callable[[], None]
    average: Callable[[], None]

    def step(self) -> None:
        for part in self:
            part()


def training_step(batch: int, device: torch.device, bf16: bool, compiled: bool = False) -> Parts:
    """A step of stage 2 on clips of full length, with the shipped network."""
    model, extra = weights.load_weights(SHIPPED, device)
    model.train().requires_grad_(True)
    if compiled:
        distributed.compile_blocks(model)
    objective = distributed.Objective(model)
    codec = puppet.Codec.from_state(extra)
    sources = open_sources(["puppet"], PUPPET, puppet.body())
    opts = train.optimizers(model, "puppet")
    average = {name: value.clone() for name, value in model.state_dict().items()}
    micro = batch // devices.microbatches(batch, device)
    parts, made = [range(i, i + micro) for i in range(0, batch, micro)], {}
    drawn = flow.draw(batches.rng("bench"), STAGE, batch)._replace(task=Task.JOINT)

    def data() -> None:
        read = functools.partial(
            batches.read, sources, model.motion_mean, model.motion_std, seed=0, stage=STAGE, step=0,
            frames=puppet.FRAMES, batch=batch, device=device, codec=codec,
        )  # fmt: skip
        made.update((part.start, read(samples=part)) for part in parts)

    def gradients() -> None:
        train.gradients(objective, iter(made.values()), drawn, parts, bf16)
        distributed.clip(model, train.CLIP_NORM)

    def optimizers() -> None:
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return Parts(data, gradients, optimizers, lambda: train.follow(average, model.state_dict(), 0.002))


@contextmanager
def clock(times: dict[str, list[float]], name: str, device: torch.device) -> Iterator[None]:
    """Add the seconds of what is inside to `times`."""
    wait(device)
    start = time.perf_counter()
    yield
    wait(device)
    times.setdefault(name, []).append(time.perf_counter() - start)


@torch.no_grad()
def guided(setting: Setting) -> list[Row]:
    """A sample of the shipped puppet from a motion, as sample.py makes it."""
    device = torch.device("cpu")
    devices.use_fast_attention(device)
    model, _ = weights.load_weights(SHIPPED)
    text, null_text = puppet.encode_text(["a person in a red shirt waves the left hand", ""]).split(1)
    motion, grid = torch.randn(1, puppet.FRAMES, MOTION_DIM), (5, 8, 8)
    how = PUPPET_DEFAULTS._asdict() | {"bf16": devices.has_bf16_units(device)}
    call = functools.partial(
        denoise, model, Task.MOTION_TO_VIDEO, text, null_text, 0, grid, motion=motion, **how
    )
    times = setting.rounds({"sample": call}, GUIDED)
    what = f"seconds of a guided sample of {PUPPET_DEFAULTS.steps} steps, motion to video"
    return [Row("puppet_sample_seconds", what, figure(times["sample"]))]


def training(setting: Setting) -> list[Row]:
    """A training step, and the clips that feed it."""
    device = torch.device("cpu")
    devices.use_fast_attention(device)
    step = training_step(BATCH, device, devices.has_bf16_units(device))
    step.data()

    def rest() -> None:
        for part in step[1:]:
            part()

    times = setting.rounds({"data": step.data, "step": rest}, TRAINING)
    what = f"seconds of a training step on {BATCH} clips of {puppet.FRAMES} frames, without its data"
    fed = "clips generated / trained on a second"
    return [
        Row("puppet_step_seconds", what, figure(times["step"])),
        Row("puppet_data_ratio", fed, ratio(times["step"], times["data"])),
    ]

"""The puppet's speed: a guided sample, a training step as in train.py, and the clips for it."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

import flow
import train
from bench.speed import Row, Setting
from bench.timing import CPU, device_name, figure, interleaved, ratio
from flow import Task
from kit import devices, distributed, puppet, weights
from kit.backbone import SHIPPED, puppet_backbone
from kit.data import batch as batches
from kit.data.sources import open_sources
from kit.distributed import World
from kit.geometry import PUPPET
from kit.jobs import PROMPT
from motion_tokens import MOTION_DIM
from sample import denoise

BATCH = 16  # clips a step, train.py's default on a CPU
STAGE = 2
BUDGET = 30  # seconds for each length


class Parts(NamedTuple):
    """What a training step does, one after the other."""

    data: Callable[[], None]
    gradients: Callable[[], None]
    optimizers: Callable[[], None]
    average: Callable[[], None]


def done(parts: Iterable[Callable[[], None]]) -> None:
    for part in parts:
        part()


def training_step(
    batch: int, device: torch.device, bf16: bool, compiled: bool = False, frames: int = puppet.FRAMES
) -> Parts:
    """A joint step of stage 2 with the shipped network."""
    model, extra = weights.load_weights(SHIPPED, device)
    model.train().requires_grad_(True)
    if compiled:
        distributed.compile_blocks(model)
    objective = distributed.wrap(model, World(device, 0, 1), None, bf16, replay=True)
    sources = open_sources(["puppet"], PUPPET, puppet.body())
    opts = train.optimizers(model, "puppet")
    average = {name: value.clone() for name, value in model.state_dict().items()}
    parts, made = train.run.microbatches(batch, World(device, 0, 1), None), []
    drawn = flow.draw(batches.rng("bench"), STAGE, batch)._replace(task=Task.JOINT)
    codec = puppet.Codec.from_state(extra)
    steps = itertools.repeat(train.Step(STAGE, 0, 1, frames))
    clips = batches.stream(sources, model, steps, 0, parts, seed=0, batch=batch, device=device, codec=codec)

    def data() -> None:
        made[:] = [next(clips) for _ in parts]

    def gradients() -> None:
        train.gradients(objective, iter(made), drawn, parts, bf16)
        distributed.clip_gradients(model, train.CLIP_NORM)

    def optimizers() -> None:
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return Parts(data, gradients, optimizers, lambda: train.lerp(average, model.state_dict(), 0.002))


@torch.no_grad()
def guided(setting: Setting) -> list[Row]:
    """A sample of the shipped puppet from a motion, as sample.py makes it."""
    backbone = puppet_backbone(SHIPPED, "cpu")
    text, null_text = puppet.encode_text([PROMPT, ""]).split(1)
    motion = torch.randn(1, puppet.FRAMES, MOTION_DIM)
    call = functools.partial(
        denoise, backbone.transformer(), Task.MOTION_TO_VIDEO, text, null_text, 0, backbone.geometry.grid,
        motion=motion, **backbone.sampling(),
    )  # fmt: skip
    times = setting.rounds({"sample": call})
    what = f"seconds of a guided sample of {backbone.defaults.steps} steps, motion to video"
    return [Row("puppet_sample_seconds", what, figure(times["sample"]))]


def training(setting: Setting) -> list[Row]:
    """A training step, and how fast its clips are generated."""
    devices.use_fast_attention(CPU)
    data, *others = training_step(BATCH, CPU, devices.has_bf16_units(CPU))
    times = setting.rounds({"data": data, "step": functools.partial(done, others)})
    what = f"seconds of a training step on {BATCH} clips of {puppet.FRAMES} frames, without its data"
    fed = "clips generated / trained on a second"
    return [
        Row("puppet_step_seconds", what, figure(times["step"])),
        Row("puppet_data_ratio", fed, ratio(times["step"], times["data"])),
    ]


def lengths() -> dict[str, dict[str, float]]:
    """Clips a second at each clip length, and how a step's time divides if blocks are compiled."""
    devices.use_fast_attention(CPU)
    bf16, found = devices.has_bf16_units(CPU), {}
    print(f"{device_name(CPU)}, torch {torch.__version__}; joint steps of {BATCH} clips")
    print(f"{'frames':10}{'clips/s':>10}{'compiled':>10}   of a compiled step, %: {', '.join(Parts._fields)}")
    for _, frames in train.run.CLIP_LENGTHS:
        plain, compiled = (training_step(BATCH, CPU, bf16, each, frames) for each in (False, True))
        calls = {"plain": functools.partial(done, plain)} | compiled._asdict()
        times = interleaved(calls, budget=BUDGET)
        plain, *parts = (statistics.median(each) for each in times.values())
        shares = [100 * part / sum(parts) for part in parts]
        found[str(frames)] = {"clips_per_second": BATCH / plain, "compiled": BATCH / sum(parts)}
        found[str(frames)] |= dict(zip(Parts._fields, shares, strict=True))
        rates = f"{frames:<10}{BATCH / plain:10.1f}{BATCH / sum(parts):10.1f}"
        print(f"{rates}   {', '.join(f'{share:.0f}' for share in shares)}", flush=True)
    return found

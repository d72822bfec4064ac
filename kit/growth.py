"""How a joint forward call grows with what a user may ask for, beside what is counted: a picture."""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from dual_dit import PRESETS, DualDiT, DualDiTConfig
from flow import Task
from kit.cost import all_products, floor_seconds, saved_bytes
from kit.plots import blank_figure, save_figure
from kit.speed import Shape, plain
from kit.timing import added_bytes, device_name, interleaved, random_model
from motion_tokens import MOTION_DIM

BUDGET = 80  # seconds for all the timing
GIB = 2**30


class Point(NamedTuple):
    """A call: one block of this width, on `batch` clips of `shape`, with their motion."""

    width: int = 768
    shape: Shape = Shape(2, 12, 21, 128)
    batch: int = 1

    @property
    def config(self) -> DualDiTConfig:
        """The 1.3B preset's proportions."""
        ffn = 35 * self.width // 6
        return dataclasses.replace(
            PRESETS["wan2.1-1.3b"], layers=1, width=self.width, heads=self.width // 128, ffn=ffn
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of the latents."""
        t, h, w = self.shape[:3]
        return t, 2 * h, 2 * w


BASE = Point()
Curves = dict[str, dict[int, Point]]  # direction -> where on its axis -> the call
DIRECTIONS: Curves = {
    "frames": {4 * t - 3: BASE._replace(shape=BASE.shape._replace(t=t)) for t in (1, 2, 4, 8, 14)},
    "video tokens a latent frame": {
        h * w: BASE._replace(shape=BASE.shape._replace(h=h, w=w))
        for h, w in ((6, 10), (12, 21), (24, 42), (36, 63))
    },
    "width": {width: BASE._replace(width=width) for width in (384, 768, 1536, 3072)},
    "batch": {batch: BASE._replace(batch=batch) for batch in (1, 2, 4, 8)},
}


class Measured(NamedTuple):
    """Of a point, what was measured and what was counted; bytes are None where the system does not tell."""

    seconds: float
    floor: float
    bytes: int | None
    counted_bytes: int


def measure(points: Sequence[Point], budget: float = BUDGET) -> dict[Point, Measured]:
    """Time of a call, and what it keeps for a backward pass.

    The floor has one rate for plain products and one for attention: the best of the base point's, alone.
    """
    widths = {point.width: point.config for point in points}
    models = {width: random_model(config, "cpu", torch.float32) for width, config in widths.items()}
    calls = {str(point): functools.partial(forward, models[point.width], point) for point in points}
    base = all_products(BASE.config, BASE.shape.tokens(motion=True))
    alone = {str(product): plain(product, torch.float32) for product in base}
    with torch.no_grad():
        times = interleaved(calls | alone, budget, least=2, most=4)
    took = {name: min(each) for name, each in times.items()}  # the least disturbed: a curve, no comparison
    rate = {
        attention: max(p.flops / took[str(p)] for p in base if bool(p.heads) == attention)
        for attention in (False, True)
    }
    measured = {}
    for point in tqdm(points, desc="memory"):
        model = models[point.width].requires_grad_(True)
        counted = all_products(point.config, point.shape.tokens(motion=True))
        floor = point.batch * floor_seconds(counted, {p: rate[bool(p.heads)] for p in counted})
        kept = saved_bytes(point.config, point.grid, point.batch, point.shape.text, bf16=False)
        added = added_bytes(functools.partial(forward, model, point))
        measured[point] = Measured(took[str(point)], floor, added, kept)
    return measured


def forward(model: DualDiT, point: Point) -> None:
    video = torch.randn(point.batch, model.config.channels, *point.grid)
    motion = torch.randn(point.batch, point.shape.frames, MOTION_DIM)
    text = torch.randn(point.batch, point.shape.text, model.config.text_dim)
    time = torch.full((point.batch,), 0.5)
    model(video, motion, time, time, text, Task.JOINT)


def picture(curves: Curves, measured: dict[Point, Measured], path: Path) -> None:
    """Time above, memory below, a column for each direction; both axes logarithmic."""
    drawing = blank_figure(11, 5.4)
    panels = drawing.subplots(2, len(curves), sharex="col", sharey="row", squeeze=False)
    for column, (name, points) in zip(panels.T, curves.items(), strict=True):
        found = [measured[point] for point in points.values()]
        sides = (
            ([m.seconds for m in found], [m.floor for m in found]),
            (
                [m.bytes and m.bytes / GIB for m in found],
                [m.counted_bytes / GIB for m in found],
            ),
        )
        for panel, (values, counted) in zip(column, sides, strict=True):
            panel.loglog(list(points), counted, "--", color="0.45", linewidth=1.4, label="counted")
            if None not in values:
                panel.loglog(list(points), values, "o-", color="#1f77b4", markersize=4, label="measured")
            panel.grid(color="0.92")
            panel.set_axisbelow(True)
        column[1].set_xticks(list(points), [str(x) for x in points])
        column[1].minorticks_off()
        column[1].set_xlabel(name)
    panels[0, 0].set_ylabel("seconds of a forward")
    panels[1, 0].set_ylabel("GiB kept for backward")
    panels[0, 0].legend(frameon=False)
    t, h, w, text = BASE.shape
    drawing.suptitle(
        f"One dual block, fp32, on {device_name('cpu')}. Where not on the axis: {BASE.shape.frames} frames, "
        f"{h}x{w} tokens each of {t} latents, {text} of text, width {BASE.width}, batch {BASE.batch}",
        fontsize=9,
    )
    save_figure(drawing, path)


def growth(args: argparse.Namespace) -> dict:
    """Measure, print and draw all directions."""
    points = list(dict.fromkeys(point for direction in DIRECTIONS.values() for point in direction.values()))
    measured = measure(points)
    print(f"{'':34}{'seconds':>9}{'floor':>9}{'share':>7}{'GiB kept':>10}{'counted':>9}")
    for name, direction in DIRECTIONS.items():
        for x, point in direction.items():
            m = measured[point]
            kept = "" if m.bytes is None else f"{m.bytes / GIB:.2f}"
            share = f"{m.floor / m.seconds:.0%}"
            at = f"{m.seconds:9.3f}{m.floor:9.3f}{share:>7}{kept:>10}{m.counted_bytes / GIB:9.2f}"
            print(f"{name:28}{x:6}{at}")
    picture(DIRECTIONS, measured, args.out)
    print(f"wrote {args.out}")
    return {
        name: {x: measured[point]._asdict() for x, point in direction.items()}
        for name, direction in DIRECTIONS.items()
    }

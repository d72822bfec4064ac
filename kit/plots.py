"""Attention maps and loss curves -> PNG, through matplotlib; the same input gives the same bytes."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from kit.files import whole_file


def attention_picture(path: str | Path, attention: Tensor, shares: Tensor, title: str) -> None:
    """Write a .png of motion -> video attention (layers f t), one panel per layer, on one colour scale.

    Entry (l, f, k) is the mass that motion frame f puts on latent k. The line is k = f/4, where
    MVS-RoPE puts frame f. `shares` (layers,) in [0, 1], the measured mass on the frame's own latent, is
    printed above each panel.
    """
    layers, frames, latents = attention.shape
    columns = min(layers, 6)
    rows = math.ceil(layers / columns)
    figure = blank_figure(2.3 * columns + 1.2, 2.0 * rows + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    maps = rearrange(attention.float().cpu().numpy(), "l f t -> l t f")
    for layer, panel in enumerate(panels.flat):
        if layer >= layers:
            panel.set_visible(False)
            continue
        heat = panel.imshow(maps[layer], cmap="magma", vmin=0, vmax=maps.max(), origin="lower", aspect="auto")
        panel.plot([0, frames - 1], [0, (frames - 1) / 4], color="white", linewidth=1, linestyle=(0, (2, 3)))
        panel.set(xlim=(-0.5, frames - 0.5), ylim=(-0.5, latents - 0.5))
        stride = math.ceil(latents / 6)  # latent frames between ticks
        panel.set(yticks=range(0, latents, stride), xticks=range(0, frames, 4 * stride))
        panel.set_title(f"layer {layer}: {100 * shares[layer]:.0f}% on own latent", fontsize=8)
        panel.tick_params(labelsize=7)
    figure.suptitle(f"{title} (chance {100 / latents:.0f}%)", fontsize=10)
    figure.supxlabel("motion frame f", fontsize=8)
    figure.supylabel("latent k", fontsize=8)
    figure.colorbar(heat, ax=panels, fraction=0.06 / columns, pad=0.02).ax.tick_params(labelsize=7)
    save_figure(figure, path)


def loss_picture(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draw the loss of each task over steps from metrics.jsonl, a panel per stage: dots raw, lines smoothed.

    One JSON object a line with step, stage, task and loss.
    """
    stages: dict = defaultdict(lambda: defaultdict(dict))  # stage -> task -> step -> loss
    for line in Path(metrics_path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "loss" in record:
            stages[record["stage"]][record["task"]][record["step"]] = record["loss"]
    figure = blank_figure(5.5 * len(stages), 3.6)
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for panel, (stage, tasks) in zip(panels, sorted(stages.items()), strict=True):
        for index, (task, losses) in enumerate(sorted(tasks.items())):
            steps = sorted(losses)
            values = [losses[step] for step in steps]
            panel.plot(steps, values, ".", color=f"C{index}", markersize=3, alpha=0.35, markeredgewidth=0)
            panel.plot(steps, _smooth(values), color=f"C{index}", linewidth=1.5, label=task)
        panel.set(title=f"stage {stage}", xlabel="step", ylabel="loss", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(color="0.92")
        panel.legend(frameon=False)
    save_figure(figure, png_path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Running average over about a twentieth of the run, without the usual bias towards the first value."""
    keep = 1 - 1 / max(1, len(values) / 20)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure, inches, that belongs to no pyplot state."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})  # no version in it

"""Loss curves and other figures -> PNG, through matplotlib; the same input gives the same bytes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from kit.files import whole_file

DOTS = 2000  # of a task's steps in a picture: more would hide its line


def loss_picture(path: str | Path, lines: Sequence[dict]) -> None:
    """Write a .png of each task's loss over steps, a panel per stage: dots raw, lines smoothed.

    `lines` are those of a run's metrics.jsonl: step, stage, task and loss. Long runs have dots for some
    of their steps only.
    """
    stages: dict = defaultdict(lambda: defaultdict(dict))  # stage -> task -> step -> loss
    for record in lines:
        if "loss" in record:
            stages[record["stage"]][record["task"]][record["step"]] = record["loss"]
    figure = blank_figure(5.5 * len(stages), 3.6)
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for panel, (stage, tasks) in zip(panels, sorted(stages.items()), strict=True):
        for index, (task, losses) in enumerate(sorted(tasks.items())):
            steps = sorted(losses)
            values = [losses[step] for step in steps]
            some = slice(None, None, 1 + len(steps) // DOTS)
            panel.plot(
                steps[some], values[some], ".", color=f"C{index}", markersize=3, alpha=0.35, markeredgewidth=0
            )
            panel.plot(steps, _smooth(values), color=f"C{index}", linewidth=1.5, label=task)
        panel.set(title=f"stage {stage}", xlabel="step", ylabel="loss", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(color="0.92")
        panel.legend(frameon=False)
    save_figure(figure, path)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean over a centred window of about a twentieth of the run."""
    half, index = len(values) // 40, np.arange(len(values))
    first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    sums = np.cumsum([0.0, *values])
    return (sums[end] - sums[first]) / (end - first)


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, outside pyplot's state."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})  # no version in it

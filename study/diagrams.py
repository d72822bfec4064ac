"""The method in four pictures, which `python -m study.figures` draws.

frames   17 frames under 5 latents, and the clock that both modalities share
tokens   a frame of motion -> 235 numbers -> 51 tokens, and where they stand
block    the network: two experts that meet in one self-attention
recipe   the three stages of training, and the three tasks with the equations of their guidance
"""

import functools
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from flow import STAGES, Role, Task
from kit import pictures, plots, puppet
from motion_tokens import GROUPS
from rope import FRAMES_PER_LATENT, TOKENS_PER_FRAME, latent_of, motion_positions, video_positions

COLOURS = pictures.PAPER, pictures.INK, *pictures.SIDE_COLOURS.values()
PAPER, INK, VIDEO, MOTION, GREY = (f"#{bytes(colour).hex()}" for colour in COLOURS)
CLIP = 9  # the puppet clip that is shown
SCALE = 8  # pixels of a skeleton to one pixel of its video
LINE = "#c8c8c4"


# ---------------------------------------------------------------- pieces


def canvas(
    width: float, height: float, x: tuple[float, float], y: tuple[float, float]
) -> tuple[Figure, Axes]:
    """A figure, sizes in inches, with one empty axes, x to the right and y up."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, colour: str = INK, size: float = 9, **how) -> None:
    axes.text(x, y, text, color=colour, fontsize=size, **({"ha": "center", "va": "center"} | how))


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float, height: float = 0.5) -> None:
    """A box centred on (x, y)."""
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "linewidth": 1.2}
    corner = x - width / 2, y - height / 2
    axes.add_patch(FancyBboxPatch(corner, width, height, edgecolor=colour, facecolor=colour + "22", **style))
    write(axes, x, y, text)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    how = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **how))


@functools.cache
def shown_clip(size: int) -> tuple[Tensor, Tensor]:
    """A puppet clip's frames and skeletons, each (f size size 3) uint8, cropped to the person."""
    clip = puppet.clips([CLIP])
    video = pictures.to_frames(puppet.render(clip.joints, clip.betas, clip.shirt)[0][0])
    skeletons = pictures.draw_skeleton(clip.joints[0], puppet.project, 64 * SCALE)
    video = pictures.resized(video, 64 * SCALE)
    return tuple(pictures.resized(frames[:, 82:, :425], size) for frames in (video, skeletons))


# ---------------------------------------------------------------- the pictures


def frames(path: Path) -> None:
    """Both modalities on one time axis: a frame stands at f/4, a latent above the frames that it holds."""
    f, T = puppet.FRAMES, (puppet.FRAMES - 1) // FRAMES_PER_LATENT + 1
    figure, axes = canvas(9.6, 3.55, (-1.0, 4.35), (-0.3, 3.22))
    width, inch = 0.235, 5.35 / 9.6 / (3.52 / 3.55)  # of a thumbnail; y units are this much smaller than x
    times = motion_positions(f, 8, 8)[::TOKENS_PER_FRAME, 0].tolist()
    own = latent_of(torch.arange(f)).tolist()
    tall = width / inch
    for top, images, name in zip(
        (2.0, 1.42), shown_clip(160), ("video frames", "motion frames"), strict=True
    ):
        for time, image in zip(times, images, strict=True):
            extent = (time - width / 2, time + width / 2, top - tall, top)
            axes.imshow(image.numpy(), extent=extent, aspect="auto", zorder=2, interpolation="antialiased")
        write(axes, -0.2, top - tall / 2, name, ha="right", colour=VIDEO if top > 1.5 else MOTION)
    for k in range(T):
        held = [time for time, latent in zip(times, own, strict=True) if latent == k]
        left, right = held[0] - 0.115, held[-1] + 0.115
        corner = (left, 2.3), right - left, 0.5
        axes.add_patch(Rectangle(*corner, edgecolor=VIDEO, facecolor=VIDEO + "22", linewidth=1.2))
        first, last = own.index(k), f - 1 - own[::-1].index(k)
        text = f"frames {first} to {last}" if last > first else "frame 0"
        write(axes, (left + right) / 2, 2.55, f"latent {k}" if k else "0", VIDEO, 9)
        write(axes, (left + right) / 2, 2.98, text, INK, 8)
        axes.plot((left, left, right, right), (2.14, 2.06, 2.06, 2.14), color=VIDEO, linewidth=1)
        # the latent's time: that of its last frame
        axes.plot((k, k), (0.66, 2.3), color=VIDEO, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    write(axes, -0.2, 2.55, "video latents", VIDEO, ha="right")
    axes.plot((-0.12, 4.12), (0.62, 0.62), color=INK, linewidth=1)
    axes.scatter(range(T), [0.62] * T, marker="s", s=70, color=VIDEO, zorder=3)
    axes.scatter(times, [0.62] * f, s=16, color=MOTION, zorder=4)
    for frame, time in enumerate(times):
        whole = frame % FRAMES_PER_LATENT == 0
        write(axes, time, 0.36, f"{time:g}", INK if whole else GREY, 9 if whole else 6.5)
        write(axes, time, 0.11, f"f = {frame}" if whole else f"{frame}", MOTION, 7.5 if whole else 6.5)
    write(axes, -0.2, 0.62, "the clock, f/4", ha="right")
    note = "blue squares: latent k stands at time k        orange dots: motion frame f stands at time f/4"
    write(axes, 2, -0.16, note, GREY, 8)
    plots.save_figure(figure, path)


def tokens(path: Path) -> None:
    """From a frame's SMPL parameters to its tokens, and the tokens' positions beside the video's grid."""
    figure, axes = canvas(9.6, 4.1, (0, 9.6), (0.15, 4.25))
    _, skeletons = shown_clip(512)
    axes.imshow(skeletons[2].numpy(), extent=(0.05, 1.75, 1.5, 3.2), aspect="auto")
    write(axes, 0.87, 3.85, "motion frame f", MOTION, 9.5)
    write(axes, 0.87, 0.95, "235 numbers:", GREY, 8)
    write(axes, 0.87, 0.7, "3 + 72 + 144 + 6 + 10", GREY, 8)
    kinds = (  # group, and of each of its parts: symbol, name, tokens x numbers
        ("position", (("v", "root translation", "1 × 3"), ("η", "joint positions", "24 × 3"))),
        ("rotation", (("θ", "joint rotations", "24 × 6"), ("γ", "root rotation", "1 × 6"))),
        ("shape", (("β", "body shape", "1 × 10"),)),
    )
    colours = {"position": "#d65827", "rotation": "#a8323e", "shape": "#b0892a"}
    y, first = 3.55, 0
    for group, parts in kinds:
        colour, height = colours[group], 0.46 * len(parts)
        for row, (symbol, name, size) in enumerate(parts):
            at = y - 0.23 - 0.46 * row
            box(axes, 2.95, at, "", colour, 2.0, 0.36)
            write(axes, 2.06, at, symbol, colour, 11)
            write(axes, 2.2, at, name, ha="left", size=8.5)
            write(axes, 3.9, at, size, GREY, 8, ha="right")
        middle = y - height / 2
        box(axes, 4.62, middle, "MLP", colour, 0.62, 0.36)
        arrow(axes, (3.97, middle), (4.29, middle), colour)
        count = GROUPS[group][0]
        arrow(axes, (4.95, middle), (5.27, middle), colour)
        many = f"tokens {first} to {first + count - 1}" if count > 1 else f"token {first}"
        write(axes, 5.34, middle, many, colour, 8.5, ha="left")
        y, first = y - height - 0.28, first + count
    write(axes, 2.95, 3.85, "parts: tokens × numbers", INK, 8.5)
    write(axes, 4.62, 3.85, "3 groups", INK, 8.5)
    write(axes, 5.78, 3.85, f"{TOKENS_PER_FRAME} tokens", INK, 8.5)
    note = (
        "each token: its MLP's output + an embedding of i, its place among the 51\n"
        "+ an embedding of the frame's place among the four that a latent holds"
    )
    write(axes, 1.98, 0.42, note, GREY, 8, ha="left", linespacing=1.5)

    # where they stand: the positions that rope.py computes, at one time
    inner = figure.add_axes((0.715, 0.11, 0.27, 0.74), facecolor=PAPER)
    H = W = 8
    video, motion = video_positions(1, H, W), motion_positions(1, H, W)
    inner.scatter(video[:, 2], video[:, 1], s=5, marker="s", color=VIDEO)
    where = motion[:, 2].tolist(), motion[:, 1].tolist()
    edges = [sum(GROUPS[name][0] for name in list(GROUPS)[:k]) for k in range(4)]
    for group, (start, end) in zip(GROUPS, pairwise(edges), strict=True):
        inner.scatter(where[0][start:end], where[1][start:end], s=7, color=colours[group])
    inner.set(xlim=(-2, 60), ylim=(60, -2), aspect="equal", xticks=(0, W, W + 50), yticks=(0, H, H + 50))
    inner.set_xticklabels(("0", "W", "W+50"))
    inner.set_yticklabels(("0", "H", "H+50"))
    inner.tick_params(labelsize=8, colors=INK)
    for spine in inner.spines.values():
        spine.set_color("#b8b8b4")
    write(inner, 10.5, 3.2, "video tokens (k, h, w)", VIDEO, 8, ha="left")
    write(inner, 59, 19, "motion token i of frame f\n(f/4, H+i, W+i)", MOTION, 8, ha="right")
    write(inner, 2, 55, "height down, width across,\none moment of time", GREY, 7.5, ha="left")
    write(axes, 8.15, 3.85, "where they stand", INK, 9.5)
    plots.save_figure(figure, path)


def block(path: Path) -> None:
    """The network from its inputs (below) to its velocities (above), under the names of dual_dit.py."""
    figure, axes = canvas(8.6, 6.5, (-5.9, 5.9), (-0.75, 8.45))
    frame = {"boxstyle": "round,pad=0.05,rounding_size=0.15", "linestyle": (0, (4, 3))}
    axes.add_patch(FancyBboxPatch((-5.0, 1.45), 10, 5.3, edgecolor="#b8b8b4", facecolor="#f2f2ee", **frame))
    write(axes, 0, 6.5, "DualBlock, once a layer", GREY)
    sides = (
        (-3.0, VIDEO, "video", "video latents", "patches → H·W tokens a latent\n+ task hint"),
        (3.0, MOTION, "motion", "motion, 235 numbers a frame", "3 MLPs → 51 tokens a frame\n+ task hint"),
    )
    for x, colour, name, given, embedding in sides:
        rows = [  # from below; those of a block from the third on, up to the head
            (-0.35, given),
            (0.75, embedding),
            (2.05, "norm · (1 + scale) + shift\nq, k, v; RoPE turns q and k"),
            (4.1, "+ gate · o-projection"),
            (5.0, "+ cross-attention to the text"),
            (5.9, "+ gate · feed-forward"),
            (7.2, "Head: norm, modulate, project"),
            (8.05, f"velocity of {name}"),
        ]
        half = [0.31 if "\n" in text else 0.22 for _, text in rows]
        for (y, text), reach in zip(rows, half, strict=True):
            box(axes, x, y, text, colour, 3.4, 2 * reach)
        for k in (0, 1, 3, 4, 5, 6):
            arrow(axes, (x, rows[k][0] + half[k]), (x, rows[k + 1][0] - half[k + 1]), colour)
        side = 1 if x > 0 else -1
        arrow(axes, (x, 2.36), (side * 1.0, 2.8), colour)
        arrow(axes, (side * 1.0, 3.4), (x, 3.88), colour)
        outside = side * 5.4
        axes.plot((outside, outside), (0.75, 7.2), color=colour, linewidth=1.1)
        write(axes, outside, 0.4, f"noise\nlevel of\n{name}", colour, 8)
        for y in (2.05, 4.1, 5.9, 7.2):  # shift, scale and gate are functions of the modality's noise level
            arrow(axes, (outside, y), (side * 4.72, y), colour)
        arrow(axes, (side * 0.5, 5.0), (side * 1.28, 5.0))
    joint = "one self-attention over both\nattention([q_v; q_m], [k_v; k_m], [v_v; v_m])"
    box(axes, 0, 3.1, joint, GREY, 4.5, 0.6)
    box(axes, 0, 5.0, "text", GREY, 1.0, 0.44)
    write(axes, -4.85, 6.5, "video expert", VIDEO, ha="left")
    write(axes, 4.85, 6.5, "motion expert", MOTION, ha="right")
    plots.save_figure(figure, path)


EQUATIONS = {  # (4) to (6): velocity of what is made
    Task.JOINT: ("u(x, m, ∅)", "+ ω1 · [ u(x, m, y) − u(x, m, ∅) ]", ""),
    Task.MOTION_TO_VIDEO: (
        "u(x, ∅, ∅)",
        "+ ω1 · [ u(x, m, y) − u(x, m, ∅) ]",
        "+ ω2 · [ u(x, m, ∅) − u(x, ∅, ∅) ]",
    ),
    Task.VIDEO_TO_MOTION: ("u(∅, m, ∅)", "", "+ ω2 · [ u(x, m, ∅) − u(∅, m, ∅) ]"),
}
NAMES = {
    Task.VIDEO_ONLY: "text → video",
    Task.MOTION_ONLY: "text → motion",
    Task.JOINT: "joint: text →\nvideo + motion",
    Task.MOTION_TO_VIDEO: "motion → video",
    Task.VIDEO_TO_MOTION: "video → motion",
}
TRAINED = {
    0: "trains the video expert; only the puppet needs\nit, a real Wan is trained already",
    1: "trains the motion expert, which starts as a copy\n"
    "of the video expert; the video expert itself is frozen",
    2: "trains both\nexperts; each\nstep draws one\nof three tasks",
}


def recipe(path: Path) -> None:
    """A row for each task: what enters as noise or clean, the text, and what guidance adds."""
    figure, axes = canvas(9.6, 4.4, (0, 9.6), (0.4, 4.8))
    stage_x, task_x, video_x, motion_x, text_x, u_x = 0.15, 2.05, 3.3, 4.3, 5.3, 6.0
    heads = {task_x: "task", video_x: "video x", motion_x: "motion m", text_x: "text y"}
    for x, name in heads.items():
        write(axes, x, 4.55, name, GREY)
    y = 4.35
    for stage, tasks in STAGES.items():
        axes.plot((stage_x, 9.45), (y, y), color=LINE, linewidth=1)
        write(axes, stage_x, y - 0.3, f"stage {stage}", size=10, ha="left", weight="bold")
        if stage < 2:
            write(axes, u_x, y - 0.3, TRAINED[stage], GREY, 8.5, ha="left", linespacing=1.4)
        else:
            write(axes, stage_x, y - 0.82, TRAINED[stage], GREY, 8.5, ha="left", linespacing=1.4)
            write(axes, u_x, y - 0.2, "velocity that sampling follows", GREY, ha="left")
        for task in tasks:
            height = 0.6 if stage < 2 else 0.86
            middle = y - height / 2 - (0.1 if task in EQUATIONS else 0)
            write(axes, task_x, middle, NAMES[task])
            entry(axes, video_x, middle, task.video, VIDEO)
            entry(axes, motion_x, middle, task.motion, MOTION)
            if task is Task.VIDEO_TO_MOTION:
                write(axes, text_x, middle, "none", GREY, style="italic")
            else:
                box(axes, text_x, middle, "given", GREY, 0.8, 0.34)
            if task in EQUATIONS:
                equation(axes, u_x, middle, task)
            y -= height
    plots.save_figure(figure, path)


def entry(axes: Axes, x: float, y: float, role: Role, colour: str) -> None:
    """How a modality enters: a condition is filled, what is absent has no box."""
    if role is Role.ABSENT:
        write(axes, x, y, "absent", GREY, style="italic")
        return
    box(axes, x, y, "noise" if role is Role.NOISY else "", colour, 0.8, 0.34)
    if role is Role.CLEAN:
        box(axes, x, y, "", colour, 0.8, 0.34)
        axes.patches[-1].set_facecolor(colour)
        write(axes, x, y, "clean", PAPER)


def equation(axes: Axes, x: float, y: float, task: Task) -> None:
    """A line for each term; the condition's term has the condition's colour."""
    colours = INK, GREY, MOTION if task is Task.MOTION_TO_VIDEO else VIDEO
    lines = [(line, colour) for line, colour in zip(EQUATIONS[task], colours, strict=True) if line]
    for k, (line, colour) in enumerate(lines):
        at = y + 0.24 * ((len(lines) - 1) / 2 - k)
        write(axes, x + 0.2 * (k > 0), at, line, colour, ha="left", family="DejaVu Sans Mono")
    write(axes, 9.45, y, f"({4 + list(EQUATIONS).index(task)})", GREY, ha="right")


DRAWN = {"frames": frames, "tokens": tokens, "block": block, "recipe": recipe}

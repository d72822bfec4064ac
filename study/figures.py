"""Pictures: `python -m study.figures [NAME ...] [--out DIR]` draws them into assets/.

drawn from the code       blocks (the network), lattice (where MVS-RoPE puts video and motion), alignment
                          (which latent a motion frame finds by position alone)
sampled (--weights)       tasks
from assets/results.json  table1, figure8, a81, a82, a83
from networks (--runs)    collision (samples of a81's networks)

Without names: all but the last. `--docs` instead writes the tables of README.md and docs/results.md.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dual_dit import DualDiT
from flow import Task
from kit import files, pictures, plots, puppet, weights
from kit.backbone import PUPPET_DEFAULTS, SHIPPED
from kit.data.datasets import puppet_motion
from motion_tokens import decode_smpl
from rope import (
    FRAMES_PER_LATENT,
    TOKENS_PER_FRAME,
    apply_rope,
    motion_positions,
    rope_table,
    video_positions,
)
from sample import denoise
from study import tables

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets"
RESULTS = ASSETS / "results.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
INK, VIDEO, MOTION, SHARED = (
    "#{:02x}{:02x}{:02x}".format(*colour)
    for colour in (pictures.INK, *(pictures.SIDE_COLOURS[side] for side in ("left", "right", "middle")))
)
CLIP, SEED = 7, 0  # the puppet clip that conditions, and the noise
PROMPT = "a person in a red shirt waves the left hand"
SHOWN = 10  # motion tokens of a frame in the lattice
TILE = 128  # pixels of a frame


class World(NamedTuple):
    """What samples are made with."""

    model: DualDiT
    codec: puppet.Codec


def opened(file: Path) -> World:
    model, extra = weights.load_weights(file)
    return World(model, puppet.Codec.from_state(extra))


# ---------------------------------------------------------------- drawn from the code's own numbers


def box(
    axes: Axes, x: float, y: float, text: str, colour: str, width: float = 2.6, height: float = 0.5
) -> None:
    """A box centred on (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "linewidth": 1.2}
    axes.add_patch(FancyBboxPatch(corner, width, height, edgecolor=colour, facecolor=colour + "22", **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = SHARED) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=1.1)
    )


def blocks(path: Path) -> None:
    """The network from its inputs (below) to its velocities (above), under the names of dual_dit.py."""
    figure = plots.blank_figure(8.6, 6.6)
    axes = figure.subplots()
    axes.set(xlim=(-5.9, 5.9), ylim=(-0.7, 8.5))
    axes.axis("off")
    frame = {"boxstyle": "round,pad=0.05,rounding_size=0.15", "linestyle": (0, (4, 3))}
    axes.add_patch(FancyBboxPatch((-5.0, 1.45), 10, 5.3, edgecolor="#c8c8c4", facecolor="#f6f6f3", **frame))
    axes.text(0, 6.5, "DualBlock, once a layer", ha="center", va="center", fontsize=9, color=SHARED)
    for x, colour, name, given, embedding in (
        (
            -3.0,
            VIDEO,
            "video",
            "video latents (b c t h w)",
            "patch_embedding\n+ place on the grid + task hint",
        ),
        (3.0, MOTION, "motion", "motion (b f 235)", "MotionEncoder: 3 MLPs → 51 tokens\n+ task hint"),
    ):
        rows = [  # from below; those of a block, from the third on, up to the head
            (-0.35, given),
            (0.75, embedding),
            (2.05, "modulate: · (1 + scale) + shift\nq k v, RMS norm, RoPE"),
            (4.1, "+ gate · o-projection"),
            (5.0, "+ cross-attention to text"),
            (5.9, "+ gate · ffn(modulate)"),
            (7.2, "Head: modulate, project"),
            (8.05, f"velocity of {name}"),
        ]
        reach = [0.31 if "\n" in text else 0.22 for _, text in rows]  # half a box's height
        for (y, text), half in zip(rows, reach, strict=True):
            box(axes, x, y, text, colour, width=3.4, height=2 * half)
        for k in (0, 1, 3, 4, 5, 6):
            arrow(axes, (x, rows[k][0] + reach[k]), (x, rows[k + 1][0] - reach[k + 1]), colour)
        side = 1 if x > 0 else -1
        arrow(axes, (x, 2.36), (side * 1.0, 2.8), colour)
        arrow(axes, (side * 1.0, 3.4), (x, 3.88), colour)
        outside = side * 5.35
        axes.plot((outside, outside), (0.75, 7.2), color=colour, linewidth=1.1)
        axes.text(outside, 0.55, f"t of\n{name}", ha="center", va="top", fontsize=8.5, color=colour)
        for y in (2.05, 4.1, 5.9, 7.2):  # shift, scale and gate are functions of the modality's own time
            arrow(axes, (outside, y), (side * 4.72, y), colour)
        arrow(axes, (side * 0.5, 5.0), (side * 1.28, 5.0))
    joint = "one self-attention over both\nattend([q_v; q_m], [k_v; k_m], [v_v; v_m])"
    box(axes, 0, 3.1, joint, SHARED, width=4.4, height=0.6)
    box(axes, 0, 5.0, "text", SHARED, width=1.0, height=0.44)
    plots.save_figure(figure, path)


LATTICES = {  # (synced, apart): title, what a motion token's position is
    (True, True): ("MVS-RoPE", "(f/4, H+i, W+i)"),
    (False, True): ("unsynced: another clock", "(f, H+i, W+i)"),
    (True, False): ("collision: video's places", "(f/4, i, i)"),
}


def lattice(path: Path) -> None:
    """Positions of 3 latents of 6x6 tokens and of the first tokens of 9 motion frames."""
    t, h, w = 3, 6, 6
    frames = FRAMES_PER_LATENT * (t - 1) + 1
    figure = plots.blank_figure(10.8, 4.0)
    for panel, ((synced, apart), (title, name)) in enumerate(LATTICES.items(), start=1):
        axes = figure.add_subplot(1, 3, panel, projection="3d")
        axes.set_box_aspect((1, 1.5, 1), zoom=0.95)
        video = video_positions(t, h, w).numpy()
        motion = motion_positions(frames, h, w, synced=synced, apart=apart).numpy()
        motion = rearrange(motion, "(f i) xyz -> f i xyz", f=frames)[:, :SHOWN]
        axes.scatter(*video[:, [1, 0, 2]].T, s=10, color=VIDEO, depthshade=False, label="video (t, h, w)")
        for f, line in enumerate(motion):
            size, faint = (9, 1.0) if f % FRAMES_PER_LATENT == 0 else (4, 0.5)
            axes.plot(*line[:, [1, 0, 2]].T, color=MOTION, linewidth=0.8, alpha=faint)
            axes.scatter(*line[:, [1, 0, 2]].T, s=size, color=MOTION, depthshade=False, alpha=faint)
        axes.plot([], [], color=MOTION, marker="o", markersize=3, label=f"motion {name}, i < {SHOWN} of 51")
        axes.set_title(title, fontsize=10, y=0.98)
        ticks = range(0, t) if synced else range(0, frames, 2)
        axes.set(xlabel="h", ylabel="t", zlabel="w", yticks=ticks)
        axes.tick_params(labelsize=6, pad=-2)
        axes.view_init(elev=20, azim=-40)
        axes.legend(loc="lower left", fontsize=8, frameon=False, bbox_to_anchor=(-0.08, -0.12))
    plots.save_figure(figure, path)


def by_position(frames: int, synced: bool, head_dim: int = 128) -> Tensor:
    """Mean logit of motion frame f on latent frame t (f t) if every query and key had the same content."""
    t, h, w = (frames - 1) // FRAMES_PER_LATENT + 1, 8, 8
    q, k = (
        apply_rope(torch.ones(1, 1, len(at), head_dim), *rope_table(at, head_dim))[0, 0]
        for at in (motion_positions(frames, h, w, synced=synced), video_positions(t, h, w))
    )
    logits = q @ k.mT / head_dim**0.5
    return reduce(logits, "(f i) (t hw) -> f t", "mean", i=TOKENS_PER_FRAME, t=t)


def alignment(path: Path) -> None:
    """The two maps side by side; each frame's best latent is marked."""
    frames = 33
    figure = plots.blank_figure(8.4, 3.0)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, synced in zip(panels, (True, False), strict=True):
        logits = by_position(frames, synced)
        panel.imshow(logits.mT.numpy(), cmap="magma", origin="lower", aspect="auto")
        panel.plot([0, frames - 1], [0, (frames - 1) / 4], color="white", linewidth=1, linestyle=(0, (2, 3)))
        panel.scatter(range(frames), logits.argmax(dim=1), s=9, color="#7fd0ff", label="largest logit")
        panel.set_title("MVS-RoPE" if synced else "unsynced", fontsize=10)
        panel.set_xlabel("motion frame f", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("latent frame t", fontsize=8)
    panels[0].legend(fontsize=7, loc="lower right")
    figure.suptitle("Logits for equal content, by position alone; dotted: t = f/4", fontsize=10)
    plots.save_figure(figure, path)


# ---------------------------------------------------------------- sampled


def skeleton(motion: Tensor, size: int = TILE) -> Tensor:
    """Motion (f 235), not normalised -> frames (f size size 3)."""
    joints = decode_smpl(motion[None])["joints"][0]
    return pictures.draw_skeleton(joints, puppet.body().parents, puppet.project, size)


def picture(world: World, latents: Tensor, size: int = TILE) -> Tensor:
    """Latents (c t h w) -> frames (f size size 3)."""
    return pictures.resized(pictures.to_frames(world.codec.decode(latents[None])[0]), size)


def sampled(world: World, task: Task, prompt: str, **sampling: float) -> tuple[Tensor, Tensor]:
    """One sample -> latents (c t h w) and motion (f 235); what conditions it comes from the clip CLIP."""
    clip = puppet.clips([CLIP])
    latents = world.codec.encode(puppet.render(clip.joints, clip.betas, clip.shirt)[0])
    text = puppet.encode_text([prompt]), puppet.encode_text([""])
    options = PUPPET_DEFAULTS._asdict() | sampling
    made = denoise(world.model, task, *text, SEED, latents.shape[2:], latents, puppet_motion(clip), **options)
    return made[0][0], made[1][0]


def titled(frames: Tensor, title: str) -> Tensor:
    """Frames (f h w 3) with a line of text above them."""
    strip = Image.new("RGB", (frames.shape[2], 22), pictures.PAPER)
    face = ImageFont.truetype(pictures.FACE, 12)
    ImageDraw.Draw(strip).text((4, 4), title, fill=pictures.INK, font=face)
    above = torch.from_numpy(np.array(strip)).expand(len(frames), -1, -1, -1)
    return torch.cat((above, frames), dim=1)


def tasks(path: Path, world: World) -> None:
    """A GIF of six columns: what is given and what is made, for each task."""
    caption = puppet.clips([CLIP]).caption[0]
    video, motion = sampled(world, Task.JOINT, PROMPT)
    columns = [titled(picture(world, video), "text → video +"), titled(skeleton(motion), "motion")]
    video, motion = sampled(world, Task.MOTION_TO_VIDEO, caption)
    columns += [titled(skeleton(motion), "motion →"), titled(picture(world, video), "video")]
    video, motion = sampled(world, Task.VIDEO_TO_MOTION, caption)
    columns += [titled(picture(world, video), "video →"), titled(skeleton(motion), "motion")]
    gap = torch.tensor(pictures.PAPER, dtype=torch.uint8).expand(*columns[0].shape[:2], 10, 3)
    parts = [part for k, column in enumerate(columns) for part in ([gap] if k in (2, 4) else []) + [column]]
    pictures.write_video(path, torch.cat(parts, dim=2), puppet.FPS)


def collision(path: Path, runs: Path) -> None:
    """The same prompt and noise by the two networks of A.8.1, frame by frame."""
    rows, titles = [], []
    for name in ("mvs-rope", "collision"):
        world = opened(runs / f"{name}-0" / "weights.safetensors")
        rows.append(picture(world, sampled(world, Task.JOINT, PROMPT)[0]))
        titles.append(tables.name_of("a81", name))
    pictures.contact_sheet(path, rows, titles)


# ---------------------------------------------------------------- from assets/results.json


def table1(path: Path, results: dict) -> None:
    """A panel a measure, a point a network with its standard error; dotted: real video."""
    found = tables.networks(results, "table1")
    names = [name for name in found if name != "real"]
    columns = tables.TABLE_1
    figure = plots.blank_figure(8.6, 4.4)
    panels = figure.subplots(3, 3, sharey=True).flat
    for panel, (measure, title) in zip(panels, columns.items(), strict=True):
        panel.set_title(title, fontsize=9)
        for y, name in enumerate(names):
            cell = found[name]["measures"][measure]
            colour = MOTION if name.startswith("echomotion") else SHARED
            error = tables.error_of(cell)
            panel.errorbar(cell["mean"], -y, xerr=error, fmt="o", markersize=4, color=colour, capsize=2)
        panel.axvline(found["real"]["measures"][measure]["mean"], color=VIDEO, linestyle=(0, (2, 2)))
        panel.set_yticks([-y for y in range(len(names))], [tables.name_of("table1", n) for n in names])
        panel.set_ylim(0.5 - len(names), 0.5)
        panel.tick_params(labelsize=7)
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
    figure.suptitle("Videos of the same prompts, by themselves; dotted: real ones", fontsize=10)
    plots.save_figure(figure, path)


def figure8(path: Path, results: dict) -> None:
    """A column a variant: above, where motion looks in video, below, where video looks in motion."""
    found = tables.networks(results, "figure8")
    figure = plots.blank_figure(2.6 * len(found) + 0.8, 4.6)
    panels = figure.subplots(2, len(found), squeeze=False, sharex=True, sharey=True)
    for row, (side, way) in enumerate(
        (("motion_to_video", "motion → video"), ("video_to_motion", "video → motion"))
    ):
        layer = tables.best_layer(results, side)
        maps = {name: np.array(network[side][layer]) for name, network in found.items()}
        maps = {name: x if row else x.T for name, x in maps.items()}  # (T f): latents upwards
        top = max(x.max() for x in maps.values())
        for panel, (name, shown) in zip(panels[row], maps.items(), strict=True):
            heat = panel.imshow(shown, cmap="magma", vmin=0, vmax=top, origin="lower", aspect="auto")
            frames = shown.shape[1]
            panel.plot([0, frames - 1], [0, (frames - 1) / 4], color="white", linestyle=(0, (2, 3)))
            panel.set(xticks=range(0, frames, 4), yticks=range(len(shown)))
            share = found[name]["measures"][f"{side}_{layer}"]
            title = f"{tables.name_of('figure8', name)}: {tables.cell(share)}"
            panel.set_title(title, fontsize=9)
            panel.tick_params(labelsize=7)
        panels[row, 0].set_ylabel(f"{way}, layer {layer}\nlatent frame t", fontsize=8)
        figure.colorbar(heat, ax=panels[row], fraction=0.02, pad=0.02).ax.tick_params(labelsize=7)
    chance = next(iter(found.values()))["chance"]
    figure.supxlabel("motion frame f", fontsize=8)
    figure.suptitle(
        f"Share of attention that keeps the 4:1 clock (chance {chance:.2f}; dotted: t = f/4)", fontsize=10
    )
    plots.save_figure(figure, path)


CURVES = {
    "a81": "Error of the video in joint modelling",
    "a82": "Loss of stage 2",
    "a83": "Loss of stage 2, from stage 0",
}


def curves(part: str) -> Callable[[Path, dict], None]:
    """Losses over the clips trained on: mean over seeds, and its standard error as a band."""

    def draw(path: Path, results: dict) -> None:
        found = tables.networks(results, part)
        figure = plots.blank_figure(5.4, 3.4)
        panel = figure.subplots()
        for (name, network), colour in zip(found.items(), (MOTION, VIDEO), strict=False):
            shown = network["curve"]
            x = np.array(shown["steps"]) * network["trained_clips"] / network["steps"]
            mean, error = (np.array(shown[key], float) for key in ("mean", "error_seeds"))
            panel.plot(x, mean, color=colour, label=tables.name_of(part, name), linewidth=1.5)
            panel.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        panel.set(xlabel="clips of stage 2", ylabel="velocity error, held-out clips", title=CURVES[part])
        panel.grid(color="0.92")
        panel.legend(frameon=False)
        plots.save_figure(figure, path)

    return draw


# ---------------------------------------------------------------- the command line

DRAWN: dict[str, Callable[[Path], None]] = {"blocks": blocks, "lattice": lattice, "alignment": alignment}
READ: dict[str, Callable[[Path, dict], None]] = {
    "table1": table1,
    "figure8": figure8,
    **{part: curves(part) for part in CURVES},
}
NAMES = (*DRAWN, "tasks", *READ, "collision")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m study.figures", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default: all but the last")
    add("--weights", type=Path, default=SHIPPED, metavar="FILE", help="of tasks; default: the shipped puppet")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="default: assets/results.json")
    add("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="study.ablate's (%(default)s)")
    add("--out", type=Path, default=ASSETS, metavar="DIR", help="default: assets")
    add("--docs", action="store_true", help="write the tables of README.md and docs/results.md instead")
    args = parser.parse_args()
    for name in args.names:
        if name not in NAMES:
            parser.error(f"no figure {name!r}: choose from {', '.join(NAMES)}")
    return args


def main() -> None:
    args = options()
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    if args.docs:
        for page in PAGES:
            tables.fill(page, results)
        return
    if not args.out.is_dir():
        raise FileNotFoundError(f"{args.out}: no such folder; create it first")
    for name in args.names or (*DRAWN, "tasks", *(part for part in READ if part in results)):
        path = args.out / f"{name}.{'gif' if name == 'tasks' else 'png'}"
        if name in DRAWN:
            DRAWN[name](path)
        elif name == "tasks":
            tasks(path, opened(args.weights))
        elif name == "collision":
            collision(path, args.runs)
        elif name in results:
            READ[name](path, results)
        else:
            raise ValueError(f"{args.results} has no {name}: measure it, `python -m study.ablate {name}`")
        print(f"wrote {path}")


if __name__ == "__main__":
    files.run(main)

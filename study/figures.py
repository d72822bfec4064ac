"""Pictures: `python -m study.figures [NAME ...] [--out DIR]` draws them into assets/.

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
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dual_dit import DualDiT
from flow import Task
from kit import files, pictures, plots, puppet, weights
from kit.backbone import PUPPET_DEFAULTS, SHIPPED
from kit.data.datasets import puppet_motion
from motion_tokens import decode_smpl
from sample import denoise
from study import tables

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets"
RESULTS = ASSETS / "results.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
VIDEO, MOTION, SHARED = (
    "#{:02x}{:02x}{:02x}".format(*pictures.SIDE_COLOURS[side]) for side in ("left", "right", "middle")
)
CLIP, SEED = 7, 0  # the puppet clip that conditions, and the noise
PROMPT = "a person in a red shirt waves the left hand"
TILE = 128  # pixels of a frame


class World(NamedTuple):
    """What samples are made with."""

    model: DualDiT
    codec: puppet.Codec


def opened(file: Path) -> World:
    model, extra = weights.load_weights(file)
    return World(model, puppet.Codec.from_state(extra))


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

READ: dict[str, Callable[[Path, dict], None]] = {
    "table1": table1,
    "figure8": figure8,
    **{part: curves(part) for part in CURVES},
}
NAMES = ("tasks", *READ, "collision")


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m study.figures", description=__doc__.splitlines()[0])
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
    for name in args.names or ("tasks", *(part for part in READ if part in results)):
        path = args.out / f"{name}.{'gif' if name == 'tasks' else 'png'}"
        if name == "tasks":
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

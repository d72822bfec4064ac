"""Pictures: `python -m study.figures [NAME ...] [--out DIR]` draws them into assets/.

of the method             frames, tokens, block, recipe (study/diagrams.py)
sampled (--weights)       tasks
from assets/results.json  figure8, a81, a82, a83
from networks (--runs)    collision (samples of a81's networks)

Without names: all but collision, if they have numbers. `--docs` instead writes the tables of README.md and
docs/results.md.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flow import Task
from kit import files, pictures, plots, puppet
from kit.backbone import SHIPPED, Backbone, puppet_backbone
from kit.data.datasets import puppet_motion
from kit.jobs import CONDITION_CLIP, PROMPT
from motion_tokens import decode_smpl
from sample import denoise
from study import diagrams, tables
from study.ablate import RESULTS, ROOT

ASSETS = ROOT / "assets"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
TILE = 128  # pixels of a frame


# ---------------------------------------------------------------- sampled


def sampled(backbone: Backbone, task: Task, prompt: str) -> tuple[Tensor, Tensor]:
    """Frames (f h w 3) of a sample's video and of its skeleton; its condition, if any, is CONDITION_CLIP."""
    clip, codec = puppet.clips([CONDITION_CLIP], backbone.geometry.frames), backbone.codec()
    latents = codec.encode(puppet.render(clip.joints, clip.betas, clip.shirt)[0])
    text = puppet.encode_text([prompt]), puppet.encode_text([""])
    inputs = backbone.transformer(), task, *text, 0, backbone.geometry.grid, latents, puppet_motion(clip)
    made, motion = denoise(*inputs, **backbone.sampling())
    video = pictures.resized(pictures.to_frames(codec.decode(made)[0]), TILE)
    joints = decode_smpl(motion)["joints"][0]
    return video, pictures.draw_skeleton(joints, puppet.project, TILE)


def titled(frames: Tensor, title: str) -> Tensor:
    """Frames (f h w 3) with a line of text above them."""
    strip = Image.new("RGB", (frames.shape[2], 22), pictures.PAPER)
    face = ImageFont.truetype(pictures.FACE, 12)
    ImageDraw.Draw(strip).text((4, 4), title, fill=pictures.INK, font=face)
    above = torch.from_numpy(np.array(strip)).expand(len(frames), -1, -1, -1)
    return torch.cat((above, frames), dim=1)


def tasks(path: Path, weights: Path) -> None:
    """A GIF of six columns: input and output of each task."""
    backbone, caption = puppet_backbone(weights, "cpu"), puppet.clips([CONDITION_CLIP]).caption[0]
    video, motion = sampled(backbone, Task.JOINT, PROMPT)
    columns = [titled(video, "text → video +"), titled(motion, "motion")]
    video, motion = sampled(backbone, Task.MOTION_TO_VIDEO, caption)
    columns += [titled(motion, "motion →"), titled(video, "video")]
    video, motion = sampled(backbone, Task.VIDEO_TO_MOTION, caption)
    columns += [titled(video, "video →"), titled(motion, "motion")]
    line = [pictures.PAPER] * 11 + [pictures.FAINT] * 2 + [pictures.PAPER] * 11  # between two tasks
    gap = torch.tensor(line, dtype=torch.uint8).expand(*columns[0].shape[:2], -1, 3)
    columns.insert(4, gap)
    columns.insert(2, gap)
    pictures.write_video(path, torch.cat(columns, dim=2), puppet.FPS)


def collision(path: Path, runs: Path) -> None:
    """The same prompt and noise by the two networks of A.8.1, frame by frame."""
    names = ("mvs-rope", "collision")
    backbones = [puppet_backbone(runs / f"{name}-0" / "weights.safetensors", "cpu") for name in names]
    rows = [sampled(backbone, Task.JOINT, PROMPT)[0] for backbone in backbones]
    pictures.contact_sheet(path, rows, [tables.name_of("a81", name) for name in names])


# ---------------------------------------------------------------- from assets/results.json


def figure8(path: Path, found: dict[str, dict]) -> None:
    """A column for each variant: above, motion's attention to video; below, video's attention to motion."""
    figure = plots.blank_figure(2.6 * len(found) + 0.8, 4.6)
    panels = figure.subplots(2, len(found), squeeze=False, sharex=True, sharey=True)
    for row, way in zip(panels, ("motion_to_video", "video_to_motion"), strict=True):
        layer = tables.best_layer(found, way)
        maps = [np.array(network[way][layer]) for network in found.values()]
        maps = [x if way == "video_to_motion" else x.T for x in maps]  # (T f): latents upwards
        for panel, shown, (name, network) in zip(row, maps, found.items(), strict=True):
            heat = panel.imshow(shown, cmap="magma", vmin=0, vmax=np.max(maps), origin="lower", aspect="auto")
            frames = shown.shape[1]
            panel.plot([0, frames - 1], [0, (frames - 1) / 4], color="white", linestyle=(0, (2, 3)))
            panel.set(xticks=range(0, frames, 4), yticks=range(len(shown)))
            share = tables.cell(network["measures"][f"{way}_{layer}"])
            panel.set_title(f"{tables.name_of('figure8', name)}: {share}", fontsize=9)
        row[0].set_ylabel(f"{way.replace('_to_', ' → ')}, layer {layer}\nlatent k", fontsize=8)
        figure.colorbar(heat, ax=row, fraction=0.02, pad=0.02)
    chance = next(iter(found.values()))["chance"]
    figure.supxlabel("motion frame f", fontsize=8)
    figure.suptitle(
        f"Share of attention that keeps the 4:1 clock (chance {chance:.2f}; dotted: k = f/4)", fontsize=10
    )
    plots.save_figure(figure, path)


def curves(part: str, title: str, path: Path, found: dict[str, dict]) -> None:
    """Losses over the number of training clips: mean over seeds, and its standard error as a band."""
    figure = plots.blank_figure(5.4, 3.4)
    panel = figure.subplots()
    for name, network in found.items():
        shown = network["curve"]
        x = np.array(shown["steps"]) * network["trained_clips"] / network["steps"]
        mean, error = (np.array(shown[key], float) for key in ("mean", "error_seeds"))
        panel.plot(x, mean, label=tables.name_of(part, name))
        panel.fill_between(x, mean - error, mean + error, alpha=0.2, linewidth=0)
    panel.set(xlabel="clips of stage 2", ylabel="velocity error, held-out clips", title=title)
    panel.grid(color="0.92")
    panel.legend(frameon=False)
    plots.save_figure(figure, path)


# ---------------------------------------------------------------- the command line

READ: dict[str, Callable[[Path, dict], None]] = {  # path, what tables.networks gives of the part
    "figure8": figure8,
    "a81": partial(curves, "a81", "Error of the video in joint modelling"),
    "a82": partial(curves, "a82", "Loss of stage 2"),
    "a83": partial(curves, "a83", "Loss of stage 2, from stage 0"),
}
NAMES = (*diagrams.DRAWN, "tasks", *READ, "collision")


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m study.figures", description=__doc__.splitlines()[0])
    add = parser.add_argument
    choices = (*NAMES, "all")
    add("names", nargs="*", choices=choices, default="all", metavar="NAME", help=", ".join(choices))
    add("--weights", type=Path, default=SHIPPED, metavar="FILE", help="of tasks; default: the shipped puppet")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="default: assets/results.json")
    add("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="study.ablate's (%(default)s)")
    add("--out", type=Path, default=ASSETS, metavar="DIR", help="default: assets")
    add("--docs", action="store_true", help="write the tables of README.md and docs/results.md instead")
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.docs and not args.results.is_file():
        raise FileNotFoundError(f"no {args.results}: measure it, `python -m study.ablate all`")
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    if args.docs:
        for page in PAGES:
            page.write_text(tables.filled(page.read_text(), results))
        return
    measured = [name for name in NAMES[:-1] if name not in READ or name in results]
    for name in measured if "all" in args.names else args.names:
        path = args.out / f"{name}.{'gif' if name == 'tasks' else 'png'}"
        if name in diagrams.DRAWN:
            diagrams.DRAWN[name](path)
        elif name == "tasks":
            tasks(path, args.weights)
        elif name == "collision":
            collision(path, args.runs)
        elif name in results:
            READ[name](path, tables.networks(results, name))
        else:
            raise ValueError(f"{args.results} has no {name}: measure it, `python -m study.ablate {name}`")
        print(f"wrote {path}")


if __name__ == "__main__":
    files.run(main)

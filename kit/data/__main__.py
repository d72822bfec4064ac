"""Check, preview and cache data sets before training.

python -m kit.data check SPEC                             read everything, print all problems
python -m kit.data preview SPEC --out FILE.png            skeletons over frames
python -m kit.data cache SPEC --wan FOLDER --out DIR      latents, text features and motion, made once
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from kit import files, pictures, puppet, wan
from kit.body import Body
from kit.data import cache
from kit.data.clips import Sample, assumed_camera
from kit.data.datasets import DataSet, open_dataset, parse, read_all, read_item
from kit.geometry import Geometry, geometry_of

PREVIEWED = 4  # clips in a preview
HEIGHT = 320  # pixels of a frame while it is drawn on


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m kit.data", description="Check, preview and cache data sets.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    common = files.Parser(add_help=False)
    kinds = "puppet:COUNT, amass:DIR, humanml3d:DIR+AMASS, clips:DIR; for check also cache:DIR"
    common.add_argument("spec", metavar="SPEC", help=kinds)
    common.add_argument("--wan", type=Path, metavar="FOLDER", help="the backbone (default: the puppet's)")
    common.add_argument("--frames", type=files.frames, metavar="N", help="4n+1 (default: the backbone's)")
    common.add_argument("--size", type=files.size, metavar="HxW", help="of a video (default: the backbone's)")
    common.add_argument("--fps", type=float, metavar="F", help="frames a second (default: the backbone's)")
    what = "an SMPL model, or a folder with one for each gender (default: the puppet's body)"
    common.add_argument("--body", type=Path, metavar="FILE", help=what)
    common.add_argument("--force", action="store_true", help="also accept motion that no person can do")
    verbs.add_parser("check", parents=[common], help="read everything and print all problems")
    preview = verbs.add_parser("preview", parents=[common], help="draw skeletons over frames")
    preview.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    caching = verbs.add_parser("cache", parents=[common], help="compute latents and text features once")
    caching.add_argument("--out", type=Path, required=True, metavar="DIR")
    caching.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of what is stored")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    caching.add_argument("--device", type=files.device, default=device)
    return parser.parse_args()


def check(spec: str, geometry: Geometry, body: Body, force: bool = False) -> int:
    """Read a whole data set and print all that is wrong with it -> how many samples are usable."""
    kind, where, _ = parse(spec)
    if kind == "cache":
        cached = cache.open_cache(where)
        damaged = cache.damaged_samples(cached)
        rejected, count = cached.rejected + damaged, len(cached.samples) - len(damaged)
        print(*cache.compared(cached, body), sep="\n")
    else:
        data = open_dataset(spec, geometry, body, force)
        names, rejected = read_all(data, lambda sample: sample.name, title=spec)
        count = len(names)
        say(data)
    print(*rejected, f"{spec}: {count} samples accepted, {len(rejected)} rejected", sep="\n")
    return count


def say(data: DataSet) -> None:
    """Print what was assumed, cut, or forced, what could be forced, and what smoothing did."""
    for line in data.reading.lines():
        print(line)
    if refused := len(data.reading.refused):
        print(f"--force would accept {refused} of those rejected: motion that no person does")
    if data.reading.smoothed:
        before, after, mean, most = torch.stack(data.reading.smoothed).unbind(1)
        print(
            f"smoothed over {data.reading.smooth:g} s: jerk {before.mean():.0f} to {after.mean():.0f} m/s³; "
            f"joints moved {1000 * mean.mean():.1f} mm on average, {1000 * most.max():.0f} mm at most"
        )


def picture(spec: str, geometry: Geometry, body: Body, out: Path, force: bool = False) -> int:
    """Draw a contact sheet (.png): the first sample of a few items, spread over the data set -> how many."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: expected the name of a .png")
    data, samples, titles = open_dataset(spec, geometry, body, force), [], []
    rejected = list(data.problems)
    for item in torch.linspace(0, len(data.names) - 1, min(PREVIEWED, len(data.names))).long().tolist():
        samples += read_item(data, item, lambda sample: sample, rejected, most=1)
    say(data)
    for sample in samples:
        title = f"{sample.name}: {' | '.join(sample.captions) or 'no text'}"
        if sample.video is not None and sample.project is None:
            title += " (no camera in the file: a typical one is assumed)"
        titles.append(title)
    if samples:
        pictures.contact_sheet(out, [overlay(sample) for sample in samples], titles)
    print(*rejected, f"{out}: {len(samples)} of {len(data.names)} items", sep="\n")
    return len(samples)


def overlay(sample: Sample) -> Tensor:
    """The sample's frames (f 320 w 3) uint8, its skeleton drawn over them."""
    joints = rearrange(sample.motion[:, 3:75], "f (j c) -> f j c", c=3)
    if sample.video is None:
        return pictures.draw_skeleton(joints, pictures.fitted(joints), HEIGHT)
    height, width = sample.video.shape[1:3]
    project = sample.project or assumed_camera(height, width)
    return pictures.draw_skeleton(joints, project, HEIGHT, height, pictures.resized(sample.video, HEIGHT))


def store(args: argparse.Namespace, geometry: Geometry, body: Body) -> int | None:
    """Make one rank's share of a cache -> how many samples it has, None if another rank is not done yet."""
    rank, ranks, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = f"cuda:{local}" if args.device == "cuda" else args.device
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    data = open_dataset(args.spec, geometry, body, args.force)
    if not data.names:
        raise ValueError(f"{args.spec}: nothing usable; {'; '.join(data.problems) or 'it is empty'}")
    settings = cache.settings_of(args.spec, data, geometry, args.dtype, args.wan, body, args.force)
    cache.prepare(args.out, settings)
    encoders = cache.Encoders(
        wan.VideoVAE(args.wan, device=device).encode if data.paired else None,
        wan.TextEncoder(args.wan, dtype, device),
    )
    cache.write(data, args.out, encoders, dtype, rank, ranks or 1)
    say(data)
    try:
        made = cache.open_cache(args.out)
    except FileNotFoundError:  # another rank is not done yet
        return None
    print(*made.rejected, f"{args.out}: {len(made.samples)} samples, {len(made.rejected)} rejected", sep="\n")
    return len(made.samples)


def main() -> None:
    args = options()
    geometry = geometry_of(args.wan, args.frames, args.size, args.fps)
    body = Body.load(args.body) if args.body else puppet.body()
    if args.wan and not args.body and parse(args.spec)[0] not in ("puppet", "cache"):
        print("no --body: joints are the puppet's, not SMPL's")
    if args.verb == "check":
        usable = check(args.spec, geometry, body, args.force)
    elif args.verb == "preview":
        usable = picture(args.spec, geometry, body, args.out, args.force)
    elif args.wan is None:
        raise ValueError("cache needs --wan FOLDER, the Wan that encodes videos and texts")
    else:
        usable = store(args, geometry, body)
    sys.exit(1 if usable == 0 else 0)


if __name__ == "__main__":
    files.run(main)

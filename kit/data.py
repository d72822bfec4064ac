"""What one training step sees, as a function of (seed, step): task, clips, noise.

Nothing here depends on how many processes run: the global batch is numbered 0 … batch-1, every sample
draws from its own (seed, step, sample), and a rank takes its slice of the numbers.

    python -m kit.data check SPEC                             read everything, say what is wrong
    python -m kit.data preview SPEC --out FILE.png            skeletons over frames
    python -m kit.data cache SPEC --wan FOLDER --out DIR      latents, text features and motion, made once
"""

import argparse
import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from flow import Draw, Task, shift_time
from kit import cache, cli, puppet, wan
from kit.body import Body
from kit.datasets import open_dataset, parse, puppet_motion, read_item  # noqa: F401 (for callers)
from kit.geometry import Geometry, geometry
from kit.preview import preview
from kit.sources import Read, Source, open_sources  # noqa: F401 (for callers)
from motion_tokens import motion_statistics

# paper is silent: how often text, and condition and text, are dropped
DROP_TEXT = 0.1  # share of samples trained without their text
DROP_BOTH = 0.1  # share of conditional steps trained without condition and text
BLOCK = 1024  # positions in which every source has exactly its share
STATISTICS_CLIPS = 2048
PREVIEWED = 4  # clips in a preview


def rng(*key: int | str) -> torch.Generator:
    """A generator that is a pure function of its key, such as ("noise", seed, step, sample)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _integer(*key: int | str) -> int:
    return int(torch.randint(2**62, (1,), generator=rng(*key)))


# ---------------------------------------------------------------- order: which sample has which position


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of BLOCK positions each source gets: its weight's, to the nearest, but at least one."""
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    given = [max(1, int(share)) for share in exact]
    for j in sorted(range(len(exact)), key=lambda j: given[j] - exact[j])[: max(0, BLOCK - sum(given))]:
        given[j] += 1
    given[given.index(max(given))] -= sum(given) - BLOCK  # what the smallest sources got too much
    return tuple(given)


@functools.lru_cache(maxsize=4)
def _block(seed: int, block: int, shares: tuple[int, ...]) -> list[tuple[int, int]]:
    """Of each position of a block its source, and how often that source came before in the block."""
    sources = [j for j, share in enumerate(shares) for _ in range(share)]
    seen, places = [0] * len(shares), []
    for k in torch.randperm(BLOCK, generator=rng("block", seed, block)).tolist():
        places.append((sources[k], seen[sources[k]]))
        seen[sources[k]] += 1
    return places


@functools.lru_cache(maxsize=16)
def _epoch(seed: int, source: int, epoch: int, count: int) -> Tensor:
    """The order of a source's samples in an epoch."""
    return torch.randperm(count, generator=rng("epoch", seed, source, epoch))


def locate(sources: Sequence[Source], seed: int, position: int) -> tuple[int, int | None]:
    """The source at a position, counted over all steps and ranks, and its sample's number (None if endless).

    A source has its share of every block of positions, and comes to each of its samples once an epoch.
    """
    share = shares([source.weight for source in sources])
    block, place = divmod(position, BLOCK)
    j, before = _block(seed, block, share)[place]
    if sources[j].count is None:
        return j, None
    epoch, place = divmod(block * share[j] + before, sources[j].count)
    return j, int(_epoch(seed, j, epoch, sources[j].count)[place])


def _gather(
    sources: Sequence[Source],
    drawn: Sequence[tuple[int, int]],
    frames: int,
    video: bool,
    codec: puppet.Codec | None,
    device: torch.device,
) -> Read:
    """These samples (source, number) in their order; each source is read once."""
    rows, parts = [], []
    for j in sorted({j for j, _ in drawn}):
        mine = [row for row, (source, _) in enumerate(drawn) if source == j]
        parts.append(sources[j].read([drawn[row][1] for row in mine], frames, video, codec, device))
        rows += mine
    order = torch.tensor(rows).argsort()
    texts = [text for part in parts for text in part.texts]
    return Read(
        torch.cat([part.motion for part in parts])[order.to(device)],
        torch.cat([part.latents for part in parts])[order.to(device)] if video else None,
        [texts[k] for k in order],
    )


def statistics(sources: Sequence[Source], seed: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation (235,) of motion, from 2,048 samples in the sources' shares."""
    seeds = torch.randint(2**62, (STATISTICS_CLIPS,), generator=rng("statistics", seed)).tolist()
    drawn = []
    for position in range(STATISTICS_CLIPS):
        j, number = locate(sources, seed, position)
        drawn.append((j, seeds[position] if number is None else number))
    frames = min(source.frames for source in sources)
    return motion_statistics(_gather(sources, drawn, frames, False, None, torch.device("cpu")).motion)


# ---------------------------------------------------------------- the batch


class Batch(NamedTuple):
    """One rank's share of one step, ready for flow.loss."""

    video: Tensor | None  # (b c t h w) latents; None in stage 1
    motion: Tensor  # (b f 235) normalised
    text: Tensor  # (b l text_dim)
    task: Task
    draw: Draw


def draw_task(seed: int, step: int, stage: int) -> tuple[Task, bool]:
    """The step's task, the same for every rank, and whether its condition and text are dropped."""
    if stage == 1:
        return Task.MOTION_ONLY, False
    generator = rng("task", seed, step)
    task = Task(int(torch.randint(3, (1,), generator=generator)))
    return task, task is not Task.JOINT and torch.rand(1, generator=generator).item() < DROP_BOTH


def batch(
    sources: Sequence[Source],
    mean: Tensor,
    std: Tensor,
    *,
    seed: int,
    step: int,
    stage: int,
    frames: int,
    batch: int,
    samples: range,
    device: torch.device,
    codec: puppet.Codec | None = None,
    shift: float = 1.0,
    shared_noise: bool = False,
    video_only: bool = False,
) -> Batch:
    """The samples numbered `samples`, of the `batch` samples of step `step`, on `device`.

    Each modality has a noise level of its own, or both have the same if `shared_noise`; `shift` is
    flow.shift_time's. Stage 2 uses the sources with video; `codec` makes latents of what is not cached.
    `video_only` takes the task VIDEO_ONLY instead of the step's. ValueError if no source has video, or
    one has fewer frames than asked for.
    """
    task, drop_both = (Task.VIDEO_ONLY, False) if video_only else draw_task(seed, step, stage)
    sources = [source for source in sources if stage == 1 or source.paired]
    if not sources:
        raise ValueError("stage 2 needs video, and no data set has any: add paired clips, or train stage 1")
    if frames > (shortest := min(source.frames for source in sources)):
        raise ValueError(f"{frames} frames are asked for, but there is a data set of {shortest}")
    drawn = []
    for i in samples:
        j, number = locate(sources, seed, step * batch + i)
        drawn.append((j, _integer("clip", seed, stage, step, i) if number is None else number))
    motion, video, texts = _gather(sources, drawn, frames, stage == 2, codec, device)
    motion = (motion - mean) / std

    generators = [rng("noise", seed, stage, step, i) for i in samples]
    drop = [drop_both or torch.rand(1, generator=g).item() < DROP_TEXT for g in generators]

    def noise_level() -> Tensor:
        return shift_time(torch.cat([torch.rand(1, generator=g) for g in generators]), shift).to(device)

    def noise_like(x: Tensor | None) -> Tensor | None:
        return (
            None
            if x is None
            else torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(device)
        )

    # paper is silent: in joint training each modality has a noise level of its own
    draw = Draw(noise_like(video), noise_like(motion), noise_level(), noise_level())
    if shared_noise:
        draw = draw._replace(t_motion=draw.t_video)
    text = torch.stack([sources[0].null_text.float()] * len(samples))
    for row, captions, dropped, i in zip(text, texts, drop, samples, strict=True):
        if captions and not dropped:
            features = captions[_integer("caption", seed, stage, step, i) % len(captions)]
            row[: len(features)] = features
            row[len(features) :] = 0
    return Batch(video, motion, text.to(device), task.unconditional if drop_both else task, draw)


# ---------------------------------------------------------------- the command line


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kit.data", description="Check, see and cache data sets.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    shape = argparse.ArgumentParser(add_help=False)
    kinds = "puppet:COUNT, amass:DIR, humanml3d:DIR+AMASS, clips:DIR; to be checked also cache:DIR"
    shape.add_argument("spec", metavar="SPEC", help=kinds)
    shape.add_argument("--wan", type=Path, metavar="FOLDER", help="the backbone (default: the puppet's)")
    shape.add_argument("--frames", type=int, metavar="N", help="of a sample, 4n+1 (default: the backbone's)")
    shape.add_argument("--size", type=cli.size, metavar="HxW", help="of a video (default: the backbone's)")
    shape.add_argument("--fps", type=float, metavar="F", help="frames a second (default: the backbone's)")
    shape.add_argument("--body", type=Path, metavar="FILE", help="an SMPL model (default: the puppet's body)")
    verbs.add_parser("check", parents=[shape], help="read everything and say what is wrong")
    picture = verbs.add_parser("preview", parents=[shape], help="draw skeletons over frames")
    picture.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    store = verbs.add_parser("cache", parents=[shape], help="make latents and text features once")
    store.add_argument("--out", type=Path, required=True, metavar="DIR")
    store.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of what is stored")
    store.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def check(spec: str, shape: Geometry, body: Body) -> int:
    """Read a whole data set and print all that is wrong with it -> how many samples are usable."""
    kind, where, _ = parse(spec)
    if kind == "cache":
        cached = cache.open_cache(where)
        damaged = cache.damaged_samples(cached)
        rejected, count = cached.rejected + damaged, len(cached.samples) - len(damaged)
    else:
        data, count = open_dataset(spec, shape, body), 0
        rejected = list(data.problems)
        for item in tqdm(range(len(data.names)), desc=spec, unit="item"):
            count += len(read_item(data, item, lambda sample: sample.name, rejected))
    print("\n".join([*rejected, f"{spec}: {count} samples accepted, {len(rejected)} rejected"]))
    return count


def picture(spec: str, shape: Geometry, body: Body, out: Path) -> int:
    """Draw the first sample of a few items, spread over the data set -> how many."""
    data, samples = open_dataset(spec, shape, body), []
    rejected = list(data.problems)
    for item in torch.linspace(0, len(data.names) - 1, min(PREVIEWED, len(data.names))).long().tolist():
        samples += read_item(data, item, lambda sample: sample, rejected)[:1]
    if samples:
        preview(out, samples)
    print("\n".join([*rejected, f"{out}: {len(samples)} of {len(data.names)} items"]))
    return len(samples)


def store(args: argparse.Namespace, shape: Geometry, body: Body) -> int | None:
    """Make one rank's share of a cache -> how many samples it has, None if another rank is still at it."""
    rank, ranks, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = f"cuda:{local}" if args.device == "cuda" else args.device
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    data = open_dataset(args.spec, shape, body)
    if not data.names:
        raise ValueError(f"{args.spec}: nothing usable; {'; '.join(data.problems) or 'it is empty'}")
    cache.prepare(args.out, cache.settings_of(args.spec, data, shape, args.dtype, args.wan, body))
    encoders = cache.Encoders(
        wan.VideoVAE(args.wan, device=device).encode if data.paired else None,
        wan.TextEncoder(args.wan, dtype, device),
    )
    if not cache.write(data, args.out, encoders, dtype, rank, ranks or 1):
        return None
    made = cache.open_cache(args.out)
    counts = f"{args.out}: {len(made.samples)} samples, {len(made.rejected)} rejected"
    if made.rejected:
        counts += "; what is repaired is read again only into another --out"
    print("\n".join([*made.rejected, counts]))
    return len(made.samples)


def main() -> None:
    args = options()
    shape = geometry(args.wan, args.frames, args.size, args.fps)
    body = Body.load(args.body) if args.body else puppet.body()
    if args.verb == "check":
        usable = check(args.spec, shape, body)
    elif args.verb == "preview":
        usable = picture(args.spec, shape, body, args.out)
    elif args.wan is None:
        raise ValueError("cache needs --wan FOLDER, the Wan whose latents and text features are wanted")
    else:
        usable = store(args, shape, body)
    sys.exit(1 if usable == 0 else 0)


if __name__ == "__main__":
    cli.run(main)

"""Which clips one training step sees, as a function of (seed, stage, step).

Nothing here depends on how many processes run: the global batch is numbered 0 … batch-1, every sample
draws from its own (seed, stage, step, sample), and a rank takes its slice of the numbers.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dual_dit import DualDiT
from kit import puppet
from kit.data.sources import Read, Source
from kit.devices import upload
from motion_tokens import motion_statistics

T = TypeVar("T")
BLOCK = 1024  # positions in which every source has exactly its share
STATISTICS_CLIPS = 2048
CLIPS_AT_ONCE = 1024  # of the puppet, made together by a GPU


def rng(*key: int | str) -> torch.Generator:
    """A generator that is a pure function of its key, such as ("clip", seed, stage, step, sample)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _integer(*key: int | str) -> int:
    return int(torch.randint(2**62, (1,), generator=rng(*key)))


# ---------------------------------------------------------------- order: which sample has which position


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of BLOCK positions each source gets: at least one; the largest source absorbs the rounding."""
    counts = [max(1, round(weight / sum(weights) * BLOCK)) for weight in weights]
    counts[counts.index(max(counts))] += BLOCK - sum(counts)
    return tuple(counts)


@functools.lru_cache(maxsize=4)
def _block(seed: int, block: int, shares: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each position of a block: its source, and how many earlier positions have the same source."""
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

    A source has its share of every block of positions, and each of its samples comes once an epoch.
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
    """The samples `drawn`, (source, number) each, in this order; each source is read once."""
    rows, parts = [], []
    for j in sorted({j for j, _ in drawn}):
        mine = [row for row, (source, _) in enumerate(drawn) if source == j]
        parts.append(sources[j].read([drawn[row][1] for row in mine], frames, video, codec, device))
        rows += mine
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor(rows).argsort()
    index = upload(order, device)
    texts = [text for part in parts for text in part.texts]
    return Read(
        torch.cat([part.motion for part in parts])[index],
        torch.cat([part.latents for part in parts])[index] if video else None,
        [texts[k] for k in order],
    )


def statistics(sources: Sequence[Source], seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation (235,) of motion, from so many samples, mixed as in training."""
    seeds = torch.randint(2**62, (count,), generator=rng("statistics", seed)).tolist()
    drawn = []
    for position in range(count):
        j, number = locate(sources, seed, position)
        drawn.append((j, seeds[position] if number is None else number))
    frames = min(source.frames for source in sources)
    return motion_statistics(_gather(sources, drawn, frames, False, None, torch.device("cpu")).motion)


# ---------------------------------------------------------------- the batch


class Batch(NamedTuple):
    """One rank's share of one step, as flow.loss takes it."""

    video: Tensor | None  # (b c T h w) latents; None in stage 1
    motion: Tensor  # (b f 235) normalised
    text: Tensor  # (b l text_dim)
    null_text: Tensor  # (l text_dim)


class Wanted(NamedTuple):
    """Samples of one step that become one Batch."""

    stage: int
    step: int
    frames: int
    samples: range  # their numbers in the step's batch


def read(
    sources: Sequence[Source],
    mean: Tensor,
    std: Tensor,
    wanted: Sequence[Wanted],
    *,
    seed: int,
    batch: int,
    device: torch.device,
    codec: puppet.Codec | None = None,
) -> list[Batch]:
    """A Batch on `device` for each of `wanted`, all of one stage and length; a step has `batch` samples.

    Stages 0 and 2 use the sources with video; `codec` makes latents of what is not cached.
    """
    stage, _, frames, _ = wanted[0]
    paired = stage != 1
    sources = [source for source in sources if source.paired or not paired]
    places = [(step, i) for _, step, _, samples in wanted for i in samples]
    drawn = []
    for step, i in places:
        j, number = locate(sources, seed, step * batch + i)
        drawn.append((j, _integer("clip", seed, stage, step, i) if number is None else number))
    motion, video, texts = _gather(sources, drawn, frames, paired, codec, device)
    chosen = [
        captions[_integer("caption", seed, stage, step, i) % len(captions)] if captions else None
        for captions, (step, i) in zip(texts, places, strict=True)
    ]
    text = upload(padded([*chosen, None], sources[0].null_text.float()), device)
    *text, null_text = text.split([*(len(part.samples) for part in wanted), 1])
    sizes = [len(x) for x in text]
    video = video.split(sizes) if paired else [None] * len(wanted)
    motion = ((motion - mean) / std).split(sizes)
    return [Batch(*parts, null_text[0]) for parts in zip(video, motion, text, strict=True)]


def padded(features: Sequence[Tensor | None], null_text: Tensor) -> Tensor:
    """Features of captions (tokens text_dim), padded with zeros, null_text for None -> (n l text_dim)."""
    text = torch.stack([null_text] * len(features))
    for row, caption in zip(text, features, strict=True):
        if caption is not None:
            row[: len(caption)] = caption
            row[len(caption) :] = 0
    return text


def stream(
    sources: Sequence[Source],
    model: DualDiT,
    steps: Iterable,
    first: int,
    parts: Sequence[range],
    *,
    seed: int,
    batch: int,
    device: torch.device,
    codec: puppet.Codec | None,
) -> Iterator[Batch]:
    """A batch for each of `parts`, ranges of samples, of each step (run.Step) from `first` on.

    On a GPU the puppet's clips of many steps are made together, with as many kernel launches as for one
    step. While a GPU trains a Wan, a thread reads the cache.
    """
    wanted = (
        Wanted(now.stage, step, now.frames, samples) for step, now in enumerate(steps) for samples in parts
    )
    on_gpu, puppets = device.type == "cuda", codec is not None
    at_once = max(1, CLIPS_AT_ONCE // batch) if on_gpu and puppets else 1  # steps
    # groups begin at the same steps after a resume: a GPU's rounding depends on the number of clips
    groups = (list(x) for _, x in groupby(wanted, lambda w: (w.stage, w.frames, w.step // at_once)))
    groups = (group for group in groups if group[-1].step >= first)
    where = {"seed": seed, "batch": batch, "device": device, "codec": codec}
    made = ((group, read(sources, model.motion_mean, model.motion_std, group, **where)) for group in groups)
    for group, found in _one_ahead(made) if on_gpu and not puppets else made:
        yield from (clips for part, clips in zip(group, found, strict=True) if part.step >= first)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """A thread makes the next item while this one is in use."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item

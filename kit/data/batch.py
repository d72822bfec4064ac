"""What one training step sees, as a function of (seed, step): task, clips, noise.

Nothing here depends on how many processes run: the global batch is numbered 0 … batch-1, every sample
draws from its own (seed, step, sample), and a rank takes its slice of the numbers.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flow import Draw, Task, shift_time
from kit import puppet
from kit.data.sources import Read, Source
from motion_tokens import motion_statistics

# paper is silent: how often text, and condition and text, are dropped
DROP_TEXT = 0.1  # share of samples trained without their text
DROP_BOTH = 0.1  # share of conditional steps trained without condition and text
BLOCK = 1024  # positions in which every source has exactly its share
STATISTICS_CLIPS = 2048


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

"""What one training step sees, as a function of (seed, step): task, clips, noise.

Nothing here depends on how many processes run: the global batch is numbered 0 … batch-1, every sample
draws from its own (seed, step, sample), and a rank takes its slice of the numbers.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from flow import Draw, Task, shift_time
from kit import puppet
from motion_tokens import encode_smpl

SHIFT = 3.0  # of the timestep, in training and sampling
DROP_TEXT = 0.1  # share of samples trained without their text
DROP_BOTH = 0.1  # share of conditional steps trained without condition and text


def rng(*key: int | str) -> torch.Generator:
    """A generator that is a pure function of its key, such as ("noise", seed, step, sample)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


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


def puppet_motion(clips: puppet.Clips) -> Tensor:
    """Motion vectors (b f 235) of puppet clips, in their camera's frame, not normalised."""
    body = puppet.body(clips.transl.device)
    return encode_smpl(clips.global_orient, clips.body_pose, clips.betas, clips.transl, body)


def puppet_batch(
    codec: puppet.Codec,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int,
    step: int,
    stage: int,
    frames: int,
    samples: range,
    device: torch.device,
) -> Batch:
    """The samples numbered `samples` of step `step`, rendered and encoded on `device`."""
    task, drop_both = draw_task(seed, step, stage)
    seeds = [int(torch.randint(2**62, (1,), generator=rng("clip", seed, stage, step, i))) for i in samples]
    clips = puppet.clips(seeds, frames=frames, device=device)
    motion = (puppet_motion(clips) - mean) / std
    video = codec.encode(puppet.render(clips.joints, clips.betas, clips.shirt)[0]) if stage == 2 else None

    generators = [rng("noise", seed, stage, step, i) for i in samples]
    drop = [drop_both or torch.rand(1, generator=g).item() < DROP_TEXT for g in generators]
    captions = ["" if dropped else caption for caption, dropped in zip(clips.caption, drop, strict=True)]
    t = shift_time(torch.cat([torch.rand(1, generator=g) for g in generators]), SHIFT).to(device)

    def noise_like(x: Tensor | None) -> Tensor | None:
        return (
            None
            if x is None
            else torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(device)
        )

    # paper is silent: in joint training both modalities have the same noise level, as in sampling
    draw = Draw(noise_like(video), noise_like(motion), t, t)
    text = puppet.encode_text(captions).to(device)
    return Batch(video, motion, text, task.unconditional if drop_both else task, draw)

"""From a condition and a seed to samples: noise in, what the network makes of it out, in the data's units."""

import torch
from torch import Tensor
from tqdm import tqdm

import flow
from dual_dit import DualDiT
from flow import Role, Task
from kit import data, puppet
from motion_tokens import MOTION_DIM

CHUNK = 16  # puppet clips at a time


def denoise(
    model: DualDiT,
    task: Task,
    text: Tensor,
    null_text: Tensor,
    seed: int,
    grid: tuple[int, int, int],
    latents: Tensor | None = None,
    motion: Tensor | None = None,
    bf16: bool = False,
    **sampling,
) -> tuple[Tensor | None, Tensor | None]:
    """Sample a batch of one task -> latents (b c t h w) and motion (b f 235), not normalised.

    text (b l text_dim), grid (t h w) of the latents; `latents` or `motion` is the condition, in the same
    units. It comes back as it was given, an absent modality as None. `bf16` is autocast's, for a network
    that is stored in fp32; `sampling` goes to flow.sample.
    """
    b, device = len(text), model.motion_mean.device
    frames = 4 * (grid[0] - 1) + 1
    generator = data.rng("sample", seed)  # on the CPU, so that a seed means the same on every device
    x_video = torch.randn((b, model.config.channels, *grid), generator=generator).to(device)
    x_motion = torch.randn((b, frames, MOTION_DIM), generator=generator).to(device)
    if task.video is Role.CLEAN:
        x_video = latents.to(device)
    if task.motion is Role.CLEAN:
        x_motion = (motion.to(device) - model.motion_mean) / model.motion_std
    x_video = None if task.video is Role.ABSENT else x_video
    x_motion = None if task.motion is Role.ABSENT else x_motion
    given = model, x_video, x_motion, text.to(device), null_text.to(device), task
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        result = flow.sample(*given, **sampling)
    if task.motion is Role.NOISY:
        motion = result.motion * model.motion_std + model.motion_mean
    return result.video, motion if task.motion is not Role.ABSENT else None


def generate_all(
    model: DualDiT,
    codec: puppet.Codec,
    clips: puppet.Clips,
    task: Task,
    video: Tensor,
    motion: Tensor,
    bf16: bool,
    **sampling,
) -> tuple[Tensor, Tensor | None]:
    """Samples, some at a time, of these clips' captions, given their video or motion if the task is.

    -> video (n 3 f h w), motion (n f 235) or None.
    """
    latents, parts = codec.encode(video), []
    for start in tqdm(range(0, len(video), CHUNK), desc=task.name.lower()):
        part = slice(start, start + CHUNK)
        text, null_text = (
            puppet.encode_text(texts) for texts in (clips.caption[part], [""] * len(latents[part]))
        )
        given = {"latents": latents[part], "motion": motion[part], "grid": latents.shape[2:], "seed": start}
        made, moved = denoise(model, task, text, null_text, **given, bf16=bf16, **sampling)
        parts.append((codec.decode(made), moved))
    return tuple(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))

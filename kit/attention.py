"""What motion and video tokens attend to: the joint attention, recorded, and its 4:1 share.

The codec is causal: latent 0 holds frame 0, latent k holds frames 4k-3 … 4k. MVS-RoPE puts motion frame f at
time f/4, so frame 4k stands on its latent exactly and the others between two. Alignment is measured as the
share of a frame's attention to video that falls on the latent that holds it and, the other way, the share of
a latent's attention to motion that falls on the frames it holds. Chance is 1/T for both.

Axes: b batch, f motion frames, i token in a frame (51), T latent frames, n tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

import dual_dit
from dual_dit import DualDiT
from flow import Task
from rope import TOKENS_PER_FRAME, latent_of

NOISE = 0.5  # noise level of generated modalities while attention is recorded
ROWS = 256  # queries at a time: all of a Wan's do not fit in memory
# queries and keys (b heads n k), and the number of video tokens, which come first -> what is kept
Read = Callable[[Tensor, Tensor, int], Tensor]

# ---------------------------------------------------------------- the recorder


@torch.no_grad()
def record(
    model: DualDiT, video: Tensor, motion: Tensor, text: Tensor, task: Task, seed: int, read: Read
) -> Tensor:
    """One call of the network on half noised data -> (layers ...), what `read` keeps of each layer.

    video (b c T h w) clean latents, motion (b f 235) normalised. A condition enters clean, as in sampling.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU: a seed means the same on every device
    inputs, times = [], []
    for x, task_given_x in ((video, Task.VIDEO_TO_MOTION), (motion, Task.MOTION_TO_VIDEO)):
        t = 0.0 if task == task_given_x else NOISE
        noise = torch.randn(x.shape, generator=generator).to(x)
        inputs.append((1 - t) * x + t * noise)
        times.append(torch.full((len(x),), t, device=x.device))
    _, ph, pw = model.config.patch
    T, H, W = video.shape[2:]
    video_tokens = T * (H // ph) * (W // pw)
    tokens = video_tokens + motion.shape[1] * TOKENS_PER_FRAME
    layers, attention = [], dual_dit.attention

    def listen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # the joint attention of each block; in cross-attention, queries come from one stream only
        if q.shape[2] == k.shape[2] == tokens:
            layers.append(read(q, k, video_tokens))
        return attention(q, k, v)

    dual_dit.attention = listen
    try:
        with torch.autocast(video.device.type, enabled=False):
            model(*inputs, *times, text, task)
    finally:
        dual_dit.attention = attention
    return torch.stack(layers)


def weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of q·k / sqrt(head size) in fp32, mean over clips and heads -> (queries, keys)."""
    return (q.float() @ k.float().mT / q.shape[-1] ** 0.5).softmax(-1).mean(dim=(0, 1))


def motion_to_video(
    model: DualDiT, video: Tensor, motion: Tensor, text: Tensor, task: Task, seed: int = 0
) -> Tensor:
    """Attention of a frame's tokens to each latent -> (layers f T), mean over tokens, heads and clips.

    Arguments as in `record`. A frame's sum over T is below 1: the rest falls on motion.
    """

    def read(q: Tensor, k: Tensor, n: int) -> Tensor:
        parts = [weights(rows, k)[:, :n] for rows in q[:, :, n:].split(ROWS, dim=2)]
        parts = [reduce(part, "rows (T hw) -> rows T", "sum", T=video.shape[2]) for part in parts]
        return reduce(torch.cat(parts), "(f i) T -> f T", "mean", i=TOKENS_PER_FRAME)

    return record(model, video, motion, text, task, seed, read)


def video_to_motion(
    model: DualDiT, video: Tensor, motion: Tensor, text: Tensor, task: Task, seed: int = 0
) -> Tensor:
    """Attention of a latent's tokens to each motion frame -> (layers T f), else as above."""

    def read(q: Tensor, k: Tensor, n: int) -> Tensor:
        parts = [weights(rows, k)[:, n:] for rows in q[:, :, :n].split(ROWS, dim=2)]
        parts = [reduce(part, "rows (f i) -> rows f", "sum", i=TOKENS_PER_FRAME) for part in parts]
        return reduce(torch.cat(parts), "(T hw) f -> T f", "mean", T=video.shape[2])

    return record(model, video, motion, text, task, seed, read)


# ---------------------------------------------------------------- maps, and the 4:1 share


def holds(f: int) -> Tensor:
    """(f T) bool: which latent holds a frame (rope.latent_of)."""
    return F.one_hot(latent_of(torch.arange(f))).bool()


def shared_out(mass: Tensor) -> Tensor:
    """How a frame's attention to video, or a latent's to motion, is shared out: the last axis sums to 1."""
    return F.normalize(mass, p=1, dim=-1)


def frame_share(maps: Tensor) -> Tensor:
    """Mean share that frames give to the latent that holds them: (layers f T) -> (layers,)."""
    return (maps * holds(maps.shape[1]).to(maps)).sum(-1).mean(-1)


def latent_share(maps: Tensor) -> Tensor:
    """Mean share that latents give to the frames that they hold: (layers T f) -> (layers,)."""
    return (maps * holds(maps.shape[2]).T.to(maps)).sum(-1).mean(-1)


def attention_to_latents(
    model: DualDiT, latents: Tensor | None, motion: Tensor | None, text: Tensor, task: Task
) -> Tensor | None:
    """How the frames of one sample share out their attention to its video: (layers f T), on the CPU.

    None where video or motion is absent.
    latents (b c T h w) and motion (b f 235), not normalised, as sample.denoise gives them.
    """
    if latents is None or motion is None:
        return None
    motion = (motion.to(model.motion_mean) - model.motion_mean) / model.motion_std
    return shared_out(motion_to_video(model, latents, motion, text.to(motion.device), task)).cpu()

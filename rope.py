"""MVS-RoPE: motion-video synchronized rotary positions, one clock for both (paper, section 3.2).

A rotary embedding turns a token's position into rotation angles of its query and key, so that their
product depends only on the difference of two positions. The rotation needs to know nothing about
grids: a token has a position (time, height, width), and that is data. All the paper adds to Wan is a
choice of positions for the motion tokens:

    video token  (t, h, w)         sits at  (t,    h,     w)       as in Wan
    motion token i of frame f      sits at  (f/4,  H + i, W + i)   beyond the H x W grid, on its diagonal

Video latents are four times shorter in time than motion, so f/4 makes motion frame 4t and video
latent t contemporaries: the attention between them is strongest along a 4:1 diagonal.
"""

import torch
from einops import rearrange
from torch import Tensor

TOKENS_PER_FRAME = 51  # motion tokens of one frame (motion_tokens.py tells what each of them holds)
FRAMES_PER_LATENT = 4  # temporal stride of the video codec


def video_positions(t: int, h: int, w: int) -> Tensor:
    """Positions of a t x h x w grid of video tokens, w fastest -> (t*h*w, 3) float64."""
    axes = [torch.arange(n, dtype=torch.float64) for n in (t, h, w)]
    grid = torch.meshgrid(*axes, indexing="ij")
    return rearrange(list(grid), "axes t h w -> (t h w) axes")


def motion_positions(f: int, h: int, w: int, synced: bool = True) -> Tensor:
    """Positions of f frames of motion tokens beside an h x w video grid -> (f*51, 3) float64.

    `synced=False` is the ablation, (f, i, i): time runs four times too fast and the diagonal lies
    inside the video grid, where positions collide.
    """
    frame = torch.arange(f, dtype=torch.float64)
    token = torch.arange(TOKENS_PER_FRAME, dtype=torch.float64)
    frame, token = torch.meshgrid(frame, token, indexing="ij")
    synced_axes = [frame / FRAMES_PER_LATENT, h + token, w + token]
    axes = synced_axes if synced else [frame, token, token]
    return rearrange(axes, "axes f i -> (f i) axes")


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's channels rotate by time, by height and by width (Wan's split)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's rotation angles: (n, 3) -> two tensors (n, head_dim/2), float32.

    Each axis owns its share of the channel pairs, with frequencies from 1 down to 1/theta. Angles are
    computed in float64: fractional times and long clips keep their precision.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"head_dim must be an even number of at least 6 (three axes of pairs), got {head_dim}"
        )
    angles = []
    for axis, dim in enumerate(axis_dims(head_dim)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(torch.outer(positions[:, axis].double(), theta**-exponent))  # (n, dim/2)
    angles = torch.cat(angles, dim=1)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x (b heads n head_dim) by the table's angles, in fp32."""
    # token by token, as projections write and read: in this order of axes nothing is copied
    a, b = rearrange(x.float(), "b heads n (pair two) -> two b n heads pair", two=2)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return rearrange(rotated, "b n heads pair two -> b heads n (pair two)").type_as(x)


if __name__ == "__main__":
    # the logit of equal content: its largest value stands where a motion frame and a video latent meet
    size, (h, w), frames = 64, (8, 8), 9
    ones = torch.ones(1, 1, 1, size)
    video, motion = video_positions((frames - 1) // 4 + 1, h, w), motion_positions(frames, h, w)
    keys = apply_rope(ones.expand(1, 1, len(video), size), *rope_table(video, size))
    queries = apply_rope(ones.expand(1, 1, len(motion), size), *rope_table(motion, size))
    logits = rearrange(queries @ keys.mT, "1 1 (f i) (t hw) -> f t (i hw)", f=frames, hw=h * w).mean(-1)
    print("mean logit of motion frame f and video latent t, of equal content; * where it is largest")
    for f, row in enumerate(logits):
        print(f"f {f} at {f / 4:.2f}  " + "".join(f"{x:9.3f}{'*' if x == row.max() else ' '}" for x in row))

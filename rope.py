"""MVS-RoPE: motion-video synchronized rotary positions, one clock for both (paper, section 3.1).

A rotary embedding turns a token's position into rotation angles of its query and key, so that their
product depends only on the difference of two positions. The rotation takes any positions (time, height,
width); MVS-RoPE is the choice of positions for the motion tokens:

    video token (h, w) of latent k    stands at  (k,    h,     w)       as in Wan
    motion token i of frame f         stands at  (f/4,  H + i, W + i)   on the diagonal beyond the H x W grid

There is one video latent for every four motion frames, so f/4 puts motion frame 4k and video latent k at the
same time. By position alone a frame attends most to the nearest latent; for frame 4k-3 that is latent k-1,
although latent k holds it. Training makes the 4:1 alignment sharp (tests/test_alignment.py).
"""

import torch
from einops import rearrange
from torch import Tensor

TOKENS_PER_FRAME = 51  # motion tokens of one frame (motion_tokens.py tells what each of them holds)
FRAMES_PER_LATENT = 4  # temporal stride of the video codec


def latent_of(frame: Tensor) -> Tensor:
    """The latent that holds a frame: frame 0 is latent 0, frames 4k-3 ... 4k are latent k."""
    return (frame + FRAMES_PER_LATENT - 1) // FRAMES_PER_LATENT


def frames_of(T: int) -> int:
    """Frames that T latents hold: one, then four each."""
    return FRAMES_PER_LATENT * (T - 1) + 1


def video_positions(T: int, H: int, W: int) -> Tensor:
    """Positions of a T x H x W grid of video tokens, W fastest -> (T·H·W, 3) float64."""
    axes = [torch.arange(n, dtype=torch.float64) for n in (T, H, W)]
    return rearrange(list(torch.meshgrid(*axes, indexing="ij")), "axes T H W -> (T H W) axes")


def motion_positions(f: int, H: int, W: int, synced: bool = True, apart: bool = True) -> Tensor:
    """Positions of f frames of motion tokens beside an H x W video grid -> (f·51, 3) float64.

    Two ablations: `synced=False` puts motion at its frame's number instead of a quarter of it; `apart=False`
    puts token i at (i, i) instead of (H + i, W + i), so that tokens of small i share video tokens' positions.
    """
    frame = torch.arange(f, dtype=torch.float64)
    token = torch.arange(TOKENS_PER_FRAME, dtype=torch.float64)
    frame, i = torch.meshgrid(frame, token, indexing="ij")  # each (f 51)
    time = frame / FRAMES_PER_LATENT if synced else frame
    row, column = (H + i, W + i) if apart else (i, i)
    return rearrange([time, row, column], "axes f i -> (f i) axes")


def rope_table(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's rotation angles: (n, 3) -> two tensors (n, head_dim/2), float32.

    Each axis owns its share of the channel pairs, with frequencies from 1 down towards 1/theta. Angles are
    computed in float64: fractional times and long clips keep their precision.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim must be even and at least 6 (three axes of pairs), got {head_dim}")
    side = 2 * (head_dim // 6)  # channels that rotate by height, and as many by width: Wan's split
    angles = []
    for axis, dim in enumerate((head_dim - 2 * side, side, side)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(torch.outer(positions[:, axis].double(), theta**-exponent))  # (n dim/2)
    angles = torch.cat(angles, dim=1)  # (n head_dim/2)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x (b heads n head_dim) by the table's angles, in fp32."""
    # n before heads, the memory layout of the projections: nothing is copied
    a, b = rearrange(x.float(), "b heads n (pair two) -> two b n heads pair", two=2)
    cos, sin = cos[:, None], sin[:, None]  # (n 1 pair)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return rearrange(rotated, "b n heads pair two -> b heads n (pair two)").type_as(x)


if __name__ == "__main__":
    # attention by position alone: every token has the same content
    T, H, W, head_dim = 5, 8, 8, 64
    f = frames_of(T)

    def attention_of_frames(synced: bool) -> Tensor:
        """How a motion frame's attention to video is shared out over the latents: (f T)."""
        ones = torch.ones(1, 1, 1, head_dim)
        video, motion = video_positions(T, H, W), motion_positions(f, H, W, synced)
        k = apply_rope(ones.expand(1, 1, len(video), -1), *rope_table(video, head_dim))
        q = apply_rope(ones.expand(1, 1, len(motion), -1), *rope_table(motion, head_dim))
        p = torch.softmax(q @ k.mT / head_dim**0.5, dim=-1)  # (1 1 f·51 T·H·W)
        return rearrange(p, "1 1 (f i) (T hw) -> f i T hw", f=f, T=T).sum(-1).mean(1)

    print(f"attention of motion frame f to the {T} latents, in %; * the latent that holds the frame")
    print(f"{'f':>4}   {'at f/4, as in MVS-RoPE':40}   at f, not synchronised")
    for frame, rows in enumerate(zip(attention_of_frames(True), attention_of_frames(False), strict=True)):
        own = int(latent_of(torch.tensor(frame)))
        cells = [
            "".join(f"{100 * x:6.1f}{'*' if latent == own else ' '}" for latent, x in enumerate(row))
            for row in rows
        ]
        print(f"{frame:>4}   {cells[0]:40}   {cells[1]}")

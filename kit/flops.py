"""What a call and a training step cost in arithmetic, counted from shapes.

A multiply-add counts as two FLOPs. Element-wise work (norms, gates, RoPE, softmax) is left out: it is
memory traffic, not arithmetic.
"""

import math
from typing import NamedTuple

from dual_dit import DualDiTConfig
from motion_tokens import GROUPS
from rope import TOKENS_PER_FRAME, frames_of


class Tokens(NamedTuple):
    """Sequence lengths of one sample; an absent modality has none."""

    video: int
    motion: int
    text: int


def tokens_of(config: DualDiTConfig, grid: tuple[int, int, int], text: int = 512) -> Tokens:
    """Tokens of a clip whose latents are (T h w)."""
    T, H, W = (size // patch for size, patch in zip(grid, config.patch, strict=True))
    return Tokens(T * H * W, TOKENS_PER_FRAME * frames_of(T), text)


def dual_blocks(config: DualDiTConfig) -> int:
    """How many blocks have a motion expert."""
    return config.layers if config.dual is None else len(config.dual)


def forward_flops(config: DualDiTConfig, tokens: Tokens) -> dict[str, int]:
    """FLOPs of one forward call on one sample, by part; a backward pass costs twice as much."""
    d, dual = config.width, dual_blocks(config)
    video, motion, text = tokens
    through = config.layers * video + dual * motion  # tokens, times the expert blocks that they pass
    read = config.layers * bool(video) + dual * bool(motion)  # how often an expert's block reads the text
    conditioning = text * (config.text_dim + d) * d + (config.freq_dim + 7 * d) * d
    ends = (
        conditioning * (bool(video) + bool(motion))
        + 2 * video * math.prod(config.patch) * config.channels * d
    )
    for count, numbers in GROUPS.values():
        ends += motion // TOKENS_PER_FRAME * count * 2 * (numbers + d) * d
    return {
        "projections": 2 * d * d * (6 * through + 2 * text * read),
        "feed-forward": 4 * d * config.ffn * through,
        "self-attention": 4 * d * (dual * (video + motion) ** 2 + (config.layers - dual) * video**2),
        "cross-attention": 4 * d * text * through,
        "ends": 2 * ends,
    }


def step_flops(config: DualDiTConfig, tokens: Tokens) -> int:
    """FLOPs of a training step on one sample: forward, and backward, twice that; without recomputation."""
    return 3 * sum(forward_flops(config, tokens).values())

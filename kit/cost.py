"""What a call of the network costs, counted from shapes: multiply-adds as two FLOPs, nothing measured.

Element-wise work (norms, gates, RoPE, softmax) is left out: it is memory traffic, not arithmetic.
"""

import math
from typing import NamedTuple

from dual_dit import DualDiTConfig
from motion_tokens import GROUPS
from rope import TOKENS_PER_FRAME


class Tokens(NamedTuple):
    """Sequence lengths of one sample; an absent modality has none."""

    video: int
    motion: int
    text: int


def tokens_of(
    config: DualDiTConfig,
    frames: int,
    size: tuple[int, int],
    stride: int,
    text: int = 512,
    motion: bool = True,
) -> Tokens:
    """Of a clip of this length and size in pixels, at a codec's spatial stride; in time it is 4."""
    _, ph, pw = config.patch
    grid = ((frames - 1) // 4 + 1, size[0] // stride // ph, size[1] // stride // pw)
    return Tokens(math.prod(grid), TOKENS_PER_FRAME * frames * motion, text)


def forward_flops(config: DualDiTConfig, tokens: Tokens) -> dict[str, int]:
    """FLOPs of one forward call on one sample, by part; a backward pass costs twice as much again."""
    d, ffn, layers = config.width, config.ffn, config.layers
    present = [n for n in tokens[:2] if n]
    n = sum(present)
    # the text's keys and values, and its embedding, are computed by each expert that is there
    text_rows = tokens.text * len(present)
    patch = math.prod(config.patch) * config.channels
    per_frame = sum(count * (numbers * d + d * d) for count, numbers in GROUPS.values())
    ends = 2 * (tokens.video * patch * d) + 2 * tokens.motion // TOKENS_PER_FRAME * per_frame
    time = len(present) * (config.freq_dim * d + 7 * d * d)
    return {
        "projections": layers * 2 * d * d * (4 * n + 2 * n + 2 * text_rows),
        "feed-forward": layers * 4 * n * d * ffn,
        "self-attention": layers * 4 * n * n * d,
        "cross-attention": layers * 4 * n * tokens.text * d,
        "ends": 2 * (ends + time + text_rows * (config.text_dim * d + d * d)),
    }

"""A fixed word embedding in place of Wan's text encoder."""

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

TEXT_DIM = 64
TEXT_LEN = 16


@functools.cache
def _code(key: str) -> Tensor:
    """A fixed random vector (64,) of unit variance for a word or a position."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def encode_text(captions: Sequence[str]) -> Tensor:
    """Captions -> (b 16 64): a fixed vector per word plus one per position, zeros after the last word.

    The empty caption is all zeros, the null text of guidance.
    """
    text = torch.zeros(len(captions), TEXT_LEN, TEXT_DIM)
    for row, caption in zip(text, captions, strict=True):
        words = caption.lower().replace(".", " ").replace(",", " ").split()
        if len(words) > TEXT_LEN:
            raise ValueError(f"a caption has at most {TEXT_LEN} words, got {len(words)}: {caption!r}")
        for position, word in enumerate(words):
            row[position] = _code(word) + 0.5 * _code(f"position {position}")
    return text

"""The precision and the attention that suit a machine's processor, and uploads to a device."""

import functools

import torch
from einops import rearrange
from torch import Tensor

import dual_dit

CACHE = 2**23  # bytes of a CPU's cache for the scores of attention


def has_bf16_units(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices in hardware, and so faster than fp32.

    By its type, never by timing it: the same seed gives the same bytes however busy the machine is.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # from Ampere on
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16; precision "auto" does so where the processor has units for it."""
    return precision == "bf16" or (precision == "auto" and has_bf16_units(device))


def use_fast_attention(device: torch.device) -> None:
    """In training, compute attention by plain products where these are faster: on a CPU's bf16 units."""
    if device.type == "cpu" and has_bf16_units(device):
        dual_dit.attention = attention_by_products


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """dual_dit.attention for training in bf16, where scores fit the cache: (b heads n k) -> (b n d).

    On a CPU's bf16 units torch's fused kernel is fast forward but slow backward: both together take up to
    twice as long as with two products and a softmax. Scores are rounded to bf16, and kept.
    """
    scores = q.shape[2] * k.shape[2] * q.element_size()  # bytes, of one head
    # a backward pass needs the scores of all heads of a sample
    if not torch.is_grad_enabled() or q.dtype != torch.bfloat16 or scores * q.shape[1] > CACHE:
        return fused_attention(q, k, v)
    b, heads = len(q), CACHE // scores
    q, k, v = (rearrange(x, "b heads n k -> (b heads) n k") for x in (q * q.shape[-1] ** -0.5, k, v))
    parts = zip(q.split(heads), k.split(heads), v.split(heads), strict=True)
    x = torch.cat([torch.softmax(queries @ keys.mT, dim=-1) @ values for queries, keys, values in parts])
    return rearrange(x, "(b heads) n k -> b n (heads k)", b=b)


fused_attention = dual_dit.attention


# ---------------------------------------------------------------- from the host to a device


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; the host does not wait for a GPU to read it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@functools.cache
def constant(numbers: tuple, device: torch.device) -> Tensor:
    """Constants on a device, uploaded once: the host waits for each such upload."""
    return torch.tensor(numbers, device=device)

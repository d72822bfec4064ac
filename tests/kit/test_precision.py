"""kit/devices.py: what a processor is chooses the attention that trains."""

import pytest
import torch

import dual_dit
from kit import devices, flops

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def qkv(dtype: torch.dtype = torch.bfloat16, b: int = 3, heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((b, heads, n, 8) for n in (12, 10, 10))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("cache", [4 * 240, 7 * 240 + 100, 2**23])  # scores of four heads, of seven, of all
def test_attention_by_products_is_attention(monkeypatch, cache):
    # catches a part left out, heads of two samples mixed, a forgotten scale
    monkeypatch.setattr(devices, "CACHE", cache)
    inputs, weights = qkv(), torch.randn(3, 12, 32)
    q, k, v = (x.double() for x in inputs)
    expected = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    found = devices.attention_by_products(*inputs)
    assert found.dtype == torch.bfloat16 and found.shape == (3, 12, 32)
    assert (found - expected).norm() / expected.norm() < 1e-2
    gradients = (torch.autograd.grad((x * weights).sum(), inputs) for x in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 2e-2


def test_scores_are_kept_once():
    # catches scores kept beside their softmax
    q, k, v = qkv(b=2, heads=3)
    kept = flops.kept_bytes(lambda: devices.attention_by_products(q, k, v), (k, v))
    assert kept == 2 * (2 * 3) * (12 * 10 + 12 * 8)  # the softmax, and the scaled queries


@pytest.mark.parametrize(
    ("dtype", "grad", "cache", "products"),
    [
        (torch.float32, True, 2**23, False),
        (torch.bfloat16, False, 2**23, False),  # without a backward pass the fused kernel is faster
        (torch.bfloat16, True, 4 * 240, True),  # a backward pass needs those of all four, 2 x 12 x 10 bytes
        (torch.bfloat16, True, 4 * 240 - 1, False),
    ],
)
def test_products_train_in_bf16_where_scores_fit(monkeypatch, dtype, grad, cache, products):
    called, fused = [], devices.fused_attention
    monkeypatch.setattr(devices, "fused_attention", lambda *x: called.append(1) or fused(*x))
    monkeypatch.setattr(devices, "CACHE", cache)
    with torch.set_grad_enabled(grad):
        devices.attention_by_products(*qkv(dtype))
    assert bool(called) is not products


@pytest.mark.parametrize(
    "device, units, products", [(CPU, True, True), (CPU, False, False), (GPU, True, False)]
)
def test_only_a_cpu_with_bf16_units_trains_by_products(monkeypatch, device, units, products):
    # elsewhere they take ten times as long as the fused kernel, or more
    monkeypatch.setattr(devices, "has_bf16_units", lambda device: units)
    devices.use_fast_attention(device)
    assert dual_dit.attention is (devices.attention_by_products if products else devices.fused_attention)

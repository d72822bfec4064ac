"""kit/devices.py: what a processor is chooses precision and attention, and chooses the same under load."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY, tiny_model
from processes import forking

import dual_dit
import flow
from bench import memory
from flow import Task
from kit import devices

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
    kept = memory.kept_bytes(lambda: devices.attention_by_products(q, k, v), (k, v))
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


def choice_and_bytes(seed: int) -> tuple[str, str]:
    """In a process of its own: the attention that training chooses, and a hash of a gradient and a sample."""
    torch.set_num_threads(1)
    devices.use_fast_attention(CPU)
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, TINY.channels, 2, 3, 4), (1, 5, 235), (1, 4, TINY.text_dim)
    video, motion, text = (torch.randn(shape, generator=generator) for shape in shapes)
    with torch.autocast("cpu", torch.bfloat16, enabled=devices.has_bf16_units(CPU)):
        model = tiny_model()
        made = flow.sample(model, video, motion, text, 0 * text, Task.JOINT, steps=2)
        drawn = flow.draw(generator, 2, 1)._replace(task=Task.JOINT)
        flow.loss(model, video, motion, text, 0 * text, drawn).total.backward()
    content = [*made, *(p.grad for p in model.parameters() if p.grad is not None)]
    content = torch.cat([x.flatten() for x in content]).numpy()
    return dual_dit.attention.__name__, hashlib.sha256(content).hexdigest()


def test_the_same_seed_gives_the_same_bytes_under_load():
    # catches a choice that a busy machine changes, and with it every sample
    with forking().Pool(1) as pool:
        quiet, other = pool.map(choice_and_bytes, (0, 1))
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        with forking().Pool(2, maxtasksperchild=1) as pool:
            found = pool.map(choice_and_bytes, (0, 0), chunksize=1)
    finally:
        for process in burning:
            process.kill()
            process.wait()
    assert found == [quiet] * 2
    assert other[0] == quiet[0] and other[1] != quiet[1]

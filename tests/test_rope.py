"""rope.py against rotation by complex numbers; where attention looks is test_alignment.py's."""

from itertools import product

import numpy as np
import pytest
import torch

from rope import TOKENS_PER_FRAME, apply_rope, axis_dims, motion_positions, rope_table, video_positions


def reference(x: np.ndarray, positions: np.ndarray, theta: float = 10_000.0) -> np.ndarray:
    """Wan's rotary embedding in complex128: x (n head_dim), positions (n 3)."""
    head_dim = x.shape[-1]
    dims = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    pairs = x[:, 0::2] + 1j * x[:, 1::2]
    turns, first = [], 0
    for axis, dim in enumerate(dims):
        for k in range(dim // 2):
            frequency = theta ** (-2 * k / dim)
            turns.append(pairs[:, first + k] * np.exp(1j * frequency * positions[:, axis]))
        first += dim // 2
    rotated = np.stack(turns, axis=1)
    return np.stack((rotated.real, rotated.imag), axis=-1).reshape(x.shape)


def test_video_positions_count_width_fastest():
    assert video_positions(2, 3, 4).tolist() == [list(p) for p in product(range(2), range(3), range(4))]


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({}, lambda f, i: [f / 4, 3 + i, 5 + i]),
        ({"synced": False}, lambda f, i: [f, 3 + i, 5 + i]),
        ({"apart": False}, lambda f, i: [f / 4, i, i]),
    ],
)
def test_motion_positions_are_frame_by_frame(options, place):
    # catches an ablation that changes two things, and tokens before frames
    positions = motion_positions(6, 3, 5, **options)
    expected = [place(f, i) for f, i in product(range(6), range(TOKENS_PER_FRAME))]
    assert positions.dtype == torch.float64 and positions.tolist() == expected


@pytest.mark.parametrize("head_dim", [6, 12, 16, 64, 128])
def test_rotation_equals_complex_multiplication(head_dim):
    generator = np.random.default_rng(head_dim)
    # long clips and quarter frames: angles taken in float32 would be off by 1e-3 here
    positions = generator.integers(0, 80_000, (40, 3)) / 4
    x = generator.normal(size=(2, 3, 40, head_dim))
    got = apply_rope(torch.from_numpy(x), *rope_table(torch.from_numpy(positions), head_dim))
    assert sum(axis_dims(head_dim)) == head_dim
    assert got.dtype == torch.float64
    for batch, head in product(range(2), range(3)):
        np.testing.assert_allclose(got[batch, head], reference(x[batch, head], positions), atol=2e-6)


def test_theta_sets_the_slowest_frequency():
    positions = np.random.default_rng(0).integers(0, 80, (9, 3)) / 4
    x = np.random.default_rng(1).normal(size=(9, 64))
    table = rope_table(torch.from_numpy(positions), 64, theta=100.0)
    got = apply_rope(torch.from_numpy(x)[None, None], *table)[0, 0]
    np.testing.assert_allclose(got, reference(x, positions, theta=100.0), atol=2e-6)


@pytest.mark.parametrize("head_dim", [12, 64, 128])
def test_logits_depend_on_differences_of_positions_only(head_dim):
    torch.manual_seed(0)
    positions = torch.cat((video_positions(3, 2, 2), motion_positions(2, 2, 2)))
    q, k = torch.randn(2, 1, 2, len(positions), head_dim)

    def logits(offset: tuple[float, float, float]) -> torch.Tensor:
        table = rope_table(positions + torch.tensor(offset, dtype=torch.float64), head_dim)
        return apply_rope(q, *table) @ apply_rope(k, *table).mT

    assert not torch.allclose(logits((0, 0, 0)), q @ k.mT, atol=0.1)
    torch.testing.assert_close(logits((7.25, 30, -4)), logits((0, 0, 0)), atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_keeps_norms_and_dtype_and_runs_in_fp32(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 64).to(dtype)
    table = rope_table(video_positions(5, 2, 2), 64)
    rotated = apply_rope(x, *table)
    assert rotated.dtype == dtype and not torch.equal(rotated, x)
    assert torch.equal(rotated, apply_rope(x.float(), *table).to(dtype))
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(rotated.float().norm(dim=-1), x.float().norm(dim=-1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("head_dim", [0, 2, 4, 7, 65])
def test_impossible_head_size_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"must be even and at least 6.*got {head_dim}"):
        rope_table(video_positions(1, 2, 2), head_dim)

"""rope.py against rotation by complex numbers; where attention looks is test_alignment.py's."""

from itertools import product

import pytest
import torch
from torch import Tensor

from rope import TOKENS_PER_FRAME, apply_rope, motion_positions, rope_table, video_positions


def complex_rotation(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Wan's rotary embedding in complex128: x (... n head_dim), positions (n 3)."""
    k = x.shape[-1]
    dims = (k - 4 * (k // 6), 2 * (k // 6), 2 * (k // 6))
    frequencies = [theta ** -(torch.arange(0, dim, 2).double() / dim) for dim in dims]
    angles = torch.cat([positions[:, axis, None] * f for axis, f in enumerate(frequencies)], dim=1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


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


@pytest.mark.parametrize(
    ("head_dim", "theta"), [(6, 1e4), (12, 1e4), (16, 1e4), (64, 1e4), (64, 100.0), (128, 1e4)]
)
def test_rotation_equals_complex_multiplication(head_dim, theta):
    torch.manual_seed(head_dim)
    # long clips and quarter frames: angles taken in float32 would be off by 1e-3 here
    positions = torch.randint(80_000, (40, 3)).double() / 4
    x = torch.randn(2, 3, 40, head_dim, dtype=torch.float64)
    got = apply_rope(x, *rope_table(positions, head_dim, theta=theta))
    torch.testing.assert_close(got, complex_rotation(x, positions, theta), atol=2e-6, rtol=0)


@pytest.mark.parametrize("head_dim", [12, 64, 128])
def test_logits_depend_on_differences_of_positions_only(head_dim):
    torch.manual_seed(0)
    positions = torch.cat((video_positions(3, 2, 2), motion_positions(2, 2, 2)))
    q, k = torch.randn(2, 1, 2, len(positions), head_dim)

    def logits(offset: tuple[float, float, float]) -> Tensor:
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


@pytest.mark.parametrize("head_dim", [4, 65])
def test_impossible_head_size_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"must be even and at least 6.*got {head_dim}"):
        rope_table(video_positions(1, 2, 2), head_dim)

"""rope.py against rotation by complex numbers; where attention looks is test_alignment.py's."""

from itertools import product

import pytest
import torch

from rope import TOKENS_PER_FRAME, apply_rope, motion_positions, rope_table, video_positions


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
def test_rotation_is_wans_complex_multiplication(head_dim, theta):
    torch.manual_seed(head_dim)
    # long clips and quarter frames: angles taken in float32 would be off by 1e-3 here
    positions = torch.randint(80_000, (40, 3)).double() / 4
    x = torch.randn(2, 3, 40, head_dim, dtype=torch.float64)
    dims = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    frequencies = [theta ** -(torch.arange(0, dim, 2).double() / dim) for dim in dims]
    angles = torch.cat([positions[:, axis, None] * f for axis, f in enumerate(frequencies)], dim=1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    got = apply_rope(x, *rope_table(positions, head_dim, theta=theta))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_rotation_of_bf16_runs_in_fp32():
    x, table = torch.randn(2, 3, 20, 64).bfloat16(), rope_table(video_positions(5, 2, 2), 64)
    rotated = apply_rope(x, *table)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), *table).bfloat16())


@pytest.mark.parametrize("head_dim", [4, 65])
def test_impossible_head_size_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"must be even and at least 6.*got {head_dim}"):
        rope_table(video_positions(1, 2, 2), head_dim)

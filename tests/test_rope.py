from itertools import product

import numpy as np
import pytest
import torch

from rope import TOKENS_PER_FRAME, apply_rope, axis_dims, motion_positions, rope_table, video_positions

GRIDS = [(4, 4), (8, 8), (30, 52)]
FRAMES = [17, 81]


def latents(frames: int) -> int:
    return (frames - 1) // 4 + 1


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


def logits_of_equal_content(frames: int, grid: tuple[int, int], head_dim: int, synced: bool) -> torch.Tensor:
    """Logits (f i t n) of equal queries and keys: every motion token to n places of each latent frame."""
    h, w = grid
    motion = motion_positions(frames, h, w, synced=synced)
    video = video_positions(latents(frames), h, w).unflatten(0, (latents(frames), h * w))
    video = video[:, :: 37 if h * w > 64 else 1]  # every place of a small grid, some of a large one
    content = torch.ones(1, 1, 1, head_dim)
    queries = apply_rope(content, *rope_table(motion, head_dim))[0, 0]
    keys = apply_rope(content, *rope_table(video.flatten(0, 1), head_dim))[0, 0]
    return (queries @ keys.T).view(frames, TOKENS_PER_FRAME, *video.shape[:2])


def peaks(logits: torch.Tensor) -> torch.Tensor:
    """(f i t n) -> the same, bool: is this latent frame the largest of those at the same place?"""
    return logits >= logits.amax(dim=2, keepdim=True) - 1e-3  # far below the step of a quarter latent frame


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("frames", FRAMES)
def test_attention_of_frame_f_peaks_at_latent_f_over_4(frames, grid, head_dim):
    # The place of a token adds the same to the logits of all latent frames, so the peak over time must be
    # right at every place and for every one of the 51 tokens; at f % 4 == 2 two latent frames tie.
    logits = logits_of_equal_content(frames, grid, head_dim, synced=True)
    distance = (torch.arange(frames)[:, None] / 4 - torch.arange(latents(frames))).abs()
    nearest = distance == distance.amin(dim=1, keepdim=True)
    assert nearest.sum(dim=1).tolist() == [2 if f % 4 == 2 else 1 for f in range(frames)]
    assert torch.equal(peaks(logits), nearest[:, None, :, None].expand_as(logits))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_mass_of_a_frame_does_not_depend_on_the_token(head_dim):
    # softmax over all places: the spatial factor cancels, what is left is a function of f/4 - t alone
    logits = logits_of_equal_content(17, (8, 8), head_dim, synced=True)
    mass = (logits / head_dim**0.5).flatten(2).softmax(-1).view_as(logits).sum(-1)  # (f i t)
    assert (mass - mass[:, :1]).abs().max() < 1e-5
    # f = 4 and f = 8 are one latent frame apart: so are their odds
    odds = mass[:, 0].log()
    torch.testing.assert_close(odds[8, 1:] - odds[8, 1], odds[4, :-1] - odds[4, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("frames", FRAMES)
def test_unsynced_attention_peaks_four_times_too_late(frames, grid, head_dim):
    logits = logits_of_equal_content(frames, grid, head_dim, synced=False)
    early = logits[: latents(frames)]
    diagonal = torch.eye(latents(frames), dtype=torch.bool)[:, None, :, None]
    assert torch.equal(peaks(early), diagonal.expand_as(early))


@pytest.mark.parametrize("grid", [(1, 1), (2, 7), *GRIDS])
@pytest.mark.parametrize("frames", [1, 5, *FRAMES])
def test_positions_collide_only_when_unsynced(frames, grid):
    video = video_positions(latents(frames), *grid)
    for synced in (True, False):
        together = torch.cat((video, motion_positions(frames, *grid, synced=synced)))
        assert (len(together.unique(dim=0)) == len(together)) == synced


def test_video_positions_count_width_fastest():
    assert video_positions(2, 3, 4).tolist() == [list(p) for p in product(range(2), range(3), range(4))]


@pytest.mark.parametrize("synced", [True, False])
def test_motion_positions_are_frame_by_frame(synced):
    positions = motion_positions(6, 3, 5, synced=synced)
    frames_and_tokens = product(range(6), range(TOKENS_PER_FRAME))
    expected = [[f / 4, 3 + i, 5 + i] if synced else [f, i, i] for f, i in frames_and_tokens]
    assert positions.dtype == torch.float64 and positions.tolist() == expected


def test_motion_frame_4t_shares_the_time_of_latent_t():
    video = video_positions(21, 2, 3).view(21, 6, 3)[:, 0, 0]
    motion = motion_positions(81, 2, 3).view(81, TOKENS_PER_FRAME, 3)[..., 0]
    assert torch.equal(motion[::4], video[:, None].expand(21, TOKENS_PER_FRAME))


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
    with pytest.raises(ValueError, match=f"even number of at least 6.*got {head_dim}"):
        rope_table(video_positions(1, 2, 2), head_dim)

"""The 4:1 alignment of motion and video, from the clock to the trained network.

Video latents are four times shorter in time than motion. MVS-RoPE (paper, section 3.1) gives both one clock,
by positions alone: motion frame f sits at time f/4. This page checks, from top to bottom,

    the clock      which frames a latent holds, and where a frame's tokens stand
    untrained      equal content: attention by position alone peaks where the clocks agree
    two ablations  off the common clock the share falls to chance; inside the grid, positions collide
    trained        in the shipped weights frames find their latent, and latents their frames

Axes: f motion frames, i token in a frame (51), T H W video tokens.
"""

import pytest
import torch
from einops import rearrange
from torch import Tensor

from flow import Task
from kit import puppet, weights
from kit.attention import frame_share, holds, latent_share, motion_to_video, shared_out, video_to_motion
from kit.backbone import SHIPPED
from kit.data.datasets import puppet_motion
from rope import TOKENS_PER_FRAME, apply_rope, latent_of, motion_positions, rope_table, video_positions
from study.measures import held_out

T = 5
FRAMES = 4 * (T - 1) + 1
GRIDS = [(4, 4), (8, 8), (30, 52)]  # the last: 480x832 pixels
by_grid_and_head = [(grid, head_dim) for grid in GRIDS for head_dim in (64, 128)]

# ---------------------------------------------------------------- the clock


def test_latent_0_holds_one_frame_and_the_others_four():
    # The codec is causal: catches floor(f/4), which would be one early for three frames of four.
    frames = torch.arange(FRAMES)
    assert latent_of(frames).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert holds(FRAMES).sum(dim=0).tolist() == [1, 4, 4, 4, 4]  # measures use the same clock


def test_frame_f_stands_at_f_over_4_and_the_last_of_a_latent_on_it():
    motion = rearrange(motion_positions(FRAMES, 8, 8), "(f i) axes -> f i axes", i=TOKENS_PER_FRAME)
    video = rearrange(video_positions(T, 8, 8), "(T hw) axes -> T hw axes", T=T)
    times = motion[:, :, 0]
    assert torch.equal(times, (torch.arange(FRAMES) / 4).double()[:, None].expand(FRAMES, TOKENS_PER_FRAME))
    assert torch.equal(times[::4, 0], video[:, 0, 0])
    assert torch.equal(times[:, 0].ceil().long(), latent_of(torch.arange(FRAMES)))


# ---------------------------------------------------------------- equal content, nothing trained


def attention(grid: tuple[int, int], head_dim: int, synced: bool = True) -> Tensor:
    """What each motion token gives to each latent when all tokens have the same content: (f i T)."""
    H, W = grid
    motion, video = motion_positions(FRAMES, H, W, synced), video_positions(T, H, W)
    content = torch.ones(1, 1, 1, head_dim)
    q = apply_rope(content.expand(1, 1, len(motion), -1), *rope_table(motion, head_dim))
    k = apply_rope(content.expand(1, 1, len(video), -1), *rope_table(video, head_dim))
    p = torch.softmax(q @ k.mT / head_dim**0.5, dim=-1)  # (1 1 f·51 T·H·W)
    return rearrange(p, "1 1 (f i) (T hw) -> f i T hw", f=FRAMES, T=T).sum(-1)


@pytest.mark.parametrize(("grid", "head_dim"), by_grid_and_head)
def test_attention_by_position_peaks_at_the_nearest_latent(grid, head_dim):
    # For every one of the 51 tokens. Half-way between two latents (f % 4 = 2) both are equally near.
    p = attention(grid, head_dim)
    distance = (torch.arange(FRAMES)[:, None] / 4 - torch.arange(T)).abs()
    nearest = (distance == distance.amin(dim=1, keepdim=True))[:, None].expand_as(p)
    assert torch.equal(p > p.amax(dim=2, keepdim=True) - 1e-4, nearest)


@pytest.mark.parametrize(("grid", "head_dim"), by_grid_and_head)
def test_by_position_alone_the_share_is_a_little_above_chance(grid, head_dim):
    # Position alone only slightly favours the right latent; training does the rest.
    p = attention(grid, head_dim)
    assert (p - p[:, :1]).abs().max() < 1e-5  # row and column cancel: all 51 tokens agree
    assert 1.1 / T < frame_share(p.mean(dim=1)[None]) < 1.5 / T


# ---------------------------------------------------------------- the two ablations


@pytest.mark.parametrize(("grid", "head_dim"), by_grid_and_head)
def test_without_the_common_clock_the_share_falls_to_chance(grid, head_dim):
    p = attention(grid, head_dim, synced=False).mean(dim=1)  # (f T)
    assert frame_share(p[None]).item() == pytest.approx(1 / T, abs=0.02)
    assert p[:T].argmax(dim=1).tolist() == list(range(T))  # frame f at latent f: four times too fast


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("synced", "apart"), [(True, True), (False, True), (True, False)])
def test_positions_collide_only_inside_the_grid(grid, synced, apart):
    video, motion = video_positions(T, *grid), motion_positions(FRAMES, *grid, synced, apart)
    places = {tuple(position) for position in video.tolist()}
    on_video = sum(tuple(position) in places for position in motion.tolist())
    # token i at (i, i) lies in the grid while i < min(H, W), and on a latent in every fourth frame
    assert on_video == (0 if apart else T * min(*grid, TOKENS_PER_FRAME))
    assert len(motion.unique(dim=0)) == len(motion)


# ---------------------------------------------------------------- the shipped weights


def test_the_shipped_weights_have_learned_it_both_ways():
    # The claim for MVS-RoPE: some layer finds what belongs together, where position alone is near chance.
    model, extra = weights.load_weights(SHIPPED)
    clips = held_out(4)
    video = puppet.Codec.from_state(extra).encode(puppet.render(clips.joints, clips.betas, clips.shirt)[0])
    motion = (puppet_motion(clips) - model.motion_mean) / model.motion_std
    no_text = puppet.encode_text([""] * 4)  # video to motion has none
    given = model, video, motion, no_text, Task.VIDEO_TO_MOTION
    to_latents = shared_out(motion_to_video(*given))  # (layers f T)
    to_frames = shared_out(video_to_motion(*given))  # (layers T f)
    chance = 1 / video.shape[2]
    assert frame_share(to_latents).max() >= 3 * chance
    assert latent_share(to_frames).max() >= 2.5 * chance

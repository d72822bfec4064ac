"""kit/puppet/: clips from seeds, their pixels, the codec and the text encoder."""

import pytest
import torch

from kit import puppet
from kit.body import JOINT_NAMES
from kit.puppet.actions import SIDED
from kit.puppet.codec import FIT_SEEDS, LATENT_CHANNELS
from kit.puppet.text import TEXT_DIM
from kit.puppet.world import COLOURS, JOINT, _move, _own_time

HELD_OUT = range(7_000_000, 7_000_012)


@pytest.fixture(scope="module")
def codec():
    return puppet.Codec.fit(FIT_SEEDS[:48])


@pytest.fixture(scope="module")
def held_out():
    clips = puppet.clips(HELD_OUT)
    return puppet.render(clips.joints, clips.betas, clips.shirt)


def test_a_clip_depends_on_its_own_seed_alone():
    together, alone = puppet.clips([5, 3, 2**62 - 1]), puppet.clips([2**62 - 1])
    assert together.caption[2] == alone.caption[0]
    for many, one in zip(together[1:], alone[1:], strict=True):
        torch.testing.assert_close(many[2:], one, atol=1e-5, rtol=1e-5)
    videos = [puppet.render(c.joints, c.betas, c.shirt)[0] for c in (together, alone)]
    torch.testing.assert_close(videos[0][2:], videos[1], atol=1e-3, rtol=0)


def test_left_is_the_mirror_of_right():
    other = {"l": lambda name: name.replace("left", "right"), "r": lambda name: name.replace("right", "left")}
    for name in SIDED:
        right, left = (puppet.ACTIONS.index(name.format(side)) for side in ("right", "left"))
        cycles = torch.linspace(0, 1, 9)[None]
        (right_pose, right_path), (left_pose, left_path) = (
            _move(torch.tensor([a]), cycles, torch.ones(1)) for a in (right, left)
        )
        swap = [JOINT[other.get(joint[0], str)(joint)] for joint in JOINT_NAMES]
        reflect = torch.tensor((-1.0, 1.0, 1.0))
        torch.testing.assert_close(left_path, right_path * reflect)
        expected = right_pose[:, :, swap] * reflect[:, None] * reflect
        torch.testing.assert_close(left_pose, expected, atol=1e-6, rtol=0)


def test_every_action_is_shown_named_and_stands_on_the_floor():
    clips = puppet.clips(range(300))
    for caption, action, shirt in zip(clips.caption, clips.action, clips.shirt, strict=True):
        assert caption == f"a person in a {COLOURS[shirt]} shirt {puppet.ACTIONS[action]}"
    assert set(clips.action.tolist()) == set(range(len(puppet.ACTIONS)))
    assert set(clips.shirt.tolist()) == set(range(len(COLOURS)))
    # a joint that never turns has nothing to be looked for; the spine turns in some actions only
    assert clips.body_pose.std(dim=1).mean(dim=(0, 2)).min() > 0.01
    height = clips.joints[:, :, [JOINT["left_foot"], JOINT["right_foot"]], 1]
    assert height.min() > -0.1 and height.amin(-1).max() < 0.4
    assert clips.betas.abs().max() == 2  # and no body more extreme


def test_a_window_is_a_part_of_the_clip():
    whole, window = puppet.clips(range(200)), puppet.clips(range(200), frames=5)
    assert window.joints.shape == (200, 5, 24, 3) and whole.joints.shape == (200, 17, 24, 3)
    starts = set()
    for full, part in zip(whole.body_pose, window.body_pose, strict=True):
        distance = [(full[s : s + 5] - part).abs().max().item() for s in range(13)]
        assert min(distance) < 1e-5
        starts.add(distance.index(min(distance)))
    assert starts == set(range(13))  # the last frame is in some, too


def test_the_pace_changes_within_a_clip_and_never_runs_backwards():
    # catches motion that goes by the clock, where frames follow from each other and alignment is not learned
    time = torch.linspace(0, 1, 401).expand(64, -1)
    own = _own_time(time, *torch.rand(3, 64, generator=torch.Generator().manual_seed(0)))
    pace = own.diff(dim=1) * 400
    assert pace.min() > 0 and (pace.amax(1) / pace.amin(1)).median() > 2
    still = torch.zeros(64)
    torch.testing.assert_close(_own_time(time, still, still, still), time)


def test_render():
    clips = puppet.clips(range(6))
    video, cover = puppet.render(clips.joints, clips.betas, clips.shirt)
    assert video.shape == (6, 3, 17, 64, 64) and cover.shape == (6, 17, 64, 64)
    assert video.abs().max() <= 1 and (cover - 0.5).abs().max() <= 0.5 + 1e-5
    shown, drawn = puppet.silhouette(video), cover > 0.5
    assert (shown & drawn).sum() / (shown | drawn).sum() > 0.94
    pixels, depth = puppet.project(clips.joints[:, :, JOINT["spine3"]])
    column, row = pixels.long().unbind(-1)
    b, f = torch.meshgrid(torch.arange(6), torch.arange(17), indexing="ij")
    assert cover[b, f, row, column].min() > 0.9 and depth.min() > 3


def test_sides_and_front_are_visible():
    """Mirroring the body about x mirrors its shape but not its colours; from behind there is no face."""
    rest = puppet.body().rest_joints(torch.zeros(10))[None, None]
    zeros = torch.zeros(1, 10), torch.zeros(1, dtype=torch.long)
    video, cover = puppet.render(rest, *zeros)
    torch.testing.assert_close(cover, cover.flip(-1), atol=1e-4, rtol=0)
    behind, _ = puppet.render(rest * torch.tensor((-1.0, 1.0, -1.0)), *zeros)
    assert (video - video.flip(-1)).abs().max() > 0.5 and (video - behind).abs().max() > 0.5


def test_codec_reconstructs_held_out_clips(codec, held_out):
    video, cover = held_out
    latents = codec.encode(video)
    assert latents.shape == (len(HELD_OUT), LATENT_CHANNELS, 5, 8, 8)
    decoded = codec.decode(latents)
    psnr = 10 * torch.log10(4 / (decoded - video).square().flatten(1).mean(1))
    assert psnr.mean() > 27.5
    shown, drawn = puppet.silhouette(decoded), cover > 0.5
    assert (shown & drawn).sum() / (shown | drawn).sum() > 0.88
    variance = latents.var(dim=(0, 2, 3, 4))
    assert 0.9 < variance.mean() < 1.1 and variance[0] > 10 * variance[-1]  # one scale, no whitening
    with pytest.raises(ValueError, match="latents have 48 channels, got 5"):
        codec.decode(latents[:, :5])


def test_codec_is_causal(codec, held_out):
    """Latent 0 holds frame 0, latent t the frames 4t-3 … 4t; decoding keeps to the same frames."""
    video = held_out[0][:1]
    latents = codec.encode(video)
    for frame in range(17):
        changed = video.clone()
        changed[:, :, frame] *= -1
        moved = (codec.encode(changed) - latents).abs().amax(dim=(0, 1, 3, 4)) > 1e-4
        assert moved.nonzero().flatten().tolist() == [(frame + 3) // 4]
    for t in range(5):
        changed = latents.clone()
        changed[:, :, t] *= -1
        moved = (codec.decode(changed) - codec.decode(latents)).abs().amax(dim=(0, 1, 3, 4)) > 1e-4
        assert moved.nonzero().flatten().tolist() == [f for f in range(17) if (f + 3) // 4 == t]
    # the first frame is the mean of the four that its latent shows elsewhere
    first = latents[:, :, :1] / 10  # faint: far from what is clamped
    frame, others = codec.decode(first.expand_as(latents[:, :, :2])).split((1, 4), dim=2)
    torch.testing.assert_close(frame, others.mean(dim=2, keepdim=True))


def test_text():
    text = puppet.encode_text(["a red shirt", "A shirt red.", "", "red"])
    assert text.shape == (4, puppet.TEXT_LEN, TEXT_DIM)
    assert not text[2].any() and not text[0, 3:].any() and text[0, :3].abs().sum(-1).min() > 0
    torch.testing.assert_close(text[0, 0], text[1, 0])
    assert not torch.allclose(text[0], text[1])  # the order of words shows

"""kit/pictures.py: what is written can be read, and the same input gives the same bytes."""

import numpy as np
import pytest
import torch
from conftest import all_frames
from PIL import Image

from kit import pictures
from kit.puppet import body, project


def moving_picture(frames: int = 9, height: int = 48, width: int = 64) -> torch.Tensor:
    """A smooth wave that travels: (3 f h w) in [-1, 1]."""
    f = torch.arange(frames).view(1, frames, 1, 1)
    y, x = torch.arange(height).view(1, 1, height, 1), torch.arange(width).view(1, 1, 1, width)
    return 0.8 * torch.sin(x / 10 + y / 14 + f / 3 + torch.tensor([0.0, 0.7, 1.4]).view(3, 1, 1, 1))


def standing(frames: int = 4) -> torch.Tensor:
    """Joints (f 24 3) of the puppet in its rest pose, facing the camera."""
    return body().rest_joints(torch.zeros(10)).expand(frames, 24, 3)


def test_frames_and_video_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    assert torch.equal(pictures.to_frames(pictures.from_frames(levels)), levels)
    assert pictures.to_frames(torch.full((3, 1, 2, 2), 7.0)).unique().tolist() == [255]
    with pytest.raises(ValueError, match="NaN or infinity; the weights or the sampler diverged"):
        pictures.to_frames(torch.full((3, 1, 2, 2), torch.nan))


def test_mp4_round_trip(tmp_path):
    frames = pictures.to_frames(moving_picture())
    pictures.write_video(tmp_path / "a.mp4", frames, 30000 / 1001)
    back, rate = all_frames(tmp_path / "a.mp4")
    assert back.shape == frames.shape and rate == pytest.approx(30000 / 1001, abs=1e-6)
    error = (back.float() - frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 30
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_gif_plays_every_frame_for_ever(tmp_path):
    frames = pictures.to_frames(moving_picture())
    pictures.write_video(tmp_path / "a.gif", frames, 10)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size) == (9, (64, 48))
        assert (image.info["duration"], image.info["loop"]) == (100, 0)
        image.seek(8)
        last = np.asarray(image.convert("RGB")).astype(float)
    assert np.abs(last - frames[8].numpy()).mean() < 6


def test_a_gif_of_many_frames_a_second_is_not_slowed_down(tmp_path):
    # catches frames of 0 or 10 ms, which viewers show for 100
    pictures.write_video(tmp_path / "a.gif", pictures.to_frames(moving_picture()), 120)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["duration"] == 20


def test_a_title_may_have_line_breaks(tmp_path):
    # a prompt from a text file: Pillow has no length for it
    for file, title in (("a.png", "a person\n\twaves"), ("b.png", "a person waves")):
        pictures.contact_sheet(tmp_path / file, [pictures.to_frames(moving_picture())], [title])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_skeleton():
    joints = standing()
    frames = pictures.draw_skeleton(joints, project, size=96)
    assert frames.shape == (4, 96, 96, 3) and frames.dtype == torch.uint8
    assert torch.equal(frames[0], frames[3])
    assert tuple(frames[0, 0, 0].tolist()) == pictures.PAPER
    for joint, side in ((20, "left"), (21, "right")):  # the wrists, where the camera sees them
        column, row = (project(joints[0, joint])[0] * 96 / 64).long().tolist()
        colour = torch.tensor(pictures.SIDE_COLOURS[side])
        assert (frames[0, row, column] - colour).abs().max() < 60

    both = pictures.side_by_side(pictures.to_frames(moving_picture(4, 16, 16)), frames)
    assert both.shape == (4, 96, 96 + 4 + 96, 3) and torch.equal(both[:, :, 100:], frames)

    ground = torch.zeros(4, 96, 96, 3, dtype=torch.uint8)
    over = pictures.draw_skeleton(joints, project, size=96, background=ground)
    assert over[0, 0, 0].tolist() == [0, 0, 0] and over.max() > 100
    behind = pictures.draw_skeleton(joints + torch.tensor([0.0, 0.0, 100.0]), project, size=96)
    assert (behind == torch.tensor(pictures.PAPER)).all()


def test_fitted_view_holds_the_motion_upright_and_unmirrored():
    joints = standing() * 3 + torch.tensor([5.0, -2.0, 1.0])
    pixels, depth = pictures.fitted(joints)(joints)
    assert (depth > 0).all() and pixels.min() >= 4 - 1e-3 and pixels.max() <= 60 + 1e-3
    head, foot, left, right = (pixels[0, joint] for joint in (15, 7, 20, 21))
    assert head[1] < foot[1] and left[0] > right[0]  # a person who faces the camera

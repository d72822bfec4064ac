"""kit/data/clips.py: which frames, which moments, which pixels; and the picture that shows if they agree."""

from fractions import Fraction

import clip_folder
import numpy as np
import pytest
import torch
from clip_folder import STEP, at_rate, ramp
from PIL import Image

from kit import pictures, puppet
from kit.data.__main__ import overlay
from kit.data.clips import (
    Clip,
    assumed_camera,
    cropped,
    cropped_camera,
    motion_vector,
    read_clip,
    read_metadata,
    unseen,
)
from kit.data.motion_files import at_times
from kit.data.plausible import Reading
from kit.geometry import Geometry
from kit.puppet.drawing import BACKGROUND


@pytest.mark.parametrize("fps", (10, 16, 25))
def test_motion_is_taken_at_the_frames_moments(tmp_path, fps):
    # catches motion resampled from another start, at its own rate, or window by window from zero
    motion = clip_folder.motion_of(0, 31, 30.0)
    motion = motion._replace(transl=motion.transl - clip_folder.PLACE)
    motion.body_pose[:, 21:] = 0  # AMASS has no hands of SMPL's
    clip_folder.write_motion(tmp_path / "a.npz", motion, None)
    ramp(tmp_path / "a.mp4", at_rate(20, 21))
    shape, clip = Geometry(fps, 5, 32, 32, 8), Clip("a.mp4", "text", "a.npz")
    samples = list(read_clip(tmp_path, clip, shape, puppet.body(), Reading()))
    assert len(samples) == (fps + 1) // 5
    seconds = torch.arange(5 * len(samples), dtype=torch.float64) / fps
    expected = motion_vector(at_times(motion, seconds), puppet.body())
    found = torch.cat([sample.motion for sample in samples])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    shown = torch.cat([sample.video for sample in samples]).float().mean(dim=(1, 2, 3)) / STEP
    moments = [Fraction(k, fps) for k in range(len(seconds))]
    nearest = [min(range(21), key=lambda k: abs(Fraction(k, 20) - t)) for t in moments]
    assert shown.round().long().tolist() == nearest


@pytest.mark.parametrize("target", [(64, 64), (64, 128), (128, 64), (45, 81), (240, 320)], ids=str)
def test_the_camera_follows_resize_and_crop(target):
    # catches the crop's offset left out or scaled twice, axes swapped, and a stretched picture
    focal, centre, point = (150.0, 160.0), (70.0, 52.0), torch.tensor([0.12, 0.07, -2.0])
    intrinsics = torch.tensor([[focal[0], 0, centre[0]], [0, focal[1], centre[1]], [0, 0, 1.0]])
    column, row = centre[0] + focal[0] * 0.12 / 2, centre[1] - focal[1] * 0.07 / 2
    y, x = np.mgrid[:120, :160] + 0.5
    dot = 255 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / 18)
    image = Image.fromarray(np.repeat(dot.round().astype(np.uint8)[..., None], 3, axis=2))
    pixels = cropped(image, *target)[..., 0].double().numpy()
    assert pixels.shape == target
    y, x = np.mgrid[: target[0], : target[1]] + 0.5
    seen = (pixels * x).sum() / pixels.sum(), (pixels * y).sum() / pixels.sum()
    projected, depth = cropped_camera(intrinsics, image, *target)(point)
    np.testing.assert_allclose(projected, seen, atol=0.15)
    assert depth.item() == pytest.approx(2.0)


def test_metadata_with_all_that_spreadsheets_do_to_it(tmp_path):
    text = (
        'motion,extra,prompt,video\r\n a.npz ,1,"one, ""two""\nthree",é/ü.mp4\r\n\r\nb.npz,,plain,b.mp4\r\n'
    )
    (tmp_path / "metadata.csv").write_text("\ufeff" + text, encoding="utf-8", newline="")
    found, problems = read_metadata(tmp_path)
    assert found == [Clip("é/ü.mp4", 'one, "two"\nthree', "a.npz"), Clip("b.mp4", "plain", "b.npz")]
    assert problems == []


def on_the_body(sample) -> float:
    """The share of the drawn skeleton's pixels that lie on the person, in every fourth frame."""
    some = sample._replace(motion=sample.motion[::4], video=sample.video[::4])
    plain = pictures.resized(some.video, 320)
    drawn = (overlay(some).int() - plain.int()).abs().amax(-1) > 60
    background = torch.tensor(BACKGROUND) * 255
    person = (plain - background).abs().amax(-1) > 12
    return (drawn & person).sum().item() / drawn.sum().item()


@pytest.mark.parametrize("shape", (Geometry(16, 17, 64, 64, 8), Geometry(12, 13, 64, 112, 8)), ids=str)
def test_the_skeleton_lies_on_the_limbs(tmp_path, shape):
    folder = clip_folder.write(tmp_path / "a", [1], frames=17)
    sample = next(read_clip(folder, read_metadata(folder)[0][0], shape, puppet.body(), Reading()))
    assert on_the_body(sample) > 0.99
    # a mirrored camera frame, a shifted one and a late motion are seen to be off
    mirrored, shifted = sample.motion.clone(), torch.tensor((0.3, 0, 0))
    mirrored[:, 3:75:3] *= -1
    wrong = {
        "mirrored": sample._replace(motion=mirrored),
        "shifted": sample._replace(project=lambda points: sample.project(points - shifted)),
        "late": sample._replace(motion=sample.motion.roll(4, 0)),
    }
    for name, changed in wrong.items():
        assert on_the_body(changed) < 0.97, name
    alone = overlay(sample._replace(video=None, motion=sample.motion[::8])).int()
    for colour in (pictures.SIDE_COLOURS["left"], pictures.SIDE_COLOURS["right"]):
        assert ((alone - torch.tensor(colour)).abs().amax(-1) < 25).sum((1, 2)).min() > 50


@pytest.mark.parametrize(("place", "seen"), ((100, True), (30, True), (140, False)))
def test_a_person_is_looked_for_in_the_whole_of_a_picture_that_is_not_square(place, seen):
    # catches height and width exchanged, in the bounds and in the lens that is assumed
    camera = assumed_camera(64, 128)
    middle, _ = camera(torch.tensor([0.0, 0.0, -4.0]))
    assert middle.tolist() == [64, 32]
    joints = torch.tensor([0.0, 0.0, -4.0]).expand(5, 24, 3).clone()
    joints[..., 0] = 4 * (place - 64) / 128  # the column, by a focal length of 128
    joints[..., 1] = torch.linspace(-0.5, 0.5, 24)
    motion = torch.zeros(5, 235)
    motion[:, 3:75] = joints.flatten(1)
    assert bool(unseen(motion, camera, 64, 128)) is not seen

"""kit/data/clips.py: which frames, which moments, which pixels; and the picture that shows if they agree."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import clip_folder
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation, Slerp

from kit import pictures, puppet
from kit.data import clips
from kit.data.__main__ import overlay, preview
from kit.data.clips import Camera, Clip, images_at, read_clip, read_metadata, resized, resized_camera
from kit.data.motion_files import Motion
from kit.geometry import Geometry

STEP = 12  # levels of grey between one frame and the next


def ramp(path: Path, times: list[Fraction], size: tuple[int, int] = (32, 32)) -> Path:
    """A video whose frame k is grey of level 12·k."""
    frames = [np.full((*size, 3), STEP * k, np.uint8) for k in range(len(times))]
    clip_folder.write_video(path, frames, times)
    return path


def levels(images) -> list[int]:
    """Which frames of a ramp these are."""
    return [round(float(np.asarray(image).mean()) / STEP) for image in images]


def at_rate(fps: Fraction | int, count: int = 20) -> list[Fraction]:
    return [Fraction(k) / fps for k in range(count)]


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize(
    "times, fps",
    [
        (at_rate(16), 16),
        (at_rate(30), 16),
        (at_rate(Fraction(30000, 1001)), 16),
        (at_rate(24), 16),
        (at_rate(16), 24),
        (at_rate(10), 24),
        ([Fraction(t, 100) for t in (0, 3, 6, 25, 28, 31, 60, 61, 80, 95)], 16),  # of a phone
        ([5 + t for t in at_rate(25)], 16),  # begins late
        ([Fraction(0)], 16),
    ],
    ids=["same", "30", "29.97", "24", "up", "10", "variable", "late", "one frame"],
)
def test_frames_are_those_nearest_to_each_moment(tmp_path, times, fps):
    # catches frames counted instead of timed, a drift, and motion that runs ahead by half a frame
    path, last = ramp(tmp_path / "a.mp4", times), times[-1] - times[0]
    moments = [Fraction(k, fps) for k in range(1000) if Fraction(k, fps) <= last]
    nearest = [min(range(len(times)), key=lambda k: abs(times[k] - times[0] - t)) for t in moments]
    assert levels(images_at(path, fps)) == nearest


def test_frames_are_decoded_as_they_are_asked_for(tmp_path, monkeypatch):
    path, decoded, decode = ramp(tmp_path / "a.mp4", at_rate(16)), [], clips._decoded
    monkeypatch.setattr(clips, "_decoded", lambda path: (decoded.append(f) or f for f in decode(path)))
    images = images_at(path, 16)
    for asked in range(1, 6):
        next(images)
        assert len(decoded) == asked + 1  # which one is nearest is known when the next has come


@pytest.mark.parametrize("fps", (10, 16, 25))
def test_motion_is_taken_at_the_frames_moments(tmp_path, fps):
    # catches motion resampled from another start, at its own rate, or window by window from zero
    generator = np.random.default_rng(0)
    rotations = Rotation.random(24 * 31, random_state=0).as_rotvec().reshape(31, 24, 3) * 0.3
    rotations[:, 22:] = 0
    transl = generator.normal(0, 0.2, (31, 3)) - (0, 0, 4)
    pose, transl = torch.tensor(rotations).float(), torch.tensor(transl).float()
    motion = Motion(pose[:, 0], pose[:, 1:], torch.zeros(10), transl, 30.0, "neutral")
    clip_folder.write_motion(tmp_path / "a.npz", motion, None)
    ramp(tmp_path / "a.mp4", at_rate(20, 21))
    shape, clip = Geometry(fps, 5, 32, 32, 8), Clip("a.mp4", "text", "a.npz")
    samples = list(read_clip(tmp_path, clip, shape, puppet.body()))
    assert len(samples) == (fps + 1) // 5
    seconds = np.arange(5 * len(samples)) / fps
    expected = np.stack([np.interp(seconds, np.arange(31) / 30, transl[:, i]) for i in range(3)], axis=1)
    found = torch.cat([sample.motion for sample in samples])
    np.testing.assert_allclose(found[:, :3], expected, atol=1e-5)
    for joint in (0, 5, 18):
        slerp = Slerp(np.arange(31) / 30, Rotation.from_rotvec(rotations[:, joint]))
        columns = slerp(seconds).as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(-1, 6)
        np.testing.assert_allclose(found[:, 75 + 6 * joint : 81 + 6 * joint], columns, atol=1e-4)
    shown = torch.cat([sample.video for sample in samples]).float().mean(dim=(1, 2, 3)) / STEP
    moments = [Fraction(k, fps) for k in range(len(seconds))]
    nearest = [min(range(21), key=lambda k: abs(Fraction(k, 20) - t)) for t in moments]
    assert shown.round().long().tolist() == nearest


# ---------------------------------------------------------------- pixels


QUARTERS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # clockwise


@pytest.mark.parametrize("turn", QUARTERS)
def test_a_lying_recording_is_turned_as_players_do(tmp_path, turn):
    path = tmp_path / "a.mp4"
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 255  # top left
    clip_folder.write_video(path, [picture] * 3, at_rate(16, 3))
    content = bytearray(path.read_bytes())
    # the matrix of ISO 14496-12's track header, version 0: a b u, c d v, x y w in fixed point
    a, b, c, d = (65536 * entry for entry in QUARTERS[turn])
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    found = np.asarray(next(images_at(path, 16)))
    expected = np.rot90(picture, -turn // 90)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 5


@pytest.mark.parametrize("standard, red, blue", [(1, 0.2126, 0.0722), (5, 0.299, 0.114)], ids=["709", "601"])
def test_colours_follow_the_standard_the_file_names(tmp_path, standard, red, blue):
    r, g, b = np.array((200, 30, 60)) / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    planes = 16 + 219 * luma, 128 + 112 * (b - luma) / (1 - blue), 128 + 112 * (r - luma) / (1 - red)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = standard, 1
        frame = av.VideoFrame(64, 64, "yuv444p")
        frame.colorspace = standard
        for plane, value in zip(frame.planes, planes, strict=True):
            plane.update(np.full((plane.height, plane.line_size), round(value), np.uint8))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pixel = np.asarray(next(images_at(tmp_path / "a.mp4", 16)))[30, 30]
    np.testing.assert_allclose(pixel, (200, 30, 60), atol=3)


@pytest.mark.parametrize("target", [(64, 64), (64, 128), (128, 64), (45, 81), (240, 320), (80, 200)], ids=str)
def test_the_camera_follows_resize_and_crop(target):
    # catches the crop's offset left out or scaled twice, axes swapped, and a stretched picture
    focal, centre, point = (150.0, 160.0), (70.0, 52.0), torch.tensor([0.12, 0.07, -2.0])
    intrinsics = torch.tensor([[focal[0], 0, centre[0]], [0, focal[1], centre[1]], [0, 0, 1.0]])
    column, row = centre[0] + focal[0] * 0.12 / 2, centre[1] - focal[1] * 0.07 / 2
    y, x = np.mgrid[:120, :160] + 0.5
    dot = 255 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / 18)
    image = Image.fromarray(np.repeat(dot.round().astype(np.uint8)[..., None], 3, axis=2))
    pixels = resized(image, *target)[..., 0].double().numpy()
    assert pixels.shape == target
    y, x = np.mgrid[: target[0], : target[1]] + 0.5
    seen = (pixels * x).sum() / pixels.sum(), (pixels * y).sum() / pixels.sum()
    projected, depth = resized_camera(intrinsics, image, *target).project(point)
    np.testing.assert_allclose(projected, seen, atol=0.15)
    assert depth.item() == pytest.approx(2.0)


def test_the_crop_is_the_largest_from_the_middle():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 255
    found = resized(Image.fromarray(picture), 20, 20)
    assert found.shape == (20, 20, 3) and found.min() > 230


def test_the_camera_is_the_puppets_own():
    points = puppet.clips([3]).joints
    camera = Camera(torch.tensor(clip_folder.CAMERA).float(), clip_folder.PLACE)
    for found, expected in zip(camera.project(points), puppet.project(points), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- the table


def test_metadata_with_all_that_spreadsheets_do_to_it(tmp_path):
    text = (
        'motion,extra,prompt,video\r\n a.npz ,1,"one, ""two""\nthree",é/ü.mp4\r\n\r\nb.npz,,plain,b.mp4\r\n'
    )
    (tmp_path / "metadata.csv").write_text("\ufeff" + text, encoding="utf-8", newline="")
    found, problems = read_metadata(tmp_path)
    assert found == [Clip("é/ü.mp4", 'one, "two"\nthree', "a.npz"), Clip("b.mp4", "plain", "b.npz")]
    assert problems == []


# ---------------------------------------------------------------- the picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return clip_folder.write(tmp_path_factory.mktemp("clips") / "a", range(4), frames=17)


def on_the_body(sample) -> float:
    """The share of the drawn skeleton's pixels that lie on the person."""
    shown = torch.linspace(0, len(sample.video) - 1, 6).round().long()
    plain = pictures.resized(sample.video[shown], 320)
    drawn = (overlay(sample)[shown].int() - plain.int()).abs().amax(-1) > 60
    background = torch.tensor(puppet.BACKGROUND) * 255
    person = (plain - background).abs().amax(-1) > 12
    return (drawn & person).sum().item() / drawn.sum().item()


@pytest.mark.parametrize("shape", (Geometry(16, 17, 64, 64, 8), Geometry(12, 13, 64, 112, 8)), ids=str)
def test_the_skeleton_lies_on_the_limbs(folder, shape):
    sample = next(read_clip(folder, read_metadata(folder)[0][1], shape, puppet.body()))
    assert on_the_body(sample) > 0.99
    # a mirrored camera frame, a shifted one and a late motion are seen to be off
    mirrored, shifted = sample.motion.clone(), torch.tensor((0.3, 0, 0))
    mirrored[:, 3:75:3] *= -1
    wrong = {
        "mirrored": sample._replace(motion=mirrored),
        "shifted": sample._replace(camera=sample.camera._replace(position=shifted)),
        "late": sample._replace(motion=sample.motion.roll(4, 0)),
    }
    for name, changed in wrong.items():
        assert on_the_body(changed) < 0.97, name


def test_preview_writes_a_row_for_each_clip(folder, tmp_path):
    shape = Geometry(16, 17, 64, 64, 8)
    samples = [next(read_clip(folder, clip, shape, puppet.body())) for clip in read_metadata(folder)[0][:2]]
    samples.append(samples[0]._replace(video=None, camera=None))  # motion alone
    samples.append(samples[1]._replace(camera=None))
    preview(tmp_path / "a.png", samples)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (6 * 168 + 8, 8 + 4 * 208)
        picture = np.asarray(image).astype(int)
    for side in ("left", "right"):
        near = np.abs(picture - pictures.SIDE_COLOURS[side]).max(-1) < 25
        assert (near.reshape(-1, near.shape[1]).sum() > 200) and near[8 + 2 * 208 :].any()

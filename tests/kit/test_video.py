"""kit/video.py, and what kit/pictures.py writes: moments, pixels and colours are those that players show."""

import itertools
import struct
from fractions import Fraction
from pathlib import Path

import av
import clip_folder
import numpy as np
import pytest
import torch
from clip_folder import at_rate, levels, ramp

from kit import pictures, video
from kit.video import images_at

# ---------------------------------------------------------------- moments


@pytest.mark.parametrize(
    "times, fps",
    [
        (at_rate(16), 16),
        (at_rate(Fraction(30000, 1001)), 16),
        (at_rate(10), 24),
        ([Fraction(t, 100) for t in (0, 3, 6, 25, 28, 31, 60, 61, 80, 95)], 16),
        ([5 + t for t in at_rate(25)], 16),
        ([Fraction(0)], 16),
    ],
    ids=["same", "29.97", "up", "of a phone", "begins late", "one frame"],
)
def test_frames_are_those_nearest_to_each_moment(tmp_path, times, fps):
    # catches frames counted instead of timed, a drift, and motion that runs ahead by half a frame
    path, last = ramp(tmp_path / "a.mp4", times), times[-1] - times[0]
    moments = [Fraction(k, fps) for k in range(1000) if Fraction(k, fps) <= last]
    nearest = [min(range(len(times)), key=lambda k: abs(times[k] - times[0] - t)) for t in moments]
    assert levels(images_at(path, fps)) == nearest


def test_frames_are_decoded_as_they_are_asked_for(tmp_path, monkeypatch):
    path, decoded, decode = ramp(tmp_path / "a.mp4", at_rate(16)), [], video.shown_frames
    monkeypatch.setattr(video, "shown_frames", lambda path: (decoded.append(f) or f for f in decode(path)))
    images = images_at(path, 16)
    for asked in range(1, 6):
        next(images)
        assert len(decoded) == asked + 1  # which one is nearest is known when the next has come


def test_times_that_go_backwards_are_refused_by_frame(tmp_path):
    # catches frames left out or shown too long, which the motion beside them does not follow
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        packets = [packet for _ in range(5) for packet in stream.encode(av.VideoFrame(32, 32, "yuvj420p"))]
        for k, packet in enumerate(packets + stream.encode()):
            packet.pts, packet.dts = (0, 1, 3, 2, 4)[k], k - 5  # no encoder does so, but recorders do
            container.mux(packet)
    with pytest.raises(ValueError, match=r"a\.mkv: frame 3 is shown at 0\.\d+ s.*encode it again"):
        list(images_at(tmp_path / "a.mkv", 16))


# ---------------------------------------------------------------- pixels


def set_matrix(path: Path, a: int, b: int, c: int, d: int, x: int = 0, y: int = 0) -> None:
    """The matrix of ISO 14496-12's track header, version 0: a b u, c d v, x y w in fixed point."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    one = 65536
    numbers = (a * one, b * one, 0, c * one, d * one, 0, x * one, y * one, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(content)


UPRIGHT = [(a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)]
LYING = [(0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2)]


@pytest.mark.parametrize("matrix", UPRIGHT + LYING, ids=str)
def test_frames_stand_as_the_display_matrix_says(tmp_path, matrix):
    # catches turns the wrong way round, and mirrored recordings (selfies) shown upside down or not mirrored
    path, picture = tmp_path / "a.mp4", np.zeros((32, 64, 3), np.uint8)
    picture[:16, :16], picture[:16, 16:48], picture[16:, :16] = (250, 20, 20), (20, 250, 20), (20, 20, 250)
    clip_folder.write_video(path, [picture] * 3, at_rate(16, 3))
    a, b, c, d = matrix
    height, width = (32, 64) if a else (64, 32)
    x, y = width * (a + c < 0), height * (b + d < 0)
    set_matrix(path, a, b, c, d, x, y)
    expected = np.zeros((height, width, 3), int)
    for row, column in np.ndindex(32, 64):  # each pixel's middle goes where the matrix takes it
        p, q = column + 0.5, row + 0.5
        expected[int(b * p + d * q + y), int(a * p + c * q + x)] = picture[row, column]
    found = np.asarray(next(images_at(path, 16))).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 5


def test_a_turn_that_is_no_quarter_is_refused(tmp_path):
    path = ramp(tmp_path / "a.mp4", at_rate(16))
    set_matrix(path, 1, 1, -1, 1)
    with pytest.raises(ValueError, match=r"a\.mp4.*65536 65536 -65536 65536.*quarter"):
        next(images_at(path, 16))


def wide(path: Path, pixel: Fraction) -> Path:
    """64x48 with a white square of 24x24 file's pixels in the middle."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[12:36, 20:44] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.sample_aspect_ratio = pixel
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("pixel", (Fraction(16, 11), Fraction(3, 4)), ids=str)
def test_pixels_that_are_not_square_are_stretched_and_then_turned(tmp_path, pixel):
    # catches people who are too thin or too broad, in a camera that does not see them so
    path = wide(tmp_path / "a.mp4", pixel)
    found = np.asarray(next(images_at(path, 16)))[..., 0] > 127
    assert found.shape == (48, round(64 * pixel))
    assert found.sum(axis=0).max() == 24
    assert found.sum(axis=1).max() == pytest.approx(24 * pixel, abs=1)
    set_matrix(path, 0, 1, -1, 0, 48)
    assert next(images_at(path, 16)).size == (48, round(64 * pixel))


# ---------------------------------------------------------------- colours


COLOURS = [(200, 30, 60), (30, 200, 60), (40, 70, 220), (250, 250, 250), (5, 5, 5), (128, 128, 128)]
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # red's, blue's share


def to_yuv(colour: tuple, matrix: int, full: bool) -> list[int]:
    """ITU-T H.273's equations, 8 bits."""
    (red, blue), (r, g, b) = LUMA[matrix], np.array(colour) / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - luma) / (1 - blue) / 2, (r - luma) / (1 - red) / 2
    scale = (255, 255, 0) if full else (219, 224, 16)
    return [round(scale[2] + scale[0] * luma), *(round(128 + scale[1] * c) for c in chroma)]


def plain(path: Path, colours: list, matrix: int, full: bool, tags, size=(64, 64), transfer=2) -> Path:
    """A frame of each colour, made of numbers of this matrix and range, tagged as (matrix, range)."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tags
        stream.codec_context.color_trc = transfer
        for colour in colours:
            frame = av.VideoFrame(width, height, "yuv420p")
            frame.colorspace, frame.color_range = tags
            frame.color_trc = transfer
            for plane, value in zip(frame.planes, to_yuv(colour, matrix, full), strict=True):
                plane.update(np.full((plane.height, plane.line_size), value, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


NAMED = [(matrix, full, (64, 64), (matrix, 1 + full)) for matrix in LUMA for full in (False, True)]
UNNAMED = [(5, False, (720, 576), (2, 0)), (1, False, (720, 1280), (2, 0)), (1, False, (1280, 544), (2, 0))]


@pytest.mark.parametrize("matrix, full, size, tags", NAMED + UNNAMED, ids=str)
def test_colours_are_those_of_the_file_or_if_it_names_none_of_its_size(tmp_path, matrix, full, size, tags):
    # catches one matrix for all (skin that is too red), greys that are washed out or clipped, and FFmpeg's
    # own rule for what names no matrix, BT.601, which no player follows from HD on
    path = plain(tmp_path / "a.mp4", COLOURS, matrix, full, tags, size)
    found = [np.asarray(image)[image.height // 2, image.width // 2] for image in images_at(path, 16)]
    np.testing.assert_allclose(found, COLOURS, atol=4)


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path, transfer, name):
    # catches pale pictures: HDR numbers read as if they were SDR's
    path = plain(tmp_path / "a.mp4", COLOURS, 9, False, tags=(9, 1), transfer=transfer)
    with pytest.raises(ValueError, match=rf"a\.mp4 is HDR \({name}\)"):
        next(images_at(path, 16))


def test_a_written_mp4_is_tagged_as_what_it_is(tmp_path):
    # catches BT.601's numbers without a tag: from HD on, players take them for BT.709's
    frames = torch.tensor(COLOURS, dtype=torch.uint8).view(-1, 1, 1, 3).expand(-1, 64, 64, 3)
    pictures.write_video(tmp_path / "a.mp4", frames, 16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert tags == (1, 1, 1, 1)
        frames = list(container.decode())
    yuv = [[bytes(plane)[plane.line_size * 9 + 9] for plane in frame.planes] for frame in frames]
    np.testing.assert_allclose(yuv, [to_yuv(colour, 1, full=False) for colour in COLOURS], atol=2)

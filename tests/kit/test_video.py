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
from clip_folder import STEP, at_rate, levels, ramp
from conftest import all_frames

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


def encode(path: Path, codec: str, fmt: str, times: list[int], **options: str) -> Path:
    """Frame k of a ramp at times[k] / 16 s, muxed as it comes out of the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = 32, 32, fmt
        stream.codec_context.time_base = Fraction(1, 16)
        packets = []
        for k in range(len(times)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), STEP * k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 16)
            packets += stream.encode(frame)
        for packet in (*packets, *stream.encode()):
            if times != sorted(set(times)):  # no encoder takes such times: they come from recorders
                packet.pts, packet.dts = times[packet.pts], packet.pts - len(times)
            container.mux(packet)
    return path


B_FRAMES = {"libx264": {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}, "mpeg4": {"bf": "3"}}


@pytest.mark.parametrize("codec", B_FRAMES)
def test_b_frames_in_an_avi_are_shown_in_their_order(tmp_path, codec):
    # catches times of decoding taken for times of showing: frames 2, 3, 1, 4, ...
    path = encode(tmp_path / "a.avi", codec, "yuv420p", list(range(20)), **B_FRAMES[codec])
    assert levels(images_at(path, 16)) == list(range(20))


def test_of_frames_at_one_time_the_last_is_seen(tmp_path):
    # catches the frame that is replaced at once being shown, and a clip that grows by each repeated time
    path = encode(tmp_path / "a.mkv", "mjpeg", "yuvj420p", [0, 1, 2, 2, 3, 4, 4, 4, 5])
    assert levels(images_at(path, 16)) == [0, 1, 3, 4, 7, 8]


@pytest.mark.parametrize("times", ([0, 1, 3, 2, 4], [0, 1, 2, 0, 1, 2]), ids=["swapped", "begins again"])
def test_times_that_go_backwards_are_refused_by_frame(tmp_path, times):
    # catches frames left out or shown too long, which the motion beside them does not follow
    path = encode(tmp_path / "a.mkv", "mjpeg", "yuvj420p", times)
    with pytest.raises(ValueError, match=r"a\.mkv: frame 3 is shown at 0\.\d+ s.*encode it again"):
        list(images_at(path, 16))


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


@pytest.mark.parametrize("ending", ("mp4", "avi"))
@pytest.mark.parametrize("pixel", (Fraction(16, 11), Fraction(3, 4)), ids=str)
def test_pixels_that_are_not_square_are_stretched(tmp_path, pixel, ending):
    # catches people who are too thin or too broad, in a camera that does not see them so
    found = np.asarray(next(images_at(wide(tmp_path / f"a.{ending}", pixel), 16)))[..., 0] > 127
    assert found.shape == (48, round(64 * pixel))
    assert found.sum(axis=0).max() == 24
    assert found.sum(axis=1).max() == pytest.approx(24 * pixel, abs=1)


def test_what_is_stretched_is_turned_after_that_within_reason(tmp_path):
    path = wide(tmp_path / "a.mp4", Fraction(3, 2))
    set_matrix(path, 0, 1, -1, 0, 48)
    assert np.asarray(next(images_at(path, 16))).shape == (96, 48, 3)
    with pytest.raises(ValueError, match=r"a\.mp4.*pixels are 20 times as wide"):  # a damaged header
        next(images_at(wide(path, Fraction(20)), 16))


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


def plain(path: Path, colours: list, matrix: int, full: bool, size=(64, 64), tags=(2, 0), transfer=2) -> Path:
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


def middles(path: Path) -> list:
    return [np.asarray(image)[image.height // 2, image.width // 2] for image in images_at(path, 16)]


@pytest.mark.parametrize("full", (False, True), ids=["limited", "full"])
@pytest.mark.parametrize("matrix", LUMA)
def test_colours_follow_the_matrix_and_range_that_the_file_names(tmp_path, matrix, full):
    # catches one matrix for all (skin that is too red) and greys that are washed out or clipped
    path = plain(tmp_path / "a.mp4", COLOURS, matrix, full, tags=(matrix, 1 + full))
    np.testing.assert_allclose(middles(path), COLOURS, atol=4)


SIZES = {(720, 576): 5, (720, 1280): 1, (1280, 544): 1}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_names_no_matrix_is_bt709_if_it_is_hd(tmp_path, size):
    # catches FFmpeg's own rule, BT.601 for everything, which no player follows
    path = plain(tmp_path / "a.mp4", COLOURS[:3], SIZES[size], False, size)
    np.testing.assert_allclose(middles(path), COLOURS[:3], atol=4)


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path, transfer, name):
    # catches pale pictures: HDR numbers read as if they were SDR's
    path = plain(tmp_path / "a.mp4", COLOURS, 9, False, tags=(9, 1), transfer=transfer)
    with pytest.raises(ValueError, match=rf"a\.mp4 is HDR \({name}\)"):
        next(images_at(path, 16))


@pytest.mark.parametrize("size", [(704, 1280), (64, 64)], ids=str)
def test_a_written_mp4_is_tagged_as_what_it_is(tmp_path, size):
    # catches BT.601's numbers without a tag: from HD on, players take them for BT.709's
    frames = torch.tensor(COLOURS, dtype=torch.uint8).view(-1, 1, 1, 3).expand(-1, *size, 3)
    pictures.write_video(tmp_path / "a.mp4", frames, 16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert tags == (1, 1, 1, 1)
        frames = list(container.decode())
    yuv = [[bytes(plane)[plane.line_size * 9 + 9] for plane in frame.planes] for frame in frames]
    np.testing.assert_allclose(yuv, [to_yuv(colour, 1, full=False) for colour in COLOURS], atol=2)
    back, fps = all_frames(tmp_path / "a.mp4")
    np.testing.assert_allclose(back[:, size[0] // 2, size[1] // 2], COLOURS, atol=4)
    assert fps == 16

"""Video files, decoded as players show them: upright, with square pixels, right colours and times."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, ColorTrc
from PIL import Image

# The container is not guessed from the content: some formats make FFmpeg open further files.
FORMATS = {
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi",
}  # fmt: skip
SAME_TIME = 1e-7  # seconds
UNSPECIFIED = 2  # a frame's colour matrix: AVCOL_SPC_UNSPECIFIED
HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}  # transfer functions of ITU-R BT.2100
MAX_PIXEL = 8  # largest ratio of a pixel's sides
ENCODE_AGAIN = "encode it again: ffmpeg -i FILE -vf setpts=N/FRAME_RATE/TB NEW.mp4"


class Shown(NamedTuple):
    """A decoded frame, not yet converted, and how to turn its picture."""

    time: float  # seconds, no earlier than the frame before it
    frame: av.VideoFrame
    pixel: Fraction  # its width over its height
    lying: bool  # swap rows and columns, before mirroring
    right: int  # -1: mirror left and right
    down: int  # -1: mirror top and bottom

    def image(self) -> Image.Image:
        image = _rgb(self.frame)
        if self.pixel != 1:  # as in DV, on DVDs and with anamorphic lenses
            size = (round(image.width * self.pixel), image.height)
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image).swapaxes(0, 1) if self.lying else np.asarray(image)  # (h w 3)
        return Image.fromarray(np.ascontiguousarray(pixels[:: self.down, :: self.right]))


def images_at(path: Path, fps: float) -> Iterator[Image.Image]:
    """The frames shown nearest to 0, 1/fps, 2/fps, ... seconds after the first, up to the last.

    One frame is decoded at a time. FileNotFoundError or ValueError for what is missing or no video.
    """
    frames, count = shown_frames(path), 0
    before = next(frames)
    start = before.time
    for frame in frames:
        if frame.time > before.time:  # of frames with the same time the last is shown
            while count / fps <= (before.time + frame.time) / 2 - start + SAME_TIME:
                yield before.image()
                count += 1
        before = frame
    while count / fps <= before.time - start + SAME_TIME:
        yield before.image()
        count += 1


# ---------------------------------------------------------------- which frames, at which times


def shown_frames(path: Path) -> Iterator[Shown]:
    """Every frame of a video, at least one, in the order in which they are shown; errors as `images_at`."""
    times, last = _avi_times(path) if path.suffix.lower() == ".avi" else None, -math.inf
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        pixel = stream.sample_aspect_ratio or Fraction(1)
        if not 1 / MAX_PIXEL <= pixel <= MAX_PIXEL:
            raise ValueError(f"{path}: its pixels are {pixel} times as wide as high, expected about 1")
        for count, frame in enumerate(container.decode(stream)):
            time = frame.time if times is None else next(times, None)
            if frame.is_corrupt or time is None:
                raise ValueError(f"{path}: frame {count} is damaged or has no time; {ENCODE_AGAIN}")
            if time < last:
                shown = f"frame {count} is shown at {time:.3f} s, the one before it at {last:.3f} s"
                raise ValueError(f"{path}: {shown}; {ENCODE_AGAIN}")
            if frame.color_trc in HDR:
                raise ValueError(f"{path} is HDR ({HDR[frame.color_trc]}): convert it to SDR, BT.709, first")
            yield Shown(time, frame, pixel, *_turn(frame, path))
            last = time
    if last == -math.inf:
        raise ValueError(f"{path} has no frames, expected at least one")


def _avi_times(path: Path) -> Iterator[float]:
    """The times of an AVI's frames as they are shown.

    An AVI says when a frame is decoded, not when it is shown, and B-frames are shown in another order.
    """
    with _opened(path) as (container, stream):
        return iter(sorted(float(p.pts * p.time_base) for p in container.demux(stream) if p.size))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a video")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a video ending in {', '.join(FORMATS)}")
    try:
        with av.open(str(path), format=FORMATS[path.suffix.lower()]) as container:
            stream = container.streams.best("video")  # the first one may be cover art
            if stream is None:
                raise ValueError(f"{path} has no video stream: it is only sound, or cut short")
            yield container, stream
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is damaged or no {path.suffix} video: {error.strerror}") from error


# ---------------------------------------------------------------- how a frame is shown


def _rgb(frame: av.VideoFrame) -> Image.Image:
    """Convert by the file's colour matrix and range; if it names no matrix, BT.709 for HD, else BT.601."""
    if frame.colorspace != UNSPECIFIED or frame.format.is_rgb:
        return frame.to_image()
    # mpv, VLC and libplacebo guess so, too; range: limited, unless the pixel format says otherwise
    hd = frame.width >= 1280 or frame.height > 576
    return frame.to_image(src_colorspace=Colorspace.ITU709 if hd else Colorspace.ITU601)


def _turn(frame: av.VideoFrame, path: Path) -> tuple[bool, int, int]:
    """Shown.lying, right and down, by the display matrix: an upright phone records lying frames, a selfie
    mirrored ones.

    The matrix (ISO 14496-12, track header) takes a pixel (x y) to (a x + c y, b x + d y).
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, 1, 1
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    lying = abs(a) + abs(d) < abs(b) + abs(c)
    right, down, *rest = (c, b, a, d) if lying else (a, d, b, c)
    if max(map(abs, rest)) > 0.01 * min(abs(right), abs(down)) or not right * down:
        found = f"its display matrix has {a} {b} {c} {d}, no quarter turns"
        raise ValueError(f"{path}: {found}; turn the pixels themselves")
    return lying, int(np.sign(right)), int(np.sign(down))

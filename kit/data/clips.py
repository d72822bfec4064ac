"""Paired clips: a video and the motion of the person in it, read at the same moments, in one camera's frame.

A folder of them has metadata.csv with the columns video, prompt and motion, paths relative to the folder. A
motion is an AMASS .npz (z up); its optional array `camera` is a pinhole's (3, 3) intrinsics, in pixels of the
video as it is shown. Or it is what human mesh recovery writes (kit/data/hmr.py). The column `track` may name
one of several persons in it, the column `axes` its axes: zup, yup or opencv.

The motion is in the camera's frame: the camera stands at the origin. In files with z up it looks along +y, x
to its right; here, with y up, along -z. Video and motion begin together, unless rows have frame numbers.
"""

import csv
import io
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kit.body import Body
from kit.data.hmr import Recovered, Stretch, at_video_times, read_motion_file, stretches
from kit.data.motion_files import Motion
from kit.data.plausible import Reading, checked
from kit.geometry import Geometry
from kit.pictures import Project
from kit.video import ENCODE_AGAIN, SAME_TIME, images_at, shown_frames
from motion_tokens import encode_smpl

COLUMNS = ("video", "prompt", "motion")
APART = 0.25  # seconds by which the ends of a video and of its motion may differ
TINY = 0.02  # of the picture's height: a smaller person is taken for a mistake in units


class Sample(NamedTuple):
    """What training learns from: some frames of one person."""

    name: str
    captions: tuple[str, ...]  # each describes it; none: no text
    motion: Tensor  # (f 235) metres and radians, not normalised
    video: Tensor | None  # (f h w 3) uint8
    project: Project | None  # the video's camera, where it is known


class Clip(NamedTuple):
    """A row of metadata.csv."""

    video: str
    prompt: str
    motion: str
    track: str = ""
    axes: str = ""


# ---------------------------------------------------------------- the list


def inside(folder: Path, name: str | Path) -> Path:
    """The file `name` of a folder; ValueError if it is outside, also through links."""
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name} leads out of {folder}: expected a file in it; move it there")
    return path


def read_metadata(folder: Path) -> tuple[list[Clip], list[str]]:
    """The clips of metadata.csv (UTF-8), and what is wrong with its other rows.

    FileNotFoundError or ValueError for a file that is missing or no such table.
    """
    file = inside(folder, "metadata.csv")
    if not file.is_file():
        raise FileNotFoundError(f"no {folder / 'metadata.csv'}: expected a table of {', '.join(COLUMNS)}")
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")  # bad bytes spoil their row only
    rows, clips, problems = csv.DictReader(io.StringIO(text, newline="")), [], []
    try:
        if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
            raise ValueError(f"{file} lacks the columns {', '.join(missing)} in its first line")
        for row in rows:
            values, wrong = [row[column] for column in COLUMNS], None
            if None in values or None in row:
                wrong = f"expected {len(rows.fieldnames)} values; quote texts with commas"
            elif not all(value.strip() for value in values):
                wrong = f"one of {', '.join(COLUMNS)} is empty"
            elif re.search("[\udc80-\udcff]", "".join(values)):
                wrong = "not UTF-8; save the table as UTF-8"
            if wrong:
                problems.append(f"metadata.csv line {rows.line_num}: {wrong}")
            else:
                clips.append(Clip(*((row.get(column) or "").strip() for column in Clip._fields)))
    except csv.Error as error:
        raise ValueError(f"{file} line {rows.line_num}: {error}") from error
    return clips, problems


# ---------------------------------------------------------------- the crop


def cropped(image: Image.Image, height: int, width: int) -> Tensor:
    """The largest centre crop of this aspect ratio, resized: (h w 3) uint8."""
    return torch.from_numpy(np.array(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)))


def camera_of(intrinsics: Tensor) -> Project:
    """A camera at the origin that looks along -z, y up; pixels count from the image's top left corner.

    intrinsics (3 3) in pixels: focal lengths on the diagonal, principal point in the last column.
    """

    def project(points: Tensor) -> tuple[Tensor, Tensor]:
        ahead = points * points.new_tensor((1.0, -1.0, -1.0))  # y down, z away from the camera
        pixels = ahead @ intrinsics.T
        return pixels[..., :2] / pixels[..., 2:], ahead[..., 2]

    return project


def cropped_camera(intrinsics: Tensor, image: Image.Image, height: int, width: int) -> Project:
    """The camera of the image that `cropped` returns, from the intrinsics (3 3) of the original."""
    scale = max(height / image.height, width / image.width)
    left, top = (image.width * scale - width) / 2, (image.height * scale - height) / 2
    to_crop = intrinsics.new_tensor(((scale, 0, -left), (0, scale, -top), (0, 0, 1)))
    return camera_of(to_crop @ intrinsics)


# ---------------------------------------------------------------- the pair


def motion_vector(motion: Motion, body: Body) -> Tensor:
    """-> (f 235), not normalised."""
    return encode_smpl(*(field[None] for field in motion[:4]), body.of(motion.gender))[0]


def read_clip(folder: Path, clip: Clip, geometry: Geometry, body: Body, reading: Reading) -> Iterator[Sample]:
    """The clip's samples one after the other, each `geometry.frames` long, at its rate and size.

    Frames left over at the end, or before a long gap in the motion, are dropped. ValueError or
    FileNotFoundError if the clip cannot be used, possibly after the last sample: discard them all then.
    """
    fps, frames, height, width, _ = geometry
    motion_file, video_file = inside(folder, clip.motion), inside(folder, clip.video)
    first = next(images_at(video_file, fps))
    size, project = (first.height, first.width), None
    found = read_motion_file(motion_file, body, clip.track, clip.axes or reading.axes, size)
    parts = _parts(found, clip, video_file, body, reading, size, (frames - 1) / fps)
    if found.intrinsics is not None:
        reading.refuse(of_another_picture(found.intrinsics, size), clip.motion)
        project = cropped_camera(found.intrinsics, first, height, width)
    pixels, longest, current = [], 0, None
    for count, image in enumerate(images_at(video_file, fps)):
        now = count / fps
        part = next((p for p in parts if p.times[0] - SAME_TIME <= now <= p.times[-1] + SAME_TIME), None)
        if part is not current:
            pixels, current = [], part
        if part is not None:
            pixels.append(cropped(image, height, width))
            longest = max(longest, len(pixels))
        if len(pixels) == frames:
            times = torch.arange(count + 1 - frames, count + 1, dtype=torch.float64) / fps
            vector = motion_vector(at_video_times(part, times), body)
            reading.refuse(unseen(vector, project, height, width), clip.motion)
            yield Sample(clip.video, (clip.prompt,), vector, torch.stack(pixels), project)
            pixels = []
    end = float(parts[-1].times[-1])
    if found.frames is None and abs(now - end) > APART:
        ends = f"{clip.video} ends after {now:.2f} s, {clip.motion} after {end:.2f} s"
        raise ValueError(f"{ends}: expected the same; is the frame rate of one of them wrong?")
    if longest < frames:
        has = f"{clip.video} has {longest} frames at {fps:g} fps with the person in them"
        raise ValueError(f"{has}, fewer than {frames}: ask for fewer --frames")


def _parts(
    found: Recovered, clip: Clip, video: Path, body: Body, reading: Reading, size: tuple[int, int],
    shortest: float,
) -> list[Stretch]:  # fmt: skip
    """The motion on its video's clock, checked, without parts of less than `shortest` seconds if there are
    longer ones; assumptions and cuts are noted in `reading`."""
    times = None
    if found.frames is not None:
        times = torch.tensor([shown.time for shown in shown_frames(video)], dtype=torch.float64)
        times -= times[0].clone()
        if times[-1] == 0:
            raise ValueError(f"{clip.video}: all its frames are shown at one time; {ENCODE_AGAIN}")
        if (last := int(found.frames[-1])) >= len(times):
            have = f"the video has 0 to {len(times) - 1}"
            raise ValueError(f"{clip.motion}: it names frame {last}, {have}: is it of another video?")
    parts, said = stretches(found, times)
    reading.say(clip.video, said)
    reading.say(clip.motion, found.notes)
    # through a long lens, distances from the camera are estimated badly
    depth = 1.0 if found.intrinsics is None else min(1.0, math.hypot(*size) / float(found.intrinsics[0, 0]))
    kept = []
    for part in [p for p in parts if p.times[-1] - p.times[0] >= shortest - SAME_TIME] or parts:
        # a fault's frames count from the first one of the part
        name = clip.motion if len(parts) == 1 else f"{clip.motion} from {part.times[0]:.2f} s on"
        kept.append(part._replace(motion=checked(part.motion, body, name, reading, depth=depth)))
    return kept


def of_another_picture(intrinsics: Tensor, size: tuple[int, int]) -> list[str]:
    """What is wrong if the principal point is far from the middle of a picture of this (height, width)."""
    width, height = (2 * intrinsics[:2, 2]).tolist()
    if all(0.8 < there / here < 1.25 for there, here in ((width, size[1]), (height, size[0]))):
        return []
    seen = f"its camera is of pictures of about {width:.0f}x{height:.0f}, the video is {size[1]}x{size[0]}"
    return [f"{seen}: name the video that the motion was recovered from, or scale the camera's numbers"]


def unseen(motion: Tensor, project: Project | None, height: int, width: int) -> list[str]:
    """Why a person with this motion (f 235) cannot be in the picture; empty if there is no reason."""
    depth = -motion[:, 5]  # of the pelvis
    if not (depth > 0).all():
        return [
            f"the person is {-depth.min():.2f} m behind the camera; expected the camera's frame: "
            "x right, z up, the camera at the origin looking along +y; or name the axes, @axes=opencv"
        ]
    joints = motion[:, 3:75].unflatten(-1, (24, 3))
    pixels, _ = (project or assumed_camera(height, width))(joints)
    tall = (pixels[..., 1].amax(-1) - pixels[..., 1].amin(-1)).median()
    if tall < TINY * height:
        return [f"the person is {tall / height:.1%} of the picture tall: is trans in centimetres?"]
    if project and not ((pixels > 0) & (pixels < pixels.new_tensor((width, height)))).all(-1).any():
        return ["no joint is ever in the picture; is camera in pixels of the video, metres in trans?"]
    return []


def assumed_camera(height: int, width: int) -> Project:
    """A pinhole at the origin that sees 53 degrees along the longer side."""
    focal = float(max(height, width))
    return camera_of(torch.tensor(((focal, 0, width / 2), (0, focal, height / 2), (0, 0, 1))))

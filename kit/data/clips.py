"""Paired clips: a video and the motion of the person in it, read at the same moments, in one camera's frame.

A folder of them has metadata.csv with the columns video, prompt and motion, paths relative to the folder. A
motion is an AMASS .npz (z up); its optional array `camera` is a pinhole's (3, 3) intrinsics, in pixels of the
video as it is shown.

The motion is in the camera's frame: the camera stands at the origin. In the file, where z is up, it looks
along +y with x to its right; here, y up, along -z. Video and motion begin together.
"""

import csv
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from kit.body import Body, read_arrays
from kit.data.motion_files import Motion, at_times, load_amass
from kit.geometry import Geometry
from kit.video import SAME_TIME, images_at
from motion_tokens import encode_smpl

COLUMNS = ("video", "prompt", "motion")
APART = 0.25  # seconds by which the ends of a video and of its motion may differ


class Camera(NamedTuple):
    """A pinhole that looks along -z, y up. Pixels count from the image's top left corner."""

    intrinsics: Tensor  # (3 3) pixels: focal lengths on the diagonal, principal point in the last column
    position: Tensor  # (3,) metres

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points (... 3), metres -> pixels (... 2) as (column, row), and depth from the camera (...)."""
        offset = (points - self.position) * points.new_tensor((1.0, -1.0, -1.0))  # y down, z away from it
        pixels = offset @ self.intrinsics.T
        return pixels[..., :2] / pixels[..., 2:], offset[..., 2]


class Sample(NamedTuple):
    """What training learns from: some frames of one person."""

    name: str
    captions: tuple[str, ...]  # each describes it; none: no text
    motion: Tensor  # (f 235) metres and radians, not normalised
    video: Tensor | None  # (f h w 3) uint8
    camera: Camera | None  # of the video, where it is known


class Clip(NamedTuple):
    """A row of metadata.csv."""

    video: str
    prompt: str
    motion: str


# ---------------------------------------------------------------- the list


def inside(folder: Path, name: str | Path) -> Path:
    """The file `name` of a folder; ValueError if it is outside, also by way of links."""
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name} leads out of {folder}: expected a file in it; move it there")
    return path


def read_metadata(folder: Path) -> tuple[list[Clip], list[str]]:
    """The clips of metadata.csv (UTF-8), and what is wrong with the rows that are none.

    FileNotFoundError or ValueError for a file that is missing or no such table.
    """
    file = inside(folder, "metadata.csv")
    if not file.is_file():
        raise FileNotFoundError(f"no {folder / 'metadata.csv'}: expected a table of {', '.join(COLUMNS)}")
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")  # bad bytes spoil their row only
    rows, clips, problems = csv.DictReader(io.StringIO(text, newline="")), [], []
    try:
        if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
            found = ", ".join(rows.fieldnames or ("nothing",))
            raise ValueError(f"{file} lacks the columns {', '.join(missing)}: its first line has {found!a}")
        for row in rows:
            where = f"metadata.csv line {rows.line_num}"
            values = [row[column] for column in COLUMNS]
            if None in values or None in row:
                problems.append(f"{where}: expected {len(rows.fieldnames)} values; quote texts with commas")
            elif not all(value.strip() for value in values):
                empty = [c for c, value in zip(COLUMNS, values, strict=True) if not value.strip()]
                problems.append(f"{where}: {' and '.join(empty)} empty")
            elif any("\udc80" <= letter <= "\udcff" for value in values for letter in value):
                problems.append(f"{where}: not UTF-8; save the table as UTF-8")
            else:
                clips.append(Clip(*(value.strip() for value in values)))
    except csv.Error as error:
        raise ValueError(f"{file} line {rows.line_num}: {error}") from error
    return clips, problems


# ---------------------------------------------------------------- the crop


def crop(image: Image.Image, height: int, width: int) -> tuple[float, float, float]:
    """The largest middle part of these proportions: its left and top, and pixels asked for per its pixel."""
    scale = max(height / image.height, width / image.width)
    return (image.width - width / scale) / 2, (image.height - height / scale) / 2, scale


def resized(image: Image.Image, height: int, width: int) -> Tensor:
    """The crop of an image, (h w 3) uint8."""
    left, top, scale = crop(image, height, width)
    right, bottom = min(left + width / scale, image.width), min(top + height / scale, image.height)
    box = (max(left, 0), max(top, 0), right, bottom)  # rounding must not lead out of the image
    return torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC, box)))


def resized_camera(intrinsics: Tensor, image: Image.Image, height: int, width: int) -> Camera:
    """The camera of the crop, from the intrinsics (3 3) of the image."""
    left, top, scale = crop(image, height, width)
    to_crop = intrinsics.new_tensor(((scale, 0, -left * scale), (0, scale, -top * scale), (0, 0, 1)))
    return Camera(to_crop @ intrinsics, torch.zeros(3))


# ---------------------------------------------------------------- the pair


def motion_vector(motion: Motion, body: Body) -> Tensor:
    """-> (f 235), not normalised."""
    fields = (motion.global_orient, motion.body_pose, motion.betas, motion.transl)
    return encode_smpl(*(field[None] for field in fields), body)[0]


def read_camera(path: Path) -> Tensor | None:
    """Intrinsics (3 3) of a motion file, None if it has none; ValueError if they are no pinhole's."""
    camera = read_arrays(path, ["camera"]).get("camera")
    if camera is None:
        return None
    if camera.shape != (3, 3) or camera.dtype.kind not in "fiu":
        raise ValueError(f"{path}: camera is {camera.dtype} {camera.shape}, expected numbers (3, 3)")
    camera = torch.from_numpy(camera.astype(np.float32))
    pinhole = camera * torch.tensor(((1, 0, 1), (0, 1, 1), (0, 0, 1)))
    if not torch.equal(camera, pinhole) or camera[2, 2] != 1 or not camera.diagonal().gt(0).all():
        expected = "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"
        raise ValueError(f"{path}: camera is {camera.tolist()}, expected {expected}")
    return camera


def read_clip(folder: Path, clip: Clip, geometry: Geometry, body: Body) -> Iterator[Sample]:
    """The clip's samples one after the other, each `geometry.frames` long, at its rate and size.

    What remains at the end is left out. Raises ValueError or FileNotFoundError, possibly after the last
    sample, if the clip cannot be used: then no sample of it counts.
    """
    fps, frames, height, width, _ = geometry
    motion_file, video_file = inside(folder, clip.motion), inside(folder, clip.video)
    motion, intrinsics = load_amass(motion_file, body), read_camera(motion_file)
    end, pixels = (len(motion.transl) - 1) / motion.fps, []
    for count, image in enumerate(images_at(video_file, fps)):
        if count / fps <= end + SAME_TIME:
            pixels.append(resized(image, height, width))
        if len(pixels) == frames:
            times = torch.arange(count + 1 - frames, count + 1, dtype=torch.float64) / fps
            vector = motion_vector(at_times(motion, times), body)
            camera = None if intrinsics is None else resized_camera(intrinsics, image, height, width)
            _check_view(vector, camera, motion_file, height, width)
            yield Sample(clip.video, (clip.prompt,), vector, torch.stack(pixels), camera)
            pixels = []
    if abs(count / fps - end) > APART:
        raise ValueError(
            f"{clip.video} ends after {count / fps:.2f} s, {clip.motion} after {end:.2f} s: "
            "expected the same; is the frame rate of one of them wrong?"
        )
    shared = math.floor((min(count / fps, end) + SAME_TIME) * fps) + 1
    if shared < frames:
        raise ValueError(
            f"{clip.video} has {shared} frames at {fps:g} fps, fewer than {frames}: ask for fewer --frames"
        )


def _check_view(motion: Tensor, camera: Camera | None, file: Path, height: int, width: int) -> None:
    """Raise ValueError unless a person who moves like this (f 235) stands before the camera."""
    depth = -motion[:, 5]  # of the pelvis
    if not (depth > 0).all():
        raise ValueError(
            f"{file}: the person is {-depth.min():.2f} m behind the camera; expected the camera's frame: "
            "x right, z up, the camera at the origin looking along +y"
        )
    if camera is None:
        return
    pixels, _ = camera.project(rearrange(motion[:, 3:75], "f (j c) -> f j c", c=3))
    if not ((pixels > 0) & (pixels < pixels.new_tensor((width, height)))).all(-1).any():
        raise ValueError(
            f"{file}: no joint is ever in the picture; is camera in pixels of the video, metres in trans?"
        )

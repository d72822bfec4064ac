"""A picture of a data set: the skeleton over the frames, so that flipped, shifted or late motion is seen."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kit import render
from kit.clips import Camera, Sample
from kit.puppet_body import PARENTS

HEIGHT = 320  # pixels of a frame while it is drawn on
COLUMNS = 6


def preview(path: Path, samples: Sequence[Sample]) -> None:
    """Write a contact sheet (.png): a row of frames for each sample, its skeleton drawn over them."""
    titles = []
    for sample in samples:
        about = " | ".join(sample.captions) or "no text"
        if sample.video is not None and sample.camera is None:
            about += " (no camera in the file: a usual one is assumed)"
        titles.append(f"{sample.name}: {about}")
    render.contact_sheet(path, [overlay(sample) for sample in samples], titles, COLUMNS)


def overlay(sample: Sample) -> Tensor:
    """The sample's frames (f 320 w 3) uint8, drawn on; those that a contact sheet leaves out are empty."""
    joints = rearrange(sample.motion[:, 3:75], "f (j c) -> f j c", c=3)
    shown = torch.linspace(0, len(joints) - 1, COLUMNS).round().long().unique()
    if sample.video is None:
        drawn = render.draw_skeleton(joints[shown], PARENTS, render.fitted(joints), HEIGHT)
    else:
        height, width = sample.video.shape[1:3]
        camera = sample.camera or assumed_camera(height, width)
        ground = render.resized(sample.video[shown], HEIGHT)
        rows, columns = ground.shape[1:3]
        side = max(rows, columns)  # skeletons are drawn on squares
        ground = F.pad(ground, (0, 0, 0, side - columns, 0, side - rows))
        scaled = side * height / rows
        drawn = render.draw_skeleton(joints[shown], PARENTS, camera.project, side, scaled, ground)
        drawn = drawn[:, :rows, :columns]
    frames = drawn.new_zeros(len(joints), *drawn.shape[1:])
    frames[shown] = drawn
    return frames


def assumed_camera(height: int, width: int) -> Camera:
    """A pinhole at the origin that sees 53 degrees along the longer side."""
    focal = float(max(height, width))
    return Camera(torch.tensor(((focal, 0, width / 2), (0, focal, height / 2), (0, 0, 1))), torch.zeros(3))

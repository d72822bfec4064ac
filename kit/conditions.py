"""A sample's condition: a user's motion or video, converted for the backbone. Every change is printed."""

import math
import re
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kit.backbone import Backbone
from kit.body import Body
from kit.data.clips import assumed_camera, cropped, motion_vector
from kit.data.datasets import NUMBER, split_options
from kit.data.hmr import read_motion_file, stretches
from kit.data.motion_files import Motion, at_times, smooth
from kit.data.plausible import faults
from kit.geometry import Geometry
from kit.pictures import from_frames
from kit.video import images_at

USUAL_FPS = 30.0  # assumed of videos that motion was recovered from
MIDDLE = 4.0  # metres in front of a camera of unknown lens: where a person out of its view is moved
IN_VIEW = 0.25  # of the joints: a head and shoulders


def read_motion(path: Path, backbone: Backbone, start: float = 0.0, loop: bool = False) -> tuple[Tensor, str]:
    """A file that kit/data/hmr.py reads, from `start` seconds on -> motion (1 f 235) at the backbone's rate,
    and the person's gender, which names a body.

    `path` may end in @axes=, @track=, @smooth=SECONDS and, for a file without a rate, @fps=. With `loop`, a
    motion that is too short is played forwards and backwards; else ValueError. A person out of the camera's
    view is moved into it.
    """
    fps, frames = backbone.geometry[:2]
    path, motion = open_motion(path, backbone.body)
    end, seconds = (len(motion.transl) - 1) / motion.fps, (frames - 1) / fps
    if not 0 <= start <= end:
        raise ValueError(f"{path} lasts {end:.2f} s: --start {start:g} is not in it")
    times = start + torch.arange(frames, dtype=torch.float64) / fps
    if start + seconds > end + 1e-6:
        if end == start:
            raise ValueError(f"{path} has one frame from --start on, expected at least two")
        if not loop:
            fewer = "" if backbone.project else ", or ask for fewer --frames"
            raise ValueError(
                f"{path} has {end - start:.2f} s from --start on, {frames} frames at {fps:g} fps are "
                f"{seconds:.2f} s: add --loop to play it forwards and backwards{fewer}"
            )
        print(f"{path}: {end - start:.2f} s are played forwards and backwards to fill {seconds:.2f} s")
        phase = (times - start) % (2 * (end - start))
        times = start + torch.minimum(phase, 2 * (end - start) - phase)
    elif start > 0 or start + seconds < end - 0.5 / fps:
        print(f"{path}: {start:.2f} to {start + seconds:.2f} s of {end:.2f} s are used")
    if motion.fps != fps:
        print(f"{path}: {motion.fps:g} fps is resampled to {fps:g} fps")
    motion = at_times(motion, times.clamp(max=end))._replace(fps=fps)
    return motion_vector(in_view(motion, backbone, path), backbone.body)[None], motion.gender


def open_motion(path: Path, body: Body) -> tuple[Path, Motion]:
    """Path with options -> the file, and its motion at a constant rate; assumptions are printed."""
    name, options = split_options(path.name, "axes", "track", "fps", "smooth")
    if "fps" in options and not (re.fullmatch(NUMBER, options["fps"]) and float(options["fps"])):
        raise ValueError(f"{path}: fps is {options['fps']!r}, expected a number above 0")
    file = path.with_name(name)
    found = read_motion_file(file, body, options.get("track", ""), options.get("axes", ""))
    said, times = list(found.notes), None
    if found.frames is not None:
        fps = float(options.get("fps", found.motion.fps))
        if math.isnan(fps):
            fps = USUAL_FPS
            said.append(f"it has no rate: {fps:g} frames a second are assumed; name another with @fps=25")
        times = torch.arange(int(found.frames[-1]) + 1, dtype=torch.float64) / fps
    elif "fps" in options:
        raise ValueError(f"{file} has a rate of its own, {found.motion.fps:g}: leave @fps= out")
    parts, cut = stretches(found, times)
    motion = max(parts, key=lambda part: len(part.times)).motion
    said += cut
    if len(parts) > 1:
        said.append("the longest part is used")
    motion = smooth(motion, float(options.get("smooth", 0)))
    for note in said + faults(motion, body):
        print(f"{file}: {note}")
    return file, motion


def in_view(motion: Motion, backbone: Backbone, path: Path) -> Motion:
    """The motion, moved to the middle of the view if hardly a joint of its first frame is in it."""
    height, width = backbone.geometry.height, backbone.geometry.width
    joints = backbone.body.of(motion.gender).joints(*motion[:4])[0]  # (24 3)
    pixels, depth = (backbone.project or assumed_camera(height, width))(joints)
    inside = (depth > 0) & ((pixels >= 0) & (pixels <= pixels.new_tensor((width, height)))).all(-1)
    if inside.float().mean() >= IN_VIEW:
        return motion
    print(f"{path}: starts outside the camera's view; moved to the middle of it")
    pelvis, lowest = joints[0], joints[:, 1].min()
    # the puppet's camera looks at a person on the floor, at x = z = 0; Wan's stands at the origin and looks
    # along -z
    aim = pelvis.new_tensor((0, pelvis[1] - lowest, 0) if backbone.project else (0, 0, -MIDDLE))
    return motion._replace(transl=motion.transl + aim - pelvis)


def read_video(path: Path, geometry: Geometry, start: float = 0.0) -> Tensor:
    """A video of any rate and size from `start` seconds on -> pixels (1 3 f h w) of the backbone's."""
    fps, frames, height, width, _ = geometry
    if not 0 <= start < math.inf:
        raise ValueError(f"--start is a number of seconds from 0 on, got {start:g}")
    first = math.ceil(start * fps - 1e-6)  # 2.2 * 25 is a little more than 55
    original = next(images_at(path, fps))
    images = islice(images_at(path, fps), first, first + frames + 1)  # one more tells whether any are left
    pixels = [cropped(image, height, width) for image in images]  # one by one: a camera's frames are large
    if len(pixels) < frames:
        raise ValueError(
            f"{path} has {len(pixels)} frames at {fps:g} fps from --start on, "
            f"{frames} are needed: {frames / fps:.2f} s"
        )
    if first or len(pixels) > frames:
        end = (first + frames - 1) / fps
        print(f"{path}: {first / fps:.2f} to {end:.2f} s are used, {frames} frames at {fps:g} fps")
    if (original.height, original.width) != (height, width):
        print(f"{path}: {original.height}x{original.width} is cut and resized to {height}x{width}")
    return from_frames(torch.stack(pixels[:frames]))[None]

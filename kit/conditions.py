"""What conditions a sample: a user's motion or video, as the backbone takes it."""

from pathlib import Path

from torch import Tensor

from kit import puppet, render
from kit.backbone import Backbone
from kit.geometry import Geometry
from kit.motion_files import load_amass, resample
from motion_tokens import encode_smpl


def read_motion(path: Path, world: Backbone) -> Tensor:
    """An AMASS-style file -> motion (1 f 235) at the backbone's frame rate, in front of its camera."""
    fps, frames, *_ = world.geometry
    motion = resample(load_amass(path, world.body), fps)
    if len(motion.transl) < frames:
        raise ValueError(
            f"{path} is {len(motion.transl)} frames long at {fps} fps: "
            f"at least {frames} ({frames / fps:.2f} s) are needed"
        )
    if len(motion.transl) > frames:
        print(f"{path}: the first {frames} of {len(motion.transl)} frames are used")
    orient, pose, transl = (x[None, :frames] for x in (*motion[:2], motion.transl))
    joints = world.body.joints(orient, pose, motion.betas[None, None], transl)
    if world.project:
        pixels, depth = world.project(joints[:, 0, 0])
        limits = pixels.new_tensor((world.geometry.width, world.geometry.height))
        if not (depth > 0).all() or (pixels < 0).any() or (pixels > limits).any():
            print(f"{path}: starts outside the camera's view; moved to its middle")
            transl = transl - transl[:, :1] * transl.new_tensor((1, 0, 1))
    return encode_smpl(orient, pose, motion.betas[None], transl, world.body)


def read_video(path: Path, geometry: Geometry) -> Tensor:
    """A video file -> pixels (1 3 f h w); ValueError if it is not of the backbone's size."""
    frames, fps = render.read_video(path)
    expected = (geometry.frames, geometry.height, geometry.width)
    if tuple(frames.shape[:3]) != expected:
        f, h, w = frames.shape[:3]
        hint = f" ({f} is not 4n+1, the nearest is {puppet.nearest_frames(f)})" if f % 4 != 1 else ""
        raise ValueError(
            f"{path} has {f} frames of {w}x{h}{hint}: "
            f"these weights take {expected[0]} frames of {expected[2]}x{expected[1]}"
        )
    if abs(fps - geometry.fps) > 0.01:
        print(f"{path}: {fps:g} fps is read as {geometry.fps} fps")
    return render.from_frames(frames)[None]

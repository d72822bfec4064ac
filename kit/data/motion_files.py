"""Motions with AMASS's fields: writing, resampling and smoothing them, turning them in space, mirroring.

Here y is up; AXES has the rotations from files' axes, such as z up in AMASS (https://amass.is.tue.mpg.de).
If `body` was loaded from a folder of several genders, the motion's gender chooses among them.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kit.body import GENDERS, JOINT_NAMES, Body
from kit.files import whole_file
from motion_tokens import axis_angle_to_matrix, matrix_to_axis_angle

MAX_FPS = 1000.0  # hertz; the fastest AMASS captures are 250
LIMITS = {  # of absolute values; in some captures a spinning person's angle adds up turn by turn
    "global_orient": (100.0, "radians: is it in degrees?"),
    "body_pose": (100.0, "radians: is it in degrees?"),
    "betas": (20.0, "deviations of the shape space"),
    "transl": (1000.0, "metres: is it in millimetres?"),
}
SAME_FRAME = 1e-4  # frames; times nearer to a frame than this mean that frame
LEFT_HIP, RIGHT_HIP = JOINT_NAMES.index("left_hip"), JOINT_NAMES.index("right_hip")
AXES = {  # turns to y up, a camera looking along -z
    # a quarter turn about x: its camera looks along +y; who faces -y, as in AMASS, then faces +z
    "zup": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]], dtype=torch.float64),
    "yup": torch.eye(3, dtype=torch.float64),
    "opencv": torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)),  # x right, y down, z ahead
}


class Motion(NamedTuple):
    """One person's SMPL motion: float32 on the CPU, y up, metres, axis-angle radians, constant frame rate."""

    global_orient: Tensor  # (f 3)
    body_pose: Tensor  # (f 23 3)
    betas: Tensor  # (10,)
    transl: Tensor  # (f 3)
    fps: float  # hertz
    gender: str  # "female", "male" or "neutral", as the file says; chooses from a folder of models


def save_amass(path: str | Path, motion: Motion, body: Body) -> None:
    """Write an AMASS-style .npz, z up: poses (f 156) SMPL+H, trans (f 3), betas (16), gender, frame rate.

    SMPL's two hand joints (22, 23) are not written, as SMPL+H has fingers in their place: they read back as
    identity. The SMPL-X Blender add-on opens the file if its target frame rate is at most the motion's.
    The same motion gives the same bytes. ValueError for a malformed motion.
    """
    check_motion(motion, f"motion for {path}")
    z_up = turn(motion, AXES["zup"].T, body)
    poses = np.zeros((len(z_up.transl), 156), dtype=np.float32)
    poses[:, :66] = rearrange(_pose(z_up)[:, :22], "f j c -> f (j c)").numpy()
    betas = np.zeros(16, dtype=np.float32)
    betas[:10] = z_up.betas.numpy()
    arrays = {"poses": poses, "trans": z_up.transl.numpy(), "betas": betas}
    rate = np.array(float(motion.fps))  # AMASS's SMPL+H and SMPL-X releases differ in its name
    arrays |= {"gender": np.array(motion.gender), "mocap_framerate": rate, "mocap_frame_rate": rate}
    with whole_file(path) as temporary:
        np.savez(temporary, **arrays)


def check_motion(motion: Motion, source: str) -> None:
    """Raise ValueError unless shapes agree and every number is finite and within LIMITS."""
    f = len(motion.body_pose)
    shapes = {"global_orient": (f, 3), "body_pose": (f, 23, 3), "betas": (10,), "transl": (f, 3)}
    for name, shape in shapes.items():
        value, (limit, unit) = getattr(motion, name), LIMITS[name]
        if tuple(value.shape) != shape or f == 0:
            raise ValueError(f"{source}: {name} is {tuple(value.shape)}, expected {shape}, at least 1 frame")
        if not value.isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or infinity; cut or repair those frames")
        if (reach := value.abs().max()) > limit:
            raise ValueError(f"{source}: {name} up to {reach:.3g}, expected at most {limit:g} {unit}")
    if not 0 < motion.fps <= MAX_FPS:
        raise ValueError(f"{source}: {motion.fps} frames a second, expected above 0 and at most {MAX_FPS:g}")
    if motion.gender not in GENDERS:
        raise ValueError(f"{source}: gender is {motion.gender!r}, expected one of {', '.join(GENDERS)}")


def _pose(motion: Motion) -> Tensor:
    """All rotations (f 24 3), the root's first."""
    return torch.cat([rearrange(motion.global_orient, "f c -> f 1 c"), motion.body_pose], dim=1)


# ---------------------------------------------------------------- time


def at_times(motion: Motion, times: Tensor) -> Motion:
    """The motion at `times` (n,), seconds from its first frame, none beyond its last: see at_frames."""
    return at_frames(motion, times.double() * motion.fps)


def at_frames(motion: Motion, position: Tensor) -> Motion:
    """The motion at positions (n,) counted in its frames: slerp for rotations, linear for transl; same fps.

    Rotations take the shorter way; at a frame's position the result is that frame, bit for bit.
    """
    position = torch.where((position - position.round()).abs() < SAME_FRAME, position.round(), position)
    before = position.long()
    after = (before + 1).clamp(max=len(motion.transl) - 1)
    weight = rearrange(position - before, "f -> f 1")

    pose = _pose(motion)
    start, end = axis_angle_to_matrix(pose[before].double()), axis_angle_to_matrix(pose[after].double())
    partly = weight[..., None] * matrix_to_axis_angle(start.mT @ end)
    between = matrix_to_axis_angle(start @ axis_angle_to_matrix(partly)).float()
    pose = torch.where(weight[..., None] == 0, pose[before], between)
    transl = torch.lerp(motion.transl[before].double(), motion.transl[after].double(), weight).float()
    return motion._replace(global_orient=pose[:, 0], body_pose=pose[:, 1:], transl=transl)


def resample(motion: Motion, fps: float, start: float = 0.0, end: float = math.inf) -> Motion:
    """The motion at start, start + 1/fps, ... up to `end` or its last frame; rounding does not lose it."""
    end = min(end, (len(motion.transl) - 1) / motion.fps)
    count = math.floor((end - start) * fps + SAME_FRAME) + 1
    times = start + torch.arange(count, dtype=torch.float64) / fps
    return at_times(motion, times.clamp(max=end))._replace(fps=float(fps))


def smooth(motion: Motion, seconds: float) -> Motion:
    """The motion filtered in time by a Gaussian of standard deviation `seconds`.

    Rotations are averaged as matrices and projected to the nearest rotation by SVD, independent of how
    axis-angle numbers wrap. Both ends are extended by point reflection, so that steady movement is unchanged.
    """
    radius = min(math.ceil(4 * seconds * motion.fps), len(motion.transl) - 1)
    if radius < 1:
        return motion
    offset = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.softmax(-((offset / (seconds * motion.fps)) ** 2) / 2, dim=0)

    def mean(before: Tensor, inside: Tensor, after: Tensor) -> Tensor:
        rows = torch.cat([before.flip(0), inside, after.flip(0)])  # nearest to the ends in the middle
        smoothed = F.conv1d(rearrange(rows.flatten(1), "f c -> c 1 f"), kernel[None, None])
        return rearrange(smoothed, "c 1 f -> f c").unflatten(1, inside.shape[1:])

    first, last = slice(1, radius + 1), slice(-radius - 1, -1)
    places = motion.transl.double()
    places = mean(2 * places[:1] - places[first], places, 2 * places[-1:] - places[last])
    turns = axis_angle_to_matrix(_pose(motion).double())
    ends = [turns[at] @ turns[part].mT @ turns[at] for at, part in (([0], first), ([-1], last))]
    u, _, vh = torch.linalg.svd(mean(ends[0], turns, ends[1]))
    u[..., 2] *= rearrange(torch.linalg.det(u @ vh), "f j -> f j 1")  # no reflection
    pose = matrix_to_axis_angle(u @ vh).float()
    return motion._replace(global_orient=pose[:, 0], body_pose=pose[:, 1:], transl=places.float())


# ---------------------------------------------------------------- space


def turn(motion: Motion, rotation: Tensor, body: Body) -> Motion:
    """Turn the whole scene by `rotation` (3 3); computed in float64, returned in float32."""
    pelvis = body.of(motion.gender).rest_joints(motion.betas.float())[0].double()
    orient = matrix_to_axis_angle(rotation @ axis_angle_to_matrix(motion.global_orient.double()))
    # SMPL turns the body about its pelvis, which stands at pelvis + transl: that point is what moves
    transl = (pelvis + motion.transl.double()) @ rotation.T - pelvis
    return Motion(orient.float(), motion.body_pose.float(), motion.betas.float(), transl.float(), *motion[4:])


def canonical(motion: Motion, body: Body) -> Motion:
    """Move and turn motion-only data so that in the first frame the pelvis is at x = z = 0, facing +z.

    Facing is by the hips: those of the first frame come to lie along x, left at +x. Heights stay.
    """
    body = body.of(motion.gender)
    first = body.joints(motion.global_orient[0], motion.body_pose[0], motion.betas, motion.transl[0])
    x, _, z = (first[LEFT_HIP] - first[RIGHT_HIP]).double()
    heading = torch.stack((torch.zeros_like(x), torch.atan2(z, x), torch.zeros_like(x)))
    turned = turn(motion, axis_angle_to_matrix(heading), body)
    pelvis = body.rest_joints(motion.betas)[0] + turned.transl[0]
    return turned._replace(transl=turned.transl - pelvis * pelvis.new_tensor((1, 0, 1)))


def mirror(motion: Motion, body: Body) -> Motion:
    """The motion in a mirror at x = 0: joints reflected, left limbs doing what right limbs did.

    Exact for a body that is its own mirror image at rest; SMPL's is, to a few millimetres.
    """
    sides = {"left": "right", "right": "left"}
    names = ("_".join(sides.get(word, word) for word in name.split("_")) for name in JOINT_NAMES)
    # seen in a mirror, a rotation about the mirror's normal keeps its sign, the other components change it
    pose = _pose(motion)[:, [JOINT_NAMES.index(name) for name in names]] * torch.tensor((1.0, -1.0, -1.0))
    # the pelvis' position, rest pelvis + transl, is reflected, not transl alone
    pelvis_x = body.of(motion.gender).rest_joints(motion.betas)[0] * pose.new_tensor((1, 0, 0))
    transl = motion.transl * pose.new_tensor((-1, 1, 1)) - 2 * pelvis_x
    return motion._replace(global_orient=pose[:, 0], body_pose=pose[:, 1:], transl=transl)

"""Motion in and out of files: AMASS .npz <-> one `Motion`; motions resampled, smoothed, cut and turned.

Here y is up; AXES has the turns from what files have, such as z up in AMASS (https://amass.is.tue.mpg.de).
A `body` that was loaded from a folder of several genders stands for that of the motion's gender.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kit.body import GENDERS, JOINT_NAMES, Body
from kit.files import whole_file
from kit.puppet import nearest_frames
from kit.untrusted import read_arrays
from motion_tokens import axis_angle_to_matrix, matrix_to_axis_angle

MAX_FPS = 1000.0  # hertz; the fastest AMASS captures are 250
MAX_BETA = 20.0  # standard deviations of the shape space
MAX_DISTANCE = 1000.0  # metres from the origin
MAX_ANGLE = 100.0  # radians; some captures count the turns of a spinning person
AMASS_WIDTHS = {72: "SMPL", 156: "SMPL+H", 165: "SMPL-X"}
RATE_KEYS = ("mocap_frame_rate", "mocap_framerate")  # SMPL-X and SMPL+H releases of AMASS differ
SAME_FRAME = 1e-4  # frames; times nearer to a frame than this mean that frame
NOT_SMPL = (
    "HumanML3D's vectors (263 numbers a frame) are no SMPL pose: their rotations are refitted to another "
    "skeleton; read the AMASS files that its index.csv names (kit/data/humanml3d.py)"
)
LEFT_HIP, RIGHT_HIP = JOINT_NAMES.index("left_hip"), JOINT_NAMES.index("right_hip")
SIDE = {"left": "right", "right": "left"}
SIDED_WORD = re.compile(
    r"\b((left|right)(wards?|most|handed|hand|footed|side)?|((counter|anti)[- ]?)?clockwise)\b", re.IGNORECASE
)
# a quarter turn about x, (x, y, z) -> (x, -z, y): a person who faces +z then faces -y, as in AMASS
Y_UP_TO_Z_UP = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
AXES = {  # turns to y up, a camera looking along -z
    "zup": Y_UP_TO_Z_UP.T,  # its camera looks along +y
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
    gender: str  # "female", "male" or "neutral": as the file says; it chooses no body


def load_amass(path: str | Path, body: Body, axes: str = "zup") -> Motion:
    """Read an AMASS .npz: poses (f 156) SMPL+H, (f 165) SMPL-X or (f 72) SMPL, trans (f 3), betas (10+).

    `axes` are the file's, one of AXES. Only the first ten betas are kept, and only root and body of the pose:
    SMPL's two hand joints are identity unless the file is plain SMPL. A missing gender reads as "neutral".
    `body` gives the rest pelvis of these betas, about which SMPL turns. Raises FileNotFoundError, or
    ValueError naming the file and what is wrong.
    """
    if Path(path).suffix == ".npy":
        raise ValueError(f"{path}: expected an AMASS .npz; {NOT_SMPL}")
    arrays = _read_amass(Path(path))
    poses, trans, betas = arrays["poses"], arrays["trans"], arrays["betas"]
    if poses.ndim != 2 or poses.shape[1] not in AMASS_WIDTHS:
        known = ", ".join(f"(f, {width}) {name}" for width, name in AMASS_WIDTHS.items())
        raise ValueError(f"{path}: poses is {tuple(poses.shape)}, expected one of {known}")
    if betas.ndim != 1 or len(betas) < 10:
        raise ValueError(f"{path}: betas is {tuple(betas.shape)}, expected (10,) or longer; AMASS has (16,)")
    joints = 24 if poses.shape[1] == 72 else 22
    pose = rearrange(poses[:, : 3 * joints], "f (j c) -> f j c", c=3)
    pose = torch.cat([pose, pose.new_zeros(len(pose), 24 - joints, 3)], dim=1)
    motion = Motion(pose[:, 0], pose[:, 1:], betas[:10], trans, arrays["fps"], arrays["gender"])
    check_motion(motion, str(path))
    return turn(motion, AXES[axes], body)


def save_amass(path: str | Path, motion: Motion, body: Body) -> None:
    """Write an AMASS-style .npz, z up: poses (f 156) SMPL+H, trans (f 3), betas (16), gender, frame rate.

    SMPL's two hand joints (22, 23) are not written, SMPL+H has fingers in their place: they read back as
    identity. The SMPL-X Blender add-on opens the file if its target frame rate is at most the motion's.
    The same motion gives the same bytes. ValueError for a malformed motion or a suffix other than .npz.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"cannot write {path}: AMASS files end in .npz")
    check_motion(motion, f"motion for {path}")
    z_up = turn(motion, Y_UP_TO_Z_UP, body)
    poses = np.zeros((len(z_up.transl), 156), dtype=np.float32)
    poses[:, :3] = z_up.global_orient.numpy()
    poses[:, 3:66] = rearrange(z_up.body_pose[:, :21], "f j c -> f (j c)").numpy()
    betas = np.zeros(16, dtype=np.float32)
    betas[:10] = z_up.betas.numpy()
    arrays = {"poses": poses, "trans": z_up.transl.numpy(), "betas": betas}
    arrays |= {"gender": np.array(motion.gender), "mocap_frame_rate": np.array(float(motion.fps))}
    with whole_file(path) as temporary:
        np.savez(temporary, **arrays)


# ---------------------------------------------------------------- time


def at_times(motion: Motion, times: Tensor) -> Motion:
    """The motion at `times` (n,), ascending seconds from its first frame: rotations by slerp, transl linear.

    Turns take the shorter way round; at the time of a frame the result is that frame, bit for bit. The
    result's fps is the mean rate of `times`. Raises ValueError for a malformed motion or times outside it.
    """
    check_motion(motion, "motion")
    times = times.double()
    if times.ndim != 1 or not len(times) or not (times.isfinite().all() and (times.diff() > 0).all()):
        raise ValueError(f"times of shape {tuple(times.shape)}: expected (n,), finite, each after the other")
    fps = (len(times) - 1) / (times[-1] - times[0]).item() if len(times) > 1 else motion.fps
    return at_frames(motion, times * motion.fps)._replace(fps=fps)


def at_frames(motion: Motion, position: Tensor) -> Motion:
    """As at_times, at positions (n,) counted in the motion's frames; its fps stays."""
    last = len(motion.transl) - 1
    position = torch.where((position - position.round()).abs() < SAME_FRAME, position.round(), position)
    if position.min() < 0 or position.max() > last:
        span = f"{position.min() / motion.fps:.3f} to {position.max() / motion.fps:.3f} s"
        raise ValueError(f"times are {span}, but the motion lasts from 0 to {last / motion.fps:.3f} s")
    before = position.long()
    after = (before + 1).clamp(max=last)
    weight = rearrange(position - before, "f -> f 1")

    pose = torch.cat([rearrange(motion.global_orient, "f c -> f 1 c"), motion.body_pose], dim=1)
    start, end = axis_angle_to_matrix(pose[before].double()), axis_angle_to_matrix(pose[after].double())
    partly = weight[..., None] * matrix_to_axis_angle(start.mT @ end)
    between = matrix_to_axis_angle(start @ axis_angle_to_matrix(partly)).float()
    pose = torch.where(weight[..., None] == 0, pose[before], between)
    transl = torch.lerp(motion.transl[before].double(), motion.transl[after].double(), weight).float()
    return motion._replace(global_orient=pose[:, 0], body_pose=pose[:, 1:], transl=transl)


def smooth(motion: Motion, seconds: float) -> Motion:
    """The motion through a Gaussian in time, `seconds` its standard deviation.

    Rotations are averaged as matrices and brought back to rotations by SVD: the mean that is nearest to all
    of them, whatever their axis-angle numbers are. Beyond both ends the motion goes on as its own point
    reflection, so that steady movement is kept as it is.
    """
    check_motion(motion, "motion")
    radius = min(math.ceil(4 * seconds * motion.fps), len(motion.transl) - 1)
    if radius < 1:
        return motion
    offset = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-((offset / (seconds * motion.fps)) ** 2) / 2)
    pose = torch.cat([rearrange(motion.global_orient, "f c -> f 1 c"), motion.body_pose], dim=1)
    turns, places = axis_angle_to_matrix(pose.double()), motion.transl.double()

    def mean(before: Tensor, inside: Tensor, after: Tensor) -> Tensor:
        rows = torch.cat([before.flip(0), inside, after.flip(0)])  # nearest to the ends in the middle
        signals = rearrange(rows.flatten(1), "f c -> c 1 f")
        smoothed = F.conv1d(signals, (kernel / kernel.sum())[None, None])
        return rearrange(smoothed, "c 1 f -> f c").unflatten(1, inside.shape[1:])

    first, last = slice(1, radius + 1), slice(-radius - 1, -1)
    places = mean(2 * places[:1] - places[first], places, 2 * places[-1:] - places[last])
    ends = [turns[at] @ turns[part].mT @ turns[at] for at, part in (([0], first), ([-1], last))]
    u, _, vh = torch.linalg.svd(mean(ends[0], turns, ends[1]))
    u = torch.cat([u[..., :2], u[..., 2:] * rearrange(torch.linalg.det(u @ vh), "f j -> f j 1 1")], dim=-1)
    pose = matrix_to_axis_angle(u @ vh).float()
    return motion._replace(global_orient=pose[:, 0], body_pose=pose[:, 1:], transl=places.float())


def resample(motion: Motion, fps: float) -> Motion:
    """The motion at times 0, 1/fps, 2/fps, ... up to its last frame, see `at_times`."""
    check_motion(motion, "motion")
    check_motion(motion._replace(fps=fps), "resampled motion")
    times = times_between(0, (len(motion.transl) - 1) / motion.fps, fps)
    return at_times(motion, times)._replace(fps=float(fps))


def times_between(start: float, end: float, fps: float) -> Tensor:
    """start, start + 1/fps, ... to end, all in seconds -> (n,) float64; rounding does not lose the last."""
    count = math.floor((end - start) * fps + SAME_FRAME) + 1
    return (start + torch.arange(count, dtype=torch.float64) / fps).clamp(max=end)


def windows(motion: Motion, frames: int, stride: int) -> list[Motion]:
    """Windows of `frames` (4n+1) that start at frames 0, stride, 2·stride, ...; none of a short motion."""
    check_motion(motion, "motion")
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames must be 4n+1, got {frames}; the nearest is {nearest_frames(frames)}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1 frame, got {stride}")
    parts = [slice(start, start + frames) for start in range(0, len(motion.transl) - frames + 1, stride)]
    orient, pose, transl = motion.global_orient, motion.body_pose, motion.transl
    return [
        motion._replace(global_orient=orient[part], body_pose=pose[part], transl=transl[part])
        for part in parts
    ]


# ---------------------------------------------------------------- space


def canonical(motion: Motion, body: Body) -> Motion:
    """The place of motion-only data: in the first frame the pelvis at x = z = 0, facing +z.

    Facing is by the hips: those of the first frame come to lie along x, left at +x. Heights stay.
    """
    check_motion(motion, "motion")
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
    check_motion(motion, "motion")
    pose = torch.cat([rearrange(motion.global_orient, "f c -> f 1 c"), motion.body_pose], dim=1)
    other_side = [JOINT_NAMES.index(_other_side(name)) for name in JOINT_NAMES]
    # seen in a mirror, a turn about the mirror's normal keeps its sense, all others change it
    pose = pose[:, other_side] * pose.new_tensor((1, -1, -1))
    # what is reflected is the place of the pelvis, rest pelvis + transl
    pelvis_x = body.of(motion.gender).rest_joints(motion.betas)[0] * pose.new_tensor((1, 0, 0))
    transl = motion.transl * pose.new_tensor((-1, 1, 1)) - 2 * pelvis_x
    return motion._replace(global_orient=pose[:, 0], body_pose=pose[:, 1:], transl=transl)


def mirror_caption(text: str) -> str:
    """Swap left and right, clockwise and counterclockwise (anticlockwise) and their relatives, keeping case.

    Whole words only: "upright" stays. Words meant in another sense ("left the room") are swapped too.
    """
    return SIDED_WORD.sub(_other_word, text)


def _other_word(match: re.Match) -> str:
    word = match[0].lower()
    other = _other_side(word)
    if "clockwise" in word:
        other = "counterclockwise" if word == "clockwise" else "clockwise"
    return other.upper() if match[0].isupper() else other.capitalize() if match[0][0].isupper() else other


def _other_side(word: str) -> str:
    return re.sub("left|right", lambda side: SIDE[side[0]], word)


def turn(motion: Motion, rotation: Tensor, body: Body) -> Motion:
    """Turn the whole scene by `rotation` (3 3), in float64 inside, float32 outside."""
    pelvis = body.of(motion.gender).rest_joints(motion.betas.float())[0].double()
    orient = matrix_to_axis_angle(rotation @ axis_angle_to_matrix(motion.global_orient.double()))
    # SMPL turns the body about its pelvis, which stands at pelvis + transl: that point is what moves
    transl = (pelvis + motion.transl.double()) @ rotation.T - pelvis
    return Motion(orient.float(), motion.body_pose.float(), motion.betas.float(), transl.float(), *motion[4:])


def _read_amass(path: Path) -> dict:
    """poses, trans, betas as float64 tensors, fps and gender, from an .npz that may hold anything."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an AMASS .npz")
    arrays = read_arrays(path, ("poses", "trans", "betas", "gender", *RATE_KEYS))
    rate = next((key for key in RATE_KEYS if key in arrays), RATE_KEYS[0])
    missing = [key for key in ("poses", "trans", "betas", rate) if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; expected poses, trans, betas and {rate}")
    if arrays[rate].size != 1 or arrays.get("gender", arrays[rate]).size != 1:
        raise ValueError(f"{path}: {rate} and gender must each be one value")
    for key in ("poses", "trans", "betas", rate):
        if arrays[key].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {key} has type {arrays[key].dtype}, expected numbers")
    numbers = {key: torch.from_numpy(arrays[key].astype(np.float64)) for key in ("poses", "trans", "betas")}
    gender = arrays["gender"].item() if "gender" in arrays else "neutral"
    if isinstance(gender, bytes):  # so in some releases
        gender = gender.decode("latin1")
    return numbers | {"fps": float(arrays[rate].item()), "gender": str(gender).lower()}


def check_motion(motion: Motion, source: str) -> None:
    """Raise ValueError unless shapes agree and every number is one that a person can have."""
    f = len(motion.body_pose)
    shapes = {"global_orient": (f, 3), "body_pose": (f, 23, 3), "betas": (10,), "transl": (f, 3)}
    for name, shape in shapes.items():
        value = getattr(motion, name)
        if tuple(value.shape) != shape:
            raise ValueError(f"{source}: {name} is {tuple(value.shape)}, expected {shape}")
        if not value.isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or infinity; cut or repair those frames")
    if f == 0:
        raise ValueError(f"{source} has no frames, expected at least one")
    if not 0 < motion.fps <= MAX_FPS:
        raise ValueError(f"{source}: {motion.fps} frames a second, expected above 0 and at most {MAX_FPS:g}")
    beta, distance = motion.betas.abs().max(), motion.transl.abs().max()
    angle = max(motion.global_orient.abs().max(), motion.body_pose.abs().max())
    if beta > MAX_BETA:
        raise ValueError(f"{source}: betas reach {beta:.3g}, expected at most {MAX_BETA:g}")
    if distance > MAX_DISTANCE:
        raise ValueError(f"{source}: transl reaches {distance:.3g}, expected metres; is it in millimetres?")
    if angle > MAX_ANGLE:
        raise ValueError(f"{source}: rotations reach {angle:.3g}, expected radians; is it in degrees?")
    if motion.gender not in GENDERS:
        raise ValueError(f"{source}: gender is {motion.gender!r}, expected one of {', '.join(GENDERS)}")

"""Motion in and out of files: AMASS .npz <-> one `Motion`, and resampling to another frame rate.

Here y is up, in AMASS (https://amass.is.tue.mpg.de) z is; the turn between them happens in this file only.
"""

import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kit.body import Body
from kit.files import whole_file
from motion_tokens import axis_angle_to_matrix, matrix_to_axis_angle

MAX_FPS = 1000.0  # hertz; the fastest AMASS captures are 250
MAX_BETA = 20.0  # standard deviations of the shape space
MAX_DISTANCE = 1000.0  # metres from the origin
AMASS_WIDTHS = {72: "SMPL", 156: "SMPL+H", 165: "SMPL-X"}
RATE_KEYS = ("mocap_frame_rate", "mocap_framerate")  # SMPL-X and SMPL+H releases of AMASS differ
GENDERS = ("female", "male", "neutral")
# a quarter turn about x, (x, y, z) -> (x, -z, y): a person who faces +z then faces -y, as in AMASS
Y_UP_TO_Z_UP = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)


class Motion(NamedTuple):
    """One person's SMPL motion: float32 on the CPU, y up, metres, axis-angle radians, constant frame rate."""

    global_orient: Tensor  # (f 3)
    body_pose: Tensor  # (f 23 3)
    betas: Tensor  # (10,)
    transl: Tensor  # (f 3)
    fps: float  # hertz
    gender: str  # "female", "male" or "neutral"


def load_amass(path: str | Path, body: Body) -> Motion:
    """Read an AMASS .npz: poses (f 156) SMPL+H, (f 165) SMPL-X or (f 72) SMPL, trans (f 3), betas (10+).

    Only the first ten betas are kept, and only root and body of the pose: SMPL's two hand joints are identity
    unless the file is plain SMPL. A missing gender reads as "neutral". `body` gives the rest pelvis of these
    betas, about which SMPL turns. Raises FileNotFoundError, or ValueError naming the file and what is wrong.
    """
    arrays = _read_arrays(Path(path))
    poses, trans, betas = arrays["poses"], arrays["trans"], arrays["betas"]
    if poses.ndim != 2 or poses.shape[1] not in AMASS_WIDTHS:
        known = ", ".join(f"(f, {width}) {name}" for width, name in AMASS_WIDTHS.items())
        raise ValueError(f"{path}: poses is {tuple(poses.shape)}, expected one of {known}")
    if betas.ndim != 1 or len(betas) < 10:
        raise ValueError(f"{path}: betas is {tuple(betas.shape)}, expected (10,) or longer; AMASS has (16,)")
    joints = 24 if poses.shape[1] == 72 else 22
    pose = rearrange(poses[:, : 3 * joints], "f (j c) -> f j c", c=3)
    pose = torch.cat([pose, pose.new_zeros(len(pose), 24 - joints, 3)], dim=1)
    z_up = Motion(pose[:, 0], pose[:, 1:], betas[:10], trans, arrays["fps"], arrays["gender"])
    _check(z_up, str(path))
    return _turn(z_up, Y_UP_TO_Z_UP.T, body)


def save_amass(path: str | Path, motion: Motion, body: Body) -> None:
    """Write an AMASS-style .npz, z up: poses (f 156) SMPL+H, trans (f 3), betas (16), gender, frame rate.

    SMPL's two hand joints (22, 23) are not written, SMPL+H has fingers in their place: they read back as
    identity. The SMPL-X Blender add-on opens the file if its target frame rate is at most the motion's.
    The same motion gives the same bytes. ValueError for a malformed motion or a suffix other than .npz.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"cannot write {path}: AMASS files end in .npz")
    _check(motion, f"motion for {path}")
    z_up = _turn(motion, Y_UP_TO_Z_UP, body)
    poses = np.zeros((len(z_up.transl), 156), dtype=np.float32)
    poses[:, :3] = z_up.global_orient.numpy()
    poses[:, 3:66] = rearrange(z_up.body_pose[:, :21], "f j c -> f (j c)").numpy()
    betas = np.zeros(16, dtype=np.float32)
    betas[:10] = z_up.betas.numpy()
    arrays = {"poses": poses, "trans": z_up.transl.numpy(), "betas": betas}
    arrays |= {"gender": np.array(motion.gender), "mocap_frame_rate": np.array(float(motion.fps))}
    with whole_file(path) as temporary:
        np.savez(temporary, **arrays)


def resample(motion: Motion, fps: float) -> Motion:
    """The motion at times 0, 1/fps, 2/fps, ... up to its last frame: slerp for rotations, linear for transl.

    Turns take the shorter way round. Raises ValueError for a malformed motion or rate.
    """
    _check(motion, "motion")
    _check(motion._replace(fps=fps), "resampled motion")
    if fps == motion.fps:
        return motion
    last = len(motion.transl) - 1
    count = math.floor(last * fps / motion.fps + 1e-6) + 1  # a margin, or rounding may lose the last
    position = (torch.arange(count, dtype=torch.float64) * motion.fps / fps).clamp(max=last)
    before = position.long()
    after = (before + 1).clamp(max=last)
    weight = rearrange(position - before, "f -> f 1")

    pose = torch.cat([rearrange(motion.global_orient, "f c -> f 1 c"), motion.body_pose], dim=1).double()
    start, end = axis_angle_to_matrix(pose[before]), axis_angle_to_matrix(pose[after])
    turn = matrix_to_axis_angle(start.mT @ end)
    pose = matrix_to_axis_angle(start @ axis_angle_to_matrix(weight[..., None] * turn)).float()
    transl = torch.lerp(motion.transl[before].double(), motion.transl[after].double(), weight).float()
    return motion._replace(global_orient=pose[:, 0], body_pose=pose[:, 1:], transl=transl, fps=float(fps))


def _turn(motion: Motion, rotation: Tensor, body: Body) -> Motion:
    """Turn the whole scene by `rotation` (3 3), in float64 inside, float32 outside."""
    pelvis = body.rest_joints(motion.betas.float())[0].double()
    orient = matrix_to_axis_angle(rotation @ axis_angle_to_matrix(motion.global_orient.double()))
    # SMPL turns the body about its pelvis, which stands at pelvis + transl: that point is what moves
    transl = (pelvis + motion.transl.double()) @ rotation.T - pelvis
    return Motion(orient.float(), motion.body_pose.float(), motion.betas.float(), transl.float(), *motion[4:])


def _read_arrays(path: Path) -> dict:
    """poses, trans, betas as float64 tensors, fps and gender, from an .npz that may hold anything."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an AMASS .npz")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz archive or is cut short; download or export it again")
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = ("poses", "trans", "betas", "gender", *RATE_KEYS)
            arrays = {key: np.asarray(file[key]) for key in wanted if key in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or holds pickled objects, not plain arrays: {error}") from error

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
    gender = str(arrays.get("gender", np.array("neutral")).astype(str).item())  # some releases store bytes
    return numbers | {"fps": float(arrays[rate].item()), "gender": gender.lower()}


def _check(motion: Motion, source: str) -> None:
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
    if beta > MAX_BETA:
        raise ValueError(f"{source}: betas reach {beta:.3g}, expected at most {MAX_BETA:g}")
    if distance > MAX_DISTANCE:
        raise ValueError(f"{source}: transl reaches {distance:.3g}, expected metres; is it in millimetres?")
    if motion.gender not in GENDERS:
        raise ValueError(f"{source}: gender is {motion.gender!r}, expected one of {', '.join(GENDERS)}")

"""Motion for other programs: a skeleton as .bvh, a mesh as .npz or as one .obj a frame; metres, y up."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kit.body import JOINT_NAMES, Body
from kit.files import whole_file
from kit.motion_files import Motion, check_motion
from motion_tokens import axis_angle_to_matrix

AT_ONCE = 256  # frames skinned at a time: SMPL's 6,890 vertices then take a few hundred megabytes


# ---------------------------------------------------------------- skeleton


def save_bvh(path: str | Path, motion: Motion, body: Body) -> None:
    """Write a Biovision Hierarchy: the 24 joints, one offset each from the body's shape, and their rotations.

    Lengths are metres (many programs expect centimetres: import with a scale of 100), angles degrees. The
    pelvis has its place in the world and its rotation, all others a rotation; a rotation is Rz·Rx·Ry, as its
    channels are listed. The same motion gives the same bytes. ValueError for a malformed motion or another
    suffix, FileNotFoundError for a missing folder.
    """
    if Path(path).suffix != ".bvh":
        raise ValueError(f"cannot write {path}: a Biovision Hierarchy ends in .bvh")
    check_motion(motion, f"motion for {path}")
    rest, parents = body.rest_joints(motion.betas).double(), body.parents.tolist()
    offsets = rest - rest[[0, *parents[1:]]]  # none for the pelvis: its channels hold all of its place
    order: list[int] = []
    hierarchy = _branch(0, parents, offsets.tolist(), order)
    pose = torch.cat([rearrange(motion.global_orient, "f c -> f 1 c"), motion.body_pose], dim=1).double()
    angles = torch.rad2deg(_euler_zxy(axis_angle_to_matrix(pose[:, order])))
    place = rest[0] + motion.transl.double()
    channels = torch.cat([place, rearrange(angles, "f j c -> f (j c)")], dim=1).tolist()
    timing = [f"Frames: {len(channels)}", f"Frame Time: {1 / motion.fps:.9f}"]
    lines = ["HIERARCHY", *hierarchy, "MOTION", *timing, *map(_numbers, channels)]
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="ascii", newline="\n")


def _branch(joint: int, parents: list[int], offsets: list[list[float]], order: list[int]) -> list[str]:
    """The lines of a joint and all below it; their numbers are added to `order` as the lines have them."""
    order.append(joint)
    place = "" if joint else "Xposition Yposition Zposition "
    lines = [f"OFFSET {_numbers(offsets[joint])}"]
    lines += [f"CHANNELS {6 if place else 3} {place}Zrotation Xrotation Yrotation"]
    children = [child for child, parent in enumerate(parents) if parent == joint]
    for child in children:
        lines += _branch(child, parents, offsets, order)
    if not children:  # the format wants an end, SMPL has none: the last bone once more
        lines += ["End Site", "{", f"  OFFSET {_numbers(offsets[joint])}", "}"]
    title = f"{'JOINT' if joint else 'ROOT'} {JOINT_NAMES[joint]}"
    return [title, "{", *(f"  {line}" for line in lines), "}"]


def _numbers(values: list[float]) -> str:
    return " ".join(f"{round(value, 6) + 0.0:.6f}" for value in values)  # + 0.0: no -0.000000


def _euler_zxy(matrix: Tensor) -> Tensor:
    """Rz(a)·Rx(b)·Ry(c) (... 3 3) -> (a, b, c) (... 3) radians; c is 0 where b is a right angle."""
    m = rearrange(matrix, "... row column -> row column ...")
    cosine = torch.hypot(m[0, 1], m[1, 1])
    locked = cosine < 1e-9  # a and c then turn about the same axis
    a = torch.where(locked, torch.atan2(m[1, 0], m[0, 0]), torch.atan2(-m[0, 1], m[1, 1]))
    c = torch.where(locked, torch.zeros_like(a), torch.atan2(-m[2, 0], m[2, 2]))
    return torch.stack((a, torch.atan2(m[2, 1], cosine), c), dim=-1)


# ---------------------------------------------------------------- mesh


def save_mesh(path: str | Path, motion: Motion, body: Body) -> None:
    """Write the skinned mesh as FILE.npz: vertices (f V 3) float32, faces (F 3) int32, fps.

    The same motion gives the same bytes. ValueError for a malformed motion or another suffix.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"cannot write {path}: expected FILE.npz")
    vertices, faces = _mesh(path, motion, body)
    with whole_file(path) as temporary:
        np.savez(temporary, vertices=vertices.numpy(), faces=faces.numpy(), fps=np.array(float(motion.fps)))


def save_objs(folder: str | Path, motion: Motion, body: Body) -> None:
    """Write the skinned mesh as a new folder of frame_000000.obj, frame_000001.obj, ...

    The same motion gives the same bytes. ValueError for a malformed motion, FileExistsError for a folder that
    is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another folder")
    _write_objs(folder, *_mesh(folder, motion, body))


@torch.no_grad()
def _mesh(path: Path, motion: Motion, body: Body) -> tuple[Tensor, Tensor]:
    """Vertices (f V 3) and faces (F 3) int32 for a file of this name."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    check_motion(motion, f"motion for {path}")
    pieces = (x.split(AT_ONCE) for x in (motion.global_orient, motion.body_pose, motion.transl))
    vertices = [
        body.mesh(orient, pose, motion.betas, transl)[0] for orient, pose, transl in zip(*pieces, strict=True)
    ]
    return torch.cat(vertices), body.faces.int()


def _write_objs(folder: Path, vertices: Tensor, faces: Tensor) -> None:
    """A file a frame, in a folder that appears when all are written."""
    triangles = "".join(f"f {a} {b} {c}\n" for a, b, c in (faces + 1).tolist())  # .obj counts from 1
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir()
        for number, frame in enumerate(vertices.tolist()):
            points = "".join(f"v {_numbers(point)}\n" for point in frame)
            file = temporary / f"frame_{number:06d}.obj"
            file.write_text(points + triangles, encoding="ascii", newline="\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

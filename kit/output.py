"""A sample on disk: first its latents, then the decoded files that people look at and work with.

Motion for other programs is a skeleton as .bvh and a mesh as .npz; metres, y up.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flow import Task
from kit.backbone import Backbone
from kit.body import JOINT_NAMES, Body
from kit.data.motion_files import Motion, save_amass
from kit.files import whole_file
from kit.page import SHOWN, PageSample, write_page
from kit.pictures import contact_sheet, draw_skeleton, fitted, resized, side_by_side, to_frames, write_video
from motion_tokens import axis_angle_to_matrix, decode_smpl

PICTURE = 256  # height of the video in the GIF, pixels
WORDS = {
    Task.JOINT: "text to video and motion", Task.MOTION_TO_VIDEO: "motion to video",
    Task.VIDEO_TO_MOTION: "video to motion", Task.VIDEO_ONLY: "text to video",
}  # fmt: skip


class Job(NamedTuple):
    """One sample to be made, and the name of its files."""

    name: str
    task: Task
    prompt: str
    seed: int
    pictures: bool  # also a GIF, a sheet and its place on the page; else motion goes to motion/
    gender: str = "neutral"  # of the body that a --motion was made with


# ---------------------------------------------------------------- latents


class Saved(NamedTuple):
    """A sample saved before decoding: if the decoder runs out of memory, nothing is lost."""

    job: Job  # its name is the file's
    fps: float
    stride: int  # of the video codec
    body: str  # Body.digest
    latents: Tensor  # (b c T h w)
    motion: Tensor | None  # (b f 235)
    attention: Tensor | None  # (layers f T)


def save_latents(
    out: Path, job: Job, backbone: Backbone, latents: Tensor, motion: Tensor | None, attention: Tensor | None
) -> Path:
    """Write what load_latents reads -> the file, in the folder out/latents, which must exist."""
    path = latents_file(out, job)
    tensors = {"latents": latents, "motion": motion, "attention": attention}
    tensors = {name: x.float().cpu().contiguous() for name, x in tensors.items() if x is not None}
    with whole_file(path) as temporary:
        # one key of metadata: safetensors keeps no order of several
        fps, stride = backbone.geometry.fps, backbone.geometry.stride
        record = {"job": job, "fps": fps, "stride": stride, "body": backbone.body.digest}
        save_file(tensors, temporary, metadata={"sample": json.dumps(record)})
    return path


def latents_file(out: Path, job: Job) -> Path:
    return out / "latents" / f"{job.name}.safetensors"


def load_latents(path: Path) -> Saved:
    """Read what save_latents wrote. FileNotFoundError or ValueError if the file holds no sample."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: expected latents that an earlier call saved in DIR/latents/")
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["sample"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        _, task, *rest = record["job"]
        job, latents = Job(path.stem, Task(task), *rest), tensors["latents"]
        others = tensors.get("motion"), tensors.get("attention")
        return Saved(job, record["fps"], record["stride"], record["body"], latents, *others)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no latents of sample.py ({error!r})") from error


def folder_of(latents: Path) -> Path:
    """Where the decoded files of latents go: next to the folder latents/, else next to the file."""
    folder = latents.absolute().parent
    return folder.parent if folder.name == "latents" else folder


# ---------------------------------------------------------------- what people look at


def write_all(
    out: Path, latents: list[Path], pixels: Tensor | None, backbone: Backbone, device: str, mesh: bool
) -> None:
    """Decode saved latents and write what people look at; `pixels` (1 3 f h w) is the condition, if any."""
    codec, samples = None, []
    for file in latents:
        job, fps, stride, body, made, motion, attention = load_latents(file)
        if stride != backbone.geometry.stride:
            raise ValueError(f"{file} was sampled with another video codec: name its Wan, if any, with --wan")
        if motion is not None and body != backbone.body.digest:
            raise ValueError(f"{file} was sampled with another body: name that with --body")
        video = pixels
        if job.task is not Task.VIDEO_TO_MOTION or pixels is None:
            codec = codec or backbone.codec()
            video = codec.decode(made.to(device))
        frames = to_frames(video[0])
        smpl = None if motion is None else decode_smpl(motion.float().cpu())
        names = write(out, job, frames, smpl, backbone, fps, mesh)
        print(f"{out}/{job.name}{'  '.join(names)}   {job.prompt!r}")
        if job.pictures and len(samples) < SHOWN:
            joints = None if smpl is None else smpl["joints"][0].numpy()
            shown = frames.numpy(), joints, fps, attention
            samples.append(PageSample(job.name, WORDS[job.task], job.prompt, *shown))
    if samples:
        write_page(out / "index.html", samples, total=len(latents))
        print(f"{out}/index.html shows them")


def write(
    out: Path, job: Job, frames: Tensor, smpl: dict[str, Tensor] | None, backbone: Backbone, fps: float,
    mesh: bool,
) -> list[str]:  # fmt: skip
    """One sample -> NAME.mp4, .npz, .bvh, and with pictures .gif (beside its skeleton) and .png (sheet).

    frames (f h w 3) uint8, smpl as decode_smpl gives it; `mesh` adds NAME-mesh.npz. Without pictures, motion
    goes to out/motion, so that `out` has MP4s only. Returns the suffixes of the files; the first one in
    out/motion is a whole path instead.
    """
    made, rows, titles = [".mp4"], [frames], [f"{job.name}: {job.prompt or 'no text'}"]
    out.mkdir(parents=True, exist_ok=True)
    if smpl:
        fields = (smpl[name][0] for name in ("global_orient", "body_pose", "betas", "transl"))
        motion = Motion(*fields, fps, job.gender)
        folder = out if job.pictures else out / "motion"
        folder.mkdir(exist_ok=True)
        save_amass(folder / f"{job.name}.npz", motion, backbone.body)
        save_bvh(folder / f"{job.name}.bvh", motion, backbone.body)
        made += [".npz" if job.pictures else str(folder / f"{job.name}.npz"), ".bvh"]
        if mesh:
            save_mesh(folder / f"{job.name}-mesh.npz", motion, backbone.body)
            made += ["-mesh.npz"]
    # after the motion: a sample whose video exists is kept (kit/jobs.py)
    write_video(out / f"{job.name}.mp4", frames, fps)
    if job.pictures:
        if smpl:
            joints = smpl["joints"][0]
            project = backbone.project or fitted(joints)
            rows += [draw_skeleton(joints, project, PICTURE)]
            titles += ["motion"]
        moving = side_by_side(*rows) if smpl else resized(frames, PICTURE)
        write_video(out / f"{job.name}.gif", moving, fps)
        contact_sheet(out / f"{job.name}.png", rows, titles)
        made += [".gif", ".png"]
    return made


# ---------------------------------------------------------------- motion for other programs: a skeleton


def save_bvh(path: str | Path, motion: Motion, body: Body) -> None:
    """Write a Biovision Hierarchy: the 24 joints, each with an offset from the body's shape, and rotations.

    Lengths are metres (many programs expect centimetres: import with a scale of 100), angles degrees. The
    pelvis has position and rotation channels, all other joints rotation channels only; a rotation is
    Rz·Rx·Ry, in the order of its channels. The same motion gives the same bytes.
    """
    body = body.of(motion.gender)
    rest, parents = body.rest_joints(motion.betas).double(), body.parents.tolist()
    offsets = rest - rest[[0, *parents[1:]]]  # zero for the pelvis: its channels hold its whole position
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
    """The lines of a joint and all below it; their indices are added to `order`, line by line."""
    order.append(joint)
    place = "" if joint else "Xposition Yposition Zposition "
    lines = [f"OFFSET {_numbers(offsets[joint])}"]
    lines += [f"CHANNELS {6 if place else 3} {place}Zrotation Xrotation Yrotation"]
    children = [child for child, parent in enumerate(parents) if parent == joint]
    for child in children:
        lines += _branch(child, parents, offsets, order)
    if not children:  # BVH needs an end site, which SMPL lacks: the last bone is repeated
        lines += ["End Site", "{", f"  OFFSET {_numbers(offsets[joint])}", "}"]
    title = f"{'JOINT' if joint else 'ROOT'} {JOINT_NAMES[joint]}"
    return [title, "{", *(f"  {line}" for line in lines), "}"]


def _numbers(values: list[float]) -> str:
    return " ".join(f"{round(value, 6) + 0.0:.6f}" for value in values)  # + 0.0: no -0.000000


def _euler_zxy(matrix: Tensor) -> Tensor:
    """Rz(a)·Rx(b)·Ry(c) (... 3 3) -> (a, b, c) (... 3) radians."""
    m = rearrange(matrix, "... row column -> row column ...")
    b = torch.atan2(m[2, 1], torch.hypot(m[0, 1], m[1, 1]))
    return torch.stack((torch.atan2(-m[0, 1], m[1, 1]), b, torch.atan2(-m[2, 0], m[2, 2])), dim=-1)


# ---------------------------------------------------------------- motion for other programs: a mesh


def save_mesh(path: str | Path, motion: Motion, body: Body) -> None:
    """Write the skinned mesh as FILE.npz: vertices (f V 3) float32, faces (F 3) int32, fps.

    The same motion gives the same bytes.
    """
    body = body.of(motion.gender)
    vertices, _ = body.mesh(*motion[:4])
    arrays = {"vertices": vertices.numpy(), "faces": body.smpl.faces_tensor.int().numpy()}
    with whole_file(path) as temporary:
        np.savez(temporary, **arrays, fps=np.array(float(motion.fps)))

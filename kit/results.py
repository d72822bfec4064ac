"""A sample on disk: its latents before they are decoded, then what people look at and work with."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flow import Task
from kit import render
from kit.backbone import Backbone
from kit.export import save_bvh, save_mesh, save_objs
from kit.files import whole_file
from kit.motion_files import Motion, save_amass
from motion_tokens import decode_smpl

PICTURE = 256  # height of the video in the GIF, pixels
MESH = {"npz": "-mesh.npz", "obj": "-mesh"}  # what is added to a sample's name


class Job(NamedTuple):
    """One sample to be made, and what its files are called."""

    name: str
    task: Task
    prompt: str
    seed: int


# ---------------------------------------------------------------- latents


def save_latents(path: Path, job: Job, latents: Tensor | None, motion: Tensor | None) -> None:
    """What was sampled, before it is decoded: a decoder that runs out of memory loses nothing."""
    tensors = {"latents": latents, "motion": motion}
    tensors = {name: x.float().cpu().contiguous() for name, x in tensors.items() if x is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"job": json.dumps(job)}  # one key: safetensors keeps no order of several
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_latents(path: Path) -> tuple[Job, Tensor, Tensor | None]:
    """-> what it is of, latents (b c t h w), motion (b f 235); raises if the file holds none."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: expected latents that an earlier call saved in DIR/latents/")
    try:
        with safe_open(path, "pt") as file:
            name, task, prompt, seed = json.loads(file.metadata()["job"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        job = Job(name, Task(task), prompt, seed)
        return job, tensors["latents"], tensors.get("motion")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no latents of sample.py ({error!r})") from error


# ---------------------------------------------------------------- what people look at


def mesh_path(out: Path, job: Job, mesh: str, pictures: bool) -> Path:
    """Where write() puts a mesh "npz" or "obj"."""
    return motion_folder(out, pictures) / f"{job.name}{MESH[mesh]}"


def motion_folder(out: Path, pictures: bool) -> Path:
    """Without pictures, motion goes to a folder of its own, so that `out` has MP4s only."""
    return out if pictures else out / "motion"


def write(
    out: Path,
    job: Job,
    video: Tensor,
    motion: Tensor | None,
    world: Backbone,
    pictures: bool = True,
    mesh: str | None = None,
) -> list[str]:
    """One sample -> NAME.mp4, .npz, .bvh, and with pictures .gif (beside its skeleton) and .png (sheet).

    `mesh` "npz" or "obj" adds NAME-mesh.npz or a folder NAME-mesh. Returns what was added to the names,
    and where that is another folder's.
    """
    frames, fps = render.to_frames(video[0]), world.geometry.fps
    rows, titles, made = [frames], [f"{job.name}: {job.prompt or 'no text'}"], [".mp4"]
    out.mkdir(parents=True, exist_ok=True)
    render.write_video(out / f"{job.name}.mp4", frames, fps)
    if motion is not None:
        smpl = decode_smpl(motion.float().cpu())
        fields = (smpl[name][0] for name in ("global_orient", "body_pose", "betas", "transl"))
        folder = motion_folder(out, pictures)
        folder.mkdir(exist_ok=True)
        moved = Motion(*fields, fps, "neutral")
        save_amass(folder / f"{job.name}.npz", moved, world.body)
        save_bvh(folder / f"{job.name}.bvh", moved, world.body)
        made += [".npz" if pictures else str(folder / f"{job.name}.npz"), ".bvh"]
        if mesh:
            save = {"npz": save_mesh, "obj": save_objs}[mesh]
            save(mesh_path(out, job, mesh, pictures), moved, world.body)
            made += [MESH[mesh]]
    if pictures:
        if motion is not None:
            joints = smpl["joints"][0]
            project = world.project or render.fitted(joints)
            rows += [render.draw_skeleton(joints, world.body.parents, project, PICTURE)]
            titles += ["motion"]
        moving = render.side_by_side(*rows) if motion is not None else render.resized(frames, PICTURE)
        render.write_video(out / f"{job.name}.gif", moving, fps)
        render.contact_sheet(out / f"{job.name}.png", rows, titles)
        made += [".gif", ".png"]
    return made

"""Video to motion on 3DPW's test set, the paper's table 5 (https://virtualhumans.mpi-inf.mpg.de/3DPW).

    python -m study.evaluate pw3d DIR --wan FOLDER --weights FILE

DIR has sequenceFiles/test/NAME.pkl and imageFiles/NAME/image_00000.jpg, ..., 30 pictures a second. For each
person a sequence has jointPositions (n 72), SMPL's joints in the world, and campose_valid (n,); for all
persons cam_poses (n 4 4), which map the world to the camera's frame: x right, y down, z ahead.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dual_dit import DualDiT
from flow import Task
from kit import files, wan
from kit.backbone import Backbone, free_memory, open_backbone
from kit.body import JOINT_NAMES
from kit.data.clips import cropped
from kit.pictures import from_frames
from kit.untrusted import read_object
from motion_tokens import decode_smpl
from sample import denoise
from study.measures import pa_mpjpe

FPS = 30.0
PAPER = {  # PA-MPJPE and MPJPE, mm
    "EchoMotion, in the paper": (59.8, 94.1), "HMR2.0": (58.4, 91.0), "ChatHuman": (58.7, 91.3),
    "SPIN": (62.9, 102.9), "ChatPose": (81.9, 163.6),
}  # fmt: skip
LIMBS = ("ankle", "knee", "hip", "wrist", "elbow", "shoulder")
NAMES = (*(f"{side}_{part}" for side in ("left", "right") for part in LIMBS), "neck", "head")
FOURTEEN = [JOINT_NAMES.index(name) for name in NAMES]  # as in the usual protocol
HIPS = [JOINT_NAMES.index(name) for name in ("left_hip", "right_hip")]
FIELDS = ("jointPositions", "cam_poses", "campose_valid")


class Window(NamedTuple):
    """Some moments of a sequence, and one person's joints in them."""

    pictures: list[Path]
    joints: Tensor  # (f 24 3) in the camera's frame, y up, metres


def windows(folder: Path, fps: float, frames: int, count: int) -> list[Window]:
    """`count` windows, spread evenly over all windows of the test set that do not overlap; or all, if fewer.

    FileNotFoundError or ValueError if a part of the test set is missing or damaged.
    """
    found = []
    sequences = sorted((folder / "sequenceFiles" / "test").glob("*.pkl"))
    if not sequences:
        raise FileNotFoundError(f"no {folder}/sequenceFiles/test/*.pkl: unpack 3DPW's sequenceFiles there")
    for file in sequences:
        pictures = sorted((folder / "imageFiles" / file.stem).glob("image_*.jpg"))
        joints, valid = read_sequence(file)
        if len(pictures) != len(valid):
            raise ValueError(f"{file}: {len(valid)} frames, but {len(pictures)} pictures: unpack imageFiles")
        moments = np.round(np.arange(frames) * FPS / fps).astype(int)
        for start in range(0, len(valid) - moments[-1], moments[-1] + 1):
            if valid[start + moments].all():
                found.append(Window([pictures[k] for k in start + moments], joints[start + moments]))
    if not found:
        raise ValueError(f"{folder}: no sequence has {frames} valid frames: ask for fewer --frames")
    return [found[k] for k in np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))]


def read_sequence(file: Path) -> tuple[Tensor, np.ndarray]:
    """One person's joints (n 24 3) in the camera's frame, y up, and whether the camera is known (n,)."""
    read = read_object(file, "sequence of 3DPW", FIELDS)
    if not isinstance(read, dict) or not read.keys() >= set(FIELDS):
        raise ValueError(f"{file} is no sequence of 3DPW: expected {', '.join(FIELDS)}")
    world = rearrange(np.stack(read["jointPositions"]), "person n (j c) -> person n j c", c=3)
    turn, place = read["cam_poses"][:, :3, :3], read["cam_poses"][:, :3, 3]
    camera = np.einsum("nrc,pnjc->pnjr", turn, world) + place[:, None]
    # paper is silent: of two persons, the one who is nearer to the camera
    nearer = int(camera[:, :, 0, 2].mean(axis=1).argmin())
    valid = np.asarray(read["campose_valid"][nearer]).astype(bool)
    return torch.from_numpy(camera[nearer] * (1.0, -1.0, -1.0)).float(), valid


def errors(predicted: Tensor, real: Tensor) -> tuple[float, float]:
    """PA-MPJPE and MPJPE of joints (f 24 3), mm: 14 joints, the latter about the middle of the hips."""
    a, b = ((x - x[:, HIPS].mean(1, keepdim=True))[:, FOURTEEN] for x in (predicted, real))
    return pa_mpjpe(a[None], b[None]).item(), 1000 * (a - b).norm(dim=-1).mean().item()


def latents_of(window: Window, backbone: Backbone, codec: wan.VideoVAE, device: str) -> Tensor:
    """(1 c T h w), of the backbone's size; its longer side is the height if pictures are upright."""
    images = [Image.open(picture).convert("RGB") for picture in window.pictures]
    size = backbone.geometry.height, backbone.geometry.width
    size = sorted(size, reverse=images[0].height > images[0].width)
    video = from_frames(torch.stack([cropped(image, *size) for image in images]))
    return codec.encode(video[None].to(device)).cpu()


def to_motion(model: DualDiT, latents: Tensor, null_text: Tensor, seed: int, sampling: dict) -> Tensor:
    """Motion from latents (1 c T h w) -> joints (f 24 3), metres."""
    inputs = model, Task.VIDEO_TO_MOTION, null_text, null_text, seed, latents.shape[2:], latents
    _, motion = denoise(*inputs, **sampling)
    return decode_smpl(motion.float().cpu())["joints"][0]


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = files.Parser(prog="python -m study.evaluate pw3d", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="sequenceFiles and imageFiles of 3DPW")
    add("--wan", type=Path, required=True, metavar="FOLDER")
    add("--weights", type=Path, required=True, metavar="FILE", help="written by train.py --wan")
    add("--body", type=Path, metavar="FILE", help="SMPL model")
    add("--clips", type=files.count, default=200, metavar="N", help="default: 200, as in the paper")
    add("--frames", type=files.frames, metavar="N", help="of a window, 4n+1; default: as trained")
    add("--size", type=files.size, metavar="HxW", help="default: as trained")
    add("--fps", type=files.positive, metavar="F", help="default: as trained")
    add("--steps", type=files.count, metavar="N", help="solver steps; default: 50")
    add("--device", type=files.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=files.new_file, metavar="FILE", help="write the numbers there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = options(arguments)
    made_of = args.wan, args.weights, args.body, args.frames, args.size, args.fps
    backbone = open_backbone(*made_of, precision=None, device=args.device)
    chosen = windows(args.folder, backbone.geometry.fps, backbone.geometry.frames, args.clips)
    null_text = backbone.text_encoder()([""])
    codec = backbone.codec()
    latents = [latents_of(window, backbone, codec, args.device) for window in tqdm(chosen, desc="videos")]
    del codec
    free_memory(args.device)
    model = backbone.transformer()
    sampling = backbone.sampling() | ({"steps": args.steps} if args.steps else {})
    found = [
        errors(to_motion(model, latents[k], null_text, k, sampling), window.joints)
        for k, window in enumerate(tqdm(chosen, desc="motions"))
    ]
    ours = np.mean(found, axis=0).tolist()
    print(f"{'3DPW, test, mm':32}{'PA-MPJPE':>9}{'MPJPE':>8}")
    for name, (aligned, plain) in {**PAPER, str(args.weights): ours}.items():
        print(f"{name[-31:]:32}{aligned:9.1f}{plain:8.1f}")
    print(f"{len(chosen)} windows; 14 of SMPL's own joints, where the paper's rows take theirs from the mesh")
    if args.json:
        result = {"pa_mpjpe_mm": ours[0], "mpjpe_mm": ours[1], "windows": len(chosen)}
        args.json.write_text(json.dumps(result, indent=2) + "\n")

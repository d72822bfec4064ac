"""Sample from trained weights: text -> video + motion, motion -> video, video -> motion.

Without arguments the shipped puppet weights make one sample of each.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flow
from dual_dit import DualDiT
from flow import Role, Task
from kit import cli, data, puppet, render, weights
from kit.motion_files import Motion, load_amass, resample, save_amass
from motion_tokens import MOTION_DIM, decode_smpl, encode_smpl

TASKS = {"joint": Task.JOINT, "m2v": Task.MOTION_TO_VIDEO, "v2m": Task.VIDEO_TO_MOTION}
SHIPPED = Path(__file__).parent / "assets" / "puppet.safetensors"
PROMPT = "a person in a red shirt waves the left hand"
CONDITION_CLIP = 7  # the puppet clip that conditions when no file is given


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, help="default: one sample of each task")
    parser.add_argument("--prompt", metavar="TEXT", help="may be empty: no text")
    parser.add_argument("--motion", type=Path, metavar="FILE.npz", help="condition of m2v, AMASS-style")
    parser.add_argument("--video", type=Path, metavar="FILE.mp4", help="condition of v2m")
    parser.add_argument(
        "--weights", type=Path, default=SHIPPED, metavar="FILE", help="default: the shipped puppet"
    )
    parser.add_argument(
        "--steps", type=int, default=12, metavar="N", help="solver steps (default %(default)s)"
    )
    parser.add_argument("--solver", choices=flow.SOLVERS, default="ab2")
    parser.add_argument("--guidance-text", type=float, default=1.5, metavar="W1", help="default %(default)s")
    parser.add_argument(
        "--guidance-condition", type=float, default=1.5, metavar="W2", help="default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("samples"), metavar="DIR", help="default %(default)s"
    )
    return parser.parse_args()


def generate(
    model: DualDiT,
    codec: puppet.Codec,
    task: Task,
    captions: list[str],
    seed: int,
    video: Tensor | None = None,
    motion: Tensor | None = None,
    frames: int = puppet.FRAMES,
    bf16: bool = False,
    **sampling,
) -> tuple[Tensor, Tensor]:
    """Sample a batch of one task -> video (b 3 f h w) in pixels and motion (b f 235), not normalised.

    `video` or `motion` is the condition, in the same units; it comes back as it was given. `bf16` runs the
    network under autocast. `sampling` goes to flow.sample (steps, solver, guidance_text, ...).
    """
    b, device = len(captions), model.motion_mean.device
    grid = (b, model.config.channels, (frames - 1) // 4 + 1, puppet.SIZE // 8, puppet.SIZE // 8)
    generator = data.rng("sample", seed)  # on the CPU, so that a seed means the same on every device
    x_video = torch.randn(grid, generator=generator).to(device)
    x_motion = torch.randn((b, frames, MOTION_DIM), generator=generator).to(device)
    if task.video is Role.CLEAN:
        x_video = codec.encode(video.to(device))
    if task.motion is Role.CLEAN:
        x_motion = (motion.to(device) - model.motion_mean) / model.motion_std
    text, null_text = (puppet.encode_text(texts).to(device) for texts in (captions, [""] * b))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        result = flow.sample(model, x_video, x_motion, text, null_text, task, shift=data.SHIFT, **sampling)
    if task.video is Role.NOISY:
        video = codec.decode(result.video)
    if task.motion is Role.NOISY:
        motion = result.motion * model.motion_std + model.motion_mean
    return video, motion


def read_motion(path: Path, body) -> Tensor:
    """An AMASS-style file -> motion (1 17 235) at the preset's frame rate, in front of its camera."""
    motion = resample(load_amass(path, body), puppet.FPS)
    if len(motion.transl) < puppet.FRAMES:
        seconds = puppet.FRAMES / puppet.FPS
        raise ValueError(
            f"{path} is {len(motion.transl)} frames long at {puppet.FPS} fps: "
            f"at least {puppet.FRAMES} ({seconds:.2f} s) are needed"
        )
    if len(motion.transl) > puppet.FRAMES:
        print(f"{path}: the first {puppet.FRAMES} of {len(motion.transl)} frames are used")
    orient, pose, transl = (x[None, : puppet.FRAMES] for x in (*motion[:2], motion.transl))
    joints = body.joints(orient, pose, motion.betas[None, None], transl)
    pixels, depth = puppet.project(joints[:, 0, 0])
    if not (depth > 0).all() or (pixels < 0).any() or (pixels > puppet.SIZE).any():
        print(f"{path}: starts outside the camera's view; moved to its middle")
        transl = transl - transl[:, :1] * transl.new_tensor((1, 0, 1))
    return encode_smpl(orient, pose, motion.betas[None], transl, body)


def read_clip(path: Path) -> Tensor:
    """A video file -> pixels (1 3 17 64 64); ValueError if it is not of the preset's size."""
    frames, fps = render.read_video(path)
    expected = (puppet.FRAMES, puppet.SIZE, puppet.SIZE)
    if tuple(frames.shape[:3]) != expected:
        f, h, w = frames.shape[:3]
        hint = f" ({f} is not 4n+1, the nearest is {puppet.nearest_frames(f)})" if f % 4 != 1 else ""
        raise ValueError(
            f"{path} has {f} frames of {w}x{h}{hint}: "
            f"these weights take {expected[0]} frames of {expected[2]}x{expected[1]}"
        )
    if abs(fps - puppet.FPS) > 0.01:
        print(f"{path}: {fps:g} fps is read as {puppet.FPS} fps")
    return render.from_frames(frames)[None]


def write(out: Path, name: str, prompt: str, video: Tensor, motion: Tensor, body) -> None:
    """One sample -> NAME.mp4, NAME.gif (beside its skeleton), NAME.png (contact sheet), NAME.npz."""
    smpl = decode_smpl(motion.cpu())
    frames = render.to_frames(video[0])
    skeleton = render.draw_skeleton(smpl["joints"][0], body.parents, puppet.project, 4 * puppet.SIZE)
    render.write_video(out / f"{name}.mp4", frames, puppet.FPS)
    render.write_video(out / f"{name}.gif", render.side_by_side(frames, skeleton), puppet.FPS)
    render.contact_sheet(
        out / f"{name}.png", [frames, skeleton], [f"{name}: {prompt or 'no text'}", "motion"]
    )
    motion_file = Motion(
        smpl["global_orient"][0],
        smpl["body_pose"][0],
        smpl["betas"][0],
        smpl["transl"][0],
        puppet.FPS,
        "neutral",
    )
    save_amass(out / f"{name}.npz", motion_file, body)


def main() -> None:
    args = options()
    if args.motion and args.task != "m2v":
        raise ValueError("--motion is the condition of --task m2v: add that, or leave --motion out")
    if args.video and args.task != "v2m":
        raise ValueError("--video is the condition of --task v2m: add that, or leave --video out")
    body = puppet.body()
    clip = puppet.clips([CONDITION_CLIP])
    conditions = {
        "video": read_clip(args.video)
        if args.video
        else puppet.render(clip.joints, clip.betas, clip.shirt)[0],
        "motion": read_motion(args.motion, body) if args.motion else data.puppet_motion(clip),
    }
    model, extra = weights.load_weights(args.weights, args.device)
    codec = puppet.Codec.from_state(extra)
    made = []
    for name in [args.task] if args.task else TASKS:
        task = TASKS[name]
        given = (task is Task.MOTION_TO_VIDEO and args.motion) or (
            task is Task.VIDEO_TO_MOTION and args.video
        )
        default = PROMPT if task is Task.JOINT else "" if given else clip.caption[0]
        prompt = default if args.prompt is None else args.prompt
        sampled = generate(
            model,
            codec,
            task,
            [prompt],
            args.seed,
            **conditions,
            steps=args.steps,
            solver=args.solver,
            guidance_text=args.guidance_text,
            guidance_condition=args.guidance_condition,
            progress=True,
        )
        made.append((name, prompt, *sampled))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, prompt, video, motion in made:
        write(args.out, name, prompt, video, motion, body)
        print(f"{args.out}/{name}.gif  .mp4  .png  .npz   {prompt!r}")
    record = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record |= {"prompts": {name: prompt for name, prompt, *_ in made}, "command": sys.argv}
    record["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    (args.out / "run.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)

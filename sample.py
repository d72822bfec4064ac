"""Sample from trained weights: text -> video + motion, motion -> video, video -> motion.

Without arguments the shipped puppet weights make one sample of each; `--wan FOLDER` samples a real Wan.
"""

import argparse
import functools
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import flow
from dual_dit import DualDiT
from flow import Role, Task
from kit import backbone, devices, files, output, puppet
from kit.backbone import Backbone, Defaults
from kit.body import Body
from kit.conditions import read_motion, read_video
from kit.data.batch import rng
from kit.data.datasets import puppet_motion
from kit.files import write_record
from kit.geometry import geometry
from kit.output import Job
from motion_tokens import MOTION_DIM

TASKS = {
    "joint": Task.JOINT, "m2v": Task.MOTION_TO_VIDEO, "v2m": Task.VIDEO_TO_MOTION, "video": Task.VIDEO_ONLY,
}  # fmt: skip
SHOWN = ("joint", "m2v", "v2m")  # what a call without --task makes
SHIPPED = Path(__file__).parent / "assets" / "puppet.safetensors"
PROMPT = "a person in a red shirt waves the left hand"
CONDITION_CLIP = 7  # the puppet clip that conditions when no file is given
LONGEST = 200  # bytes of a prompt that names files, of the 255 that a name may have


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", choices=TASKS, help="default: one sample each of joint, m2v and v2m")
    add("--prompt", metavar="TEXT", help="may be empty: no text")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line: makes PROMPT-INDEX.mp4 of each")
    add("--count", type=int, default=1, metavar="N", help="samples of each prompt: seeds SEED, SEED+1, ...")
    add("--motion", type=Path, metavar="FILE.npz", help="condition of m2v, AMASS-style")
    add("--video", type=Path, metavar="FILE.mp4", help="condition of v2m")
    add("--start", type=float, default=0.0, metavar="SECONDS", help="where in --motion or --video to begin")
    add("--loop", action="store_true", help="play a --motion that is too short there and back")
    add("--weights", type=Path, metavar="FILE", help="written by train.py; default: the shipped puppet")
    add("--wan", type=Path, metavar="FOLDER", help="a Wan in the Diffusers layout")
    add("--body", type=Path, metavar="FILE", help="SMPL model for --wan; default: the procedural body")
    add("--frames", type=int, metavar="N", help="4n+1, for --wan; default: as published")
    add("--size", type=files.size, metavar="HxW", help="pixels, for --wan; default: as published")
    add("--precision", choices=("bf16", "fp32"), help="of Wan's weights; default: bf16 on a GPU")
    add("--steps", type=int, metavar="N", help="solver steps; default: puppet 6, Wan 50")
    add("--solver", choices=flow.SOLVERS, default="ab2")
    add("--guidance-text", type=float, metavar="W1", help="default: puppet 1.5, Wan 5")
    add("--guidance-condition", type=float, metavar="W2", help="default: 1.5")
    add(
        "--lead",
        type=float,
        metavar="SHARE",
        help="of the way, how far motion is ahead of video in joint sampling, "
        "0 to 0.5; default: puppet 0.5, Wan 0",
    )
    add("--seed", type=int, default=0, metavar="N")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, metavar="DIR", help="default: samples, with --decode where the latents are from")
    add("--mesh", choices=("npz", "obj"), help="also write the body's mesh: vertices, or a folder of frames")
    add("--decode", type=Path, metavar="FILE", help="only decode latents that an earlier call has saved")
    return parser.parse_args()


# ---------------------------------------------------------------- conditions


def conditions(
    args: argparse.Namespace, world: Backbone, tasks: set[Task]
) -> tuple[Tensor | None, Tensor | None]:
    """Pixels for v2m and motion for m2v, where they are needed; the puppet brings its own."""
    own = puppet.clips([CONDITION_CLIP])
    pixels = motion = None
    if Task.VIDEO_TO_MOTION in tasks:
        if args.wan and not args.video:
            raise ValueError("--video FILE is needed: it is the condition of this task")
        pixels = puppet.render(own.joints, own.betas, own.shirt)[0]
        if args.video:
            pixels = read_video(args.video, world.geometry, args.start)
    if Task.MOTION_TO_VIDEO in tasks:
        if args.wan and not args.motion:
            raise ValueError("--motion FILE is needed: it is the condition of this task")
        motion = puppet_motion(own)
        if args.motion:
            motion = read_motion(args.motion, world, args.start, args.loop)
    return pixels, motion


# ---------------------------------------------------------------- from noise to a sample


def denoise(
    model: DualDiT,
    task: Task,
    text: Tensor,
    null_text: Tensor,
    seed: int,
    grid: tuple[int, int, int],
    latents: Tensor | None = None,
    motion: Tensor | None = None,
    bf16: bool = False,
    **sampling,
) -> tuple[Tensor | None, Tensor | None]:
    """Sample a batch of one task -> latents (b c t h w) and motion (b f 235), not normalised.

    text (b l text_dim), grid (t h w) of the latents; `latents` or `motion` is the condition, in the same
    units. It comes back as it was given, an absent modality as None. `bf16` is autocast's, for a network
    that is stored in fp32; `sampling` goes to flow.sample.
    """
    b, device = len(text), model.motion_mean.device
    frames = 4 * (grid[0] - 1) + 1
    generator = rng("sample", seed)  # on the CPU, so that a seed means the same on every device
    x_video = torch.randn((b, model.config.channels, *grid), generator=generator).to(device)
    x_motion = torch.randn((b, frames, MOTION_DIM), generator=generator).to(device)
    if task.video is Role.CLEAN:
        x_video = latents.to(device)
    if task.motion is Role.CLEAN:
        x_motion = (motion.to(device) - model.motion_mean) / model.motion_std
    x_video = None if task.video is Role.ABSENT else x_video
    x_motion = None if task.motion is Role.ABSENT else x_motion
    given = model, x_video, x_motion, text.to(device), null_text.to(device), task
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        result = flow.sample(*given, **sampling)
    if task.motion is Role.NOISY:
        motion = result.motion * model.motion_std + model.motion_mean
    return result.video, motion if task.motion is not Role.ABSENT else None


# ---------------------------------------------------------------- the verb


def jobs_of(args: argparse.Namespace, world: Backbone) -> list[Job]:
    """What the options ask for."""
    if args.prompts:
        if not args.prompts.is_file():
            raise FileNotFoundError(f"no {args.prompts}: expected a text file with one prompt a line")
        prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
        names = [prompt.replace("/", "_") for prompt in prompts]
        if long := [name for name in names if len(name.encode()) > LONGEST]:
            raise ValueError(f"a prompt names its files: at most {LONGEST} bytes, got {long[0]!r}")
        task = TASKS[args.task or "joint"]
        return [
            Job(f"{name}-{i}", task, prompt, args.seed + i)
            for name, prompt in zip(names, prompts, strict=True) for i in range(args.count)
        ]  # fmt: skip
    jobs = []
    for name in [args.task] if args.task else SHOWN:
        task, prompt = TASKS[name], PROMPT
        if task in (Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION):  # the caption of the puppet's own condition
            prompt = "" if args.motion or args.video else puppet.clips([CONDITION_CLIP]).caption[0]
        prompt = prompt if args.prompt is None else args.prompt
        names = [f"{name}-{i}" for i in range(args.count)] if args.count > 1 else [name]
        jobs += [Job(name, task, prompt, args.seed + i) for i, name in enumerate(names)]
    return jobs


def open_backbone(args: argparse.Namespace) -> Backbone:
    if not args.wan:
        for flag in ("frames", "size", "body", "precision"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} is for --wan; the puppet has one size and one body")
        return backbone.puppet_backbone(args.weights or SHIPPED, args.device)
    if args.weights and not args.weights.is_file():
        raise FileNotFoundError(f"no {args.weights}: expected weights written by train.py --wan")
    if not args.weights and not args.decode:
        print("no --weights: the motion expert is untrained, its motion means nothing; try --task video")
    if not args.body:
        print("no --body: joints are the procedural body's, not SMPL's")
    body = Body.load(args.body) if args.body else puppet.body()
    precision = args.precision or ("bf16" if args.device.startswith("cuda") else "fp32")
    shape = geometry(args.wan, args.frames, args.size)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    return backbone.wan_backbone(args.wan, args.weights, args.device, dtype, body, shape)


def make(
    args: argparse.Namespace, world: Backbone, jobs: list[Job], pixels: Tensor | None, motion: Tensor | None
) -> list[Path]:
    """Text, then the condition, then the samples -> files of latents; each part of the backbone is let go."""
    if not jobs:
        return []
    prompts = sorted({job.prompt for job in jobs} | {""})
    text = dict(zip(prompts, world.text_encoder()(prompts).split(1), strict=True))
    backbone.free(args.device)
    latents = None if pixels is None else world.codec().encode(pixels.to(args.device))
    backbone.free(args.device)
    sampling = {name: getattr(args, name) for name in ("solver", *Defaults._fields)}
    g = world.geometry
    grid = ((g.frames - 1) // 4 + 1, g.height // g.stride, g.width // g.stride)
    model, files = world.transformer(), []
    # a Wan is stored in its --precision; the puppet, stored in fp32, computes as it was trained and measured
    sampling["bf16"] = not args.wan and devices.faster_in_bf16(torch.device(args.device))
    for job in jobs:
        prompt = text[job.prompt], text[""]
        given = model, job.task, *prompt, job.seed, grid, latents, motion
        result = denoise(*given, progress=functools.partial(tqdm, desc="denoising"), **sampling)
        files.append(args.out / "latents" / f"{job.name}.safetensors")
        output.save_latents(files[-1], job, *result)
    return files


def main() -> None:
    args = options()
    if args.motion and args.task != "m2v":
        raise ValueError("--motion is the condition of --task m2v: add that, or leave --motion out")
    if args.video and args.task != "v2m":
        raise ValueError("--video is the condition of --task v2m: add that, or leave --video out")
    if args.count < 1:
        raise ValueError(f"--count is at least 1, got {args.count}")
    if args.out is None:
        there = args.decode.absolute().parent if args.decode else Path("samples")
        args.out = there.parent if there.name == "latents" else there  # a sample's lie in OUT/latents
    world = open_backbone(args)
    for name, value in world.defaults._asdict().items():  # what was not given on the command line
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    asked = [] if args.decode else jobs_of(args, world)
    jobs = [job for job in asked if not (args.prompts and (args.out / f"{job.name}.mp4").exists())]
    if len(jobs) < len(asked):
        print(f"{args.out} has {len(asked) - len(jobs)} of {len(asked)} samples already: they are kept")
    for job in jobs if args.mesh == "obj" else ():
        if (there := output.mesh_path(args.out, job, "obj", not args.prompts)).exists():
            raise FileExistsError(f"{there} exists: choose another --out")
    pixels, motion = conditions(args, world, {job.task for job in jobs})
    files = [args.decode] if args.decode else make(args, world, jobs, pixels, motion)
    backbone.free(args.device)
    codec = None
    for file in files:
        job, latents, motion = output.load_latents(file)
        video = pixels
        if job.task is not Task.VIDEO_TO_MOTION or pixels is None:
            codec = codec or world.codec()
            video = codec.decode(latents.to(args.device))
        made = output.write(args.out, job, video, motion, world, pictures=not args.prompts, mesh=args.mesh)
        print(f"{args.out}/{job.name}{'  '.join(made)}   {job.prompt!r}")
    if jobs:
        write_record(args.out / "run.json", args, prompts={job.name: job.prompt for job in asked})


if __name__ == "__main__":
    files.run(main)

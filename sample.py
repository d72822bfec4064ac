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
from kit import files, jobs, output
from kit.attention import attention_to_latents
from kit.backbone import Backbone, free_memory, open_backbone
from kit.data.batch import rng
from kit.output import Job
from motion_tokens import MOTION_DIM
from rope import frames_of


def options() -> tuple[argparse.Namespace, set[str]]:
    """The options, and the names of those that are not at their defaults."""
    parser = files.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    # what
    add("--task", choices=jobs.TASKS, help="default: joint; without --prompts or --wan also m2v and v2m")
    add("--prompt", metavar="TEXT", help="an empty one means no text")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line: makes each missing PROMPT-INDEX.mp4")
    add("--count", type=files.count, default=1, metavar="N", help="of each prompt; seeds SEED, SEED+1, ...")
    add("--seed", type=int, default=0, metavar="N")
    # conditions
    add("--motion", type=Path, metavar="FILE", help="condition of m2v; formats: docs/data.md")
    add("--video", type=Path, metavar="FILE.mp4", help="condition of v2m")
    add("--start", type=float, default=0.0, metavar="SECONDS", help="where in --motion or --video to begin")
    add("--loop", action="store_true", help="play a --motion that is too short forwards and backwards")
    # the network
    add("--weights", type=Path, metavar="FILE", help="written by train.py; default: the shipped puppet")
    add("--wan", type=Path, metavar="FOLDER", help="a Wan in the Diffusers layout")
    add("--body", type=Path, metavar="FILE", help="SMPL model, as in training; default: the puppet's")
    add("--frames", type=files.frames, metavar="N", help="4n+1, for --wan; default: as trained")
    add("--size", type=files.size, metavar="HxW", help="pixels, for --wan; default: as trained")
    add("--fps", type=files.positive, metavar="F", help="frames a second, for --wan; default: as trained")
    add("--precision", choices=("bf16", "fp32"), help="of Wan's weights; default: bf16 on a GPU")
    # how
    add("--steps", type=files.count, metavar="N", help="solver steps; default: puppet 6, Wan 50")
    add("--solver", choices=flow.SOLVERS, default="ab2")
    add("--guidance-text", type=files.finite, metavar="W1", help="default: puppet 1.5, Wan 6")
    add("--guidance-condition", type=files.finite, metavar="W2", help="default: puppet 1.5, Wan 6")
    what = "generate the video of a joint sample once more, from its motion; default: for the puppet only"
    add("--redraw", action=argparse.BooleanOptionalAction, help=what)
    add("--device", type=files.device, default="cuda" if torch.cuda.is_available() else "cpu")
    # what comes out
    add("--out", type=Path, metavar="DIR", help="default: samples; with --decode, the latents' own")
    add("--mesh", action="store_true", help="also write the body's vertices and faces, NAME-mesh.npz")
    add("--decode", type=Path, metavar="FILE", help="only decode latents that an earlier call has saved")
    args = parser.parse_args()
    return args, {name for name, value in vars(args).items() if value != parser.get_default(name)}


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
    redraw: bool = False,
    **sampling,
) -> tuple[Tensor | None, Tensor | None]:
    """Sample a batch of one task -> latents (b c T h w) and motion (b f 235), not normalised.

    text (b l text_dim), grid (T h w) of the latents; `latents` or `motion` is the condition, in the same
    units. It is returned as given, an absent modality as None. `bf16` turns autocast on, for a network stored
    in fp32; `redraw` generates a joint sample's video once more, from its motion; `sampling` goes to
    flow.sample.
    """
    b, device = len(text), model.motion_mean.device
    generator = rng("sample", seed)  # on the CPU: a seed gives the same noise on every device
    noise_video = torch.randn((b, model.config.channels, *grid), generator=generator)
    noise_motion = torch.randn((b, frames_of(grid[0]), MOTION_DIM), generator=generator)
    if task.motion is Role.CLEAN:
        motion = (motion.to(device) - model.motion_mean) / model.motion_std
    x_video = {Role.NOISY: noise_video, Role.CLEAN: latents, Role.ABSENT: None}[task.video]
    x_motion = {Role.NOISY: noise_motion, Role.CLEAN: motion, Role.ABSENT: None}[task.motion]
    x_video, x_motion = (None if x is None else x.to(device) for x in (x_video, x_motion))
    text, null_text = text.to(device), null_text.to(device).expand_as(text)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        video, motion = flow.sample(model, x_video, x_motion, text, null_text, task, **sampling)
        if redraw and task is Task.JOINT:
            # a video generated from clean motion is better than one generated beside noisy motion
            noise = torch.randn(noise_video.shape, generator=generator).to(device)
            video, _ = flow.sample(model, noise, motion, text, null_text, Task.MOTION_TO_VIDEO, **sampling)
    return video, None if motion is None else motion * model.motion_std + model.motion_mean


def make(
    backbone: Backbone, todo: list[Job], pixels: Tensor | None, motion: Tensor | None, sampling: dict,
    out: Path, device: str,
) -> list[Path]:  # fmt: skip
    """Encode text and condition, sample -> files of latents. Parts of the backbone are freed after use."""
    prompts = sorted({"", *(job.prompt for job in todo)})
    text = dict(zip(prompts, backbone.text_encoder()(prompts).split(1), strict=True))  # (1 l text_dim) each
    free_memory(device)
    latents = None if pixels is None else backbone.codec().encode(pixels.to(device))
    free_memory(device)
    (out / "latents").mkdir(parents=True, exist_ok=True)  # before sampling: an error would cost a sample
    model, made = backbone.transformer(), []
    for job in todo:
        y, progress = text[job.prompt], functools.partial(tqdm, desc=job.name)
        inputs = job.task, y, text[""], job.seed, backbone.geometry.grid, latents, motion
        x, m = denoise(model, *inputs, progress=progress, **sampling)
        seen = attention_to_latents(model, x, m, y, job.task) if job.pictures else None
        made.append(output.save_latents(out, job, backbone, x, m, seen))
    return made


def main() -> None:
    args, given = options()
    backbone = open_backbone(
        args.wan, args.weights, args.body, args.frames, args.size, args.fps, args.precision, args.device
    )
    sampling = backbone.sampling() | {"solver": args.solver}
    sampling |= {name: x for name, x in vars(args).items() if name in sampling and x is not None}
    out = args.out or (output.folder_of(args.decode) if args.decode else Path("samples"))

    # the samples to make, and their conditions
    task = args.task or ("joint" if args.wan or args.prompts else None)  # a Wan has no conditions of its own
    jobs.check_used(task, given, sampling["redraw"])
    wanted = jobs.jobs(task, args.prompt, args.prompts, args.count, args.seed, args.motion is not None)
    if args.prompts:
        jobs.check_options(out, vars(args))
    todo, made = ([], [args.decode]) if args.decode else jobs.missing(out, wanted)
    pixels = motion = None
    if any(job.task is Task.VIDEO_TO_MOTION for job in todo):
        pixels = jobs.condition_video(args.video, backbone, args.start)
    if any(job.task is Task.MOTION_TO_VIDEO for job in todo):
        motion, gender = jobs.condition_motion(args.motion, backbone, args.start, args.loop)
        todo = [job._replace(gender=gender) for job in todo]

    prompts = {job.name: job.prompt for job in wanted}
    record = functools.partial(files.write_record, out / "run.json", vars(args), prompts=prompts)
    if todo and args.prompts:
        record()  # before sampling: a call that was stopped goes on with the same options
    if todo:
        made += make(backbone, todo, pixels, motion, sampling, out, args.device)
        free_memory(args.device)
    output.write_all(out, made, pixels, backbone, args.device, args.mesh)
    if todo:
        record()


if __name__ == "__main__":
    files.run(main)

"""Train EchoMotion's two stages: `python train.py`, or `torchrun --nproc-per-node N train.py`.

Stage 1 trains the motion expert alone on motion; there are no video tokens and Wan's part is frozen.
Stage 2 trains everything on paired clips; each step draws one task. Without arguments the puppet
preset is trained from scratch; with --wan FOLDER a real Wan gets a motion expert.

    python train.py export --out RUN FILE      the averaged weights of a run's last checkpoint, for sample.py
"""

import argparse
import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flow
from dual_dit import DualDiT
from kit import checkpoints, devices, distributed, files, monitor, plots, run, validation
from kit.data import batch as batches
from kit.distributed import local
from kit.muon import Muon

RUN = Path("runs/puppet")
STAGE_1_SHARE = 0.1  # of the steps, when both stages are trained
# Short clips first: attention over 5 frames costs a fraction of that over 17, and poses are the same.
# Only long ones teach the 4:1 alignment.
CLIP_LENGTHS = ((0.0, 5), (0.2, 9), (0.4, 17))  # (from this share of a stage on, frames)
WARMUP = 50  # steps
LEARNING_RATE = {"puppet": 5e-3, "wan": 5e-5}
# paper is silent: the shift of noise levels in training
SHIFT = {"puppet": 1.0, "wan": 3.0}
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
EMA_DECAY = 0.998
BAD_STEPS = 10  # in a row, then the run stops


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--stage", choices=("1", "2", "both"), default="both")
    add("--steps", type=int, default=5000, metavar="N", help="in all (default %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="clips a step, of all ranks (default %(default)s)")
    add("--out", type=Path, default=RUN, metavar="RUN", help="default %(default)s")
    what = "go on from RUN's last checkpoint; auto: start, if there is none"
    add("--resume", nargs="?", const="must", choices=("must", "auto"), help=what)
    add("--save-every", type=int, default=250, metavar="STEPS", help="default %(default)s")
    add("--keep", type=int, default=3, metavar="N", help="of the last checkpoints (default %(default)s)")
    what = "losses on held-out clips, pictures of the puppet; 0: never (default %(default)s)"
    add("--validate-every", type=int, default=500, metavar="STEPS", help=what)
    add("--init", type=Path, metavar="FILE", help="start from these weights, such as stage 1's")
    add("--wan", type=Path, metavar="FOLDER", help="a Wan, instead of the puppet preset")
    what = (
        "the motion expert: from the video expert or new (default: copy for --wan, --init's own for --init)"
    )
    add("--init-motion", choices=("copy", "fresh"), help=what)
    add(
        "--data",
        action="append",
        metavar="SPEC",
        help="KIND:WHERE@WEIGHT, as in kit/data/datasets.py; repeatable",
    )
    add("--body", type=Path, metavar="FILE", help="SMPL model for --data; default: the puppet's")
    add("--frames", type=int, metavar="N", help="clips of this length throughout, instead of growing ones")
    add("--lr", type=float, help="at its peak; default: puppet 5e-3, Wan 5e-5")
    what = "of noise levels, toward noise (flow.shift_time); default: puppet 1, Wan 3"
    add("--shift", type=float, help=what)
    add("--unsynced", action="store_true", help="ablation: motion positions (f, i, i)")
    what = "ablation: one noise level for both modalities"
    add("--shared-noise", action="store_true", help=what)
    what = "ablation: video tuning, stage 2 without any motion"
    add("--video-only", action="store_true", help=what)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    what = "how ranks share the work; default: fsdp from a billion parameters on"
    add("--parallel", choices=("ddp", "fsdp"), help=what)
    what = "microbatches a step on each rank, to save memory; default: 1, on a CPU as many as have 8 clips"
    add("--accumulate", type=int, metavar="N", help=what)
    add("--checkpointing", action="store_true", help="recompute blocks in the backward pass, to save memory")
    add("--compile", action="store_true", help="torch.compile each block")
    verbs = parser.add_subparsers(dest="verb", metavar="export")
    what = "write the averaged weights of a run's last checkpoint to a file"
    export = verbs.add_parser("export", help=what)
    # what the parser above has read is not to be forgotten
    export.add_argument("--out", type=Path, default=argparse.SUPPRESS, metavar="RUN", help=f"default {RUN}")
    export.add_argument("file", type=Path, metavar="FILE", help="safetensors, for sample.py --weights")
    args = parser.parse_args()
    if args.shift is None:
        args.shift = SHIFT["wan" if args.wan else "puppet"]
    return args


class Step(NamedTuple):
    """Where in the run a step is: everything the schedule needs to know."""

    stage: int
    step: int  # within the stage
    steps: int  # of the stage
    frames: int  # of the clips


def plan(stage: str, steps: int, frames: int | None) -> list[Step]:
    """The whole run, step by step."""
    first = {"1": steps, "2": 0, "both": round(steps * STAGE_1_SHARE)}[stage]

    def length(share: float) -> int:
        return frames or [f for start, f in CLIP_LENGTHS if share >= start][-1]

    return [Step(s, i, n, length(i / n)) for s, n in ((1, first), (2, steps - first)) for i in range(n)]


def learning_rate(peak: float, now: Step) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * now.step / now.steps))
    return peak * min(1.0, (now.step + 1) / WARMUP) * (0.05 + 0.95 * cosine)


def optimizers(model: DualDiT, pretrained: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else; a pretrained Wan has AdamW only."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # paper is silent: the optimizer
    adamw = functools.partial(torch.optim.AdamW, weight_decay=WEIGHT_DECAY, fused=True)
    if pretrained:  # Muon's steps have full rank: they would wash out what the video expert knows
        return [adamw([p for _, p in trained], betas=(0.9, 0.99))]
    matrices = [p for name, p in trained if name.startswith("blocks.") and p.ndim == 2]
    others = [p for name, p in trained if not (name.startswith("blocks.") and p.ndim == 2)]
    muon = Muon(matrices, WEIGHT_DECAY)  # its steps have AdamW's size: one learning rate serves both
    muon.register_step_pre_hook(distributed.gather_gradients)
    return [muon, adamw(others, betas=(0.9, 0.98))]


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: DualDiT, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))  # early on, forget the initialisation fast
    for name, value in model.state_dict().items():
        local(ema[name]).lerp_(local(value), 1 - decay)


def train(args: argparse.Namespace) -> None:
    """Both stages, or what is left of them."""
    device, rank, ranks = world = distributed.start(args.device)
    run.check(args, ranks)
    found = run.resumed(args, world)
    sources, shape = run.open_data(args, rank)
    sources, held = validation.hold_out(sources)  # also when it is not used: watching changes no run
    steps = plan(args.stage, args.steps, shape.frames if args.wan else args.frames)
    share = args.batch // ranks
    args.accumulate = args.accumulate or devices.microbatches(share, device)
    micro = share // args.accumulate
    peak_lr = args.lr or LEARNING_RATE["wan" if args.wan else "puppet"]

    torch.manual_seed(args.seed)
    model, codec = run.build(args, sources, found, device)
    model.train().requires_grad_(True).checkpointing = args.checkpointing
    if args.compile:
        distributed.compile_blocks(model)
    bf16 = found.record["bf16"] if found else distributed.use_bf16(args.precision, world)
    first_step, skipped, bad = (found.record[k] if found else 0 for k in ("step", "skipped", "bad"))
    log, peak = None, monitor.peak_flops(device, bf16)
    if rank == 0:
        run.save_record(args, model, world, bf16, first_step)
        log = monitor.Log(args.out, first_step, len(steps))
    writer = checkpoints.Writer(args.out, args.keep, world, distributed.small(model))

    def validate(step: int, stage: int) -> None:
        tasks = validation.VIDEO_TUNING if args.video_only else validation.TASKS[stage]
        with validation.averaged(model, ema):
            losses = validation.validate(model, held_out, tasks, micro, bf16, ranks)
            if codec:
                path = args.out / "samples" / f"step-{step:08}.png" if log else None
                validation.picture(path, model, held_out, tasks, codec, bf16)
        if log:
            log.validation(step, losses)

    stopping, done = distributed.terminated(), first_step
    for step in range(first_step, len(steps)):
        now = steps[step]
        if step == first_step or now.step == 0:
            # a stage trains its own parameters, with its own optimizers
            for p in model.video_parameters():
                p.requires_grad_(now.stage == 2)
            wrapped = distributed.wrap(model, world, args.parallel, bf16)
            opts = optimizers(model, pretrained=bool(args.wan))
            if step == first_step:
                ema = {name: value.clone() for name, value in model.state_dict().items()}
                if found:
                    checkpoints.load(found.folder, model, ema, opts if now.step else [], world)
            watched = held if args.validate_every else []
            held_out = validation.read_held_out(watched, model, now.stage, shape.frames, codec, world)
        if held_out and step % args.validate_every == 0:
            validate(step, now.stage)
        start, waited, values = time.perf_counter(), 0.0, 0.0
        # ------------------------------------------------------------------ one step
        for part in range(args.accumulate):
            asked, first = time.perf_counter(), rank * share + part * micro
            batch = batches.batch(
                sources, model.motion_mean, model.motion_std, seed=args.seed, step=step, stage=now.stage,
                frames=now.frames, batch=args.batch, samples=range(first, first + micro), device=device,
                codec=codec, shift=args.shift, shared_noise=args.shared_noise,
                video_only=args.video_only,
            )  # fmt: skip
            waited += time.perf_counter() - asked
            with distributed.exchange(wrapped, last=part == args.accumulate - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = flow.loss(wrapped, *batch)
                (loss.total / args.accumulate).backward()
            values += torch.stack([loss.total, *(x.mean() for x in loss if x is not None)]).detach()
        norm = distributed.clip(model, CLIP_NORM).item()
        flags = values.new_tensor([stopping.is_set(), writer.failed()])
        means = distributed.mean_over_ranks(torch.cat([values / args.accumulate, flags]), ranks)
        *losses, stop, failed = means.tolist()
        finite = all(math.isfinite(x) for x in (*losses, norm))  # the same on every rank
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(peak_lr, now)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if finite:
            update_ema(ema, model, step)
        # ---------------------------------------------------------------------------
        skipped, bad = (skipped, 0) if finite else (skipped + 1, bad + 1)
        task = batch.task.name.lower()
        if log:
            seconds = time.perf_counter() - start
            names = ("loss", *(name for name, x in loss._asdict().items() if x is not None))
            record = {"step": step, "stage": now.stage, "frames": now.frames, "task": task}
            record |= dict(zip(names, losses, strict=True)) | {"grad_norm": norm, "skipped": skipped}
            record |= {"seconds": seconds, "data_seconds": waited}
            log.step(record | monitor.speed(model.config, batch, args.batch, seconds, peak and peak * ranks))
        if not finite:
            where = f"seed {args.seed}, step {step}, task {task}, samples 0 to {args.batch - 1}"
            if log:
                print(f"skipped, loss or gradient is not finite: {where}")
            if bad == BAD_STEPS:
                raise ValueError(
                    f"{bad} steps in a row had a loss or gradient that is not finite; last: {where}"
                )
        if failed:
            writer.wait()  # says what is wrong
        done = step + 1
        if stop or done % args.save_every == 0 or done == len(steps):
            record = run.progress(args, model, step=done, bf16=bf16, skipped=skipped, bad=bad)
            writer.save(
                record, checkpoints.training_state(model, ema, opts, codec.state() if codec else {}, rank)
            )
        if stop:
            break
    writer.wait()
    if first_step < len(steps) == done and held_out:
        validate(done, now.stage)
    if log:
        log.close()
        leave(args.out, done, complete=done == len(steps))
    distributed.stop()


def leave(out: Path, done: int, complete: bool) -> None:
    """What a run leaves behind when it ends."""
    if not complete:
        print(f"SIGTERM: {out} is saved at step {done}; go on with --resume")
        return
    checkpoints.export(checkpoints.folder_of(out, done), out / "weights.safetensors")
    plots.loss_picture(out / "metrics.jsonl", out / "loss.png")
    print(f"wrote {out}/weights.safetensors, metrics.jsonl and loss.png")


def main() -> None:
    args = options()
    if args.verb == "export":
        found = checkpoints.newest(args.out, distributed.ALONE)
        if not found:
            raise FileNotFoundError(f"nothing to export: no checkpoint in {args.out}; point --out at a run")
        checkpoints.export(found.folder, args.file)
        print(f"wrote {args.file}, from {found.folder}")
    else:
        train(args)


if __name__ == "__main__":
    files.run(main)

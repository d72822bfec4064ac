"""Train EchoMotion: `python train.py`, or `torchrun --nproc-per-node N train.py` (paper, section 3.2).

    stage 0   text -> video: the video expert alone. Only the puppet needs it: a real Wan is trained already
    stage 1   text -> motion: the motion expert, which starts as a copy of the video expert, and the task hint
    stage 2   both on paired clips; each step draws one of three tasks

Without arguments the puppet is trained from scratch in all three; a real Wan (--wan FOLDER) in 1 and 2.

    python train.py export --out RUN FILE      the averaged weights of a run's last checkpoint, for sample.py,
                                               and beside them a .json that describes the run
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import flow
from dual_dit import DualDiT
from kit import backbone, checkpoints, devices, distributed, files, monitor, run, validation
from kit.data import batch as batches
from kit.distributed import local
from kit.muon import optimizers
from kit.run import Step, schedule, stage_steps
from kit.wan import copy_video_to_motion

RUN = Path("runs/puppet")
# paper is silent: the schedule of the learning rate, clipping of gradients, averaging of weights
WARMUP = 50  # steps
LEARNING_RATE = {"puppet": 5e-3, "wan": 8e-6}
SHIFT = {"puppet": 1.0, "wan": 8.0}  # of noise levels
CLIP_NORM = 1.0
EMA_DECAY = 0.998
BAD_STEPS = 10  # the run stops after so many skipped steps in a row
# options that must be the same when a run is resumed
PLAN = (
    "stage", "steps", "batch", "frames", "data", "body", "init", "lr", "shift", "seed", "ablate", "precision",
)  # fmt: skip
ABLATIONS = (*backbone.CHANGES, "one-stage")


def options() -> argparse.Namespace:
    parser = files.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    # what is trained
    add("--wan", type=Path, metavar="FOLDER", help="train a real Wan instead of the puppet")
    add("--data", action="append", metavar="SPEC", help="KIND:WHERE@WEIGHT, see docs/data.md; repeatable")
    add("--body", type=Path, metavar="FILE", help="SMPL model for --data; default: the puppet's")
    add("--frames", type=files.frames, metavar="N", help="clips of this length only, instead of growing ones")
    add("--init", type=Path, metavar="FILE", help="start from these weights, for instance of another run")
    add("--ablate", choices=ABLATIONS, metavar="NAME", help=", ".join(ABLATIONS))
    # how much
    add("--stage", type=int, choices=(0, 1, 2), help="one stage alone; default: all, of a Wan 1 and 2")
    add("--steps", type=files.count, metavar="N", help="of all stages; default: puppet 16,000, Wan 27,000")
    add("--batch", type=files.count, metavar="N", help="clips a step; default: 16; puppet on a GPU: 32")
    # how
    add("--lr", type=files.positive, help="peak learning rate; default: puppet 5e-3, Wan 8e-6")
    add("--shift", type=files.positive, help="of noise levels; default: that of --init, else puppet 1, Wan 8")
    add("--seed", type=int, default=0)
    # where, and what is kept
    add("--out", type=Path, default=RUN, metavar="RUN", help="default %(default)s")
    add("--resume", nargs="?", const="must", choices=("must", "auto"), help="resume RUN; auto: or start it")
    add("--save-every", type=files.count, default=250, metavar="STEPS", help="default %(default)s")
    add("--keep", type=files.count, default=3, metavar="N", help="checkpoints to keep (default %(default)s)")
    what = "losses on held-out clips, and the puppet's pictures; 0: never (default %(default)s)"
    add("--validate-every", type=files.count_or_0, default=2000, metavar="STEPS", help=what)
    # the machine
    add("--device", type=files.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    add("--parallel", choices=("ddp", "fsdp"), help="default: fsdp from a billion parameters on")
    what = "microbatches a step on each rank, to save memory; default: 1 (on a CPU, one for every 8 clips)"
    add("--accumulate", type=files.count, metavar="N", help=what)
    add("--checkpointing", action="store_true", help="recompute blocks in the backward pass, to save memory")
    add("--compile", action="store_true", help="torch.compile each block")
    verbs = parser.add_subparsers(dest="verb", metavar="export")
    export = verbs.add_parser("export", help="averaged weights, for sample.py")
    # SUPPRESS: without it the default would replace an --out given before the verb
    export.add_argument("--out", type=Path, default=argparse.SUPPRESS, metavar="RUN", help=f"default {RUN}")
    export.add_argument("--bf16", action="store_true", help="store weights in bf16, about half the size")
    export.add_argument("file", type=Path, metavar="FILE", help="safetensors, for sample.py --weights")
    args = parser.parse_args()
    # the puppet is so small that 16 clips leave a GPU waiting for its host
    args.batch = args.batch or (32 if args.device.startswith("cuda") and not args.wan else 16)
    return args


# ---------------------------------------------------------------- the parts of a run


def learning_rate(peak: float, now: Step) -> float:
    """In each stage: linear warm-up, then half a cosine down to a twentieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * now.index / now.steps))
    return peak * min(1.0, (now.index + 1) / WARMUP) * (0.05 + 0.95 * cosine)


def freeze(model: DualDiT, stage: int) -> None:
    """Stage 0 trains the video expert, stage 1 everything else, stage 2 all parameters."""
    video = set(model.video_parameters())
    for p in model.parameters():
        p.requires_grad_({0: p in video, 1: p not in video, 2: True}[stage])


def hand_over(model: DualDiT, ema: dict[str, Tensor], stage: int) -> None:
    """Start the next stage from the averaged weights of `stage`; after 0, copy the video expert to motion."""
    lerp(model.state_dict(), ema, 1.0)  # weight 1: model <- ema
    if stage == 0:
        copy_video_to_motion(model)
        lerp(ema, model.state_dict(), 1.0)


@torch.no_grad()
def lerp(target: dict[str, Tensor], source: dict[str, Tensor], weight: float) -> None:
    """target <- target + weight·(source - target), for every tensor."""
    torch._foreach_lerp_([local(target[key]) for key in source], [local(x) for x in source.values()], weight)


def update(
    state: dict[str, Tensor], ema: dict[str, Tensor], opts: list[torch.optim.Optimizer], rate: float,
    now: Step,
) -> None:  # fmt: skip
    """One step of the optimizers, and of the averaged weights."""
    for optimizer in opts:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    # early in a stage, average over few steps
    lerp(ema, state, 1 - min(EMA_DECAY, (1 + now.index) / (10 + now.index)))


def gradients(
    objective: nn.Module, clips: Iterator[batches.Batch], drawn: flow.Draw, microbatches: list[range],
    bf16: bool,
) -> Tensor:  # fmt: skip
    """Forward and backward, a microbatch at a time -> losses (2 or 3,): total, video's, motion's."""
    losses, count = 0.0, len(microbatches)
    for samples in microbatches:
        batch = next(clips)
        with distributed.exchange(objective, last=samples is microbatches[-1]):
            with torch.autocast(batch.text.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                loss = objective(*batch, drawn.rows(samples.start, samples.stop))
            (loss.total / count).backward()
        losses += torch.stack([loss.total, *(x.mean() for x in loss if x is not None)]).detach() / count
    return losses


def train(args: argparse.Namespace) -> None:
    """All stages, or what is left of them."""
    world = distributed.start(args.device)
    device, rank, ranks = world
    kind = "wan" if args.wan else "puppet"
    stages = stage_steps(kind, args.stage, args.steps, one_stage=args.ablate == "one-stage")
    args.steps = sum(stages.values())  # recorded: a resumed run must have as many
    microbatches = run.microbatches(args.batch, world, args.accumulate)
    chunk = len(microbatches[0])  # clips a forward pass
    peak = args.lr or LEARNING_RATE[kind]

    # the checkpoint to resume from, data, network
    plan = files.recorded({name: getattr(args, name) for name in PLAN})
    found = run.resumed(args.out, args.resume, plan)
    first = found.record["step"] if found else 0
    shift = args.shift or run.earlier_shift(args.init, found) or SHIFT[kind]
    sources, geometry = run.open_data(args.data, args.wan, args.body, args.frames, stages, rank)
    steps = schedule(stages, geometry.frames if args.wan else args.frames)
    sources, held = validation.hold_out(sources)  # always: training data must not depend on validation
    torch.manual_seed(args.seed)
    model, codec = run.build(args.wan, args.init, args.ablate, stages, sources, args.seed, found, world)
    devices.use_fast_attention(device)
    if args.checkpointing:
        distributed.recompute_blocks(model)
    if args.compile:
        distributed.compile_blocks(model)
    bf16 = found.record["bf16"] if found else devices.use_bf16(args.precision, device)
    settings = run.settings(sources[0], geometry, shift, args.ablate)
    extra = codec.state() if codec else {}
    plan |= found.record["plan"] if found else {}  # with what was left out on --resume
    kept = {"bf16": bf16, "plan": plan, "config": dataclasses.asdict(model.config)}
    writer = checkpoints.Writer(args.out, args.keep, world)
    log = None
    if rank == 0:
        run.save_record(args.out, vars(args), model, world, bf16, first)
        words = len(sources[0].null_text)
        log = monitor.Log(args.out, first, len(steps), model.config, geometry, words, world, bf16)
    stopping, done, bad = distributed.terminated(), first, 0
    # a generator: nothing runs before the first step, when the model is on its device
    clips = batches.stream(
        sources, model, steps, first, microbatches, seed=args.seed, batch=args.batch, device=device,
        codec=codec,
    )  # fmt: skip
    # CUDA graphs need one forward and one backward pass a step, and cannot recompute
    replay = len(microbatches) == 1 and not args.checkpointing

    for step in range(first, len(steps)):
        now = steps[step]
        if step == first or now.index == 0:
            freeze(model, now.stage)
            objective = distributed.wrap(model, world, args.parallel, bf16, replay)
            opts = optimizers(model, kind)
            if step == first:
                ema = {name: value.clone() for name, value in model.state_dict().items()}
                if found:
                    checkpoints.load(found.folder, model, ema, opts if now.index else [])
            if now.index == 0 and step > 0:
                hand_over(model, ema, steps[step - 1].stage)
            state = model.state_dict()
            held_out = validation.read_held_out(
                held if args.validate_every else [], model, now.stage, geometry.frames, codec, device
            )
        if held_out and step % args.validate_every == 0:
            validation.watch(args.out, step, now.stage, model, ema, held_out, codec, chunk, bf16, log, shift)

        # this rank's clips through flow.loss; gradients averaged over the ranks
        start = time.perf_counter()
        drawn = flow.draw(batches.rng("draw", args.seed, step), now.stage, args.batch, shift)
        losses = gradients(objective, clips, drawn, microbatches, bf16)
        norm = distributed.clip_gradients(model, CLIP_NORM)

        # one all-reduce and one wait for the device; then all ranks have the same numbers
        flags = losses.new_tensor([stopping.is_set(), writer.failed()])
        numbers = distributed.mean_over_ranks(torch.cat([losses, norm[None], flags]), ranks)
        *losses, norm, stop, failed = numbers.tolist()
        finite = all(math.isfinite(x) for x in (*losses, norm))

        # the step
        if finite:
            update(state, ema, opts, learning_rate(peak, now), now)
        model.zero_grad()

        # log and checkpoint
        done = step + 1
        seconds = time.perf_counter() - start
        if log:
            log.step(step, now.stage, now.frames, drawn.task, losses, norm, args.batch, seconds)
        bad = 0 if finite else bad + 1
        if not finite:
            run.report_skipped(args.seed, step, drawn.task, args.batch, rank, stop=bad == BAD_STEPS)
        if failed:
            writer.wait()  # raises the error
        if held_out and done == len(steps):  # before the checkpoint: a run killed here repeats the step
            validation.watch(args.out, done, now.stage, model, ema, held_out, codec, chunk, bf16, log, shift)
        ended = now.index + 1 == now.steps  # of the stage: its weights become RUN/stage-N.safetensors
        if stop or ended or done % args.save_every == 0:
            record = kept | run.record(done, now.stage, ended, settings)
            writer.save(record, checkpoints.training_state(model, ema, opts, extra))
        if stop:
            break

    writer.wait()
    if log:
        log.close()
        run.leave(args.out, done, complete=done == len(steps))
    distributed.stop()


def main() -> None:
    args = options()
    if args.verb == "export":
        run.export(args.out, args.file, torch.bfloat16 if args.bf16 else torch.float32)
    else:
        train(args)


if __name__ == "__main__":
    files.run(main)

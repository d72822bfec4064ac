"""Train EchoMotion's two stages: `python train.py`, or `torchrun --nproc-per-node N train.py`.

Stage 1 trains the motion expert alone on motion; there are no video tokens and Wan's part is frozen.
Stage 2 trains everything on paired clips; each step draws one task. Without arguments the puppet
preset is trained from scratch; with --wan FOLDER a real Wan gets a motion expert.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

import flow
from dual_dit import PRESETS, DualDiT
from kit import cli, data, parallel, puppet, render, wan, weights
from kit.body import Body
from kit.files import whole_file
from kit.geometry import Geometry, geometry
from kit.sources import cached_geometry

STAGE_1_SHARE = 0.1  # of the steps, when both stages are trained
# Short clips first: attention over 5 frames costs a fraction of that over 17, and poses are the same.
# Only long ones teach the 4:1 alignment.
CLIP_LENGTHS = ((0.0, 5), (0.2, 9), (0.4, 17))  # (from this share of a stage on, frames)
WARMUP = 50  # steps
LEARNING_RATE = {"puppet": 5e-3, "wan": 5e-5}
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
EMA_DECAY = 0.998


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both")
    parser.add_argument("--steps", type=int, default=5000, help="in all (default %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=16, help="clips a step, over all ranks (default %(default)s)"
    )
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("runs/puppet"), help="default %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--init", type=Path, metavar="FILE", help="start from these weights, such as stage 1's"
    )
    parser.add_argument("--wan", type=Path, metavar="FOLDER", help="a Wan, instead of the puppet preset")
    parser.add_argument(
        "--init-motion",
        choices=("copy", "fresh"),
        default="copy",
        help="of --wan: from its video expert or not",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="SPEC",
        help="KIND:WHERE@WEIGHT, see kit/datasets.py; may be repeated",
    )
    parser.add_argument(
        "--body", type=Path, metavar="FILE", help="SMPL model for --data; default: the puppet's"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute blocks in the backward pass, to save memory"
    )
    parser.add_argument("--frames", type=int, help="clips of this length throughout, instead of growing ones")
    parser.add_argument("--lr", type=float, help="at its peak; default: puppet 5e-3, Wan 5e-5")
    parser.add_argument("--unsynced", action="store_true", help="ablation: motion positions (f, i, i)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    return parser.parse_args()


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
    if pretrained:  # Muon's steps have full rank: they would wash out what the video expert knows
        return [torch.optim.AdamW([p for _, p in trained], betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)]
    matrices = [p for name, p in trained if name.startswith("blocks.") and p.ndim == 2]
    others = [p for name, p in trained if not (name.startswith("blocks.") and p.ndim == 2)]
    return [
        # with this adjustment Muon's steps have AdamW's size, so that one learning rate serves both
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: DualDiT, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))  # early on, forget the initialisation fast
    for name, value in model.state_dict().items():
        ema[name].lerp_(value, 1 - decay)


def open_data(args: argparse.Namespace, rank: int) -> tuple[list[data.Source], Geometry]:
    """The data sets that the options name, and the size of their clips."""
    if args.wan and not args.data:
        raise ValueError(
            "--wan trains on latents: make some with `python -m kit.data cache SPEC --wan FOLDER --out DIR`, "
            "then add --data cache:DIR"
        )
    body = Body.load(args.body) if args.body else puppet.body()
    shape = cached_geometry(args.data[0], args.frames) if args.wan else geometry(None, args.frames)
    return data.open_sources(args.data or ["puppet"], shape, body, wan=bool(args.wan), rank=rank), shape


def build(
    args: argparse.Namespace, sources: list[data.Source], device: torch.device
) -> tuple[DualDiT, puppet.Codec | None]:
    """The network to be trained, with its motion statistics, and the puppet's codec."""
    codec = None
    if args.init:
        model, extra = weights.load_weights(args.init, device)
        codec = None if args.wan else puppet.Codec.from_state(extra)
    else:
        if args.wan:
            model = wan.load_transformer(args.wan, device=device, init_motion=args.init_motion)
            print(f"{args.wan}: the video expert is loaded, the motion expert is new ({args.init_motion})")
        else:
            model = DualDiT(dataclasses.replace(PRESETS["puppet"], synced=not args.unsynced)).to(device)
            codec = puppet.Codec.fit()
        mean, std = data.statistics(sources, args.seed)
        model.motion_mean.copy_(mean)
        model.motion_std.copy_(std)
    model.checkpointing = args.checkpointing
    return model.train().requires_grad_(True), codec


def open_log(path: Path, first_step: int) -> TextIO:
    """metrics.jsonl, to be appended to; a resumed run first drops the steps that it will repeat."""
    lines = path.read_text().splitlines(keepends=True) if first_step and path.exists() else []
    with whole_file(path) as temporary:  # one line a step, so that a line cut off by a crash goes too
        temporary.write_text("".join(lines[:first_step]))
    return open(path, "a")


def main() -> None:
    args = options()
    if args.steps < 1 or args.save_every < 1:
        raise ValueError(f"--steps and --save-every are at least 1, got {args.steps} and {args.save_every}")
    if args.frames is not None and args.frames != puppet.nearest_frames(args.frames):
        nearest = puppet.nearest_frames(args.frames)
        raise ValueError(f"--frames must be 4n+1, got {args.frames}; the nearest is {nearest}")
    device, rank, ranks = parallel.start(args.device)
    if args.batch % ranks or args.batch < 1:
        nearest = max(1, round(args.batch / ranks)) * ranks
        raise ValueError(
            f"--batch {args.batch} must be a multiple of {ranks} ranks; the nearest is {nearest}"
        )
    sources, shape = open_data(args, rank)
    samples = range(args.batch // ranks * rank, args.batch // ranks * (rank + 1))
    checkpoint = args.out / "checkpoint.pt"
    if not args.resume and checkpoint.exists():
        raise ValueError(f"{checkpoint} exists: add --resume to go on, or choose another --out")
    torch.manual_seed(args.seed)
    steps = plan(args.stage, args.steps, shape.frames if args.wan else args.frames)
    peak = args.lr or LEARNING_RATE["wan" if args.wan else "puppet"]
    bf16 = {"bf16": True, "fp32": False, "auto": None}[args.precision]
    if bf16 is None:  # by majority, so that all ranks compute alike
        bf16 = (
            parallel.mean_over_ranks(
                torch.tensor(float(parallel.faster_in_bf16(device))).to(device), ranks
            ).item()
            > 0.5
        )

    # ---- model, codec, averaged weights: new, from a file, or from a checkpoint
    first_step, saved_optimizers = 0, None
    model, codec = build(args, sources, device)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    if args.resume:
        state = parallel.load_state(checkpoint)
        if (state["stage"], state["steps"]) != (args.stage, args.steps):
            raise ValueError(
                f"{checkpoint} is of --stage {state['stage']} --steps {state['steps']}: resume with the same"
            )
        model.load_state_dict(state["model"])
        ema = {name: value.to(device) for name, value in state["ema"].items()}
        codec = puppet.Codec.from_state(state["codec"]) if codec else None
        first_step, bf16, saved_optimizers = state["step"], state["bf16"], state["optimizers"]

    log = None
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        log = open_log(args.out / "metrics.jsonl", first_step)
    smooth: dict[str, float] = {}
    bar = tqdm(range(first_step, len(steps)), initial=first_step, total=len(steps), disable=rank > 0)
    for step in bar:
        now = steps[step]
        if now.step == 0 or step == first_step:
            # a stage trains its own parameters, with its own optimizers
            for p in model.video_parameters():
                p.requires_grad_(now.stage == 2)
            wrapped, opts = parallel.wrap(model, ranks), optimizers(model, pretrained=bool(args.wan))
            if now.step > 0:  # resumed within a stage
                for optimizer, saved in zip(opts, saved_optimizers, strict=True):
                    optimizer.load_state_dict(saved)
        start = time.perf_counter()
        batch = data.batch(
            sources, model.motion_mean, model.motion_std, seed=args.seed, step=step, stage=now.stage,
            frames=now.frames, batch=args.batch, samples=samples, device=device, codec=codec,
        )  # fmt: skip
        waited = time.perf_counter() - start
        # ------------------------------------------------------------------ one step
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = flow.loss(wrapped, *batch)
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(peak, now)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step)
        # ---------------------------------------------------------------------------
        total = parallel.mean_over_ranks(loss.total.detach(), ranks).item()
        if log:
            task = batch.task.name.lower()
            smooth[task] = total if task not in smooth else 0.95 * smooth[task] + 0.05 * total
            bar.set_postfix({k: f"{v:.3f}" for k, v in sorted(smooth.items())}, refresh=False)
            record = {"step": step, "stage": now.stage, "frames": now.frames, "task": task, "loss": total}
            record |= {name: part.mean().item() for name, part in loss._asdict().items() if part is not None}
            seconds = {"seconds": time.perf_counter() - start, "data_seconds": waited}
            print(json.dumps(record | {"grad_norm": norm.item()} | seconds), file=log, flush=True)
        done = step + 1
        if log and (done % args.save_every == 0 or done == len(steps)):
            state = {
                "step": done, "stage": args.stage, "steps": args.steps, "bf16": bf16,
                "codec": codec.state() if codec else {},
                "model": model.state_dict(), "ema": ema, "optimizers": [o.state_dict() for o in opts],
            }  # fmt: skip
            parallel.save_state(checkpoint, state)
            weights.save_weights(args.out / "weights.safetensors", model.config, ema, state["codec"])
    if log:
        log.close()
        render.loss_picture(args.out / "metrics.jsonl", args.out / "loss.png")
        print(f"wrote {args.out}/weights.safetensors, metrics.jsonl and loss.png")
    parallel.stop()


if __name__ == "__main__":
    cli.run(main)

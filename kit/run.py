"""What a training run starts from: its options, data and network; and the record of how it was started."""

import argparse
import dataclasses
import math
from collections.abc import Sequence

import torch

from dual_dit import PRESETS, DualDiT, DualDiTConfig
from kit import checkpoints, puppet, wan, weights
from kit.body import Body
from kit.checkpoints import Checkpoint
from kit.data import batch as batches
from kit.data.sources import Source, cached_geometry, open_sources
from kit.distributed import World
from kit.files import write_record
from kit.geometry import Geometry, geometry


def check(args: argparse.Namespace, ranks: int) -> None:
    """ValueError for options that can't be; before anything is written."""
    for name in ("steps", "save_every", "keep", "accumulate"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is at least 1, got {getattr(args, name)}")
    if not 0 < args.shift < math.inf:
        raise ValueError(f"--shift is a number above 0, got {args.shift:g}")
    if args.video_only and args.stage != "2":
        raise ValueError("--video-only trains no motion expert: add --stage 2, or leave --video-only out")
    start = {"copy": args.wan or args.init, "fresh": args.wan and not args.init}
    if args.init_motion and not start[args.init_motion]:
        raise ValueError(
            "--init-motion copy needs --wan FOLDER or --init FILE, fresh needs --wan FOLDER without --init"
        )
    if args.validate_every < 0:
        raise ValueError(f"--validate-every is at least 0, got {args.validate_every}")
    if args.frames is not None and args.frames != puppet.nearest_frames(args.frames):
        nearest = puppet.nearest_frames(args.frames)
        raise ValueError(f"--frames must be 4n+1, got {args.frames}; the nearest is {nearest}")
    parts = ranks * (args.accumulate or 1)
    if args.batch % parts or args.batch < 1:
        nearest = max(1, round(args.batch / parts)) * parts
        shares = f"{ranks} ranks" + (f" x {args.accumulate} microbatches" if parts > ranks else "")
        raise ValueError(f"--batch {args.batch} must be a multiple of {shares}; the nearest is {nearest}")
    there = *(args.out / "checkpoints").glob(checkpoints.PATTERN), *args.out.glob("weights.safetensors")
    if there and not args.resume:
        raise ValueError(f"{there[0]} exists: add --resume to go on, or choose another --out")


# options that a run keeps when it goes on
PLAN = (
    "stage", "steps", "batch", "seed", "frames", "data", "lr", "shift",
    "unsynced", "shared_noise", "video_only",
)  # fmt: skip


def resumed(args: argparse.Namespace, world: World) -> Checkpoint | None:
    """The checkpoint that train.py's options ask to go on from; None for a new run.

    FileNotFoundError if there must be one and is none, ValueError if it is of another plan.
    """
    found = checkpoints.newest(args.out, world) if args.resume else None
    if args.resume == "must" and not found:
        raise FileNotFoundError(
            f"nothing to resume: no checkpoint in {args.out}; start without --resume, or point --out at a run"
        )
    if found and (other := {k: v for k, v in found.record["plan"].items() if v != getattr(args, k)}):
        wanted = " ".join(_flag(name, value) for name, value in other.items())
        raise ValueError(f"{found.folder} is of a run with {wanted}: resume with the same")
    return found


def _flag(name: str, value: object) -> str:
    """An option as it was given on the command line, or that it was not."""
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return f"no {flag}"
    values = value if isinstance(value, list) else [value]
    return flag if value is True else " ".join(f"{flag} {each}" for each in values)


def progress(args: argparse.Namespace, model: DualDiT, **more: object) -> dict:
    """The record of a checkpoint: all that is needed to go on, beside tensors."""
    plan = {name: getattr(args, name) for name in PLAN}
    return {"plan": plan, "config": dataclasses.asdict(model.config), **more}


def open_data(args: argparse.Namespace, rank: int) -> tuple[list[Source], Geometry]:
    """The data sets that train.py's options name, and the size of their clips."""
    if args.wan and not args.data:
        raise ValueError(
            "--wan trains on latents: make some with `python -m kit.data cache SPEC --wan FOLDER --out DIR`, "
            "then add --data cache:DIR"
        )
    body = Body.load(args.body) if args.body else puppet.body()
    shape = cached_geometry(args.data[0], args.frames) if args.wan else geometry(None, args.frames)
    sources = open_sources(args.data or ["puppet"], shape, body, wan=bool(args.wan), rank=rank)
    if args.stage != "1" and not any(source.paired for source in sources):
        raise ValueError("stage 2 needs video, and no data set has any: add paired clips, or --stage 1")
    return sources, shape


def build(
    args: argparse.Namespace, sources: Sequence[Source], found: Checkpoint | None, device: torch.device
) -> tuple[DualDiT, puppet.Codec | None]:
    """The network, on the CPU, with its motion statistics, and the puppet's codec on `device`.

    Where a run goes on the network is empty: checkpoints.load fills it when it is where it belongs.
    """
    if found:
        with torch.device("meta"):
            model = DualDiT(DualDiTConfig(**found.record["config"]))
        model, extra = model.to_empty(device="cpu"), checkpoints.load_whole(found.folder, "codec")
    elif args.init:
        model, extra = weights.load_weights(args.init)
        if args.init_motion == "copy":
            wan.copy_video_to_motion(model)
    elif args.wan:
        how = args.init_motion or "copy"
        model, extra = wan.load_transformer(args.wan, init_motion=how), {}
        print(f"{args.wan}: the video expert is loaded, the motion expert is new ({how})")
    else:
        model, extra = DualDiT(PRESETS["puppet"]), puppet.Codec.fit().state()
    if not found:
        if args.unsynced:  # no weight depends on it
            model.config = dataclasses.replace(model.config, synced=False)
        for p in model.parameters():  # in a file they lie anywhere: sums would end in other bits than resumed
            p.data = p.data.clone()
    if not found and not args.init:
        mean, std = batches.statistics(sources, args.seed)
        model.motion_mean.copy_(mean)
        model.motion_std.copy_(std)
    codec = None if args.wan else puppet.Codec.from_state({k: v.to(device) for k, v in extra.items()})
    return model, codec


def save_record(args: argparse.Namespace, model: DualDiT, world: World, bf16: bool, first_step: int) -> None:
    """RUN/run.json: options, command, versions, network and machines of the run's last start."""
    write_record(
        args.out / "run.json",
        args,
        first_step=first_step,
        bf16=bf16,
        ranks=world.ranks,
        device=str(world.device),
        config=dataclasses.asdict(model.config),
        parameters=sum(p.numel() for p in model.parameters()),
    )

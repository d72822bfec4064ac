"""A training run's schedule, what it starts from (its data and network), and the records it leaves."""

import dataclasses
import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dual_dit import PRESETS, DualDiT, DualDiTConfig
from flow import Task
from kit import checkpoints, distributed, monitor, plots, puppet, wan, weights
from kit.backbone import CHANGES, check_weights
from kit.body import Body
from kit.checkpoints import Checkpoint
from kit.data import batch as batches
from kit.data.sources import Source, cached_geometry, open_sources
from kit.distributed import World
from kit.files import whole_file, write_record
from kit.geometry import Geometry, geometry_of

STEPS = {"puppet": {0: 3500, 1: 1200, 2: 11_300}, "wan": {1: 15_000, 2: 12_000}}  # Wan's are the paper's
# Short clips first: attention over 5 frames costs a fraction of that over 17, and poses are the same.
# Only long ones teach the 4:1 alignment.
CLIP_LENGTHS = ((0.0, 5), (0.2, 9), (0.4, 17))  # (from this share of a stage on, frames)
CPU_CLIPS = 8  # clips of a microbatch on a CPU
LIKE_CLIPS = 64  # of the data, to compare with what --init was trained on
UNLIKE = 4.0  # mean square of normalised motion, from which on it is other motion

# ---------------------------------------------------------------- the schedule


class Step(NamedTuple):
    """Where in the run a step is."""

    stage: int
    index: int  # within the stage
    steps: int  # of the stage
    frames: int  # of the clips


def schedule(stages: dict[int, int], frames: int | None) -> list[Step]:
    """The whole run, step by step; `stages` says how many steps each has."""

    def length(share: float) -> int:
        return frames or [f for start, f in CLIP_LENGTHS if share >= start][-1]

    return [Step(stage, i, n, length(i / n)) for stage, n in stages.items() for i in range(n)]


def stage_steps(kind: str, stage: int | None, steps: int | None, one_stage: bool) -> dict[int, int]:
    """Steps of each stage: the defaults, or `steps` in all, in the same proportions."""
    usual = STEPS[kind]
    if stage is not None:
        if one_stage and stage == 1:
            raise ValueError("--ablate one-stage leaves stage 1 out: leave --stage 1 out, or the ablation")
        if stage not in usual and not steps:
            raise ValueError("--stage 0 tunes a Wan on video: say for how many --steps")
        return {stage: steps or usual[stage]}
    if one_stage:
        usual = {s: n for s, n in usual.items() if s != 1}
    total = steps or sum(usual.values())
    counts = {s: round(total * n / sum(usual.values())) for s, n in usual.items() if s != 2}
    return counts | {2: total - sum(counts.values())}


# ---------------------------------------------------------------- the start


def microbatches(batch: int, world: World, accumulate: int | None) -> list[range]:
    """This rank's samples of a step, in microbatches; ValueError if the batch cannot be divided evenly."""
    share, on_cpu = batch // world.ranks, world.device.type == "cpu"
    if not accumulate:
        # with more clips, tensors outgrow a CPU's cache, and every pass over them waits for memory
        accumulate = max(1, share // CPU_CLIPS) if on_cpu and share % CPU_CLIPS == 0 else 1
    parts = world.ranks * accumulate
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        shares = f"{world.ranks} ranks x {accumulate} microbatches"
        raise ValueError(f"--batch {batch} must be a multiple of {shares}; the nearest is {nearest}")
    size = batch // parts
    mine = range(world.rank * accumulate * size, (world.rank + 1) * accumulate * size)
    return [range(i, i + size) for i in mine[::size]]


def resumed(out: Path, resume: str | None, plan: dict[str, object]) -> Checkpoint | None:
    """The checkpoint to resume from; None for a new run.

    The options in `plan` must be as they were; --init and --precision may be left out. FileNotFoundError if
    a checkpoint is required and missing; ValueError if its plan differs, or if a new run would overwrite one.
    """
    found = distributed.of_rank_0(checkpoints.newest(out))  # a network disk may list older ones elsewhere
    finished = out / "weights.safetensors"
    if found and not resume:
        raise ValueError(f"{found.folder} exists: add --resume to go on, or choose another --out")
    if not found and finished.is_file():
        raise ValueError(f"{finished} exists, and no checkpoint to go on from: choose another --out")
    if not found and resume == "must":
        raise FileNotFoundError(
            f"nothing to resume: no checkpoint in {out}; start without --resume, or point --out at a run"
        )
    left_out = {"init": None, "precision": "auto"}  # then weights and precision are the checkpoint's
    was = found.record["plan"] if found else {}
    if other := {k: v for k, v in was.items() if plan.get(k) not in (v, left_out.get(k, v))}:
        options = ", ".join(f"{name} {value}" for name, value in other.items())
        raise ValueError(f"{found.folder} belongs to a run with {options}: resume with the same options")
    return found


def earlier_shift(init: Path | None, found: Checkpoint | None) -> float | None:
    """The shift of the run that is resumed, else of the weights to start from; None if there are none."""
    settings = found.record["settings"] if found else weights.read_header(init)[1] if init else {}
    return settings.get("recipe", {}).get("shift")


def open_data(
    specs: list[str] | None,
    wan: Path | None,
    body: Path | None,
    frames: int | None,
    stages: Container[int],
    rank: int,
) -> tuple[list[Source], Geometry]:
    """The data sets (default: the puppet), and the size of their clips."""
    if wan and not specs:
        raise ValueError(
            "--wan trains on latents: make some with "
            "`python -m kit.data cache SPEC --wan FOLDER --body SMPL --out DIR`, then add --data cache:DIR"
        )
    if wan and body:
        raise ValueError("--body: a cache has its own body; leave the option out")
    if body and not specs:
        raise ValueError("--body is the body of --data: add that, or leave --body out")
    own_body = Body.load(body) if body else puppet.body()
    geometry = cached_geometry(specs[0], frames) if wan else geometry_of(None, frames)
    sources = open_sources(specs or ["puppet"], geometry, own_body, wan=bool(wan), rank=rank)
    if (0 in stages or 2 in stages) and not any(source.paired for source in sources):
        raise ValueError("stages 0 and 2 need video, and no data set has any: add paired clips, or --stage 1")
    return sources, geometry


def build(
    folder: Path | None,
    init: Path | None,
    ablate: str | None,
    stages: Container[int],
    sources: Sequence[Source],
    seed: int,
    found: Checkpoint | None,
    world: World,
) -> tuple[DualDiT, puppet.Codec | None]:
    """The network, on the CPU, with its motion statistics, and the puppet's codec on the rank's device.

    From `init`, from the Wan in `folder`, or a new puppet, changed by `ablate`. On the meta device, without
    values, if a run is resumed (checkpoints.load reads them later), and for a Wan on all ranks but 0, so that
    a node's memory does not hold it once per GPU.
    """
    if found:
        model = weights.empty(DualDiTConfig(**found.record["config"]))
        extra = checkpoints.load_whole(found.folder, "codec")
    elif folder and world.rank > 0:
        config = weights.read_header(init)[0] if init else wan.transformer_config(folder)
        model, extra = weights.empty(dataclasses.replace(config, **CHANGES.get(ablate, {}))), {}
    else:
        recipe = weights.read_header(init)[1].get("recipe", {}) if init else {}
        if init:
            check_init(init, recipe, folder, ablate, stages)
            model, extra = weights.load_weights(init)
        elif folder:
            model, extra = wan.load_transformer(folder), {}  # motion starts as video's copy
        else:
            model, extra = DualDiT(PRESETS["puppet"]), puppet.Codec.fit().state()
        if ablate in CHANGES:
            state = model.state_dict()
            model = DualDiT(dataclasses.replace(model.config, **CHANGES[ablate]))
            model.load_state_dict({name: state[name] for name in model.state_dict()})
        if recipe.get("stage") == 0 and 0 not in stages:
            wan.copy_video_to_motion(model)
        for p in model.parameters():  # copies: with a file's alignment sums would differ in the last bits
            p.data = p.data.clone()
        if not init:
            mean, std = batches.statistics(sources, seed, batches.STATISTICS_CLIPS)
            model.motion_mean.copy_(mean)
            model.motion_std.copy_(std)
        elif world.rank == 0:
            compare_motion(init, model, sources, seed)
    for source in sources if folder else ():
        if source.paired:
            channels = source.read([0], 1, True, None, torch.device("cpu")).latents.shape[1]
            if channels != model.config.channels:
                has = f"--data has latents of {channels} channels, {folder} has {model.config.channels}"
                raise ValueError(f"{has}: cache the data with this Wan")
    codec = None if folder else puppet.Codec.from_state({k: v.to(world.device) for k, v in extra.items()})
    return model, codec


def check_init(
    init: Path, recipe: dict, folder: Path | None, ablate: str | None, stages: Container[int]
) -> None:
    """ValueError unless training can go on from the weights in `init`, which were trained by `recipe`."""
    if folder:
        check_weights(init, folder)
    before, stage = recipe.get("ablate"), recipe.get("stage")
    if before in CHANGES and before != ablate:
        raise ValueError(f"{init} was trained with --ablate {before}: add that, or start from other weights")
    if ablate == "single-stream" != before and stage != 0:
        raise ValueError(f"--ablate {ablate} has one set of weights: start from stage 0's, not {init}")
    if stage in (1, 2) and 0 in stages and (1 in stages or 2 in stages):
        raise ValueError(
            f"{init} has a trained motion expert, which would be overwritten after stage 0: "
            "go on with --stage 2 (or 1), or tune its video with --stage 0"
        )


def compare_motion(init: Path, model: DualDiT, sources: Sequence[Source], seed: int) -> None:
    """Print a warning if the data's motion is far from what the weights in `init` were trained on."""
    mean, std = batches.statistics(sources, seed, LIKE_CLIPS)
    square = (((mean - model.motion_mean) ** 2 + std**2) / model.motion_std**2).mean()  # 1 if it is alike
    if square > UNLIKE:
        print(
            f"{init} was trained on other motion: normalised as that was, this has a mean square of "
            f"{square:.0f} instead of 1. Let its stage 1 see such motion too"
        )


# ---------------------------------------------------------------- records


def settings(source: Source, geometry: Geometry, shift: float, ablate: str | None) -> dict[str, object]:
    """What training depended on, except the stage; stored with the weights (kit/weights.py)."""
    fps, frames, height, width, _ = geometry
    clip = {"fps": fps, "frames": frames, "height": height, "width": width}
    recipe = {"shift": shift, "ablate": ablate}
    return clip | {"text_tokens": len(source.null_text), "body": source.body, "recipe": recipe}


def record(step: int, stage: int, ended: bool, settings: dict[str, object]) -> dict[str, object]:
    """What a checkpoint says of its place in the run; `ended`: the stage ended with this step."""
    settings = settings | {"recipe": {"stage": stage} | settings["recipe"]}
    return {"step": step, "stage_ended": stage if ended else None, "settings": settings}


def save_record(
    out: Path, options: dict[str, object], model: DualDiT, world: World, bf16: bool, first_step: int
) -> None:
    """RUN/run.json: options, command, versions, network and machines of the run's last start."""
    write_record(
        out / "run.json",
        options,
        first_step=first_step,
        bf16=bf16,
        ranks=world.ranks,
        device=str(world.device),
        config=dataclasses.asdict(model.config),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def export(out: Path, file: Path, dtype: torch.dtype) -> None:
    """Write the averaged weights of a run's last checkpoint to file, and beside it a .json about the run.

    The .json has run.json, the hours of all steps, and the losses on held-out clips.
    """
    found, summary = checkpoints.newest(out), file.with_suffix(".json")
    if not found:
        raise FileNotFoundError(f"nothing to export: no checkpoint in {out}; point --out at a run")
    # the record of an earlier export may be replaced, other files may not
    if file == summary or (summary.exists() and '"hours":' not in summary.read_text()):
        raise ValueError(f"{summary} is where the record of the weights would go: choose another FILE")
    checkpoints.export(found.folder, file, dtype)
    lines = monitor.read_log(out / "metrics.jsonl")
    record = json.loads((out / "run.json").read_text()) | {
        "steps": found.record["step"],
        "hours": round(sum(line.get("seconds", 0) for line in lines) / 3600, 2),
        "validation": [line for line in lines if "validation" in line],
    }
    with whole_file(summary) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {file} and {summary}, from {found.folder}")


def report_skipped(seed: int, step: int, task: Task, batch: int, rank: int, stop: bool) -> None:
    """Print that a step was skipped; ValueError if `stop`."""
    where = f"seed {seed}, step {step}, task {task.name.lower()}, samples 0 to {batch - 1}"
    if rank == 0:
        print(f"skipped, loss or gradient is not finite: {where}")
    if stop:
        raise ValueError(f"too many steps in a row had a loss or gradient that is not finite; last: {where}")


def leave(out: Path, done: int, complete: bool) -> None:
    """Write a finished run's weights and loss picture; of a stopped one, say how to resume it."""
    if not complete:
        print(f"SIGTERM: {out} is saved at step {done}; go on with --resume")
        return
    checkpoints.export(checkpoints.folder_of(out, done), out / "weights.safetensors")
    plots.loss_picture(out / "loss.png", monitor.read_log(out / "metrics.jsonl"))
    print(f"wrote {out}/weights.safetensors, metrics.jsonl and loss.png")

"""The paper's tables and ablations on the puppet: train what is missing, measure, write it down.

    python -m study.ablate all                 after `python train.py`: all of it
    python -m study.ablate table1 figure8      some of it

table1     the video of joint modelling against the backbone's and against more training on video alone
table1-18  the same networks, sampled in 18 solver steps instead of 6
figure8    attention between motion and video, both ways: with MVS-RoPE, unsynced, in collision
a81        what positions in collision do to a network that can already make video
a82        stage 2 with stage 1 before it and without
a83        two experts against one set of weights
table5     video to motion
table6     text to motion

All networks start from the stages of one run of train.py (--from). Each is a run of train.py in
DIR/NAME-SEED: finished ones are reused, interrupted ones are resumed. A part is written to
assets/results.json network by network; what is there, of the same weights, is not measured again.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import train
from dual_dit import PRESETS
from flow import Task
from kit import checkpoints, files, flops, monitor, puppet, validation
from kit.attention import frame_share, latent_share
from kit.backbone import puppet_backbone
from kit.geometry import PUPPET
from motion_tokens import decode_smpl
from study import scores
from study.measures import summary
from study.scores import Columns

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "assets" / "results.json"
ABLATION_STEPS = 500  # of networks that are compared by their losses and attention
VALIDATIONS = 16  # of each such network, evenly over its steps
WAYS = {"motion_to_video": frame_share, "video_to_motion": latent_share}
STAGE_2 = ("joint/video", "joint/motion", "motion_to_video/video", "video_to_motion/motion")  # its losses


class Network(NamedTuple):
    """How a network is trained: from the weights of stage `start`, through stage `stage`."""

    start: int
    stage: int
    ablate: str | None = None
    frames: int | None = None  # None: clips as long as the run's


NETWORKS = {
    "echomotion": Network(1, 2),
    "echomotion-short": Network(1, 2),  # stages 1 and 2 with as much arithmetic as video-tuning
    "video-tuning-quarter": Network(0, 0),  # on a quarter of the clips of echomotion's stage 2
    "video-tuning": Network(0, 0),  # on as many
    "video-tuning-flops": Network(0, 0),  # with as much arithmetic as echomotion's stages 1 and 2
    "mvs-rope": Network(1, 2, None, puppet.FRAMES),  # the baseline of the ablations
    "unsynced": Network(1, 2, "unsynced", puppet.FRAMES),
    "collision": Network(1, 2, "collision", puppet.FRAMES),
    "one-stage": Network(0, 2, "one-stage", puppet.FRAMES),
    "single-stream": Network(0, 2, "single-stream", puppet.FRAMES),
}
RUN_STAGES = {"backbone": 0, "stage-1": 1}  # of the run itself


class Plan(NamedTuple):
    start: Path  # the run that all networks start from
    seeds: int
    clips: int  # measured on
    steps: int | None  # of the last stage
    runs: Path
    out: Path
    device: str
    # how the run was trained, and so the networks
    stages: dict[int, int]  # steps
    batch: int
    frames: int | None  # of clips; None: growing clips
    lr: float | None  # None: train.py's default
    shift: float | None
    precision: str
    compile: bool

    def stage(self, stage: int) -> Path:
        """The weights at the end of a stage of the run."""
        return self.start / f"stage-{stage}.safetensors"


def check_start(folder: Path) -> dict[str, object]:
    """The fields of Plan that say how a run was trained; an error if it has not ended."""
    for name in ("run.json", "stage-0.safetensors", "stage-1.safetensors", "weights.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {folder / name}: train all stages with `python train.py --out {folder}`"
            )
    options = json.loads((folder / "run.json").read_text())["options"]
    steps = train.stage_steps("puppet", None, options["steps"], False)
    if not ended(folder, sum(steps.values())):
        raise ValueError(f"{folder} has not ended: go on with `python train.py --out {folder} --resume`")
    if other := [name for name in ("wan", "data", "body") if options[name]]:
        raise ValueError(f"{folder} was trained with --{other[0]}: expected a run on the puppet's own clips")
    as_trained = ("batch", "frames", "lr", "shift", "precision", "compile")
    return {"stages": steps} | {name: options[name] for name in as_trained}


def ended(run: Path, steps: int) -> bool:
    """Whether a run has come to its last step; its checkpoints may have been deleted since."""
    last = checkpoints.folder_of(run, steps)
    return (run / "weights.safetensors").is_file() and (last.is_dir() or not last.parent.is_dir())


# ---------------------------------------------------------------- training


def arithmetic(stage: int, steps: int, frames: int | None) -> float:
    """FLOPs of a stage for each clip of a batch; as if no condition were ever dropped."""
    config, total = PRESETS["puppet"], 0
    absent = {0: {"motion": 0}, 1: {"video": 0}, 2: {}}[stage]
    lengths = Counter(step.frames for step in train.schedule({stage: steps}, frames))
    for length, count in lengths.items():
        grid = PUPPET._replace(frames=length).grid
        tokens = flops.tokens_of(config, grid, puppet.TEXT_LEN)._replace(**absent)
        total += count * flops.step_flops(config, tokens)
    return total


def steps_of(name: str, plan: Plan) -> int:
    """Steps of a network's own stage; ValueError if stage 1 leaves no arithmetic for any."""
    if NETWORKS[name].frames:
        return plan.steps or ABLATION_STEPS
    steps = plan.steps or plan.stages[2]
    if name == "video-tuning-quarter":
        return steps // 4
    if name in ("video-tuning-flops", "echomotion-short"):
        flops_of = partial(arithmetic, frames=plan.frames)
        video, motion, pairs = flops_of(0, steps), flops_of(1, plan.stages[1]), flops_of(2, steps)
        if name == "video-tuning-flops":
            return round(steps * (motion + pairs) / video)
        if video <= motion:
            enough = math.ceil(steps * motion / video) + 1
            raise ValueError(f"{steps} steps on video are less work than stage 1: --steps {enough} or more")
        return max(1, round(steps * (video - motion) / pairs))
    return steps


def trained(name: str, seed: int, plan: Plan) -> Path:
    """The weights of a network, trained now unless they exist; ValueError if trained with another plan."""
    network, steps, out = NETWORKS[name], steps_of(name, plan), plan.runs / f"{name}-{seed}"
    if name == "echomotion" and seed == 0 and steps == plan.stages[2]:
        return plan.start / "weights.safetensors"  # the run itself
    options = {"init": str(plan.stage(network.start)), "stage": network.stage, "steps": steps}
    options |= {"batch": plan.batch, "frames": network.frames or plan.frames, "ablate": network.ablate}
    options |= {"lr": plan.lr, "shift": plan.shift, "precision": plan.precision}
    options |= {"seed": seed + 1}  # not 0: the run's stages were trained on those clips
    init, trained_from = digests([plan.stage(network.start)])[0], out / "init"
    if trained_from.is_file() and trained_from.read_text() != init:
        raise ValueError(f"{out} was trained from other weights of {plan.start}: choose another --runs")
    if (out / "run.json").is_file():
        found = json.loads((out / "run.json").read_text())["options"]
        if other := {key: found[key] for key, value in options.items() if found[key] != value}:
            raise ValueError(f"{out} was trained with {other}, expected {options}: choose another --runs")
    if not ended(out, steps):
        every = max(1, steps // VALIDATIONS) if network.frames else 0
        options |= {"validate-every": every, "keep": 1, "device": plan.device, "resume": "auto", "out": out}
        command = [sys.executable, str(ROOT / "train.py")]
        for key, value in options.items():
            command += [] if value is None else [f"--{key}", str(value)]
        command += ["--compile"] * plan.compile
        out.mkdir(parents=True, exist_ok=True)
        trained_from.write_text(init)
        print(f"{name}, seed {seed}: {steps} steps", flush=True)
        code = subprocess.run(command).returncode
        if code or not ended(out, steps):
            raise ValueError(f"training stopped; the same command goes on: {' '.join(command)}")
    return out / "weights.safetensors"


def networks(name: str, plan: Plan) -> tuple[list[Path], int]:
    """The weights of a row, one for each seed, and the steps of their last stage."""
    if name in ("real", "mean-motion"):
        return [plan.stage(0)], 0
    if name in RUN_STAGES:
        return [plan.stage(RUN_STAGES[name])], plan.stages[RUN_STAGES[name]]
    name = name.removesuffix("-redrawn")
    return [trained(name, seed, plan) for seed in range(plan.seeds)], steps_of(name, plan)


# ---------------------------------------------------------------- measuring


def measure(
    plan: Plan, part: str, name: str, measured: Callable[[list[Path]], dict], beside: Sequence[Path] = ()
) -> None:
    """Write measured(weights) to results[part][name] in plan.out, unless a result of these weights is there.

    `beside`: other weights that it depends on.
    """
    paths, steps = networks(name, plan)
    entry = {
        "seeds": len(paths),
        "clips": plan.clips,
        "steps": steps,
        "trained_clips": steps * plan.batch,
        "weights": digests(paths),
    } | ({"beside": digests(beside)} if beside else {})
    there = read(plan.out).get(part, {}).get(name, {})
    if all(there.get(key) == value for key, value in entry.items()):
        print(f"{part}, {name}: as before")
        return
    print(f"{part}, {name}", flush=True)
    entry |= measured(paths)
    results = read(plan.out)  # now: another call may have written its parts
    results.setdefault(part, {})[name] = entry
    with files.whole_file(plan.out) as temporary:
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def digests(paths: Sequence[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths]


def read(out: Path) -> dict[str, dict]:
    """What has been measured: a dictionary for each part."""
    return json.loads(out.read_text()) if out.is_file() else {}


real_clips = cache(scores.held_out)


# ---------------------------------------------------------------- the parts


TABLES: dict[str, dict[str, Task | None]] = {  # rows, and the task that each is sampled in
    "table1": {
        "real": None,
        "backbone": Task.VIDEO_ONLY,
        "echomotion": Task.JOINT,
        "echomotion-redrawn": Task.JOINT,
        "video-tuning-quarter": Task.VIDEO_ONLY,
        "video-tuning": Task.VIDEO_ONLY,
        "echomotion-short": Task.JOINT,
        "echomotion-short-redrawn": Task.JOINT,
        "video-tuning-flops": Task.VIDEO_ONLY,
    },
    "table5": {"mean-motion": None, "echomotion": Task.VIDEO_TO_MOTION},
    "table6": {"real": None, "stage-1": Task.MOTION_ONLY, "echomotion": Task.JOINT},
}


def table(rows: str, plan: Plan, steps: int | None = None) -> None:
    """One of TABLES: samples of each network for the same clips, measured over clips and seeds.

    In the puppet's usual solver steps, or in `steps`: then the part is called ROWS-STEPS.
    """
    part = f"{rows}-{steps}" if steps else rows
    sampling = {"steps": steps} if steps else {}
    real = real_clips(plan.clips)
    of = {
        "table1": lambda video, _: scores.of_video(video, real),
        "table5": lambda _, motion: scores.of_pose(decode_smpl(motion)["joints"], real),
        "table6": lambda _, motion: scores.of_motion(motion, real),
    }[rows]

    def columns(name: str, task: Task, file: Path) -> Columns:
        backbone = puppet_backbone(file, plan.device)
        if name == "mean-motion":
            return scores.of_pose(scores.mean_motion(real), real)
        if name == "real":
            return of(scores.through_codec(backbone.codec(), real), real.motion)
        return of(*scores.generate(backbone, real, task, redraw=name.endswith("redrawn"), **sampling))

    def measured(name: str, task: Task, paths: list[Path]) -> dict:
        found = [columns(name, task, path) for path in paths]
        return {"measures": {key: summary(torch.stack([each[key] for each in found])) for key in found[0]}}

    for name, task in TABLES[rows].items():
        measure(plan, part, name, partial(measured, name, task))


def figure8(plan: Plan) -> None:
    """Maps of attention both ways, mean over seeds, and each layer's share on the 4:1 clock."""

    def measured(paths: list[Path]) -> dict:
        found = [scores.maps(puppet_backbone(path, plan.device), real_clips(plan.clips)) for path in paths]
        maps, measures = dict(zip(WAYS, zip(*found, strict=True), strict=True)), {}
        for way, share_of in WAYS.items():
            shares = torch.stack([share_of(of_seed) for of_seed in maps[way]])  # (seeds layers)
            measures |= {f"{way}_{layer}": summary(x[:, None]) for layer, x in enumerate(shares.T)}
        shown = {way: torch.stack(of).mean(0).double().round(decimals=4).tolist() for way, of in maps.items()}
        return {"measures": measures, "chance": 1 / len(shown["video_to_motion"][0]), **shown}

    for name in ("mvs-rope", "unsynced", "collision"):
        measure(plan, "figure8", name, measured)


def curve(folder: Path, kinds: Sequence[str]) -> tuple[list[int], list[float]]:
    """Steps, and the loss of stage 2 on held-out clips at each: of some of STAGE_2, mean over the tasks."""
    lines = monitor.read_log(folder / "metrics.jsonl")
    rows = {line["step"]: line["validation"] for line in lines if "validation" in line}
    tasks = len({kind.partition("/")[0] for kind in kinds})
    return list(rows), [sum(row[kind] for kind in kinds) / tasks for row in rows.values()]


def curves(part: str, names: Sequence[str], kinds: Sequence[str], plan: Plan) -> None:
    """A part that compares networks with the first one by their losses over training."""

    def read_all(paths: list[Path]) -> tuple[list[int], Tensor]:
        steps, losses = zip(*(curve(path.parent, kinds) for path in paths), strict=True)
        return steps[0], torch.tensor(losses)  # (seeds steps)

    def measured(paths: list[Path]) -> dict:
        (steps, losses), (_, base) = read_all(paths), read_all(first_row)
        points = [summary(at[:, None]) for at in losses.T]  # of a step, over the seeds
        behind = summary((losses - base)[:, -1:])  # networks of one seed see the same clips and noise
        shown = {key: [point.get(key) for point in points] for key in ("mean", "error_seeds")}
        first, *_, last = points
        measures = {"first_loss": first, "loss": last, "behind": behind}
        return {"measures": measures, "curve": {"steps": steps, **shown}}

    first_row, _ = networks(names[0], plan)
    for name in names:
        measure(plan._replace(clips=validation.SAMPLES), part, name, measured, beside=first_row)


PARTS: dict[str, Callable[[Plan], None]] = {  # the cheapest first
    "table5": partial(table, "table5"),
    "table6": partial(table, "table6"),
    "a81": partial(curves, "a81", ("mvs-rope", "collision"), ("joint/video",)),
    "a82": partial(curves, "a82", ("mvs-rope", "one-stage"), STAGE_2),
    "a83": partial(curves, "a83", ("one-stage", "single-stream"), STAGE_2),  # both without a stage 1
    "figure8": figure8,
    "table1": partial(table, "table1"),
    "table1-18": partial(table, "table1", steps=18),
}


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m study.ablate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("parts", nargs="+", choices=(*PARTS, "all"), metavar="PART", help=f"{', '.join(PARTS)} or all")
    what = "the run of all stages that all networks start from (default %(default)s)"
    add("--from", dest="start", type=Path, default=train.RUN, metavar="RUN", help=what)
    add("--seeds", type=files.count, default=3, metavar="N", help="of each network (default %(default)s)")
    add("--clips", type=files.count, default=256, metavar="N", help="to measure on (default %(default)s)")
    what = f"of the last stage; default: in tables 1, 5 and 6 as RUN's, elsewhere {ABLATION_STEPS}"
    add("--steps", type=files.count, metavar="N", help=what)
    add("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="networks (default %(default)s)")
    add("--out", type=Path, default=RESULTS, metavar="FILE", help="default: assets/results.json")
    add("--device", type=files.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = vars(options())
    parts = args.pop("parts")
    plan = Plan(**args, **check_start(args["start"]))
    plan.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours
    for part in PARTS if "all" in parts else parts:
        PARTS[part](plan)


if __name__ == "__main__":
    files.run(main)

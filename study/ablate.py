"""The paper's tables and ablations on the puppet: train what is missing, measure, write it down.

    python -m study.ablate all                 after `python train.py`: all of it
    python -m study.ablate table1 figure8      some of it

table1   the video of joint modelling against the backbone's and against more training on video alone
figure8  where motion and video look in each other, with MVS-RoPE, unsynced, in collision
a81      what positions in collision do to a network that could make video
a82      stage 2 with stage 1 before it and without
a83      two experts against one set of weights
table5   video to motion
table6   text to motion

All networks start from the stages of one run of train.py (--from) and differ in one thing. Each is a run of
train.py in DIR/NAME-SEED: one that is there is taken, one that was cut short goes on. A part is written to
assets/results.json network by network; what is there and of the same weights is not measured again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import train
from dual_dit import PRESETS, DualDiT
from flow import DROP_CONDITION, Task
from kit import checkpoints, devices, files, flops, puppet, validation, weights
from kit.attention import frame_share, latent_share
from kit.files import whole_file
from motion_tokens import decode_smpl
from study import scores
from study.measures import summary
from study.scores import ONE_CLOCK, Columns, Real

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "assets" / "results.json"
ABLATION_STEPS = 500  # of networks that are compared by their losses and attention
LOOKS = 16  # times that each of these is validated
SAMPLING = {"steps": 12}  # of the solver


class Network(NamedTuple):
    """How a network is trained: from the weights of stage `start`, through stage `stage`."""

    start: int
    stage: int
    ablate: str | None = None
    frames: int | None = None  # None: growing clips, as train.py has them


NETWORKS = {
    "echomotion": Network(1, 2),
    "video-tuning": Network(0, 0),  # on as many clips as echomotion's stage 2
    "video-tuning-flops": Network(0, 0),  # with as much arithmetic as echomotion's stages 1 and 2
    "mvs-rope": Network(1, 2, None, puppet.FRAMES),  # what the ablations are held against
    "unsynced": Network(1, 2, "unsynced", puppet.FRAMES),
    "collision": Network(1, 2, "collision", puppet.FRAMES),
    "one-stage": Network(0, 2, "one-stage", puppet.FRAMES),
    "single-stream": Network(0, 2, "single-stream", puppet.FRAMES),
}


class Start(NamedTuple):
    """The run that all networks start from."""

    folder: Path
    steps: dict[int, int]  # of its stages
    batch: int

    def weights(self, stage: int) -> Path:
        return self.folder / f"stage-{stage}.safetensors"


class Plan(NamedTuple):
    start: Start
    seeds: int
    clips: int  # measured on
    steps: int | None  # of the last stage
    runs: Path
    out: Path
    device: str


def start_of(folder: Path) -> Start:
    """FileNotFoundError or ValueError unless it is a run of all stages and keeps what each ended with."""
    for name in ("run.json", "stage-0.safetensors", "stage-1.safetensors", "weights.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {folder / name}: train all stages with `python train.py --out {folder}`"
            )
    options = json.loads((folder / "run.json").read_text())["options"]
    if options["wan"] or options["stage"] is not None or options["ablate"]:
        raise ValueError(f"{folder} is not a run of all of the puppet's stages: choose another --from")
    steps = train.stage_steps("puppet", None, options["steps"], False)
    if (folder / "checkpoints").is_dir() and not checkpoints.folder_of(folder, sum(steps.values())).is_dir():
        raise ValueError(f"{folder} has not ended: go on with `python train.py --out {folder} --resume`")
    return Start(folder, steps, options["batch"])


# ---------------------------------------------------------------- training


def arithmetic(stage: int, steps: int, frames: int | None = None) -> float:
    """FLOPs of a stage for each clip of a batch, over its tasks and growing clips."""
    config, size = PRESETS["puppet"], (puppet.SIZE, puppet.SIZE)

    @cache
    def costs(length: int) -> float:
        both = flops.tokens_of(config, length, size, 8, puppet.TEXT_LEN)
        video, motion, pair = (
            flops.step_flops(config, tokens, False)
            for tokens in (both._replace(motion=0), both._replace(video=0), both)
        )
        dropped = DROP_CONDITION * (video + motion) + (1 - DROP_CONDITION) * 2 * pair
        return {0: video, 1: motion, 2: (pair + dropped) / 3}[stage]

    return sum(costs(step.frames) for step in train.schedule({stage: steps}, frames))


def steps_of(name: str, plan: Plan) -> int:
    """Steps of a network's own stage."""
    if NETWORKS[name].frames:
        return plan.steps or ABLATION_STEPS
    steps = plan.steps or plan.start.steps[2]
    if name == "video-tuning-flops":
        both = arithmetic(1, plan.start.steps[1]) + arithmetic(2, steps)
        return round(steps * both / arithmetic(0, steps))
    return steps


def trained(name: str, seed: int, plan: Plan) -> Path:
    """The folder of a network, trained now unless it is there; ValueError if that is of another plan."""
    network, steps, out = NETWORKS[name], steps_of(name, plan), plan.runs / f"{name}-{seed}"
    if name == "echomotion" and seed == 0 and steps == plan.start.steps[2]:
        return plan.start.folder  # the run itself
    options = {"init": str(plan.start.weights(network.start)), "stage": network.stage, "steps": steps}
    options |= {"batch": plan.start.batch, "frames": network.frames, "ablate": network.ablate}
    options |= {"seed": seed + 1}  # 0 is the run's own: its stages have seen those clips
    if (out / "run.json").is_file():
        found = json.loads((out / "run.json").read_text())["options"]
        if other := {key: found[key] for key, value in options.items() if found[key] != value}:
            raise ValueError(f"{out} was trained with {other}, expected {options}: choose another --runs")
    if not checkpoints.folder_of(out, steps).is_dir():  # weights of earlier steps may be there
        looks = max(1, steps // LOOKS) if network.frames else 0
        options |= {"validate_every": looks, "keep": 1, "device": plan.device, "resume": "auto", "out": out}
        given = [(key.replace("_", "-"), value) for key, value in options.items() if value is not None]
        command = [sys.executable, str(ROOT / "train.py"), *(x for k, v in given for x in (f"--{k}", str(v)))]
        print(f"{name}, seed {seed}: {steps} steps", flush=True)
        code = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        if code or not checkpoints.folder_of(out, steps).is_dir():
            raise ValueError(f"training stopped; the same command goes on: {' '.join(command)}")
    return out


def all_seeds(name: str, plan: Plan) -> list[Path]:
    return [trained(name, seed, plan) for seed in range(plan.seeds)]


# ---------------------------------------------------------------- measuring

Measure = Callable[[DualDiT, puppet.Codec], Columns]


def opened(folder: Path, plan: Plan) -> tuple[DualDiT, puppet.Codec]:
    """The network of a run's folder, or of a file, and its codec."""
    model, extra = weights.load_weights(weights_of(folder), plan.device)
    return model, puppet.Codec.from_state(extra)


def weights_of(path: Path) -> Path:
    return path / "weights.safetensors" if path.is_dir() else path


def over_seeds(found: Sequence[Columns]) -> dict[str, dict[str, float]]:
    return {name: summary(torch.stack([columns[name] for columns in found])) for name in found[0]}


def write(plan: Plan, part: str, name: str, paths: Sequence[Path], steps: int, measured: Callable) -> None:
    """results[part][name] in plan.out: measured() and what it is of, unless that is there already."""
    digests = [hashlib.sha256(weights_of(path).read_bytes()).hexdigest()[:12] for path in paths]
    entry = {
        "seeds": len(paths),
        "clips": plan.clips,
        "steps": steps,
        "trained_clips": steps * plan.start.batch,
    }
    entry |= {"weights": digests}
    results = json.loads(plan.out.read_text()) if plan.out.is_file() else {}
    there = results.setdefault(part, {}).get(name, {})
    if all(there.get(key) == value for key, value in entry.items()):
        print(f"{part}, {name}: as before")
        return
    print(f"{part}, {name}", flush=True)
    results[part][name] = entry | measured()
    with whole_file(plan.out) as temporary:
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def measure(plan: Plan, part: str, name: str, paths: Sequence[Path], steps: int, columns: Measure) -> None:
    """Write a measure of networks that differ by their seeds."""
    write(
        plan, part, name, paths, steps,
        lambda: {"measures": over_seeds([columns(*opened(path, plan)) for path in paths])},
    )  # fmt: skip


@cache
def real_clips(count: int) -> Real:
    return scores.held_out(count)


# ---------------------------------------------------------------- the parts


def table1(plan: Plan) -> None:
    real, first = real_clips(plan.clips), plan.start.weights(0)

    def video(task: Task, **sampling: float) -> Measure:
        made = lambda *network: scores.generate(*network, real, task, **SAMPLING, **sampling)[0]
        return lambda *network: scores.of_video(made(*network), real)

    def coded(_: DualDiT, codec: puppet.Codec) -> Columns:
        return scores.of_video(codec.decode(codec.encode(real.video.to(plan.device))).cpu(), real)

    measure(plan, "table1", "real", [first], 0, coded)
    measure(plan, "table1", "backbone", [first], plan.start.steps[0], video(Task.VIDEO_ONLY))
    for name in ("echomotion", "video-tuning", "video-tuning-flops"):
        paths, steps = all_seeds(name, plan), steps_of(name, plan)
        if name == "echomotion":
            measure(plan, "table1", "echomotion-one-clock", paths, steps, video(Task.JOINT, **ONE_CLOCK))
            measure(plan, "table1", "echomotion", paths, steps, video(Task.JOINT))
        else:
            measure(plan, "table1", name, paths, steps, video(Task.VIDEO_ONLY))


def figure8(plan: Plan) -> None:
    for name in ("mvs-rope", "unsynced", "collision"):
        paths = all_seeds(name, plan)

        def measured(paths: Sequence[Path] = paths) -> dict:
            real = real_clips(plan.clips)
            to_video, to_motion = zip(
                *(scores.maps(*opened(path, plan), real) for path in paths), strict=True
            )
            shares = {
                f"{side}_{layer}": share[:, None]  # one value a seed
                for side, share_of, of in (
                    ("motion_to_video", frame_share, to_video), ("video_to_motion", latent_share, to_motion)
                )
                for layer, share in enumerate(torch.stack([share_of(x) for x in of]).T)
            }  # fmt: skip
            return {
                "measures": {key: summary(value) for key, value in shares.items()},
                "chance": 1 / to_motion[0].shape[1],
                "motion_to_video": mean_map(to_video),
                "video_to_motion": mean_map(to_motion),
            }

        write(plan, "figure8", name, paths, steps_of(name, plan), measured)


def mean_map(maps: Sequence[Tensor]) -> list:
    return torch.stack(maps).mean(0).double().round(decimals=4).tolist()


STAGE_2 = ("joint/video", "joint/motion", "motion_to_video/video", "video_to_motion/motion")


def curve(folder: Path, kinds: Sequence[str]) -> tuple[list[int], list[float]]:
    """Steps, and the loss of stage 2 on held-out clips at each: of some of STAGE_2, the mean over tasks."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = {line["step"]: line["validation"] for line in lines if "validation" in line}
    tasks = len({kind.partition("/")[0] for kind in kinds})
    return list(rows), [sum(row[kind] for kind in kinds) / tasks for row in rows.values()]


def curves(part: str, names: Sequence[str], kinds: Sequence[str]) -> Callable[[Plan], None]:
    """A part that compares networks by their losses over training."""

    def run(plan: Plan) -> None:
        for name in names:
            paths = all_seeds(name, plan)

            def measured(paths: Sequence[Path] = paths) -> dict:
                found = [curve(path, kinds) for path in paths]
                points = [
                    summary(torch.tensor(at)[:, None]) for at in zip(*(y for _, y in found), strict=True)
                ]
                means, errors = ([point.get(k) for point in points] for k in ("mean", "error_seeds"))
                shown = {"steps": found[0][0], "mean": means, "error_seeds": errors}
                return {"measures": {"loss": points[-1], "first_loss": points[0]}, "curve": shown}

            held = plan._replace(clips=validation.SAMPLES)
            write(held, part, name, paths, steps_of(name, plan), measured)

    return run


def table5(plan: Plan) -> None:
    real, paths = real_clips(plan.clips), all_seeds("echomotion", plan)

    def found(*network: DualDiT | puppet.Codec) -> Columns:
        motion = scores.generate(*network, real, Task.VIDEO_TO_MOTION, **SAMPLING)[1]
        return scores.of_pose(decode_smpl(motion)["joints"], real)

    mean = lambda *_: scores.of_pose(scores.mean_motion(real), real)
    measure(plan, "table5", "mean-motion", [plan.start.weights(0)], 0, mean)
    measure(plan, "table5", "echomotion", paths, steps_of("echomotion", plan), found)


def table6(plan: Plan) -> None:
    real, alone, paths = real_clips(plan.clips), plan.start.weights(1), all_seeds("echomotion", plan)
    steps = steps_of("echomotion", plan)

    def motion(task: Task, **sampling: float) -> Measure:
        made = lambda *network: scores.generate(*network, real, task, **SAMPLING, **sampling)[1]
        return lambda *network: scores.of_motion(made(*network), real)

    measure(plan, "table6", "real", [alone], 0, lambda *_: scores.of_motion(real.motion, real))
    measure(plan, "table6", "stage-1", [alone], plan.start.steps[1], motion(Task.MOTION_ONLY))
    measure(plan, "table6", "echomotion-one-clock", paths, steps, motion(Task.JOINT, **ONE_CLOCK))
    measure(plan, "table6", "echomotion", paths, steps, motion(Task.JOINT))


PARTS: dict[str, Callable[[Plan], None]] = {  # the cheapest first
    "table5": table5,
    "table6": table6,
    "a81": curves("a81", ("mvs-rope", "collision"), ("joint/video",)),
    "a82": curves("a82", ("mvs-rope", "one-stage"), STAGE_2),
    "a83": curves("a83", ("one-stage", "single-stream"), STAGE_2),  # both without a stage 1
    "figure8": figure8,
    "table1": table1,
}


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m study.ablate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("parts", nargs="+", choices=(*PARTS, "all"), metavar="PART", help=f"{', '.join(PARTS)} or all")
    what = "a run of all stages, that all networks start from (%(default)s)"
    add("--from", dest="start", type=Path, default=train.RUN, metavar="RUN", help=what)
    add("--seeds", type=files.count, default=3, metavar="N", help="networks of each (%(default)s)")
    add("--clips", type=files.count, default=256, metavar="N", help="to measure on (%(default)s)")
    what = f"of the last stage; default: table 1 and 5 to 6 as RUN, others {ABLATION_STEPS}"
    add("--steps", type=files.count, metavar="N", help=what)
    add("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="of networks (%(default)s)")
    add("--out", type=Path, default=RESULTS, metavar="FILE", help="default: assets/results.json")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.clips < 2:
        raise ValueError(f"--clips must be at least 2, to have a standard error, got {args.clips}")
    plan = Plan(start_of(args.start), args.seeds, args.clips, args.steps, args.runs, args.out, args.device)
    plan.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours
    devices.use_fast_attention(torch.device(args.device))
    for part in PARTS if "all" in args.parts else args.parts:
        PARTS[part](plan)


if __name__ == "__main__":
    files.run(main)

"""Ablations: networks that differ in one thing, trained on the same clips and measured alike.

Each is `train.py` with the flags in VARIANTS and the steps of steps_of, as a process of its own, in
RUNS/VARIANT-SEED. A run that is already there goes on where it was, or is taken as it is.
"""

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flow
from dual_dit import PRESETS, DualDiT
from flow import Task
from kit import checkpoints, devices, flops, puppet, validation, weights
from kit.backbone import PUPPET_DEFAULTS
from kit.data.batch import rng
from kit.data.datasets import puppet_motion
from kit.files import whole_file
from study import measures, pose
from study.scores import CHUNK, generate_all, scores

SAMPLING = PUPPET_DEFAULTS._replace(steps=12)  # as the README's table was measured
TRAIN = Path(__file__).parent.parent / "train.py"
REAL_CLIPS = 1024  # among which the nearest silhouette of a generated video is looked for
READ_CLIPS = 128  # of them whose elbows and knees say what is usual
SCORES = (  # of study/scores.py
    "joint_sync_peak_rate", "joint_iou", "v2m_mpjpe_mm", "m2v_iou", "text_action_accuracy", "jerk_ratio",
)  # fmt: skip
GUIDANCE = (1.0, 1.5, 3.0)  # of ω1 and of ω2; ω2 = 1 is guidance by text alone
GRID = "m2v_iou_{:g}_{:g}"  # the measure's name


class Variant(NamedTuple):
    flags: tuple[str, ...]  # of train.py
    motion: bool = True  # whether it has learned of any


VARIANTS = {
    "echomotion": Variant(()),
    "unsynced": Variant(("--unsynced",)),
    "shared noise": Variant(("--shared-noise",)),
    "stage 2 alone": Variant(("--stage", "2")),
    "video tuning": Variant(("--stage", "2", "--video-only"), motion=False),
}


class Plan(NamedTuple):
    """What all runs share."""

    steps: int  # of echomotion, both stages
    batch: int
    frames: int
    stage_1_share: float  # of these steps
    device: str
    init: str | None = None  # weights whose video expert both experts of all networks start from


# ---------------------------------------------------------------- training


def steps_of(name: str, plan: Plan) -> int:
    """Steps of a variant: as many clips in pairs for video tuning, as many FLOPs for stage 2 alone."""
    first = round(plan.steps * plan.stage_1_share)
    if name == "video tuning":
        return plan.steps - first
    if name == "stage 2 alone":
        config = PRESETS["puppet"]
        both = flops.tokens_of(config, plan.frames, (puppet.SIZE, puppet.SIZE), 8, puppet.TEXT_LEN)
        alone, pair = (flops.step_flops(config, tokens, False) for tokens in (both._replace(video=0), both))
        return plan.steps - first + round(first * alone / pair)
    return plan.steps


def trained(name: str, seed: int, plan: Plan, runs: Path, threads: int) -> Path:
    """The weights of a variant, trained now unless they are there; ValueError if they are of another plan."""
    out = runs / f"{name.replace(' ', '-')}-{seed}"
    options = {"steps": steps_of(name, plan), "batch": plan.batch, "frames": plan.frames, "seed": seed}
    options |= {"init": str(Path(plan.init)), "init_motion": "copy"} if plan.init else {"init": None}
    if (out / "run.json").is_file():
        found = json.loads((out / "run.json").read_text())["options"]
        if other := {key: found[key] for key, value in options.items() if found[key] != value}:
            raise ValueError(f"{out} was trained with {other}, expected {options}: choose another --runs")
    if not checkpoints.folder_of(out, options["steps"]).is_dir():  # weights of earlier steps may be there
        given = {key.replace("_", "-"): value for key, value in options.items() if value is not None}
        flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
        flags += ["--validate-every", "0", "--resume", "auto", "--keep", "1", "--device", plan.device]
        print(f"{name}, seed {seed}", flush=True)
        command = [sys.executable, str(TRAIN), *VARIANTS[name].flags, *flags, "--out", str(out)]
        if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode:
            raise ValueError(f"training stopped: {' '.join(command)}")
    return out / "weights.safetensors"


# ---------------------------------------------------------------- measuring


class HeldOut(NamedTuple):
    """Real clips that every variant is measured on."""

    clips: puppet.Clips
    motion: Tensor  # (b f 235)
    video: Tensor  # (b 3 f h w)
    bank: puppet.Clips  # other real clips
    shapes: Tensor  # (n f h w) their silhouettes
    bends: Tensor  # (m 4) of their elbows and knees
    bf16: bool  # whether networks run in it


def held_out(count: int, frames: int) -> HeldOut:
    clips, bank = measures.held_out(count, frames=frames), measures.held_out(REAL_CLIPS, "bank", frames)
    video, others = (puppet.render(c.joints, c.betas, c.shirt)[0] for c in (clips, bank))
    bends = pose.read_pose(others[:READ_CLIPS]).bend.flatten(0, 1)
    bf16 = devices.has_bf16_units(torch.device("cpu"))
    return HeldOut(clips, puppet_motion(clips), video, bank, puppet.silhouette(others), bends, bf16)


def of_video(video: Tensor, real: HeldOut) -> dict[str, float]:
    """What a video shows by itself: anatomy, likeness to a real clip, steadiness, sharpness."""
    shape, others = (x.flatten(1).float() for x in (puppet.silhouette(video), real.shapes))
    common = shape @ others.mT
    nearest = common / (shape.sum(1, keepdim=True) + others.sum(1) - common).clamp_min(1)
    read = pose.anatomy(pose.read_pose(video), real.bends)
    return {
        **{f"video_{name}": value for name, value in read.items()},
        "video_nearest_iou": nearest.amax(dim=1).mean().item(),
        "video_jerk_ratio": unsteadiness(video) / unsteadiness(real.video),
        "video_sharpness": sharpness(video) / sharpness(real.video),
    }


def unsteadiness(video: Tensor) -> float:
    """Mean size of the third difference of pixels over frames: flicker, and limbs that jump."""
    return video.diff(n=3, dim=2).abs().mean().item()


def sharpness(video: Tensor) -> float:
    """Mean difference of neighbouring pixels: the proxy for aesthetics, as far as a puppet has any."""
    return (video.diff(dim=-1).abs().mean() + video.diff(dim=-2).abs().mean()).item()


@torch.no_grad()
def errors(model: DualDiT, codec: puppet.Codec, tasks: Sequence[Task], real: HeldOut) -> dict[str, float]:
    """Squared velocity errors of tasks, by modality: what is trained, and steadier than any sample."""
    text = puppet.encode_text(real.clips.caption)
    motion = (real.motion - model.motion_mean) / model.motion_std
    given, generator, found = (codec.encode(real.video), motion), rng("ablation"), defaultdict(list)
    noise = [torch.randn(x.shape, generator=generator) for x in given]
    for task, level in product(tasks, validation.TIMES):
        t = torch.full((len(motion),), level)
        for columns in zip(*(x.split(CHUNK) for x in (*given, text, *noise, t, t)), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=real.bf16):
                loss = flow.loss(model, *columns[:3], task, flow.Draw(*columns[3:]))
            for modality, error in loss._asdict().items():
                if error is not None:
                    found[f"error_{task.name.lower()}_{modality}"] += error.tolist()
    return {name: statistics.mean(values) for name, values in found.items()}


class Measured(NamedTuple):
    """Of one network."""

    values: dict[str, float]  # by name
    attention: Tensor | None = None  # (layers f t) motion -> video


def measured(model: DualDiT, codec: puppet.Codec, motion: bool, real: HeldOut) -> Measured:
    """Measures of a network; one without motion has those of its videos only."""
    sampling = SAMPLING._asdict() | {"bf16": real.bf16}
    tasks = (Task.VIDEO_ONLY, *(validation.TASKS[2] if motion else ()))
    values = errors(model, codec, tasks, real)
    if not motion:
        given = (real.video, real.motion)
        video, _ = generate_all(model, codec, real.clips, Task.VIDEO_ONLY, *given, **sampling)
        return Measured(values | of_video(video, real))
    found = scores(model, codec, real.clips, real.bank, **sampling)
    share = {"attention_41_share_best": max(found.values["attention_41_share"])}
    values = share | values | {name: found.values[name] for name in SCORES} | of_video(found.video, real)
    return Measured(values, found.attention)


def guidance_grid(model: DualDiT, codec: puppet.Codec, real: HeldOut) -> dict[str, float]:
    """IoU of motion to video over ω1 and ω2."""
    shape, found = puppet.silhouette(real.video), {}
    given = (model, codec, real.clips, Task.MOTION_TO_VIDEO, real.video, real.motion, real.bf16)
    for w1, w2 in product(GUIDANCE, GUIDANCE):
        sampling = SAMPLING._replace(guidance_text=w1, guidance_condition=w2)._asdict()
        video, _ = generate_all(*given, **sampling)
        found[GRID.format(w1, w2)] = measures.iou(puppet.silhouette(video), shape).mean().item()
    return found


def spread(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each measure over seeds."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return {
        name: {"mean": statistics.mean(column), "std": statistics.stdev(column) if len(column) > 1 else 0.0}
        for name, column in columns.items()
    }


def ablate(plan: Plan, seeds: Sequence[int], clips: int, runs: Path, out: Path, jobs: int) -> dict:
    """Train and measure all variants -> what is written to `out`: {"plan", "variants": {name: measures}}.

    `jobs` of them train at a time. "real" are real videos, through the codec. "attention" (layers f t) is the
    mean over seeds.
    """
    networks, threads = list(product(VARIANTS, seeds)), max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda network: trained(*network, plan, runs, threads), networks)
        files = dict(zip(networks, found, strict=True))
    real, variants = held_out(clips, plan.frames), {}
    for name, variant in VARIANTS.items():
        rows, maps = [], []
        for seed in seeds:
            model, extra = weights.load_weights(files[name, seed])
            codec = puppet.Codec.from_state(extra)
            if not variants:  # what can be reached
                variants["real"] = spread([of_video(codec.decode(codec.encode(real.video)), real)])
            values, attention = measured(model, codec, variant.motion, real)
            grid = guidance_grid(model, codec, real) if name == "echomotion" else {}
            rows.append(values | grid)
            maps += [] if attention is None else [attention]
        variants[name] = {"seeds": list(seeds), "steps": steps_of(name, plan), **spread(rows)}
        if maps:
            variants[name]["attention"] = torch.stack(maps).mean(0).round(decimals=4).tolist()
        result = {"plan": plan._asdict() | {"clips": clips}, "variants": variants}
        with whole_file(out) as temporary:  # after each variant: measuring all takes long
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def cell(found: dict, measure: str) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{found[measure]['mean']:.3g} ± {found[measure]['std']:.2g}" if measure in found else ""


def print_table(result: dict) -> None:
    """A line a measure, a column a variant; then the guidance grid."""
    variants, whole = result["variants"], result["variants"]["echomotion"]
    rows = [name for name, x in whole.items() if isinstance(x, dict)]
    grid = [GRID.format(w1, w2) for w1, w2 in product(GUIDANCE, GUIDANCE)]
    print(f"{'':29}" + "".join(f"{name:>16}" for name in variants))
    for measure in [name for name in rows if name not in grid]:
        print(f"{measure:29}" + "".join(f"{cell(found, measure):>16}" for found in variants.values()))
    print(f"\n{'motion to video, IoU':29}" + "".join(f"{f'ω1 = {w1:g}':>16}" for w1 in GUIDANCE))
    for w2 in GUIDANCE:
        name = f"ω2 = {w2:g}" + (", text alone" if w2 == 1 else "")
        print(f"{name:29}" + "".join(f"{cell(whole, GRID.format(w1, w2)):>16}" for w1 in GUIDANCE))

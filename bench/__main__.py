"""Speed and memory, measured side by side in one run.

python -m bench             1.3B-shaped blocks beside diffusers and the machine's limit; guidance; the puppet
python -m bench wan         a whole Wan 1.3B on this machine: seconds, GFLOP/s, peak memory, beside diffusers
python -m bench plan        what a training run will need, counted
python -m bench ranks       training on 1 process beside 2 of DDP and of FSDP, at equal work and equal threads
python -m bench stall       how long a checkpoint holds training, in the background and in the foreground
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import train
from bench import plan, puppet, speed, training
from bench.peer import diffusers_twin
from bench.speed import NAMES, Row, Setting
from bench.timing import device_name, peak_gib, random_model, seconds
from dual_dit import PRESETS
from flow import Task
from kit import files
from kit.devices import has_bf16_units
from kit.files import whole_file
from kit.flops import forward_flops, tokens_of

MEASUREMENTS: tuple[Callable[[Setting], list[Row]], ...] = (
    lambda setting: speed.forward(setting, torch.float32),
    lambda setting: speed.limits(setting, torch.float32),
    lambda setting: speed.sampling(setting, torch.float32),
    lambda setting: speed.training(setting, torch.float32),
    lambda setting: speed.memory(setting, torch.float32),
    lambda setting: speed.forward(setting.half, torch.bfloat16),
    lambda setting: speed.training(setting.half.half, torch.bfloat16),
    puppet.guidance,
    lambda setting: puppet.training(setting, train.optimizers),
)


def bench_all(args: argparse.Namespace, setting: Setting = Setting()) -> dict:  # noqa: B008
    """The table, row by row; JSON has each figure under its key, and the rounds' extremes under "spread"."""
    rows = [row for measure in tqdm(MEASUREMENTS, desc="measuring") for row in measure(setting)]
    print(
        f"{device_name('cpu')}, torch {torch.__version__}; median, smallest and largest of alternating runs"
    )
    for key, what, (median, low, high) in rows:
        print(f"{key:20}{median:8.3g}  ({low:.3g} … {high:.3g})".ljust(50) + what)
    spread = {row.key: row.figure[1:] for row in rows}
    return {row.key: row.figure.median for row in rows} | {"spread": spread, "device": device_name("cpu")}


@torch.no_grad()
def bench_wan(args: argparse.Namespace) -> dict:
    """Joint and video-only forward of the 1.3B preset, beside diffusers' model on the same tokens."""
    config, size, device = PRESETS["wan2.1-1.3b"], (480, 832), args.device
    frames = args.frames or (81 if device == "cuda" else 17)
    t, (h, w) = (frames - 1) // 4 + 1, (side // 8 for side in size)
    video = torch.randn(1, config.channels, t, h, w, device=device)
    motion = torch.randn(1, frames, 235, device=device)
    text = torch.randn(1, 512, config.text_dim, device=device)
    time_of = torch.full((1,), 0.5, device=device)
    both = sum(forward_flops(config, tokens_of(config, frames, size, 8)).values())
    alone = sum(forward_flops(config, tokens_of(config, frames, size, 8, motion=False)).values())
    repeats = 5 if device == "cuda" else 1
    dtype = torch.bfloat16 if has_bf16_units(torch.device(device)) else torch.float32

    ours = random_model(config, device, dtype)
    peer = diffusers_twin(ours)
    calls = {
        "ours, joint": lambda x, y: ours(x, y, time_of, time_of, text, Task.JOINT),
        "ours, video only": lambda x, y: ours(x, None, time_of, None, text, Task.VIDEO_ONLY),
        "diffusers, video only": lambda x, y: peer(x.to(dtype), 1000 * time_of, text.to(dtype)),
    }
    for call in calls.values():  # whoever comes first would pay for touching the memory
        call(video[:, :, :1, :16, :16], motion[:, :1])
    rows = []
    for (name, call), flops in zip(calls.items(), (both, alone, alone), strict=True):
        took = seconds(functools.partial(call, video, motion), device, repeats)
        rows.append((name, flops, took, None if rows else peak_gib(device)))  # the first takes the most
    joint, plain, theirs = (took for _, _, took, _ in rows)

    print(f"Wan 1.3B, {NAMES[dtype]}, {frames} frames of {size[0]}x{size[1]}, on {device_name(device)}")
    print(f"{'':24}{'TFLOP':>8}{'seconds':>10}{'GFLOP/s':>10}{'peak GiB':>10}")
    for name, flops, took, peak in rows:
        memory = "" if peak is None else f"{peak:.1f}"
        print(f"{name:24}{flops / 1e12:8.1f}{took:10.2f}{flops / took / 1e9:10.0f}{memory:>10}")
    return {
        "joint_seconds": joint,
        "video_seconds": plain,
        "diffusers_seconds": theirs,
        "ratio": theirs / plain,
    }


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    verbs = parser.add_subparsers(dest="what", metavar="wan, plan, ranks, stall")
    common = files.Parser(add_help=False)
    # what the parser above has read is not to be forgotten
    common.add_argument("--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="as above")
    whole = verbs.add_parser(
        "wan",
        parents=[common],
        help="a whole Wan 1.3B beside diffusers' (default 17 frames on a CPU, 81 on a GPU)",
    )
    whole.add_argument("--frames", type=int, metavar="N", help="4n+1")
    whole.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_options(verbs, parents=[common])
    counted = verbs.add_parser("plan", parents=[common], help="what a training run will need")
    counted.add_argument("--frames", type=int, metavar="N", help="4n+1")
    counted.add_argument("--preset", choices=plan.PUBLISHED, default="wan2.2-5b")
    counted.add_argument("--gpus", type=int, default=32, metavar="N")
    counted.add_argument(
        "--node", type=int, default=8, metavar="N", help="GPUs of a node (default %(default)s)"
    )
    counted.add_argument("--batch", type=int, default=32, metavar="CLIPS", help="a step, over all GPUs")
    counted.add_argument("--size", type=files.size, metavar="HxW", help="pixels; default: as published")
    counted.add_argument("--steps", type=int, default=10_000)
    what = "of a GPU in bf16: A100 312, H100 989"
    counted.add_argument("--peak-tflops", type=float, default=plan.A100 / 1e12, help=what)
    counted.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    counted.add_argument("--check", action="store_true", help="measure small runs beside the counted memory")
    return parser.parse_args()


def main() -> None:
    args = options()
    called = {None: bench_all, "wan": bench_wan, "plan": plan.plan}
    called |= {"ranks": training.ranks, "stall": training.stall}
    result = called[args.what](args)
    if args.json:
        with whole_file(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    files.run(main)

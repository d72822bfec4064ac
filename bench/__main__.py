"""Speed and memory, measured side by side in one run.

python -m bench             1.3B-shaped blocks beside diffusers; the price of motion; the puppet. On the CPU
python -m bench puppet      training of the puppet: clips a second at each length, compiled or not. On the CPU
python -m bench gpu         the 1.3B at 81x480x832, training and beside diffusers (bench/gpu.py)
python -m bench plan        what a training run will need, counted
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from bench import gpu, plan, puppet, speed
from bench.timing import CPU, device_name
from kit import files
from kit.devices import has_bf16_units


def bench_all() -> dict:
    """The table, row by row; JSON has each figure under its key, and the rounds' extremes under "spread"."""
    parts = [speed.motion, functools.partial(speed.compared, torch.float32), puppet.guided, puppet.training]
    if has_bf16_units(CPU):  # without them a CPU takes minutes for each call
        parts.insert(2, functools.partial(speed.compared, torch.bfloat16))
    rows = [row for part in tqdm(parts, desc="measuring") for row in part()]
    print(f"{device_name(CPU)}, torch {torch.__version__}; median, smallest and largest of alternating runs")
    figures, spread = {}, {}
    for key, what, values in rows:
        figures[key], spread[key] = statistics.median(values), (min(values), max(values))
        low, high = spread[key]
        print(f"{key:22}{figures[key]:8.3g}  ({low:.3g} … {high:.3g})".ljust(52) + what)
    return figures | {"spread": spread, "device": device_name(CPU)}


def options() -> argparse.Namespace:
    common = files.Parser(add_help=False)
    # SUPPRESS: a --json before the verb is kept
    what = "write the figures there"
    common.add_argument("--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=what)
    about = __doc__.splitlines()[0]
    parser = files.Parser(prog="python -m bench", parents=[common], description=about)
    verbs = parser.add_subparsers(dest="what", metavar="puppet, gpu, plan")
    verbs.add_parser("puppet", parents=[common], help="clips a second in training, at each length")

    add = verbs.add_parser("gpu", parents=[common], help="what a GPU does with the 1.3B").add_argument
    choices = (*gpu.PARTS, "all")
    add("parts", nargs="*", choices=choices, default="all", metavar="PART", help=", ".join(choices))

    add = verbs.add_parser("plan", parents=[common], help="what a training run will need").add_argument
    add("--frames", type=files.frames, metavar="N", help="4n+1")
    add("--preset", choices=("wan2.1-1.3b", "wan2.2-5b"), default="wan2.2-5b")
    add("--gpus", type=files.count, default=32, metavar="N")
    add("--node", type=int, default=8, metavar="N", help="GPUs of a node (default %(default)s)")
    add("--batch", type=files.count, default=32, metavar="CLIPS", help="a step, over all GPUs")
    add("--size", type=files.size, metavar="HxW", help="pixels; default: as published")
    add("--steps", type=int, default=10_000)
    what = "of a GPU in bf16: A100 312, H100 989"
    add("--peak-tflops", type=float, default=312, help=what)
    add("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    return parser.parse_args()


def main() -> None:
    args = vars(options())
    file, what = args.pop("json", None), args.pop("what")
    measured = {None: bench_all, "puppet": puppet.lengths, "gpu": gpu.run_parts, "plan": plan.plan}[what]
    figures = measured(**args)
    if file:
        file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    files.run(main)

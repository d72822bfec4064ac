"""Speed and memory, measured side by side in one run.

python -m bench             1.3B-shaped blocks beside diffusers; the price of motion; the puppet. On the CPU
python -m bench gpu         what a GPU does, in one command of eight minutes (bench/gpu.py)
python -m bench plan        what a training run will need, counted
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from kit import files
from kit.files import whole_file


def bench_all(args: argparse.Namespace) -> dict:
    """The table, row by row; JSON has each figure under its key, and the rounds' extremes under "spread"."""
    from bench import puppet, speed

    half = speed.Setting(share=0.5)
    return table(
        lambda: speed.forward(speed.Setting(), torch.float32),
        lambda: speed.motion(speed.Setting(), torch.float32),
        lambda: speed.sampling(speed.Setting(), torch.float32),
        lambda: speed.training(speed.Setting(), torch.float32),
        lambda: speed.forward(half, torch.bfloat16),
        lambda: speed.training(half, torch.bfloat16),
        lambda: puppet.guided(speed.Setting()),
        lambda: puppet.training(speed.Setting()),
    )


def table(*measurements: Callable[[], list]) -> dict:
    """Measure, print and return the figures."""
    from bench.timing import device_name

    rows = [row for measure in tqdm(measurements, desc="measuring") for row in measure()]
    print(
        f"{device_name('cpu')}, torch {torch.__version__}; median, smallest and largest of alternating runs"
    )
    for key, what, (median, low, high) in rows:
        print(f"{key:22}{median:8.3g}  ({low:.3g} … {high:.3g})".ljust(52) + what)
    spread = {row.key: row.figure[1:] for row in rows}
    return {row.key: row.figure.median for row in rows} | {"spread": spread, "device": device_name("cpu")}


def run_plan(args: argparse.Namespace) -> dict:
    from bench import plan

    return plan.plan(args)


def run_gpu(args: argparse.Namespace) -> dict:
    from bench import gpu

    return gpu.run_parts(args.parts, args.minutes, args.out, args.device)


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.set_defaults(call=bench_all)
    verbs = parser.add_subparsers(dest="what", metavar="gpu, plan")
    common = files.Parser(add_help=False)
    # SUPPRESS: a --json before the verb is kept
    common.add_argument("--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="as above")

    gpu = verbs.add_parser("gpu", parents=[common], help="what a GPU does; without one a tiny rehearsal")
    gpu.set_defaults(call=run_gpu)
    what = "tests, train, forward, motion, hybrid, puppet, run; default: all, in this order"
    gpu.add_argument("parts", nargs="*", metavar="PART", help=what)
    gpu.add_argument("--minutes", type=float, default=8, metavar="N", help="in all (default %(default)s)")
    what = "figures and the puppet's run (default %(default)s)"
    gpu.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help=what)
    gpu.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    plan = verbs.add_parser("plan", parents=[common], help="what a training run will need")
    plan.set_defaults(call=run_plan)
    plan.add_argument("--frames", type=int, metavar="N", help="4n+1")
    plan.add_argument("--preset", choices=("wan2.1-1.3b", "wan2.2-5b"), default="wan2.2-5b")
    plan.add_argument("--gpus", type=int, default=32, metavar="N")
    plan.add_argument("--node", type=int, default=8, metavar="N", help="GPUs of a node (default %(default)s)")
    plan.add_argument("--batch", type=int, default=32, metavar="CLIPS", help="a step, over all GPUs")
    plan.add_argument("--size", type=files.size, metavar="HxW", help="pixels; default: as published")
    plan.add_argument("--steps", type=int, default=10_000)
    what = "of a GPU in bf16: A100 312, H100 989"
    plan.add_argument("--peak-tflops", type=float, default=312, help=what)
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    plan.add_argument("--check", action="store_true", help="measure small runs beside the counted memory")
    return parser.parse_args()


def main() -> None:
    args = options()
    result = args.call(args)
    if args.json:
        with whole_file(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    files.run(main)

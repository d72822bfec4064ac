"""Speed and memory, measured side by side in one run.

python -m bench             1.3B-shaped blocks against diffusers; the price of motion; the puppet. On the CPU
python -m bench puppet      training of the puppet: clips a second at each length, compiled or not. On the CPU
python -m bench gpu         all measurements of a GPU, in at most eight minutes (bench/gpu.py)
python -m bench plan        what a training run will need, counted
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from kit import files


def bench_all() -> dict:
    """The table, row by row; JSON has each figure under its key, and the rounds' extremes under "spread"."""
    from bench import puppet, speed
    from bench.timing import CPU, device_name

    setting, fp32, bf16 = speed.Setting(), torch.float32, torch.bfloat16
    compared = [(key, dtype) for dtype in (fp32, bf16) for key in speed.COMPARED]
    rows = speed.motion(setting)
    for key, dtype in tqdm(compared, desc="measuring"):
        rows += speed.compared(setting, key, dtype)
    rows += puppet.guided(setting) + puppet.training(setting)
    print(f"{device_name(CPU)}, torch {torch.__version__}; median, smallest and largest of alternating runs")
    for key, what, (median, low, high) in rows:
        print(f"{key:22}{median:8.3g}  ({low:.3g} … {high:.3g})".ljust(52) + what)
    spread = {row.key: row.figure[1:] for row in rows}
    return {row.key: row.figure.median for row in rows} | {"spread": spread, "device": device_name(CPU)}


def options() -> argparse.Namespace:
    common = files.Parser(add_help=False)
    # SUPPRESS: without it the default would replace a --json given before the verb
    what = "write the figures there"
    common.add_argument("--json", type=files.new_file, metavar="FILE", default=argparse.SUPPRESS, help=what)
    about = __doc__.splitlines()[0]
    parser = files.Parser(prog="python -m bench", parents=[common], description=about)
    verbs = parser.add_subparsers(dest="what", metavar="puppet, gpu, plan")
    verbs.add_parser("puppet", parents=[common], help="clips a second in training, at each length")

    gpu = verbs.add_parser("gpu", parents=[common], help="what a GPU does; without one a tiny rehearsal")
    what = "tests, train, forward, motion, hybrid, puppet, run; default: all, in this order"
    gpu.add_argument("parts", nargs="*", metavar="PART", help=what)
    gpu.add_argument("--minutes", type=files.positive, default=8, metavar="N", help="in all (%(default)s)")
    what = "for figures and the puppet's run (default %(default)s)"
    gpu.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help=what)
    gpu.add_argument("--device", type=files.device, default="cuda" if torch.cuda.is_available() else "cpu")

    plan = verbs.add_parser("plan", parents=[common], help="what a training run will need")
    plan.add_argument("--frames", type=files.frames, metavar="N", help="4n+1")
    plan.add_argument("--preset", choices=("wan2.1-1.3b", "wan2.2-5b"), default="wan2.2-5b")
    plan.add_argument("--gpus", type=files.count, default=32, metavar="N")
    plan.add_argument("--node", type=files.count, default=8, metavar="N", help="GPUs of a node (%(default)s)")
    plan.add_argument("--batch", type=files.count, default=32, metavar="CLIPS", help="a step, over all GPUs")
    plan.add_argument("--size", type=files.size, metavar="HxW", help="pixels; default: as published")
    what = "default: the paper's in stage 2, %(default)s"
    plan.add_argument("--steps", type=files.count, default=12_000, help=what)
    what = "of a GPU in bf16: A100 312, H100 989"
    plan.add_argument("--peak-tflops", type=files.positive, default=312, help=what)
    what = "share of that peak (default %(default)s)"
    plan.add_argument("--mfu", type=files.positive, default=0.4, help=what)
    return parser.parse_args()


def main() -> None:
    args = vars(options())
    what, file = args.pop("what"), args.pop("json", None)
    if what == "puppet":
        from bench import puppet

        figures = puppet.lengths()
    elif what == "gpu":
        from bench import gpu

        figures = gpu.run_parts(**args)
    elif what == "plan":
        from bench import plan

        figures = plan.plan(**args)
    else:
        figures = bench_all()
    if file:
        file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    files.run(main)

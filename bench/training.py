"""What training on several ranks and saving cost: time and memory of real runs of train.py, by turns."""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from bench.timing import Figure, device_name, figure, ratio
from dual_dit import PRESETS, DualDiT, DualDiTConfig
from kit import checkpoints, distributed

ROOT = Path(__file__).parent.parent
WARM_UP = 3  # steps of a run that are not counted
THREADS = 2  # of all processes of a run together
WAYS = {"1 process": (1, ()), "2 x DDP": (2, ("--parallel", "ddp")), "2 x FSDP": (2, ("--parallel", "fsdp"))}
LARGE = DualDiTConfig(
    layers=8, width=640, heads=10, ffn=2560, channels=48, text_dim=64, patch=(1, 1, 1), freq_dim=256
)  # about 100 million parameters


def add_options(verbs: argparse._SubParsersAction, **common: object) -> None:
    """The verbs "ranks" and "stall"."""
    add = verbs.add_parser("ranks", help="training on 1 process beside 2 of DDP and of FSDP", **common)
    add.add_argument("--steps", type=int, default=12, metavar="N", help="of each run (default %(default)s)")
    add.add_argument("--batch", type=int, default=8, metavar="CLIPS", help="a step (default %(default)s)")
    add.add_argument("--rounds", type=int, default=3, metavar="N", help="of all three (default %(default)s)")
    add.add_argument("--frames", type=int, default=17, metavar="N", help="4n+1 (default %(default)s)")
    add = verbs.add_parser(
        "stall", help="how long a save holds training, beside one in the foreground", **common
    )
    add.add_argument("--rounds", type=int, default=7, metavar="N", help="saves of each (default %(default)s)")


# ---------------------------------------------------------------- ranks


def ranks(args: argparse.Namespace) -> dict:
    """Seconds a step and memory of train.py on the puppet: 1 process, 2 of DDP, 2 of FSDP, by turns."""
    if args.steps <= WARM_UP:
        raise ValueError(f"--steps must be more than the {WARM_UP} that warm up, got {args.steps}")
    steps, peaks = ({name: [] for name in WAYS} for _ in range(2))
    for _ in range(args.rounds):
        for name, (count, options) in WAYS.items():
            took, peak = _run(count, args, options)
            steps[name].append(took)
            peaks[name].append(peak)
    rows = {name: (figure(steps[name]), figure(peaks[name])) for name in WAYS}
    alone = next(iter(WAYS))
    print(f"{THREADS} threads, {args.batch} clips of {args.frames} frames a step, {device_name('cpu')}")
    print(f"median of {args.rounds} runs by turns; memory of all processes, the peak of each added up\n")
    print(f"{'':12}{'s a step':>10}{'least':>8}{'most':>8}{'ratio':>8}{'MiB':>8}{'ratio':>8}")
    for name, (took, peak) in rows.items():
        times = ratio(steps[name], steps[alone]).median
        print(
            f"{name:12}{took.median:10.3f}{took.low:8.3f}{took.high:8.3f}{times:8.2f}"
            f"{peak.median / 2**20:8.0f}{peak.median / rows[alone][1].median:8.2f}"
        )
    return {name: {"seconds": took, "bytes": peak} for name, (took, peak) in rows.items()}


def _run(count: int, args: argparse.Namespace, options: Sequence[str]) -> tuple[float, int]:
    """Train on `count` processes -> median seconds of a step, but for its data, and peak bytes of all."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        out = Path(folder) / "run"
        plan = ("--stage", 2, "--steps", args.steps, "--batch", args.batch, "--frames", args.frames)
        quiet = ("--validate-every", 0, "--save-every", args.steps, "--precision", "fp32", "--device", "cpu")
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count)
        call = (sys.executable, *torchrun, "train.py", *plan, *quiet, *options, "--out", out)
        run = subprocess.Popen(
            list(map(str, call)), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(THREADS // count)},
            stdout=subprocess.DEVNULL, stderr=errors,  # a pipe would fill up
        )  # fmt: skip
        peaks = {}
        while run.poll() is None:
            peaks |= _peaks(run.pid)
            time.sleep(0.1)
        if run.returncode:
            errors.seek(0)
            raise RuntimeError(f"train.py ended with {run.returncode}: {errors.read()[-2000:]}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return statistics.median(s["seconds"] - s["data_seconds"] for s in lines[WARM_UP:]), sum(peaks.values())


def _peaks(agent: int) -> dict[int, int]:
    """Most bytes that each of torchrun's processes has had resident so far, as Linux counts them."""
    found = {}
    children = Path(f"/proc/{agent}/task/{agent}/children")
    for pid in children.read_text().split() if children.exists() else ():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it has just ended
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines())
        if "VmHWM" in fields:
            found[int(pid)] = 1024 * int(fields["VmHWM"].split()[0])
    return found


# ---------------------------------------------------------------- stall


def stall(args: argparse.Namespace) -> dict:
    """Seconds that a save holds training: in the background, as train.py saves, and all in the foreground."""
    print(f"seconds that a save holds training, median of {args.rounds}; {device_name('cpu')}\n")
    print(f"{'':18}{'MB':>8}{'':>12}{'median':>10}{'least':>10}{'most':>10}")
    result = {}
    for name, config in (("the puppet", PRESETS["puppet"]), ("100 million", LARGE)):
        state, record = _state(config), {"config": dataclasses.asdict(config)}
        held = _held(state, record, args.rounds)
        size = sum(tensor.nbytes for tensor in state.values())
        for way, took in held.items():
            print(f"{name:18}{size / 1e6:8.0f}  {way:10}{took.median:10.4f}{took.low:10.4f}{took.high:10.4f}")
        result[name] = held | {"bytes": size}
    return result


def _state(config: DualDiTConfig) -> dict[str, Tensor]:
    """What a checkpoint of a network of this size holds: weights, average, AdamW's two states."""
    model = DualDiT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    return checkpoints.training_state(model, ema, [optimizer], {}, rank=0)


def _held(state: dict[str, Tensor], record: dict, rounds: int) -> dict[str, Figure]:
    """Both ways of saving by turns, after one of each that warms up; what follows a save is not counted."""
    times = {"background": [], "foreground": []}
    with tempfile.TemporaryDirectory() as folder:
        writer = checkpoints.Writer(Path(folder), keep=1, world=distributed.ALONE, weights_too=True)
        for step in range(1, 2 * rounds + 3):
            way = ("background", "foreground")[step % 2]
            start = time.perf_counter()
            if way == "background":
                writer.save(record | {"step": step}, state)
            else:
                _save_now(writer, record | {"step": step}, state)
            times[way].append(time.perf_counter() - start)
            writer.wait()
    return {way: figure(each[1:]) for way, each in times.items()}


def _save_now(writer: checkpoints.Writer, record: dict, state: dict[str, Tensor]) -> None:
    """The same files, with nothing copied first and nothing left to a thread."""
    temporary = checkpoints.folder_of(writer.run, record["step"]).with_suffix(".now")
    dcp.save(state, checkpoint_id=temporary, no_dist=True)
    written = Future()
    written.set_result(None)
    writer.finish(written, temporary, record)

"""What a GPU does, in one command: `python -m bench gpu`, eight minutes on an H100.

Each part runs in a process of its own with a deadline: one that fails, or takes too long, stops no other.
What a part finds is printed as it comes, and RUN/gpu.json is written after each figure. Parts, in order:

    tests    what only a GPU can show: tests/gpu
    train    a joint training step of 1.3B at 81x480x832, checkpointed, compiled and not, beside the plan
    forward  a forward call and a sampling step beside diffusers' model on the same tokens
    motion   what motion tokens cost beyond their share of the arithmetic
    hybrid   the 5B with 15 dual blocks, at the largest size that fits
    puppet   clips a second at several batches, and where the time goes
    run      train.py on the puppet for the rest of the time, its weights and metrics in RUN

Without a GPU all of it runs at tiny sizes on the CPU, as a rehearsal.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

import flow
from bench.timing import device_name, random_model, seconds
from dual_dit import PRESETS, DualDiT, DualDiTConfig
from flow import Task
from kit import distributed, flops
from kit.files import whole_file
from motion_tokens import MOTION_DIM

ROOT = Path(__file__).parent.parent
GIB = 2**30
KEPT = ("weights.safetensors", "metrics.jsonl", "loss.png", "run.json")  # of the run


class Sizes(NamedTuple):
    """What is measured: networks, latents (T h w), words, batches of the puppet."""

    small: DualDiTConfig
    large: DualDiTConfig
    grid: tuple[int, int, int]
    large_grids: tuple[tuple[int, int, int], ...]  # the first that fits counts
    words: int
    batches: tuple[int, ...]
    run_batch: int
    run_steps: int | None  # None: as many as there is time for


REAL = Sizes(
    PRESETS["wan2.1-1.3b"], PRESETS["wan2.2-5b"], (21, 60, 104),
    ((31, 44, 80), (21, 44, 80), (11, 44, 80), (5, 44, 80)), 512, (16, 64, 256), 128, None,
)  # fmt: skip
_tiny = dataclasses.replace(PRESETS["wan2.1-1.3b"], layers=2, width=96, heads=2, ffn=160, text_dim=32)
TINY = Sizes(
    _tiny, dataclasses.replace(_tiny, dual=(1,), channels=48), (2, 4, 4), ((2, 4, 4),), 8, (2,), 2, 12
)

Report = Callable[..., None]  # report(name=figure, ...)


# ---------------------------------------------------------------- the parts


def tests(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    call = (sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider")
    line = ""
    with _ended(subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True)) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    report(exit_code=process.returncode, last_line=line.strip())


def train(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    config, grid = sizes.small, sizes.grid
    counted = flops.training_memory(config, grid, 1, checkpointing=True, text=sizes.words)
    report(planned_gib=sum(counted) / GIB)
    model = random_model(config, device, torch.float32).train().requires_grad_(True)
    distributed.recompute_blocks(model)
    step = _training_step(model, grid, sizes.words, device)
    for name in ("plain", "compiled"):
        if name == "compiled":
            distributed.compile_blocks(model)
        _reset_peak(device)
        took = seconds(step, device)
        report(**{name: _of_step(config, grid, sizes.words, took.median, device)})


def forward(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    from bench.speed import Sides

    sides, shape = Sides(sizes.small, torch.bfloat16, device), _shape(sizes)
    measured = {"forward": sides.calls(shape)}
    try:
        measured["sample"] = sides.sampling(shape, steps=1)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # diffusers' pipeline needs transformers, its network does not
        report(sample_skipped=str(error))
    with torch.no_grad():
        for name in ("plain", "compiled"):
            if name == "compiled":
                for block in (*sides.ours.blocks, *sides.peer.blocks):
                    block.forward = torch.compile(block.forward)
            for what, calls in measured.items():
                for call in (*calls.values(), *calls.values()):  # a second call may compile once more
                    call()
                took = {side: seconds(call, device).median for side, call in calls.items()}
                report(**{f"{what}_{name}": took | {"diffusers_over_ours": took["peer"] / took["ours"]}})


def motion(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    from bench.speed import Sides, motion_price

    sides, shape = Sides(sizes.small, torch.bfloat16, device, peer=False), _shape(sizes)
    with torch.no_grad():
        joint = seconds(sides.joint(shape), device).median
        video = seconds(sides.calls(shape)["ours"], device).median
    price = motion_price(sizes.small, shape)
    report(joint=joint, video=video, flops_ratio=price, overhead=joint / video / price)


def hybrid(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    """Weights and gradients in bf16, no optimizer: that takes several GPUs."""
    config = sizes.large
    model = random_model(config, device, torch.bfloat16)
    distributed.recompute_blocks(model)
    for grid in sizes.large_grids:
        try:
            inputs = _inputs(config, grid, sizes.words, device)
            with torch.no_grad():
                took = seconds(lambda: model(*inputs), device)  # noqa: B023, called at once
            report(grid=grid, forward_seconds=took.median)
            model.train().requires_grad_(True)
            _reset_peak(device)

            def step() -> None:
                sum(u.float().square().mean() for u in model(*inputs)).backward()  # noqa: B023
                model.zero_grad(set_to_none=True)

            report(backward=_of_step(config, grid, sizes.words, seconds(step, device).median, device))
            return
        except torch.OutOfMemoryError:
            report(too_large=grid)
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def puppet(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    from bench.puppet import clock, training_step

    for compiled in (False, True):
        for batch in sizes.batches[-1:] if compiled else sizes.batches:
            step, times = training_step(batch, device, device.type == "cuda", compiled), {}
            step.step()  # warms up
            for _ in range(5):
                with clock(times, "step", device):
                    step.step()
                for name, part in step._asdict().items():  # each waited for: together they overlap
                    with clock(times, name, device):
                        part()
            mean = {name: sum(each) / len(each) for name, each in times.items()}
            name = f"batch_{batch}{'_compiled' * compiled}"
            report(**{name: {"clips_per_second": batch / mean["step"]} | mean})


def run(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    """It ends early by SIGTERM, which saves; its averaged weights are exported then."""
    folder, end = out / "puppet-run", time.monotonic() + left
    shutil.rmtree(folder, ignore_errors=True)
    steps = sizes.run_steps or max(20, int(0.7 * left * _clips_per_second(out) / sizes.run_batch))
    plan = ("--batch", sizes.run_batch, "--steps", steps, "--device", device, "--out", folder)
    call = [sys.executable, "train.py", *map(str, plan), "--save-every", "1000", "--validate-every", "1000"]
    with _ended(subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL)) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(5.0, left - 20))
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(max(5.0, end - time.monotonic()))
    if not (folder / "weights.safetensors").exists():
        export = [sys.executable, "train.py", "export", "--out", folder, folder / "weights.safetensors"]
        subprocess.run(list(map(str, export)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for name in KEPT:
        if (folder / name).exists():
            shutil.copy(folder / name, out / f"puppet-{name}")
    for sheet in sorted((folder / "samples").glob("*.png"))[-1:]:
        shutil.copy(sheet, out / "puppet-sample.png")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    steps = [line for line in lines if "loss" in line]
    report(exit_code=process.returncode, steps=len(steps), last=steps[-1])


def _clips_per_second(out: Path) -> float:
    """At the largest batch that the part "puppet" has measured; a guess where it did not run."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        found = json.loads((out / "gpu.json").read_text()).get("puppet", {})
        return [x["clips_per_second"] for name, x in found.items() if name.startswith("batch_")][-1]
    return 1000.0


# part: (what runs, the seconds that it may take at most); the last has what is left
PARTS = {
    "tests": (tests, 80), "train": (train, 130), "forward": (forward, 85), "motion": (motion, 25),
    "hybrid": (hybrid, 50), "puppet": (puppet, 60), "run": (run, 3600),
}  # fmt: skip


# ---------------------------------------------------------------- what parts share


def _shape(sizes: Sizes):
    from bench.speed import Shape

    (t, h, w), (_, ph, pw) = sizes.grid, sizes.small.patch
    return Shape(t, h // ph, w // pw, sizes.words)


def _inputs(config: DualDiTConfig, grid: tuple[int, int, int], words: int, device: torch.device) -> tuple:
    """What a joint call takes."""
    video = torch.randn(1, config.channels, *grid, device=device)
    motion = torch.randn(1, 4 * (grid[0] - 1) + 1, MOTION_DIM, device=device)
    t = torch.full((1,), 0.5, device=device)
    return video, motion, t, t, torch.randn(1, words, config.text_dim, device=device), Task.JOINT


def _training_step(model: DualDiT, grid: tuple[int, int, int], words: int, device: torch.device) -> Callable:
    """As train.py trains a Wan: bf16 autocast, AdamW, an average of the weights."""
    objective = distributed.Objective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    video, motion, _, _, text, _ = _inputs(model.config, grid, words, device)
    drawn = flow.draw(torch.Generator().manual_seed(0), 2, 1)._replace(task=Task.JOINT)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = objective(video, motion, text, text[0], drawn)
        loss.total.backward()
        distributed.clip(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 0.002)

    return step


def _of_step(
    config: DualDiTConfig, grid: tuple[int, int, int], words: int, took: float, device: torch.device
) -> dict[str, float | None]:
    """Seconds of a joint training step of one clip as rates: recomputed blocks are no useful work."""
    (T, H, W), (_, ph, pw) = grid, config.patch
    frames = 4 * (T - 1) + 1
    tokens = flops.Tokens(T * (H // ph) * (W // pw), frames * flops.TOKENS_PER_FRAME, words)
    useful = flops.step_flops(config, tokens, checkpointing=False)
    found = {"seconds": took, "tokens_per_second": (tokens.video + tokens.motion) / took}
    found |= {"tflops": useful / took / 1e12}
    if device.type == "cuda":
        from kit.monitor import peak_flops

        peak = peak_flops(device, bf16=True)
        found |= {"mfu": peak and useful / took / peak}
        found |= {"peak_gib": torch.cuda.max_memory_allocated(device) / GIB}
        found |= {"reserved_gib": torch.cuda.max_memory_reserved(device) / GIB}
    return found


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """No process outlives its part."""
    try:
        yield process
        process.wait()
    finally:
        process.kill()


# ---------------------------------------------------------------- one part after the other


def _part(name: str, sizes: Sizes, device: torch.device, out: Path, left: float, results: Connection) -> None:
    """A part in its own process: figures, and a reason if it fails, go through the pipe."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started ends with it
    try:
        PARTS[name][0](sizes, device, out, left, lambda **figures: results.send(figures))
    except ImportError as error:
        results.send({"skipped": f"{error}: pip install it, or carry its wheel"})
    except Exception as error:
        traceback.print_exc()
        results.send({"error": f"{type(error).__name__}: {error}"[:500]})


def run_part(name: str, sizes: Sizes, device: torch.device, out: Path, left: float, note: Report) -> None:
    """Until it ends or its time is over; `note` gets its figures as they come."""
    context = multiprocessing.get_context("forkserver")  # it has imported torch, and knows of no GPU yet
    context.set_forkserver_preload(["bench.gpu"])
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_part, args=(name, sizes, device, out, left, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    with contextlib.suppress(EOFError):
        while mine.poll(max(0.0, left - (time.monotonic() - start))):
            note(**mine.recv())
    process.join(1 if time.monotonic() - start < left else 0)
    if process.is_alive():
        note(error=f"stopped after {left:.0f} s")
        process.terminate()
        process.join(10)
        process.kill()
    note(took=time.monotonic() - start)


def run_parts(parts: list[str], minutes: float, out: Path, device: str) -> dict:
    """All parts within the time -> the figures, which are also in OUT/gpu.json."""
    if unknown := set(parts) - PARTS.keys():
        raise ValueError(f"unknown part {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    place, end = torch.device(device), time.monotonic() + 60 * minutes
    sizes = REAL if place.type == "cuda" else TINY
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    found: dict = {"device": device_name(place), "torch": torch.__version__}
    print(f"{found['device']}, torch {torch.__version__}, at most {minutes:g} minutes", flush=True)
    if place.type != "cuda":
        print("no GPU: a rehearsal at tiny sizes, its figures mean nothing", flush=True)
    for name in parts or PARTS:
        left = end - time.monotonic() - 5
        if place.type == "cuda":
            left = min(PARTS[name][1], left)
        figures = found.setdefault(name, {})

        def note(part: str = name, into: dict = figures, **more: object) -> None:
            into |= more
            print(f"{part}: {json.dumps(more)}", flush=True)
            with whole_file(out / "gpu.json") as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n")

        if left < 5:
            note(skipped="no time is left")
        else:
            run_part(name, sizes, place, out, left, note)
    return found

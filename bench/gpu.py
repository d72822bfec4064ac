"""Measure a GPU with one command: `python -m bench gpu`, at most eight minutes.

Each part runs in its own process with a deadline: one that fails, or takes too long, stops no other.
Figures are printed as they come, and OUT/gpu.json is written after each. Parts, in order:

    tests    what only a GPU can show: tests/gpu
    train    a joint training step of 1.3B at 81x480x832, checkpointed, compiled and not, against the plan
    forward  a forward call and a sampling step against diffusers' model on the same tokens
    motion   what motion tokens cost beyond their share of the arithmetic
    hybrid   the 5B with 15 dual blocks, at the largest size that fits
    puppet   clips a second at several batches, and where the time goes
    run      train.py on the puppet for the rest of the time, in OUT/puppet-run

Without a GPU all of it runs at tiny sizes on the CPU, as a rehearsal.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

import flow
from bench.memory import training_memory
from bench.plan import price_of_motion
from bench.speed import SHAPES, Shape, Sides, inputs
from bench.timing import device_name, interleaved, random_model, seconds
from dual_dit import PRESETS, DualDiT, DualDiTConfig
from flow import Task
from kit import distributed, flops, monitor
from kit.data.batch import CLIPS_AT_ONCE
from kit.files import whole_file

ROOT = Path(__file__).parent.parent
GIB = 2**30


class Sizes(NamedTuple):
    """What is measured: networks, clips, batches of the puppet."""

    small: DualDiTConfig
    large: DualDiTConfig
    shape: Shape
    large_shapes: tuple[Shape, ...]  # the first that fits is used
    batches: tuple[int, ...]
    run_batch: int
    run_steps: int | None  # None: as many as there is time for


REAL = Sizes(
    PRESETS["wan2.1-1.3b"], PRESETS["wan2.2-5b"], SHAPES[-1],
    (Shape(31, 22, 40), Shape(21, 22, 40), Shape(11, 22, 40), Shape(5, 22, 40)), (16, 32, 128), 32, None,
)  # fmt: skip
_tiny = dataclasses.replace(PRESETS["wan2.1-1.3b"], layers=2, width=96, heads=2, ffn=160, text_dim=32)
_few = Shape(2, 2, 2, 8)
TINY = Sizes(_tiny, dataclasses.replace(_tiny, dual=(1,), channels=48), _few, (_few,), (2,), 2, 12)

Report = Callable[..., None]  # report(name=figure, ...)


# ---------------------------------------------------------------- the parts


def tests(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    call = (sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider")
    report(exit_code=subprocess.run(call, cwd=ROOT).returncode)


def train(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    config, shape = sizes.small, sizes.shape
    grid = shape.latents(config)
    counted = training_memory(config, grid, 1, checkpointing=True, text=shape.text)
    report(planned_gib=sum(counted) / GIB)
    model = random_model(config, device, torch.float32).train().requires_grad_(True)
    distributed.recompute_blocks(model)
    step = _training_step(model, shape, device)
    report(plain=_rates(step, config, shape, device))
    distributed.compile_blocks(model)
    report(compiled=_rates(step, config, shape, device))


def forward(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    sides = Sides(sizes.small, torch.bfloat16, device)
    measured = {"forward": sides.forward(sizes.shape)}
    try:
        measured["sample"] = sides.sample(sizes.shape, steps=1)
    except (ImportError, RuntimeError) as error:  # the pipeline needs transformers, the network does not
        report(sample_skipped=str(error))
    with torch.no_grad():
        for name in ("plain", "compiled"):
            if name == "compiled":
                for block in (*sides.ours.blocks, *sides.peer.blocks):
                    block.forward = torch.compile(block.forward)
            for what, calls in measured.items():
                for call in calls.values():  # compile now; the warm-up in `seconds` may compile once more
                    call()
                took = {side: seconds(call, device) for side, call in calls.items()}
                report(**{f"{what}_{name}": took | {"diffusers_over_ours": took["peer"] / took["ours"]}})


def motion(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    sides = Sides(sizes.small, torch.bfloat16, device, peer=False)
    with torch.no_grad():
        joint = seconds(sides.joint(sizes.shape), device)
        video = seconds(sides.forward(sizes.shape)["ours"], device)
    price = 1 + price_of_motion(sizes.small, sizes.shape.tokens())[1]
    report(joint=joint, video=video, flops_ratio=price, overhead=joint / video / price)


def hybrid(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    """Weights and gradients in bf16, without an optimizer, which would need several GPUs."""
    config = sizes.large
    model = random_model(config, device, torch.bfloat16)
    distributed.recompute_blocks(model)
    for shape in sizes.large_shapes:
        try:
            video, motion, t, text = inputs(config, shape, device)
            call = functools.partial(model, video, motion, t, t, text, Task.JOINT)
            with torch.no_grad():
                report(shape=str(shape), forward_seconds=seconds(call, device))
            model.train().requires_grad_(True)
            report(backward=_rates(functools.partial(_backward, model, call), config, shape, device))
            return
        except torch.OutOfMemoryError:
            report(too_large=str(shape))
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def _backward(model: DualDiT, call: Callable) -> None:
    sum(u.float().square().mean() for u in call()).backward()
    model.zero_grad(set_to_none=True)


def puppet(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    from bench.puppet import done, training_step

    bf16 = device.type == "cuda"
    for batch, compiled in (*((batch, False) for batch in sizes.batches), (sizes.batches[-1], True)):
        parts = training_step(batch, device, bf16, compiled)
        # steps whose clips a GPU makes together
        group = max(1, CLIPS_AT_ONCE // batch) if bf16 else 1
        calls = parts._asdict() | {
            "step": functools.partial(done, [*parts] * group),
            "data": functools.partial(done, [parts.data] * group),
        }
        # each part is timed until the GPU is done; in a whole step the parts overlap
        mean = {name: sum(x) / len(x) for name, x in interleaved(calls, least=5, device=device).items()}
        mean |= {name: mean[name] / group for name in ("step", "data")}
        name = f"batch_{batch}{'_compiled' * compiled}"
        report(**{name: {"clips_per_second": batch / mean["step"]} | mean})


def run(sizes: Sizes, device: torch.device, out: Path, left: float, report: Report) -> None:
    """If time runs out, SIGTERM makes the run save and stop, and its averaged weights are exported."""
    folder, end = out / "puppet-run", time.monotonic() + left
    shutil.rmtree(folder, ignore_errors=True)
    found = json.loads((out / "gpu.json").read_text()).get("puppet", {})
    rate = found.get(f"batch_{sizes.run_batch}", {}).get("clips_per_second", 1000.0)
    steps = sizes.run_steps or max(20, int(0.7 * left * rate / sizes.run_batch))
    plan = ("--batch", sizes.run_batch, "--steps", steps, "--device", device, "--out", folder)
    call = [sys.executable, "train.py", *map(str, plan), "--save-every", "1000", "--validate-every", "1000"]
    process = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        process.wait(max(5.0, left - 20))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(max(5.0, end - time.monotonic()))
    finally:
        process.kill()  # it does not outlive this part
    if not (folder / "weights.safetensors").exists():
        export = (sys.executable, "train.py", "export", "--out", folder, folder / "weights.safetensors")
        subprocess.run(export, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder / "checkpoints")  # large, and no longer needed
    steps = [line for line in monitor.read_log(folder / "metrics.jsonl") if "loss" in line]
    report(exit_code=process.returncode, steps=len(steps), last=steps[-1])


# part: (what runs, the seconds that it may take at most); the last has what is left
PARTS = {
    "tests": (tests, 120), "train": (train, 130), "forward": (forward, 85), "motion": (motion, 25),
    "hybrid": (hybrid, 50), "puppet": (puppet, 60), "run": (run, 3600),
}  # fmt: skip


# ---------------------------------------------------------------- what parts share


def _training_step(model: DualDiT, shape: Shape, device: torch.device) -> Callable[[], None]:
    """As train.py trains a Wan: bf16 autocast, AdamW, an average of the weights."""
    objective = distributed.Objective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    video, motion, _, text = inputs(model.config, shape, device)
    drawn = flow.draw(torch.Generator().manual_seed(0), 2, 1)._replace(task=Task.JOINT)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = objective(video, motion, text, text[0], drawn)
        loss.total.backward()
        distributed.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 0.002)

    return step


def _rates(
    step: Callable[[], None], config: DualDiTConfig, shape: Shape, device: torch.device
) -> dict[str, float | None]:
    """Time of a joint training step of one clip, and rates; recomputation does not count as work."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took, tokens = seconds(step, device), shape.tokens()
    useful = flops.step_flops(config, tokens)
    found = {"seconds": took, "tokens_per_second": (tokens.video + tokens.motion) / took}
    found |= {"tflops": useful / took / 1e12}
    if device.type == "cuda":
        peak = monitor.peak_flops(device, bf16=True)
        found |= {"mfu": peak and useful / took / peak}
        found |= {"peak_gib": torch.cuda.max_memory_allocated(device) / GIB}
        found |= {"reserved_gib": torch.cuda.max_memory_reserved(device) / GIB}
    return found


# ---------------------------------------------------------------- one part after the other


def _part(name: str, sizes: Sizes, device: torch.device, out: Path, left: float, results: Connection) -> None:
    """A part in its own process: figures, and a reason if it fails, go through the pipe."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes it started end, too
    try:
        PARTS[name][0](sizes, device, out, left, lambda **figures: results.send(figures))
    except ImportError as error:
        results.send({"skipped": str(error)})
    except Exception as error:
        traceback.print_exc()
        results.send({"error": f"{type(error).__name__}: {error}"[:500]})


def run_part(name: str, sizes: Sizes, device: torch.device, out: Path, left: float, note: Report) -> None:
    """Run a part until it ends or its time is over; `note` gets its figures as they come."""
    context = multiprocessing.get_context("forkserver")  # has imported torch, but not initialised CUDA
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
        raise ValueError(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    place, end = torch.device(device), time.monotonic() + 60 * minutes
    sizes = REAL if place.type == "cuda" else TINY
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    machine = {"device": device_name(place), "torch": torch.__version__}
    found = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").is_file() else {}
    found = found if machine.items() <= found.items() else machine  # keep figures of parts not run now

    def note(part: str, **figures: object) -> None:
        found.setdefault(part, {}).update(figures)
        print(f"{part}: {json.dumps(figures)}", flush=True)
        with whole_file(out / "gpu.json") as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")

    print(f"{found['device']}, torch {torch.__version__}, at most {minutes:g} minutes", flush=True)
    if place.type != "cuda":
        print("no GPU: a rehearsal at tiny sizes, its figures mean nothing", flush=True)
    for name in parts or PARTS:
        found.pop(name, None)
        left = end - time.monotonic() - 5
        if place.type == "cuda":
            left = min(PARTS[name][1], left)
        if left < 5:
            note(name, skipped="no time is left")
        else:
            note(name)  # prints the part's name, and makes sure that there is a gpu.json
            run_part(name, sizes, place, out, left, functools.partial(note, name))
    return found

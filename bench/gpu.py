"""What a GPU does with the 1.3B at 81x480x832: `python -m bench gpu`. Figures are printed as they come.

train    a joint training step, checkpointed, compiled and not, its memory beside the plan's
forward  a forward call beside diffusers' model on the same tokens, and with motion; compiled and not
"""

import gc
import json
from collections.abc import Callable, Iterator

import torch
from torch.utils.benchmark import Timer

import flow
from bench.plan import GIB, price_of_motion
from bench.speed import Shape, Sides, inputs
from bench.timing import device_name, random_model
from dual_dit import PRESETS, DualDiTConfig
from flow import Task
from kit import distributed, flops
from kit.monitor import peak_flops

SHAPE = Shape(21, 30, 52)
Figures = Iterator[dict[str, object]]


def seconds(call: Callable[[], object]) -> float:
    """Of a call, the mean of three after two that warm up."""
    return Timer("call()", globals={"call": call}).timeit(3).mean


def train(config: DualDiTConfig, shape: Shape, device: torch.device) -> Figures:
    """As train.py trains a Wan: bf16 autocast, AdamW, an average of the weights."""
    counted = flops.training_memory(config, shape.latents(config), 1, checkpointing=True, text=shape.text)
    yield {"planned_gib": sum(counted) / GIB}
    model = random_model(config, device, torch.float32).train().requires_grad_(True)
    distributed.recompute_blocks(model)
    objective = distributed.Objective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    video, motion, _, text = inputs(config, shape, device)
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

    tokens = shape.tokens(motion=True)
    useful = flops.step_flops(config, tokens, checkpointing=False)  # recomputed blocks are no useful work
    for name in ("plain", "compiled"):
        if name == "compiled":
            distributed.compile_blocks(model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        took = seconds(step)
        found = {"seconds": took, "tokens_per_second": (tokens.video + tokens.motion) / took}
        found |= {"tflops": useful / took / 1e12}
        if device.type == "cuda":
            peak = peak_flops(device, bf16=True)
            found |= {"mfu": peak and useful / took / peak}
            found |= {"peak_gib": torch.cuda.max_memory_allocated(device) / GIB}
        yield {name: found}


@torch.no_grad()
def forward(config: DualDiTConfig, shape: Shape, device: torch.device) -> Figures:
    sides = Sides(config, torch.bfloat16, device)
    calls = sides.forward(shape) | {"joint": sides.joint(shape)}
    price = 1 + price_of_motion(config, shape.tokens(motion=True))[1]
    for name in ("plain", "compiled"):
        if name == "compiled":
            for block in (*sides.ours.blocks, *sides.peer.blocks):
                block.forward = torch.compile(block.forward)
        took = {side: seconds(call) for side, call in calls.items()}
        ratios = {"diffusers_over_ours": took["peer"] / took["ours"]}
        ratios |= {"motion_overhead": took["joint"] / took["ours"] / price}
        yield {name: took | ratios}


PARTS = {"train": train, "forward": forward}


def run_parts(parts: list[str]) -> dict:
    """One part after the other -> the figures."""
    if not torch.cuda.is_available():
        raise ValueError("bench gpu needs a GPU, and torch sees none")
    device = torch.device("cuda")
    found = {"device": device_name(device), "torch": torch.__version__}
    print(f"{found['device']}, torch {torch.__version__}", flush=True)
    for name in PARTS if "all" in parts else parts:
        found[name] = {}
        for figures in PARTS[name](PRESETS["wan2.1-1.3b"], SHAPE, device):
            found[name] |= figures
            print(f"{name}: {json.dumps(figures)}", flush=True)
        gc.collect()  # one part's memory before the next
        torch.cuda.empty_cache()
    return found

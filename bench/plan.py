"""What a training run will need: memory, arithmetic, communication and time, counted from its options."""

import argparse
import dataclasses
import multiprocessing
from typing import NamedTuple

import torch

from bench.timing import peak_gib
from dual_dit import PRESETS, DualDiT, DualDiTConfig
from flow import Task
from kit import distributed
from kit.flops import forward_flops, parameter_count, step_flops, tokens_of, training_memory
from kit.geometry import WAN, Geometry, adjusted
from motion_tokens import MOTION_DIM

GIB = 2**30
PUBLISHED = {"wan2.1-1.3b": WAN[8], "wan2.2-5b": WAN[16]}
# what the paper states of both: parameters, and by what share motion adds to the FLOPs of a call
PAPER = {"wan2.1-1.3b": (2.6e9, 0.129), "wan2.2-5b": (7.5e9, 0.103)}
PAPER_HOURS = {"wan2.1-1.3b": 2300, "wan2.2-5b": 4000}  # about, of both stages
A100 = 312e12  # FLOP/s in bf16


class Price(NamedTuple):
    """By what share motion adds to the FLOPs of a call."""

    linear: float  # counting what is linear in tokens: all but self-attention
    whole: float


def price_of_motion(config: DualDiTConfig, clip: Geometry) -> Price:
    """What a joint call costs more than a call on the video alone, as a share."""
    size = clip.height, clip.width
    joint, alone = (
        forward_flops(config, tokens_of(config, clip.frames, size, clip.stride, motion=motion))
        for motion in (True, False)
    )
    both, video = sum(joint.values()), sum(alone.values())
    linear = (both - joint["self-attention"]) / (video - alone["self-attention"]) - 1
    return Price(linear, both / video - 1)


def plan(args: argparse.Namespace) -> dict:
    """Memory, arithmetic, communication and time of stage 2, counted without allocating anything."""
    published, config = PUBLISHED[args.preset], PRESETS[args.preset]
    _, frames, *size, stride = adjusted(published, args.frames, args.size)
    if min(args.gpus, args.batch) < 1:
        raise ValueError(f"--gpus and --batch are at least 1, got {args.gpus} and {args.batch}")
    if args.batch % args.gpus:
        raise ValueError(f"--batch {args.batch} must be a multiple of --gpus {args.gpus}")
    grid = ((frames - 1) // 4 + 1, *(side // stride for side in size))
    tokens = tokens_of(config, frames, size, stride)
    parts, count, mine = forward_flops(config, tokens), parameter_count(config), args.batch // args.gpus
    print(
        f"{args.preset}, {count / 1e9:.2f} billion parameters; {frames} frames of {size[0]}x{size[1]}: "
        f"{tokens.video} video and {tokens.motion} motion tokens a clip"
    )
    price, (paper_count, paper_price) = price_of_motion(config, published), PAPER[args.preset]
    clip = f"{published.frames} frames of {published.height}x{published.width}"
    print(f"{clip:24}{'ours':>12}{'the paper':>14}")
    print(f"{'parameters, billions':24}{count / 1e9:12.2f}{paper_count / 1e9:14.1f}")
    print(f"{'motion adds, % of FLOPs':24}{100 * price.linear:+12.1f}{100 * paper_price:+14.1f}")
    print(f"{'  with self-attention':24}{100 * price.whole:+12.1f}\n")
    # several nodes of several GPUs have all slices each (HSDP), as in kit/distributed.py
    node = args.node if 1 < args.node < args.gpus else args.gpus
    if args.gpus % node:
        raise ValueError(f"--gpus {args.gpus} must be a multiple of --node {args.node}, the GPUs of a node")
    nodes = args.gpus // node
    where = f"{args.gpus} GPUs" + (f", sharded over {node}" if node > 1 else "")
    print(f"{args.batch} clips a step on {where}; bf16 compute, fp32 state\n")

    plans = {ck: training_memory(config, grid, mine, node, ck) for ck in (False, True)}
    print(f"{'GiB a GPU':24}{'stored':>12}{'checkpointed':>14}")
    for name in plans[False]._fields:
        print(
            f"{name:24}"
            + "".join(
                f"{getattr(each, name) / GIB:{w}.1f}"
                for each, w in zip(plans.values(), (12, 14), strict=True)
            )
        )
    print(f"{'sum':24}{sum(plans[False]) / GIB:12.1f}{sum(plans[True]) / GIB:14.1f}\n")

    total = {ck: args.batch * step_flops(config, tokens, ck) for ck in (False, True)}
    print("TFLOP of one clip's forward call: " + ", ".join(f"{k} {v / 1e12:.1f}" for k, v in parts.items()))
    # bf16 weights are gathered twice and fp32 gradients scattered; their slices are then summed over nodes
    inside, across = 8 * count * (node - 1) / node, 8 * count / node * (nodes - 1) / nodes
    if args.gpus > 1:
        print(f"sent by a GPU in a step: {inside / 1e9:.1f} GB to those {node}, {across / 1e9:.1f} GB beyond")
    seconds = total[True] / (args.peak_tflops * 1e12 * args.mfu * args.gpus)
    days = args.steps * seconds / 86400
    print(
        f"a step at {args.mfu:.0%} of {args.peak_tflops:g} TFLOP/s: {seconds:.1f} s with checkpointing; "
        f"{args.steps} steps: {days:.1f} days, {24 * days * args.gpus:.0f} GPU hours"
    )
    hours = PAPER_HOURS[args.preset]
    paper = hours * 3600 * A100 * args.mfu / total[True]
    print(f"the paper's {hours} GPU hours on A100 would do {paper:.0f} such steps")
    result = {
        "parameters": count,
        "motion_adds": price._asdict(),
        "step_seconds": seconds,
        "gib": {str(ck): sum(p) / GIB for ck, p in plans.items()},
    }
    if args.check:
        result["checked"] = check_plan()
    return result


CHECKED = (  # layers of the 1.3B preset, latents (t h w), checkpointing: small enough for a laptop
    (2, (5, 30, 52), False),
    (2, (5, 30, 52), True),
    (1, (3, 60, 104), False),
)


def check_plan() -> list[float]:
    """Peak memory of real training steps on the CPU, each in a process of its own, over what was counted."""
    print("\nmeasured on this machine (two steps each):")
    context, ratios = multiprocessing.get_context("spawn"), []
    for layers, grid, checkpointing in CHECKED:
        config = dataclasses.replace(PRESETS["wan2.1-1.3b"], layers=layers)
        counted = sum(training_memory(config, grid, 1, checkpointing=checkpointing, average=False))
        with context.Pool(1) as pool:
            measured = pool.apply(measure_step, (config, grid, checkpointing))
        ratios.append(measured / counted)
        how = "checkpointed" if checkpointing else "stored"
        print(f"1.3B, {layers} layers, {grid}, {how}: {measured / GIB:.2f} GiB, {ratios[-1]:.2f} x counted")
    return ratios


def measure_step(config: DualDiTConfig, grid: tuple[int, int, int], checkpointing: bool) -> int:
    """Bytes by which two training steps raise this process's peak memory."""
    before = peak_gib("cpu")
    model = DualDiT(config)
    if checkpointing:
        distributed.recompute_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters())
    time_of, frames = torch.rand(1), 4 * (grid[0] - 1) + 1
    for _ in range(2):
        inputs = torch.randn(1, config.channels, *grid), torch.randn(1, frames, MOTION_DIM), time_of, time_of
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(*inputs, torch.randn(1, 512, config.text_dim), Task.JOINT)
        sum(u.square().mean() for u in outputs).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return int((peak_gib("cpu") - before) * GIB)

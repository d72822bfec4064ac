"""What a training run will need: memory, arithmetic, communication and time, counted from its options."""

from bench.memory import parameter_count, training_memory
from dual_dit import PRESETS, DualDiTConfig
from kit.flops import Tokens, forward_flops, step_flops, tokens_of
from kit.geometry import WAN, adjusted

GIB = 2**30
PUBLISHED = {"wan2.1-1.3b": WAN[8], "wan2.2-5b": WAN[16]}
# what the paper states: parameters, the share that motion adds to the FLOPs of a call, and the GPU hours
# of both stages, about
PAPER = {"wan2.1-1.3b": (2.6e9, 0.129, 2300), "wan2.2-5b": (7.5e9, 0.103, 4000)}
A100 = 312e12  # FLOP/s in bf16


def price_of_motion(config: DualDiTConfig, tokens: Tokens) -> tuple[float, float]:
    """The share that motion adds to the FLOPs of a call: without self-attention, and with it."""
    joint, alone = (forward_flops(config, each) for each in (tokens, tokens._replace(motion=0)))
    both, video = sum(joint.values()), sum(alone.values())
    linear = (both - joint["self-attention"]) / (video - alone["self-attention"])
    return linear - 1, both / video - 1


def plan(
    preset: str, gpus: int, node: int, batch: int, frames: int | None, size: tuple[int, int] | None,
    steps: int, peak_tflops: float, mfu: float,
) -> dict:  # fmt: skip
    """Memory, arithmetic, communication and time of stage 2, counted without allocating anything."""
    published, config = PUBLISHED[preset], PRESETS[preset]
    geometry = adjusted(published, frames, size)
    if batch % gpus:
        raise ValueError(f"--batch {batch} must be a multiple of --gpus {gpus}")
    tokens = tokens_of(config, geometry.grid)
    parts, count, mine = forward_flops(config, tokens), parameter_count(config), batch // gpus
    print(
        f"{preset}, {count / 1e9:.2f} billion parameters; {geometry.frames} frames of "
        f"{geometry.height}x{geometry.width}: {tokens.video} video and {tokens.motion} motion tokens a clip"
    )
    usual = tokens_of(config, published.grid)
    (linear, whole), (paper_count, paper_price, hours) = price_of_motion(config, usual), PAPER[preset]
    clip = f"{published.frames} frames of {published.height}x{published.width}"
    print(f"{clip:24}{'ours':>12}{'the paper':>14}")
    print(f"{'parameters, billions':24}{count / 1e9:12.2f}{paper_count / 1e9:14.1f}")
    print(f"{'motion adds, % of FLOPs':24}{100 * linear:+12.1f}{100 * paper_price:+14.1f}")
    print(f"{'  with self-attention':24}{100 * whole:+12.1f}\n")
    # of several nodes of several GPUs, each has a full set of shards (HSDP), as in kit/distributed.py
    node = node if 1 < node < gpus else gpus
    if gpus % node:
        raise ValueError(f"--gpus {gpus} must be a multiple of --node {node}, the GPUs of a node")
    nodes = gpus // node
    where = f"{gpus} GPUs" + (f", sharded over {node}" if node > 1 else "")
    print(f"{batch} clips a step on {where}; bf16 compute, fp32 state\n")

    plans = {ck: training_memory(config, geometry.grid, mine, node, ck) for ck in (False, True)}
    print(f"{'GiB a GPU':24}{'stored':>12}{'checkpointed':>14}")
    for name, stored, checkpointed in zip(plans[True]._fields, *plans.values(), strict=True):
        print(f"{name:24}{stored / GIB:12.1f}{checkpointed / GIB:14.1f}")
    print(f"{'sum':24}{sum(plans[False]) / GIB:12.1f}{sum(plans[True]) / GIB:14.1f}\n")

    total = batch * step_flops(config, tokens)
    print("TFLOP of one clip's forward call: " + ", ".join(f"{k} {v / 1e12:.1f}" for k, v in parts.items()))
    # bf16 weights are gathered twice and fp32 gradients scattered; gradient shards are summed over nodes
    inside, across = 8 * count * (node - 1) / node, 8 * count / node * (nodes - 1) / nodes
    if gpus > 1:
        print(f"sent by a GPU in a step: {inside / 1e9:.1f} GB to those {node}, {across / 1e9:.1f} GB beyond")
    seconds = total / (peak_tflops * 1e12 * mfu * gpus)
    days = steps * seconds / 86400
    print(
        f"a step at an MFU of {mfu:g}, of {peak_tflops:g} TFLOP/s: {seconds:.1f} s; "
        f"{steps} steps: {days:.1f} days, {24 * days * gpus:.0f} GPU hours"
    )
    paper = hours * 3600 * A100 * mfu / total
    print(f"the paper's {hours} GPU hours on A100 would do {paper:.0f} such steps")
    return {
        "parameters": count,
        "motion_adds": {"linear": linear, "whole": whole},
        "step_seconds": seconds,
        "gib": {str(ck): sum(p) / GIB for ck, p in plans.items()},
    }

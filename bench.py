"""Speed and memory, measured side by side in one run.

python bench.py wan      a whole Wan 1.3B on this machine: seconds, GFLOP/s, peak memory, beside diffusers
"""

import argparse
import dataclasses
import json
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dual_dit import PRESETS, DualDiT, DualDiTConfig
from flow import Task
from kit import cli
from kit.cost import forward_flops, parameter_count, step_flops, tokens_of, training_memory
from kit.files import whole_file
from kit.geometry import PUPPET, WAN
from motion_tokens import MOTION_DIM


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call after one that warms up (or the only one, where it takes minutes)."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[repeats > 1 :])


def peak_gib(device: str) -> float:
    """Most memory used so far: of the GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_model(config, device: str, dtype: torch.dtype) -> DualDiT:
    """A network of this size with random weights, made without a second copy."""
    with torch.device("meta"):
        model = DualDiT(config).to(dtype)
    model = model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        else:
            tensor.normal_(std=0.02)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- a whole Wan


@torch.no_grad()
def bench_wan(args: argparse.Namespace) -> dict:
    """Joint and video-only forward of the 1.3B preset in bf16, beside diffusers' model on the same tokens."""
    from diffusers import WanTransformer3DModel

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

    rows, ours = [], random_model(config, device, torch.bfloat16)
    joint = seconds(lambda: ours(video, motion, time_of, time_of, text, Task.JOINT), device, repeats)
    rows.append(("ours, joint", both, joint, peak_gib(device)))
    plain = seconds(lambda: ours(video, None, time_of, None, text, Task.VIDEO_ONLY), device, repeats)
    rows.append(("ours, video only", alone, plain, peak_gib(device)))
    ours.to_empty(device="meta")  # make room for the peer
    with torch.device("meta"):
        peer = WanTransformer3DModel(
            num_attention_heads=config.heads, attention_head_dim=config.width // config.heads,
            in_channels=config.channels, out_channels=config.channels, ffn_dim=config.ffn,
            num_layers=config.layers, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ).to(torch.bfloat16)  # fmt: skip
    rope = WanTransformer3DModel(num_layers=0, num_attention_heads=1, ffn_dim=1, text_dim=1).rope
    peer = peer.to_empty(device=device)
    peer.rope = rope.to(device)  # its tables are no weights: to_empty would leave them blank
    for parameter in peer.parameters():
        parameter.normal_(std=0.02)
    inputs = video.bfloat16(), 1000 * time_of, text.bfloat16()
    theirs = seconds(lambda: peer(*inputs), device, repeats)
    rows.append(("diffusers, video only", alone, theirs, None))

    print(f"Wan 1.3B, bf16, {frames} frames of {size[0]}x{size[1]}, on {device_name(device)}")
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


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", known)
    return f"{torch.get_num_threads()} threads of {name[1] if name else 'this CPU'}"


# ---------------------------------------------------------------- the plan of a run

GIB = 2**30
# the paper's run: 32 A100 for four days (it states about 4,000 GPU hours)
PAPER_GPUS, PAPER_DAYS, PAPER_HOURS = 32, 4, 4000
A100 = 312e12  # FLOP/s in bf16


def bench_plan(args: argparse.Namespace) -> dict:
    """Memory, arithmetic, communication and time of stage 2, counted without allocating anything."""
    published = {"puppet": PUPPET, "wan2.1-1.3b": WAN[8], "wan2.2-5b": WAN[16]}[args.preset]
    config = PRESETS[args.preset]
    frames, size = args.frames or published.frames, args.size or published[2:4]
    if args.batch % args.gpus:
        raise ValueError(f"--batch {args.batch} must be a multiple of --gpus {args.gpus}")
    grid = ((frames - 1) // 4 + 1, *(side // published.stride for side in size))
    tokens = tokens_of(config, frames, size, published.stride)
    parts, count, mine = forward_flops(config, tokens), parameter_count(config), args.batch // args.gpus
    print(
        f"{args.preset}, {count / 1e9:.2f} billion parameters; {frames} frames of {size[0]}x{size[1]}: "
        f"{tokens.video} video and {tokens.motion} motion tokens a clip"
    )
    print(f"{args.batch} clips a step on {args.gpus} GPUs, all sharded (FSDP), bf16 compute, fp32 state\n")

    plans = {ck: training_memory(config, grid, mine, args.gpus, ck) for ck in (False, True)}
    print(f"{'GiB a GPU':24}{'stored':>12}{'checkpointed':>14}")
    for name in plans[False]._fields:
        print(
            f"{name:24}"
            + "".join(
                f"{getattr(plan, name) / GIB:{w}.1f}"
                for plan, w in zip(plans.values(), (12, 14), strict=True)
            )
        )
    print(f"{'sum':24}{sum(plans[False]) / GIB:12.1f}{sum(plans[True]) / GIB:14.1f}\n")

    total = {ck: args.batch * step_flops(config, tokens, ck) for ck in (False, True)}
    print("TFLOP of one clip's forward call: " + ", ".join(f"{k} {v / 1e12:.1f}" for k, v in parts.items()))
    traffic = 0 if args.gpus == 1 else 8 * count * (args.gpus - 1) / args.gpus
    print(f"communication: {traffic / 1e9:.1f} GB a GPU and step (bf16 weights twice, fp32 gradients once)")
    seconds = total[True] / (args.peak_tflops * 1e12 * args.mfu * args.gpus)
    days = args.steps * seconds / 86400
    print(
        f"a step at {args.mfu:.0%} of {args.peak_tflops:g} TFLOP/s: {seconds:.1f} s with checkpointing; "
        f"{args.steps} steps: {days:.1f} days, {24 * days * args.gpus:.0f} GPU hours"
    )
    paper = PAPER_GPUS * PAPER_DAYS * 86400 * A100 * args.mfu / total[True]
    print(
        f"the paper's {PAPER_GPUS} A100 in {PAPER_DAYS} days (about {PAPER_HOURS} GPU hours by its count) "
        f"would do {paper:.0f} such steps"
    )
    result = {
        "parameters": count,
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
    model.checkpointing = checkpointing
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="what", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    common.add_argument("--frames", type=int, metavar="N", help="4n+1")
    whole = verbs.add_parser(
        "wan",
        parents=[common],
        help="a whole Wan 1.3B beside diffusers' (default 17 frames on a CPU, 81 on a GPU)",
    )
    whole.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    plan = verbs.add_parser("plan", parents=[common], help="what a training run will need")
    plan.add_argument("--preset", choices=PRESETS, default="wan2.2-5b")
    plan.add_argument("--gpus", type=int, default=32, metavar="N")
    plan.add_argument("--batch", type=int, default=32, metavar="CLIPS", help="a step, over all GPUs")
    plan.add_argument("--size", type=cli.size, metavar="HxW", help="pixels; default: as published")
    plan.add_argument("--steps", type=int, default=10_000)
    plan.add_argument(
        "--peak-tflops", type=float, default=A100 / 1e12, help="of a GPU in bf16: A100 312, H100 989"
    )
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    plan.add_argument("--check", action="store_true", help="measure small runs beside the counted memory")
    args = parser.parse_args()
    result = {"wan": bench_wan, "plan": bench_plan}[args.what](args)
    if args.json:
        with whole_file(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)

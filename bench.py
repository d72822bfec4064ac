"""Speed and memory, measured side by side in one run.

python bench.py wan      a whole Wan 1.3B on this machine: seconds, GFLOP/s, peak memory, beside diffusers
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dual_dit import PRESETS, DualDiT
from flow import Task
from kit import cli
from kit.cost import forward_flops, tokens_of
from kit.files import whole_file


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
    del ours
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
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads of {(model or ['this CPU'])[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("wan",))
    parser.add_argument("--frames", type=int, metavar="N", help="4n+1; default: 81 on a GPU, 17 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    result = {"wan": bench_wan}[args.what](args)
    if args.json:
        with whole_file(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)

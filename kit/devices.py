"""What a machine is fast at: the precision and the number of clips it computes with unless told otherwise."""

import time

import torch

CPU_CLIPS = 8  # that a CPU trains on at a time


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a linear layer of size x size on as many rows on a CPU, measured."""
    x = torch.ones(size, size, dtype=dtype, device=device)
    x @ x.mT  # warms up
    start = time.perf_counter()
    for _ in range(3):
        x @ x.mT  # as a layer multiplies: CPUs without bf16 units take twenty times longer for x @ x
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def faster_in_bf16(device: torch.device) -> bool:
    """Whether this machine multiplies bf16 matrices faster than fp32."""
    if device.type == "cuda":
        return True
    return matmul_rate(device, torch.bfloat16, size=512) > matmul_rate(device, torch.float32, size=512)


def microbatches(share: int, device: torch.device) -> int:
    """Into how many microbatches a rank's share of a batch is split."""
    # the tensors of more clips outgrow a CPU's cache, and every pass over them waits for memory
    return share // CPU_CLIPS if device.type == "cpu" and share % CPU_CLIPS == 0 else 1

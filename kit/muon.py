"""AdamW, and for the puppet's matrices Muon: torch's own, with an inner loop that batches matrices.

Muon replaces the momentum of a matrix, U·S·Vᵀ, by nearly U·Vᵀ. torch.optim.Muon does so matrix by matrix and
always in bf16, which CPUs without bf16 units compute far slower than fp32; here all matrices of one shape are
one batch, in fp32.
"""

from itertools import groupby

import torch
from torch import Tensor

from dual_dit import DualDiT
from kit import distributed

WEIGHT_DECAY = {"puppet": 1e-2, "wan": 1e-3}


def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (n rows columns) -> near U·Vᵀ of each, by the quintic Newton-Schulz iteration."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the products below are (rows rows): make rows the shorter side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # singular values are at most 1
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b·gram + c·gram²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a·x + polynomial·x
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw": its steps have AdamW's size."""

    def __init__(self, params: list[Tensor], weight_decay: float):
        super().__init__(params, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            whitening = (group["ns_coefficients"], group["ns_steps"], group["eps"])
            trained = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: tuple(p.shape))
            for shape, group_of_shape in groupby(trained, key=lambda p: tuple(p.shape)):
                same = list(group_of_shape)
                gradients, buffers = [p.grad for p in same], [self._buffer(p) for p in same]
                torch._foreach_lerp_(buffers, gradients, 1 - momentum)
                updates = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))  # Nesterov's
                updates = orthogonalise(updates, *whitening).unbind()
                torch._foreach_mul_(same, 1 - lr * group["weight_decay"])
                torch._foreach_add_(same, updates, alpha=-lr * 0.2 * max(shape) ** 0.5)

    def _buffer(self, p: Tensor) -> Tensor:
        """A matrix's momentum, zero at first."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        return self.state[p]["momentum_buffer"]


def optimizers(model: DualDiT, kind: str) -> list[torch.optim.Optimizer]:
    """Muon for the puppet's matrices within blocks, AdamW for everything else; a Wan has AdamW only."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = {"weight_decay": WEIGHT_DECAY[kind]}
    if kind == "wan":  # Muon's steps have full rank: they would overwrite what the video expert has learned
        return [torch.optim.AdamW([p for _, p in trained], fused=True, **decay)]
    matrices = {name: p for name, p in trained if name.startswith("blocks.") and p.ndim == 2}
    others = [p for name, p in trained if name not in matrices]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), fused=True, **decay)
    if not matrices:  # stage 1 of a single stream: all blocks are frozen
        return [adamw]
    # Muon's steps have AdamW's size: one learning rate serves both
    muon = Muon(list(matrices.values()), **decay)
    muon.register_step_pre_hook(distributed.gather_gradients)
    return [muon, adamw]

"""Muon in batches: torch's own, matrix by matrix, up to the rounding of its bf16; and what it should be."""

import copy

import pytest
import torch
from torch import nn

from kit.muon import Muon, orthogonalise

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315), 5, 1e-7)  # torch.optim.Muon's
SHAPES = ((24, 64), (64, 24), (40, 40), (24, 64), (64, 24))


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) / 8) for shape in SHAPES]


@pytest.mark.parametrize("shape", ((3, 24, 64), (3, 64, 24), (3, 40, 40)), ids=("wide", "tall", "square"))
def test_orthogonalising_keeps_singular_vectors_and_brings_values_near_one(shape):
    # catches matrices mixed up in the batch, a norm over the whole batch, tall ones that come back wide
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    u, values, vt = torch.linalg.svd(x.double(), full_matrices=False)
    inside = u.mT @ orthogonalise(x, *NEWTON_SCHULZ).double() @ vt.mT  # diagonal, where U and V are kept
    found = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(found), rtol=0, atol=1e-3)
    large = values > 0.02 * values.norm(dim=1, keepdim=True)  # five steps lift what is not far below
    assert large.double().mean() > 0.9
    assert not orthogonalise(torch.zeros(2, 3, 5), *NEWTON_SCHULZ).any()  # nothing is divided by zero
    assert ((found > 0.6) & (found < 1.3))[large].all(), found
    assert (found > 0).all() and (found < 1.3).all()


def test_steps_are_those_of_torchs_muon():
    # catches another momentum, Nesterov, decay or size of steps, and updates that reach the wrong matrix
    ours, theirs = matrices(), matrices()
    start = [p.detach().clone() for p in ours]
    optimizers = (
        Muon(ours, weight_decay=0.1),
        torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        if step == 2:  # a task can leave a matrix out
            ours[1].grad = theirs[1].grad = None
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            optimizer.step()
    mine, other = optimizers
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()  # bf16 has 8 bits, in every product
        torch.testing.assert_close(mine.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"])
    # what it remembers has torch's names: a checkpoint of the one is a checkpoint of the other
    assert all(list(mine.state[p]) == ["momentum_buffer"] for p in ours)
    other.load_state_dict(copy.deepcopy(mine.state_dict()))

"""Muon in batches: torch's own, matrix by matrix, up to the rounding of its bf16."""

import copy

import torch
from conftest import tiny_model
from torch import nn

from kit.muon import Muon, optimizers

SHAPES = ((24, 64), (64, 24), (40, 40), (24, 64), (64, 24))


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) / 8) for shape in SHAPES]


def test_steps_are_those_of_torchs_muon():
    # catches another momentum, Nesterov, decay or size of steps, updates that reach the wrong matrix, a norm
    # over all matrices of a shape, tall ones that come back wide
    ours, theirs = matrices(), matrices()
    start = [p.detach().clone() for p in ours]
    optimizers = (
        Muon(ours, weight_decay=0.1),
        torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            scale = 10.0**i if step or i < 4 else 0.0  # nothing is divided by zero
            mine.grad = scale * torch.randn(mine.shape, generator=generator)
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


def test_muon_has_the_matrices_within_blocks_and_both_decay():
    # catches embeddings and heads, whose rows are no directions of one space, trained by Muon
    model = tiny_model()
    names = {p: name for name, p in model.named_parameters()}
    muon, adamw = optimizers(model, "puppet")
    of_muon, others = ({names[p] for g in o.param_groups for p in g["params"]} for o in (muon, adamw))
    assert of_muon == {n for p, n in names.items() if n.startswith("blocks.") and p.ndim == 2}
    assert of_muon | others == {*names.values()} and not of_muon & others
    assert {g["weight_decay"] for o in (muon, adamw) for g in o.param_groups} == {1e-2}
    assert adamw.param_groups[0]["betas"] == (0.9, 0.98)  # as the shipped weights were trained

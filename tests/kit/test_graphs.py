"""What a GPU records is the network: each task's inputs in their order, and what is generated."""

import pytest
import torch
from conftest import tiny_model

import flow
from flow import Draw, Task
from kit import graphs


@pytest.mark.parametrize("task", Task)
def test_a_recorded_network_is_the_network(monkeypatch, task):
    # catches inputs in another order, and a head whose output no loss uses being trained by a zero gradient
    recorded = []
    monkeypatch.setattr(
        torch.cuda, "make_graphed_callables", lambda module, *_, **__: recorded.append(module) or module
    )
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    draw = flow.draw(generator, 2, 3)
    draw = Draw(task, *draw[1:])
    video, motion = (
        torch.randn(3, 48, 2, 8, 8, generator=generator),
        torch.randn(3, 5, 235, generator=generator),
    )
    given = video, motion, torch.randn(3, 4, 64, generator=generator), torch.zeros(4, 64), draw
    network, found = graphs.Recorded(model), []
    for called in (model, network, network):
        model.zero_grad()
        loss = flow.loss(called, *given)
        loss.total.backward()
        found.append((loss, [p.grad for p in model.parameters()]))
    (expected, gradients), *others = found
    for loss, theirs in others:
        assert [x is None for x in loss] == [x is None for x in expected]
        assert torch.equal(loss.total, expected.total)
        assert [g is None for g in theirs] == [g is None for g in gradients]
        assert all(torch.equal(a, b) for a, b in zip(theirs, gradients, strict=True) if a is not None)
    assert len(recorded) == 1  # the second call replays

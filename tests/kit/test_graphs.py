"""What a GPU records is the network: each task's inputs in their order, and what is generated."""

from unittest.mock import MagicMock

import pytest
import torch
from conftest import tiny_model

import flow
from flow import Task
from kit import graphs


class Eager(graphs.RecordedPass):
    """A pass whose replay computes anew in the same memory, without a GPU."""

    def __init__(self, *given):
        super().__init__(*given)
        self.forward.replay, self.backward.replay = self.launch_forward, self.launch_backward

    @torch.enable_grad()
    def launch_forward(self):
        for u, now in zip(self.outputs, self.run_forward(), strict=True):
            u.data.copy_(now)

    @torch.enable_grad()
    def launch_backward(self):
        now = self.run_backward(self.run_forward(), self.output_gradients)
        for gradient, new in zip(self.gradients, now, strict=True):
            if new is not None:
                gradient.copy_(new)


@pytest.mark.parametrize("task", Task)
def test_a_recorded_network_is_the_network(monkeypatch, task):
    # catches inputs in another order, and a head whose output no loss uses being trained by a zero gradient
    for name in ("Stream", "stream", "current_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock)
    monkeypatch.setattr(graphs, "RecordedPass", Eager)
    generator = torch.Generator().manual_seed(0)
    draw = flow.draw(generator, 2, 3)._replace(task=task)
    shapes = (3, 48, 2, 8, 8), (3, 5, 235), (3, 4, 64)
    video, motion, text = (torch.randn(shape, generator=generator) for shape in shapes)
    model = tiny_model()
    network, found = graphs.Recorded(model), []
    others = video + 1, motion + 1, text
    for called, given in (
        (network, others),
        (model, (video, motion, text)),
        (network, (video, motion, text)),
    ):
        model.zero_grad()
        loss = flow.loss(called, *given, torch.zeros(4, 64), draw)
        loss.total.backward()
        found.append((loss, [p.grad for p in model.parameters()]))
    _, (expected, gradients), (loss, replayed) = found
    assert [x is None for x in loss] == [x is None for x in expected]
    assert torch.equal(loss.total, expected.total)
    assert [g is None for g in replayed] == [g is None for g in gradients]
    assert all(torch.equal(a, b) for a, b in zip(replayed, gradients, strict=True) if a is not None)
    assert len(network.passes) == 1

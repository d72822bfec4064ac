"""Many ranks train as one process does: DDP, FSDP, HSDP, microbatches, and going on with other ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from processes import finish, start
from safetensors.torch import load_file

import flow
from flow import Draw, Task
from kit import distributed

STEPS = 20  # two of stage 1
CALL = ("--steps", STEPS, "--batch", 4, "--frames", 5, "--save-every", 10, "--validate-every", 10)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def agree(run: Path, other: Path) -> None:
    """Losses, gradient norms, validation and final weights of two runs are the same to fp32's tolerance."""
    for mine, expected in zip(lines(run), lines(other), strict=True):
        assert mine.keys() == expected.keys()
        for key in ("step", "stage", "frames", "task", "skipped"):
            assert mine.get(key) == expected.get(key)
        for key in ("loss", "video", "motion", "grad_norm", "validation"):
            if key in expected:
                assert mine[key] == pytest.approx(expected[key], rel=2e-5), (mine["step"], key)
    ours, expected = (load_file(each / "weights.safetensors") for each in (run, other))
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_weights) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    finish(start("--init", tiny_weights, *CALL, "--out", folder / "run", log=folder / "log"), folder / "log")
    return folder / "run"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_weights) -> Path:
    """The run of two ranks under FSDP, with two microbatches each."""
    folder = tmp_path_factory.mktemp("sharded")
    call = ("--init", tiny_weights, *CALL, "--parallel", "fsdp", "--accumulate", 2, "--out", folder / "run")
    finish(start(*call, ranks=2, log=folder / "log"), folder / "log")
    return folder / "run"


def test_one_process_sees_every_kind_of_step(one):
    # what the comparisons below are worth: every task, both stages, validation of both
    steps = [line for line in lines(one) if "loss" in line]
    assert {line["task"] for line in steps} >= {"motion_only", "joint", "motion_to_video", "video_to_motion"}
    assert [line["stage"] for line in steps] == [1] * 2 + [2] * 18
    assert [line["step"] for line in lines(one) if "validation" in line] == [0, 10, 20]


def test_fsdp_is_one_process(one, sharded):
    # catches sums taken for averages, slices clipped by their own norm, Muon on slices, stale weights
    agree(sharded, one)


@pytest.mark.parametrize(
    ("ranks", "microbatches"), ((1, 4), (2, 2)), ids=("microbatches", "ddp with microbatches")
)
def test_ranks_and_microbatches_are_one_process(one, tiny_weights, tmp_path, ranks, microbatches):
    # catches a loss that is not the mean over the global batch, repeated samples, no exchange, or too many
    out = tmp_path / "run"
    call = ("--init", tiny_weights, *CALL, "--accumulate", microbatches, "--checkpointing", "--out", out)
    finish(start(*call, ranks=ranks, log=tmp_path / "log"), tmp_path / "log")
    agree(out, one)


@pytest.mark.parametrize(
    ("made_by", "ranks", "options"),
    (("one", 4, ("--parallel", "fsdp")), ("sharded", 1, ()), ("sharded", 2, ("--parallel", "ddp"))),
    ids=("one process, then two nodes of two", "two slices, then one process", "fsdp, then ddp"),
)
def test_a_run_goes_on_with_other_ranks(one, request, tmp_path, made_by, ranks, options):
    # catches optimizer states, averages or weights of one rank only, gradients that do not cross nodes
    out = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(made_by), out)
    shutil.rmtree(out / "checkpoints" / "step-00000020")
    call = (*CALL, *options, "--resume", "--out", out)
    finish(start(*call, ranks=ranks, ranks_a_node=min(ranks, 2), log=tmp_path / "log"), tmp_path / "log")
    agree(out, one)
    if "fsdp" in options:  # every rank wrote its share
        assert len(list((out / "checkpoints" / "step-00000020").glob("__*.distcp"))) == ranks


def test_compiled_blocks_compute_the_same(monkeypatch):
    # a backend that runs what was captured: catches blocks that are not captured whole, or not recomputed
    graphs, compile_it = [], torch.compile
    backend = lambda graph, _: graphs.append(graph) or graph
    monkeypatch.setattr(torch, "compile", lambda f: compile_it(f, backend=backend, fullgraph=True))
    draw = Draw(torch.randn(2, 48, 2, 8, 8), torch.randn(2, 5, 235), torch.rand(2), torch.rand(2))
    batch = torch.randn(2, 48, 2, 8, 8), torch.randn(2, 5, 235), torch.randn(2, 16, 64)
    model = tiny_model()

    def gradients() -> list[torch.Tensor]:
        found = []
        for task in (Task.JOINT, Task.MOTION_ONLY):
            model.zero_grad()
            flow.loss(model, *batch, task, draw).total.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return found

    expected = gradients()
    distributed.compile_blocks(model)
    model.checkpointing = True
    for found, right in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2  # one a task, shared by the blocks

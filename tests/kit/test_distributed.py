"""Many ranks train as one process does: DDP, FSDP, HSDP, microbatches, and going on with other ranks."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import metrics, tiny_model
from processes import finish, start
from safetensors.torch import load_file

import flow
from flow import Draw, Task
from kit import checkpoints, distributed

# 2 steps of stage 0, 1 of stage 1 and 5 of stage 2, all tasks among them; the ends of stages are saved too
CALL = ("--batch", 4, "--frames", 5, "--steps", 8, "--seed", 1, "--keep", 9)
CALL += ("--save-every", 2, "--validate-every", 8)
RUNS = {  # number of ranks, options
    "one": (1, ()),
    "microbatches": (1, ("--accumulate", 4, "--checkpointing")),
    "ddp": (2, ("--accumulate", 2, "--checkpointing", "--parallel", "ddp")),
    "fsdp": (2, ("--accumulate", 2, "--parallel", "fsdp")),
}


def agree(run: Path, other: Path) -> None:
    """Losses, gradient norms, validation and final weights of two runs are the same to fp32's tolerance."""
    for mine, expected in zip(metrics(run), metrics(other), strict=True):
        assert mine.keys() == expected.keys()
        for key in ("step", "stage", "frames", "task"):
            assert mine.get(key) == expected.get(key)
        for key in ("loss", "video", "motion", "grad_norm", "validation"):
            if key in expected:
                assert mine[key] == pytest.approx(expected[key], rel=2e-5), (mine["step"], key)
    ours, expected = (load_file(each / "weights.safetensors") for each in (run, other))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_weights) -> Callable[[str], Path]:
    """run(name): the folder of one of RUNS, trained when it is first asked for."""

    @functools.cache
    def trained(name: str) -> Path:
        ranks, options = RUNS[name]
        out = tmp_path_factory.mktemp(name)
        call = ("--init", tiny_weights, *CALL, *options, "--out", out)
        finish(start(*call, ranks=ranks, log=out / "log"), out / "log")
        return out

    return trained


@pytest.mark.parametrize("name", ("microbatches", "ddp", "fsdp"))
def test_ranks_and_microbatches_are_one_process(run, name):
    # catches a loss that is not the mean over the global batch, repeated samples, no exchange, or too many;
    # under FSDP sums taken for averages, slices clipped by their own norm, Muon on slices, stale weights
    agree(run(name), run("one"))
    steps = [line for line in metrics(run("one")) if "loss" in line]
    assert {line["task"] for line in steps} == {task.name.lower() for task in Task}  # each was compared


GOES_ON = {  # a run and the step of its checkpoint, the ranks and options that it goes on with
    "one process, then two nodes of two": ("one", 6, 4, ("--parallel", "fsdp")),
    "two slices, then one process": ("fsdp", 6, 1, ()),
    "ddp from the end of a stage": ("ddp", 3, *RUNS["ddp"]),
    "fsdp from the end of a stage": ("fsdp", 3, *RUNS["fsdp"]),
}


@pytest.mark.parametrize(("name", "step", "ranks", "options"), GOES_ON.values(), ids=GOES_ON)
def test_a_run_goes_on_with_these_ranks_or_others(run, tmp_path, name, step, ranks, options):
    # catches optimizer states, averages or weights of one rank only, gradients that do not cross nodes, a
    # stage that is begun twice or not at all, hooks of the stage before
    out = tmp_path / "run"
    shutil.copytree(run(name), out)
    for later in range(step + 1, 9):
        shutil.rmtree(checkpoints.folder_of(out, later), ignore_errors=True)
    call = (*CALL, *options, "--resume", "--out", out)
    finish(start(*call, ranks=ranks, ranks_a_node=min(ranks, 2), log=tmp_path / "log"), tmp_path / "log")
    agree(out, run("one"))
    if (ranks, options) == RUNS[name]:
        assert (out / "weights.safetensors").read_bytes() == (run(name) / "weights.safetensors").read_bytes()
    # every rank wrote its share
    assert len({path.name[:4] for path in checkpoints.folder_of(out, 8).glob("__*.distcp")}) == ranks


def test_compiled_blocks_compute_the_same(monkeypatch):
    # a backend that runs what was captured: catches blocks that are captured in pieces, and graphs compiled
    # for validation and pictures, half a minute each
    graphs, compile_it = [], torch.compile
    backend = lambda graph, _: graphs.append(graph) or graph
    monkeypatch.setattr(torch, "compile", lambda f: compile_it(f, backend=backend, fullgraph=True))
    batch = torch.randn(2, 48, 2, 8, 8), torch.randn(2, 5, 235), torch.randn(2, 16, 64), torch.randn(16, 64)
    drawn = torch.tensor([True, False]), torch.rand(2), torch.tensor([1, 2])
    model = tiny_model()

    def gradients() -> list[torch.Tensor]:
        found = []
        for task in (Task.JOINT, Task.MOTION_ONLY):
            model.zero_grad()
            flow.loss(model, *batch, Draw(task, *drawn)).total.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return found

    expected = gradients()
    distributed.recompute_blocks(model)  # in train.py's order
    distributed.compile_blocks(model)
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        flow.loss(model, *batch, Draw(Task.VIDEO_ONLY, *drawn))
    assert len(graphs) == 2  # one a task, shared by the blocks

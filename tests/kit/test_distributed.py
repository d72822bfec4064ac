"""Many ranks train as one process does: DDP, FSDP, HSDP, microbatches, and going on with other ranks."""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from processes import finish, start
from safetensors.torch import load_file

import flow
from flow import Draw, Task
from kit import checkpoints, distributed

STEPS = 24  # 6 of stage 0, 2 of stage 1 and 16 of stage 2
PLAN = ("--batch", 4, "--frames", 5)
CALL = (*PLAN, "--steps", STEPS, "--save-every", 12, "--validate-every", 9)


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
    made = {"video_only", "motion_only", "joint", "motion_to_video", "video_to_motion"}
    assert {line["task"] for line in steps} == made
    assert [line["stage"] for line in steps] == [0] * 6 + [1] * 2 + [2] * 16
    assert [line["step"] for line in lines(one) if "validation" in line] == [0, 9, 18, 24]


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
    shutil.rmtree(out / "checkpoints" / "step-00000024")
    call = (*CALL, *options, "--resume", "--out", out)
    finish(start(*call, ranks=ranks, ranks_a_node=min(ranks, 2), log=tmp_path / "log"), tmp_path / "log")
    agree(out, one)
    if "fsdp" in options:  # every rank wrote its share
        assert len(list((out / "checkpoints" / "step-00000024").glob("__*.distcp"))) == ranks


def killed_after_saving(step: int) -> None:
    """This process dies, as all of the others do, when the checkpoint of a step is whole."""
    save = checkpoints.Writer.save

    def last(self: checkpoints.Writer, record: dict, state: dict) -> None:
        save(self, record, state)
        if record["step"] == step:
            self.wait()
            os._exit(9)

    checkpoints.Writer.save = last


@pytest.mark.parametrize("parallel", ("ddp", "fsdp"))
def test_two_ranks_killed_at_the_end_of_each_stage_and_within_go_on_bit_for_bit(
    tiny_weights, tmp_path, parallel
):
    # catches a stage that is begun twice or not at all, hooks of the stage before, ranks that part
    log = tmp_path / "log"
    call = ("--init", tiny_weights, *PLAN, "--steps", 12, "--parallel", parallel, "--validate-every", 0)
    whole, parts = (("--out", tmp_path / name, "--save-every", 1) for name in ("whole", "parts"))
    finish(start(*call, *whole, ranks=2, log=log), log)
    for step in (3, 4, 9):  # stage 0 is three steps, stage 1 is one
        before = functools.partial(killed_after_saving, step)
        finish(start(*call, *parts, "--resume", "auto", ranks=2, log=log, before=before), log, code=9)
    finish(start(*call, *parts, "--resume", ranks=2, log=log), log)
    losses = [[(line["stage"], line["loss"]) for line in lines(tmp_path / n)] for n in ("whole", "parts")]
    assert losses[0] == losses[1] and [stage for stage, _ in losses[0]] == [0] * 3 + [1] + [2] * 8
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_compiled_blocks_compute_the_same(monkeypatch):
    # a backend that runs what was captured: catches blocks that are not captured whole, or not recomputed
    graphs, compile_it = [], torch.compile
    backend = lambda graph, _: graphs.append(graph) or graph
    monkeypatch.setattr(torch, "compile", lambda f: compile_it(f, backend=backend, fullgraph=True))
    batch = torch.randn(2, 48, 2, 8, 8), torch.randn(2, 5, 235), torch.randn(2, 16, 64), torch.randn(16, 64)
    drawn = torch.tensor([True, False]), *torch.rand(2, 2), torch.tensor([1, 2])
    model = tiny_model()

    def gradients() -> list[torch.Tensor]:
        found = []
        for task in (Task.JOINT, Task.MOTION_ONLY):
            model.zero_grad()
            flow.loss(model, *batch, Draw(task, *drawn)).total.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return found

    expected = gradients()
    distributed.compile_blocks(model)
    distributed.recompute_blocks(model)
    for found, right in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2  # one a task, shared by the blocks

"""Runs that are killed, stopped, out of disk or given NaN: nothing is lost, and what went wrong is said."""

import dataclasses
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, metrics, small_codec
from processes import finish, start, wait_for

from dual_dit import DualDiT
from kit import checkpoints, weights
from kit.data import batch as batches
from kit.data.batch import Batch

KILLS, STEPS = 3, 24


@pytest.fixture(scope="module")
def call(tmp_path_factory) -> tuple[object, ...]:
    """A run from weights so small that a step takes a few hundredths of a second."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, layers=1, width=16, ffn=16)
    path = tmp_path_factory.mktemp("weights") / "smallest.safetensors"
    weights.save_weights(path, config, DualDiT(config).state_dict(), small_codec().state())
    plan = ("--steps", STEPS, "--batch", 2, "--frames", 5, "--save-every", 2, "--validate-every", 0)
    return ("--init", path, *plan)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, call) -> Path:
    """The run of one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(*call, "--out", folder / "run", log=folder / "log"), folder / "log")
    return folder / "run"


def lines(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def losses(out: Path) -> dict[int, float]:
    """Of every step; none may be missing or logged twice."""
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(len(records)))
    return {record["step"]: record["loss"] for record in records}


def saving(out: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or that were when a run died."""
    return {(path.name, path.stat().st_ctime_ns) for path in (out / "checkpoints").glob(".step-*")}


# ---------------------------------------------------------------- killed


def test_a_run_killed_again_and_again_ends_as_if_undisturbed(call, undisturbed, tmp_path):
    # catches anything that a checkpoint does not hold, half a checkpoint taken for one, and lost logs
    chance, out, log = random.Random(), tmp_path / "run", tmp_path / "log"
    during_saves = 0
    for kill in range(KILLS):
        # five steps on, a checkpoint has been published: the run gets ahead
        before, old, more = len(lines(out)), saving(out), chance.randint(5, 8)
        (process,) = start(*call, "--out", out, "--resume", "auto", log=log)
        if kill % 2:  # within a step, a few steps on
            reached = wait_for(lambda more=more, before=before: len(lines(out)) >= before + more, process)
        else:  # within a save, or just after
            reached = wait_for(lambda old=old: bool(saving(out) - old), process)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert reached and process.exitcode == -signal.SIGKILL, log.read_text()[-4000:]
        during_saves += bool(saving(out))
    assert during_saves > 0
    assert len(lines(out)) < STEPS  # the kills were within the run
    finish(start(*call, "--out", out, "--resume", log=log), log)
    assert (out / "weights.safetensors").read_bytes() == (undisturbed / "weights.safetensors").read_bytes()
    assert losses(out) == losses(undisturbed)


def test_torchrun_restarts_a_run_that_lost_a_rank(call, undisturbed, tmp_path):
    # catches survivors that hang, and a restart that begins anew or loses what was logged
    out, log = tmp_path / "run", tmp_path / "log"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1)
    how = ("--resume", "auto", "--parallel", "ddp", "--device", "cpu", "--precision", "fp32")
    arguments = (*call, "--out", out, *how)
    with log.open("w") as printed:
        agent = subprocess.Popen(
            [*map(str, (sys.executable, "-m", *torchrun, "train.py", *arguments))],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=printed, stderr=printed,
        )  # fmt: skip
    try:
        while not checkpoints.folder_of(out, 6).exists():
            assert agent.poll() is None, log.read_text()[-4000:]
            time.sleep(0.01)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert agent.wait(300) == 0, log.read_text()[-4000:]
    finally:
        agent.terminate()
    assert 6 <= json.loads((out / "run.json").read_text())["first_step"] < STEPS  # the second start went on
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-4)


def test_sigterm_saves_and_ends_well(call, undisturbed, tmp_path):
    # catches a run that dies at once, one that goes on, and ranks that stop at different steps
    out, log = tmp_path / "run", tmp_path / "log"
    call = (*call, "--parallel", "ddp", "--out", out)
    processes = start(*call, "--save-every", 1000, ranks=2, log=log)
    assert wait_for(lambda: len(lines(out)) > 5, processes[0])
    processes[-1].terminate()  # one of them is enough
    printed = finish(processes, log)
    stopped = checkpoints.newest(out).record["step"]
    assert 5 < stopped == len(lines(out)) < STEPS
    assert f"is saved at step {stopped}; go on with --resume" in printed
    finish(start(*call, "--resume", ranks=2, log=log), log)
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-4)


# ---------------------------------------------------------------- a full disk


def fail_at_step_6() -> None:
    """From the save of step 6 on, the second of two ranks can write no file of over 20 kB."""
    save = checkpoints.Writer.save

    def limited(self: checkpoints.Writer, record: dict, state: dict) -> None:
        self.wait()
        if record["step"] == 6 and self.world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(self, record, state)

    checkpoints.Writer.save = limited


def test_a_save_that_fails_says_so_and_leaves_the_last_checkpoint(call, undisturbed, tmp_path):
    # catches half a checkpoint under a good name, an error lost in the writing thread, ranks that hang
    out, log = tmp_path / "run", tmp_path / "log"
    processes = start(*call, "--keep", 2, "--out", out, ranks=2, log=log, before=fail_at_step_6)
    printed = finish(processes, log, code=2)
    assert printed.count(f"cannot save {checkpoints.folder_of(out, 6)}: ") == 2
    assert os.strerror(errno.EFBIG) in printed and "go on with --resume" in printed
    steps = [int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/*")]
    assert sorted(steps) == [4, 5]  # the last two; a stage ended with step 5
    finish(start(*call, "--out", out, "--resume", log=log), log)  # as one process, when there is room
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-4)


# ---------------------------------------------------------------- not a number


def poison() -> None:
    """Batches of steps 3 to 7, and from 9 on, hold a NaN, in the last rank's samples only."""
    read = batches.read

    def poisoned(*arguments: object, batch: int, **others: object) -> list[Batch]:
        found = read(*arguments, batch=batch, **others)
        for made, part in zip(found, arguments[3], strict=True):
            if part.step not in (0, 1, 2, 8) and part.samples.stop == batch:
                for clean in (made.video, made.motion):
                    if clean is not None:
                        clean[-1, 0] = torch.nan
        return found

    batches.read = poisoned


def test_steps_that_are_not_finite_are_skipped_on_every_rank_and_ten_in_a_row_end_the_run(call, tmp_path):
    # catches NaN in weights, optimizer states or averages, one rank that goes on alone, a count never reset
    out, log = tmp_path / "run", tmp_path / "log"
    printed = finish(start(*call, "--out", out, ranks=2, log=log, before=poison), log, code=2)
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(19))
    assert [record["step"] for record in records if "loss" in record] == [0, 1, 2, 8]
    assert [record["skipped"] for record in records] == [0, 0, 0, 1, 2, 3, 4, 5, 5, *range(6, 16)]
    assert printed.count("skipped, loss or gradient is not finite") == 15
    task = records[-1]["task"]
    assert printed.count(f"not finite; last: seed 0, step 18, task {task}, samples 0 to 1\n") == 2
    folder = checkpoints.newest(out).folder
    for kind in ("model", "ema", "optimizer"):
        assert all(value.isfinite().all() for value in checkpoints.load_whole(folder, kind).values())

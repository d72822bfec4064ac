"""Runs that are killed, stopped, out of disk or given NaN: nothing is lost, and what went wrong is said."""

import dataclasses
import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from processes import finish, start, wait_for

from dual_dit import DualDiT
from kit import checkpoints, puppet, weights
from kit.data import batch as batches
from kit.data.batch import Batch

KILLS = 20
SELDOM = ("--save-every", 1000)  # saving takes longer than so small a step, and changes nothing


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """Weights so small that a step takes a few hundredths of a second."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, layers=1, width=16, ffn=16)
    path = tmp_path_factory.mktemp("weights") / "smallest.safetensors"
    weights.save_weights(path, config, DualDiT(config).state_dict(), puppet.Codec.fit(range(8)).state())
    return path


def call(init: Path, out: Path, steps: int, *more: object) -> tuple[object, ...]:
    plan = ("--steps", steps, "--batch", 2, "--frames", 5, "--save-every", 2, "--validate-every", 0)
    return ("--init", init, *plan, "--out", out, *more)


def lines(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def losses(out: Path) -> list[tuple[int, float]]:
    records = map(json.loads, lines(out))
    return [(record["step"], record["loss"]) for record in records]


def saving(out: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or that were when a run died."""
    return {(path.name, path.stat().st_ctime_ns) for path in (out / "checkpoints").glob(".step-*")}


# ---------------------------------------------------------------- killed


def test_a_run_killed_twenty_times_ends_as_if_undisturbed(smallest, tmp_path):
    # catches anything that a checkpoint does not hold, half a checkpoint taken for one, and lost logs
    chance = random.Random()
    steps, out, log = 80, tmp_path / "run", tmp_path / "log"
    undisturbed = tmp_path / "undisturbed"
    finish(start(*call(smallest, undisturbed, steps), *SELDOM, log=log), log)
    during_saves = 0
    for kill in range(KILLS):
        before, old = len(lines(out)), saving(out)
        (process,) = start(*call(smallest, out, steps, "--resume", "auto"), log=log)
        if kill % 2:  # within a save, or just after
            reached = wait_for(lambda old=old: bool(saving(out) - old), process)
        else:  # within a step, a few steps on
            more = chance.randint(0, 4)
            reached = wait_for(lambda more=more, before=before: len(lines(out)) >= before + more, process)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        assert reached and process.exitcode == -signal.SIGKILL, log.read_text()[-4000:]
        during_saves += bool(saving(out))
    assert during_saves >= KILLS // 5
    assert len(lines(out)) < steps  # the kills were within the run
    finish(start(*call(smallest, out, steps, "--resume"), *SELDOM, log=log), log)
    assert (out / "weights.safetensors").read_bytes() == (undisturbed / "weights.safetensors").read_bytes()
    assert losses(out) == losses(undisturbed)


def test_torchrun_restarts_a_run_that_lost_a_rank(smallest, tmp_path):
    # catches survivors that hang, and a restart that begins anew or loses what was logged
    steps, out, log = 20, tmp_path / "run", tmp_path / "log"
    undisturbed = tmp_path / "undisturbed"
    finish(start(*call(smallest, undisturbed, steps), *SELDOM, log=log), log)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1)
    arguments = call(smallest, out, steps, "--resume", "auto", "--device", "cpu", "--precision", "fp32")
    with (tmp_path / "torchrun").open("w") as printed:
        agent = subprocess.Popen(
            [*map(str, (sys.executable, "-m", *torchrun, "train.py", *arguments))],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=printed, stderr=printed,
        )  # fmt: skip
    try:
        while not checkpoints.folder_of(out, 6).exists():
            assert agent.poll() is None, (tmp_path / "torchrun").read_text()[-4000:]
            time.sleep(0.01)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert agent.wait(300) == 0, (tmp_path / "torchrun").read_text()[-4000:]
    finally:
        agent.terminate()
    record = json.loads((out / "run.json").read_text())
    assert 6 <= record["first_step"] < steps  # the second start went on
    expected = losses(undisturbed)
    assert [step for step, _ in losses(out)] == [step for step, _ in expected]
    assert [loss for _, loss in losses(out)] == pytest.approx([loss for _, loss in expected], rel=1e-4)


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize("ranks", (1, 2))
def test_sigterm_saves_and_ends_well(smallest, tmp_path, ranks):
    # catches a run that dies at once, one that goes on, and ranks that stop at different steps
    steps, out, log = 30, tmp_path / "run", tmp_path / "log"
    undisturbed = tmp_path / "undisturbed"
    finish(start(*call(smallest, undisturbed, steps), *SELDOM, ranks=ranks, log=log), log)
    processes = start(*call(smallest, out, steps), *SELDOM, ranks=ranks, log=log)
    assert wait_for(lambda: len(lines(out)) > 5, processes[0])
    processes[-1].terminate()  # one of them is enough
    printed = finish(processes, log)
    stopped = checkpoints.newest(out).record["step"]
    assert 5 < stopped == len(lines(out)) < steps
    assert f"is saved at step {stopped}; go on with --resume" in printed
    finish(start(*call(smallest, out, steps, "--resume"), *SELDOM, ranks=ranks, log=log), log)
    assert losses(out) == losses(undisturbed)
    assert (out / "weights.safetensors").read_bytes() == (undisturbed / "weights.safetensors").read_bytes()


# ---------------------------------------------------------------- a full disk


def fail_at_step_6() -> None:
    """From the save of step 6 on, this process (of several, the last) can write no file of over 20 kB."""
    save = checkpoints.Writer.save

    def limited(self: checkpoints.Writer, record: dict, state: dict) -> None:
        self.wait()
        if record["step"] == 6 and self.world.rank == self.world.ranks - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(self, record, state)

    checkpoints.Writer.save = limited


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_save_that_fails_says_so_and_leaves_the_last_checkpoint(smallest, tmp_path, ranks):
    # catches half a checkpoint under a good name, an error lost in the writing thread, ranks that hang
    out, log = tmp_path / "run", tmp_path / "log"
    processes = start(*call(smallest, out, 30), ranks=ranks, log=log, before=fail_at_step_6)
    printed = finish(processes, log, code=2)
    assert printed.count(f"cannot save {checkpoints.folder_of(out, 6)}: ") == ranks
    assert os.strerror(errno.EFBIG) in printed and "go on from the last with --resume" in printed
    assert sorted(path.name for path in out.glob("checkpoints/*")) == ["step-00000002", "step-00000004"]
    assert checkpoints.newest(out).record["step"] == 4


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A folder for a run, whose checkpoints are on a disk of 8 MB."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a disk here; the test above fails writes in another way")
    yield folder.parent
    subprocess.run(("umount", str(folder)), check=True)


def test_a_full_disk_is_said_and_costs_no_earlier_checkpoint(smallest, small_disk, tmp_path):
    log = tmp_path / "log"
    plan = (*call(smallest, small_disk, 30), "--stage", 2)
    printed = finish(start(*plan, "--keep", 99, log=log), log, code=2)
    assert f"cannot save {small_disk}/checkpoints/step-" in printed and os.strerror(errno.ENOSPC) in printed
    saved = sorted(path.name for path in small_disk.glob("checkpoints/*"))
    assert saved == [f"step-{step:08}" for step in range(2, 2 * len(saved) + 1, 2)]
    assert checkpoints.newest(small_disk).folder.name == saved[-1] and len(saved) > 2
    for name in saved[:-2]:  # someone makes room
        shutil.rmtree(small_disk / "checkpoints" / name)
    undisturbed = tmp_path / "undisturbed"
    for more in (("--out", small_disk, "--resume", "--keep", 1), ("--out", undisturbed, *SELDOM)):
        finish(start(*plan, *more, log=log), log)
    assert losses(small_disk) == losses(undisturbed)


# ---------------------------------------------------------------- not a number


def poison(first: int, last: int) -> None:
    """Batches of these steps hold a NaN, in the last rank's samples only."""
    read = batches.read

    def poisoned(*arguments: object, step: int, samples: range, **others: object) -> Batch:
        made = read(*arguments, step=step, samples=samples, **others)
        if first <= step <= last and samples.stop == others["batch"]:
            for clean in (made.video, made.motion):
                if clean is not None:
                    clean[-1, 0] = torch.nan
        return made

    batches.read = poisoned


def test_a_step_that_is_not_finite_is_skipped_on_every_rank(smallest, tmp_path):
    # catches NaN in weights, optimizer states or averages, and one rank that goes on alone
    out, log = tmp_path / "run", tmp_path / "log"
    before = functools.partial(poison, 5, 13)
    printed = finish(start(*call(smallest, out, 20), ranks=2, log=log, before=before), log)
    records = [json.loads(line) for line in lines(out)]
    assert [record["step"] for record in records if "loss" not in record] == list(range(5, 14))
    assert [record["skipped"] for record in records] == [0] * 5 + list(range(1, 10)) + [9] * 6
    assert printed.count("skipped, loss or gradient is not finite") == 9
    last = checkpoints.newest(out)
    assert (last.record["step"], last.record["skipped"], last.record["bad"]) == (20, 9, 0)
    for kind in ("model", "ema", "optimizer"):
        assert all(value.isfinite().all() for value in checkpoints.load_whole(last.folder, kind).values())


def test_ten_such_steps_in_a_row_end_the_run_and_name_the_batch(smallest, tmp_path):
    # the count goes over a restart
    out, log = tmp_path / "run", tmp_path / "log"
    before = functools.partial(poison, 5, 99)
    (process,) = start(*call(smallest, out, 30), log=log, before=before)
    assert wait_for(lambda: checkpoints.folder_of(out, 10).exists(), process)
    process.kill()
    process.join()
    again = start(*call(smallest, out, 30, "--resume"), log=log, before=before)
    printed = finish(again, log, code=2)
    task = json.loads(lines(out)[-1])["task"]
    assert (
        "train.py: error: too many steps in a row had a loss or gradient that is not finite; "
        f"last: seed 0, step 14, task {task}, samples 0 to 1\n"
    ) in printed
    assert checkpoints.newest(out).record["bad"] == 9

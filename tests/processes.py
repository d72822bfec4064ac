"""Processes that start in no time, forked from one that has imported torch; train.py in them."""

import functools
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import ROOT


@functools.cache
def forking() -> multiprocessing.context.BaseContext:
    """The context whose processes start so; one thread each, so that results can be compared bitwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # torch's optimizers import the second
    with pytest.MonkeyPatch.context() as patch:  # what they are forked from inherits these
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()
    return context


def _rank(environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    os.environ |= environment
    target(*arguments)


def start_ranks(
    target: Callable, *arguments: object, ranks: int = 1, ranks_a_node: int | None = None
) -> list[BaseProcess]:
    """target(*arguments) in a process for each rank, with the environment that torchrun would give it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": ranks}
    node = ranks_a_node or ranks
    processes = []
    for rank in range(ranks):
        names = address | {"RANK": rank, "LOCAL_RANK": rank % node, "LOCAL_WORLD_SIZE": node}
        environment = {name: str(value) for name, value in names.items()} if ranks > 1 else {}
        processes.append(forking().Process(target=_rank, args=(environment, target, arguments)))
        processes[-1].start()
    return processes


def _train(arguments: list[str], log: str, before: Callable | None) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    import train
    from kit import files, plots

    plots.loss_picture = lambda *_: None  # it takes a second, and no test looks at it
    sys.argv = ["train.py", *arguments]
    if before:
        before()
    files.run(train.main)


def start(
    *arguments: object, log: Path, before: Callable[[], None] | None = None, **ranks: int
) -> list[BaseProcess]:
    """train.py with these arguments; what it prints is added to `log`; each process calls `before` first."""
    alone = ["--device", "cpu", "--precision", "fp32", *map(str, arguments)]
    return start_ranks(_train, alone, str(log), before, **ranks)


def finish(processes: Sequence[BaseProcess], log: Path, code: int = 0) -> str:
    """Wait for all of them to end with this exit code -> what they printed."""
    for process in processes:
        process.join(300)
        process.kill()
    printed = log.read_text() if log.exists() else ""
    codes = [process.exitcode for process in processes]
    assert codes == [code] * len(processes), f"exit codes {codes}\n{printed[-4000:]}"
    return printed


def wait_for(happened: Callable[[], bool], process: BaseProcess) -> bool:
    """Until something has happened (True), or the process has ended (False)."""
    while not happened():
        if not process.is_alive():
            return False
        time.sleep(0.005)
    return True

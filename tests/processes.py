"""train.py in processes of its own that start in no time: forked from one that has imported torch."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import ROOT


def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # torch's optimizers import the second
    return context


def _train(arguments: list[str], environment: dict[str, str], log: str, before: Callable | None) -> None:
    os.environ |= environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    import train
    from kit import files

    sys.argv = ["train.py", *arguments]
    if before:
        before()
    files.run(train.main)


def start(
    *arguments: object,
    log: Path,
    ranks: int = 1,
    ranks_a_node: int | None = None,
    before: Callable[[], None] | None = None,
) -> list[BaseProcess]:
    """train.py with these arguments, a process for each rank; what it prints is added to `log`.

    `before` is called in each process first. One thread a process, so that results can be compared bitwise.
    """
    alone = ["--device", "cpu", "--precision", "fp32", *map(str, arguments)]
    kept = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONPATH")}
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    processes = []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for rank in range(ranks):
        node = ranks_a_node or ranks
        names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % node, "LOCAL_WORLD_SIZE": node}
        environment = {name: str(value) for name, value in names.items()}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        given = (alone, environment if ranks > 1 else {}, str(log), before)
        processes.append(_context().Process(target=_train, args=given))
        processes[-1].start()
    for name, value in kept.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return processes


def finish(processes: Sequence[BaseProcess], log: Path, code: int = 0) -> str:
    """Wait for all of them to end with this exit code -> what they printed."""
    for process in processes:
        process.join(300)
    printed = log.read_text() if log.exists() else ""
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [code] * len(processes), f"exit codes {codes}\n{printed[-4000:]}"
    return printed


def wait_for(happened: Callable[[], bool], process: BaseProcess) -> bool:
    """Until something has happened (True), or the process has ended (False)."""
    while not happened():
        if not process.is_alive():
            return False
        time.sleep(0.005)
    return True

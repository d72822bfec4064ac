"""Checkpoints of a run, of all ranks together, written while training continues.

    RUN/checkpoints/step-00000250/      complete: it gets this name when all of it is on disk
        __0_0.distcp, ..., .metadata    torch.distributed.checkpoint: every rank's shards, and their places
        done.json                       written last: the step and the run's settings
    RUN/checkpoints/.step-00000500      being written, or left by a run that died; removed on resume

Shards are stored as parts of whole tensors, so a run can resume with another number of ranks. With several
nodes RUN is on a disk that all of them share.
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dual_dit import DualDiT, DualDiTConfig
from kit import weights
from kit.distributed import World, gathered

# torch warns about checkpoints of a single process
warnings.filterwarnings("ignore", "torch.distributed is disabled")

DONE = "done.json"
PATTERN = "step-" + 8 * "[0-9]"  # what else is there is the user's


class Checkpoint(NamedTuple):
    folder: Path
    record: dict  # "step", the number of steps done, and the rest of what Writer.save was given


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


# ---------------------------------------------------------------- what is in one


def training_state(
    model: DualDiT,
    ema: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    codec: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Every tensor of a run under a unique name; those of a sharded model are DTensors.

    No random state: what a step draws is a function of the seed and its number (kit/data/batch.py).
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"model/{name}": value for name, value in model.state_dict().items()}
    state |= {f"ema/{name}": value for name, value in ema.items()}
    state |= {f"codec/{name}": value for name, value in codec.items()}
    state |= {
        f"optimizer/{names[parameter]}/{slot}": value
        for optimizer in optimizers
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }
    return state


def load(
    folder: Path, model: DualDiT, ema: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Read a checkpoint into model, average and the optimizers' states; `optimizers` may be empty."""
    stored = _stored(folder)
    parameters = dict(model.named_parameters())
    owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key in stored:
        kind, _, rest = key.partition("/")
        name, _, slot = rest.rpartition("/")
        if kind == "optimizer" and parameters[name] in owners:
            parameter = parameters[name]
            # shaped and sharded like the parameter, or a step counter, which fused AdamW needs on its device
            counter = not len(stored[key].size)
            empty = torch.zeros((), device=parameter.device) if counter else torch.zeros_like(parameter)
            # Muon's momentum is unsharded, like the gradient it is given
            empty = gathered(empty) if slot == "momentum_buffer" else empty
            owners[parameter].state[parameter][slot] = empty.detach()
    _read(folder, training_state(model, ema, optimizers, {}), no_dist=not dist.is_initialized())


def load_whole(folder: Path, kind: str) -> dict[str, Tensor]:
    """The "ema" or the "codec" of a checkpoint, whole, on the CPU of this process alone."""
    prefix = kind + "/"
    stored = {name: what for name, what in _stored(folder).items() if name.startswith(prefix)}
    state = {name: torch.empty(what.size, dtype=what.properties.dtype) for name, what in stored.items()}
    _read(folder, state, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _stored(folder: Path) -> dict:
    """The tensors in a checkpoint: name -> size and dtype; ValueError if it is damaged."""
    try:
        return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except (EOFError, pickle.UnpicklingError) as error:
        raise _damaged(folder, error) from error


def _read(folder: Path, state: dict[str, Tensor], no_dist: bool) -> None:
    """Fill tensors from a checkpoint, in place; ValueError if it is damaged."""
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    except CheckpointException as error:
        raise _damaged(folder, _root_cause(error)) from error


def _damaged(folder: Path, why: BaseException) -> ValueError:
    return ValueError(f"{folder} is damaged ({why}): delete it, then --resume starts from the one before")


# ---------------------------------------------------------------- writing


class Writer:
    """Writes checkpoints in a background thread, one at a time, and keeps the last `keep`."""

    def __init__(self, run: Path, keep: int, world: World):
        self.run, self.keep, self.world = run, keep, world
        # a separate group: collectives of two threads must not mix
        self.group = dist.new_group(backend="gloo") if world.ranks > 1 else None
        # With a second team of threads libgomp counts more threads than cores, and lets them sleep at every
        # barrier: a CPU's steps would take 1.2 times as long from the first checkpoint on.
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.thread.submit(int).result()  # starts it now; threads that torch starts later use one thread, too
        self.pending: Future | None = None
        if world.rank == 0:
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)  # an error now, not after hours
            for left in (run / "checkpoints").glob("." + PATTERN):
                shutil.rmtree(left)

    def save(self, record: dict, state: dict[str, Tensor]) -> None:
        """Copy the state and return; the copy is written in the background. record["step"] names it."""
        self.wait()
        final = folder_of(self.run, record["step"])
        temporary = final.with_name("." + final.name)
        alone = self.group is None
        written = dcp.async_save(state, checkpoint_id=temporary, process_group=self.group, no_dist=alone)
        self.pending = self.thread.submit(self.finish, written, temporary, record)

    def failed(self) -> bool:
        """Whether a checkpoint could not be written; wait() says why."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; OSError if it could not be written."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def finish(self, written: Future, temporary: Path, record: dict) -> None:
        """In the background thread: wait for the shards, then publish; OSError if anything fails."""
        try:
            written.result()  # what fails on one rank, torch raises on all
            if self.world.rank == 0:
                self._publish(temporary, record)
        except (CheckpointException, OSError) as error:
            free = shutil.disk_usage(temporary.parent).free / 2**20
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"cannot save {temporary.with_name(temporary.name[1:])}: {_root_cause(error)} "
                f"({free:.0f} MB were free); earlier checkpoints are intact: go on with --resume"
            ) from error

    def _publish(self, temporary: Path, record: dict) -> None:
        """Write the marker and the stage's weights, then rename, then delete older checkpoints."""
        with open(temporary / DONE, "w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if record["stage_ended"] is not None:  # before the rename: a run resumed from here does not repeat it
            export(temporary, self.run / f"stage-{record['stage_ended']}.safetensors")
        final = folder_of(self.run, record["step"])
        temporary.rename(final)
        _sync(final.parent)
        for old in sorted(final.parent.glob(PATTERN))[: -self.keep]:
            shutil.rmtree(old)


def _root_cause(error: BaseException) -> BaseException:
    """The first OSError behind an error: torch's writer fails again on closing a file it could not write."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and (before := error.__cause__ or error.__context__):
        error = before
    return error


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---------------------------------------------------------------- finding


def newest(run: Path) -> Checkpoint | None:
    """A run's last checkpoint; None if it never saved one."""
    folders = sorted((run / "checkpoints").glob(PATTERN))
    return Checkpoint(folders[-1], json.loads((folders[-1] / DONE).read_text())) if folders else None


def export(folder: Path, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint's averaged weights, codec and configuration as one safetensors file."""
    record = json.loads((folder / DONE).read_text())
    config, settings = DualDiTConfig(**record["config"]), record["settings"]
    weights.save_weights(
        file, config, load_whole(folder, "ema"), load_whole(folder, "codec"), dtype, settings
    )

"""Training state that survives: checkpoints of all ranks together, written while training goes on.

    RUN/checkpoints/step-00000250/      complete: it has this name only once all of it is on the disk
        __0_0.distcp, ..., .metadata    torch.distributed.checkpoint: every rank's slices, and what is where
        done.json                       written last: where in the run this is
    RUN/checkpoints/.step-00000500      being written; or left by a run that died, and removed when it goes on

The slices are of whole tensors, so a run can go on with another number of ranks. With several nodes RUN
is on a disk that all of them share.
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

# torch takes a single process for a mistake
warnings.filterwarnings("ignore", "torch.distributed is disabled")

DONE = "done.json"
PATTERN = "step-*"


class Checkpoint(NamedTuple):
    folder: Path
    record: dict  # "step", how many are done, and what else Writer.save was given


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


# ---------------------------------------------------------------- what is in one


def training_state(
    model: DualDiT,
    ema: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    codec: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Every tensor of a run under a name of its own; what a sharded model has of it are DTensors.

    No random state: whatever a step draws is a function of its number (kit/data/batch.py).
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
    """Fill all of these from a checkpoint; optimizers, where they are given, get the states they had."""
    stored = _stored(folder)
    parameters = dict(model.named_parameters())
    owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key in stored:
        kind, _, rest = key.partition("/")
        name, _, slot = rest.rpartition("/")
        if kind == "optimizer" and parameters[name] in owners:
            parameter = parameters[name]
            # something of the parameter's shape and slices, or a counter; fused AdamW wants that beside it
            counter = not len(stored[key].size)
            empty = torch.zeros((), device=parameter.device) if counter else torch.zeros_like(parameter)
            # Muon's is like its gradient
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
    return ValueError(f"{folder} is damaged ({why}): delete it, and --resume goes on from the one before")


# ---------------------------------------------------------------- writing


class Writer:
    """Writes one checkpoint at a time, behind the training loop's back."""

    def __init__(self, run: Path, keep: int, world: World):
        """Keeps the last `keep`."""
        self.run, self.keep, self.world = run, keep, world
        # a group of their own: collectives of two threads must not mix
        self.group = dist.new_group(backend="gloo") if world.ranks > 1 else None
        # With a second team of threads libgomp counts more threads than cores, and lets them sleep at every
        # barrier: a CPU's steps would take 1.2 times as long from the first checkpoint on.
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.thread.submit(int).result()  # threads that torch starts from now on have one, too
        self.pending: Future | None = None
        if world.rank == 0:
            for left in (run / "checkpoints").glob("." + PATTERN):
                shutil.rmtree(left)

    def save(self, record: dict, state: dict[str, Tensor]) -> None:
        """Copy the state and go on; the copy is written meanwhile. record["step"] names it."""
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
        """Until the last checkpoint is on the disk; OSError if it could not be written."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def finish(self, written: Future, temporary: Path, record: dict) -> None:
        """What remains once the slices are being written, in the writing thread."""
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
        """Marker, the stage's weights, name, and only then may an older one go."""
        with open(temporary / DONE, "w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if record["stage_ended"] is not None:  # first: a run that goes on from here writes it no more
            export(temporary, self.run / f"stage-{record['stage_ended']}.safetensors")
        final = folder_of(self.run, record["step"])
        temporary.rename(final)
        _sync(final.parent)
        for old in sorted(final.parent.glob(PATTERN))[: -self.keep]:
            shutil.rmtree(old)


def _root_cause(error: BaseException) -> BaseException:
    """torch's writer fails once more while it closes a file that could not be written."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and (before := error.__cause__ or error.__context__):
        error = before
    return error


def _sync(folder: Path) -> None:
    """The names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---------------------------------------------------------------- finding


def newest(run: Path) -> Checkpoint | None:
    """A run's last checkpoint; None if it never saved one."""
    folders = sorted((run / "checkpoints").glob(PATTERN))
    return Checkpoint(folders[-1], json.loads((folders[-1] / DONE).read_text())) if folders else None


def export(folder: Path, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """The averaged weights of a checkpoint, codec and configuration with them, as one safetensors file."""
    record = json.loads((folder / DONE).read_text())
    config, settings = DualDiTConfig(**record["config"]), record["settings"]
    weights.save_weights(
        file, config, load_whole(folder, "ema"), load_whole(folder, "codec"), dtype, settings
    )

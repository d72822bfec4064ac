"""Weights on disk: one safetensors file with all that is needed to use them.

Tensors: the network's under their own names, and what belongs to it (the puppet's codec) under a
prefix. Metadata: the network's configuration as JSON, and in it the settings that it was trained with.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dual_dit import DualDiT, DualDiTConfig
from kit.files import whole_file

EXTRA = "extra."  # prefix of tensors that are not the network's
# parts of names whose tensors stay fp32 in a bf16 network: times, modulation, norms, task hint, statistics
KEEP_FP32 = ("time_", "modulation", "norm", "task_hint", "motion_mean", "motion_std")


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the tensor of this name in a network of `dtype`."""
    return torch.float32 if any(part in name for part in KEEP_FP32) else dtype


def save_weights(
    path: Path,
    config: DualDiTConfig,
    tensors: dict[str, Tensor],
    extra: dict[str, Tensor],
    dtype=torch.float32,
    settings: dict | None = None,
) -> None:
    """Write a state dict, its configuration and extra tensors; extras stay fp32. `settings`: run.settings."""
    record = dataclasses.asdict(config) | ({"settings": settings} if settings else {})
    file = {k: v.to("cpu", stored_dtype(k, dtype)).contiguous() for k, v in tensors.items()}
    file |= {EXTRA + k: v.cpu().float().contiguous() for k, v in extra.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        # one entry: safetensors writes several in random order, and the same run must give the same bytes
        save_file(file, temporary, metadata={"config": json.dumps(record)})


def empty(config: DualDiTConfig) -> DualDiT:
    """A network on the meta device, without memory: weights are loaded later."""
    with torch.device("meta"):
        return DualDiT(config)


def load_weights(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[DualDiT, dict[str, Tensor]]:
    """Read what save_weights wrote -> the network, in evaluation mode, and the extra tensors (fp32).

    FileNotFoundError or ValueError if the file is missing, damaged, or of another configuration.
    """
    with _opened(Path(path)) as (file, config, _):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    model = empty(config)
    extra = {k.removeprefix(EXTRA): v.to(device) for k, v in tensors.items() if k.startswith(EXTRA)}
    state = {k: v.to(device, stored_dtype(k, dtype)) for k, v in tensors.items() if not k.startswith(EXTRA)}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own configuration: {error}") from error
    return model.eval().requires_grad_(False), extra


def read_header(path: Path) -> tuple[DualDiTConfig, dict]:
    """Configuration and settings of a file, without its tensors; raises as load_weights does."""
    with _opened(Path(path)) as (_, config, settings):
        return config, settings


@contextmanager
def _opened(path: Path) -> Iterator[tuple[safe_open, DualDiTConfig, dict]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: train some with `python train.py`, or name a file with --weights"
        )
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["config"])
            settings = record.pop("settings", {})
            yield file, DualDiTConfig(**record), settings
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file or is truncated ({error}): copy it again"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by this version of train.py ({error})") from error

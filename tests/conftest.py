"""What several test files share: tiny weights with all that belongs to them, and verbs called in-process."""

import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import dual_dit
from dual_dit import DualDiT, DualDiTConfig
from kit import devices, files, puppet, weights
from kit.body import Body
from kit.data.datasets import puppet_motion
from kit.puppet.codec import LATENT_CHANNELS
from kit.puppet.text import TEXT_DIM
from kit.video import shown_frames
from motion_tokens import motion_statistics

ROOT = Path(__file__).parent.parent
# files that take longest run first: else one worker is still at one of them when the others have ended
LONG = ("distributed", "faults", "ranks", "devices", "sample", "sample_wan", "train")
TINY = DualDiTConfig(
    layers=2,
    width=48,
    heads=2,
    ffn=64,
    channels=LATENT_CHANNELS,
    text_dim=TEXT_DIM,
    patch=(1, 1, 1),
    freq_dim=16,
)


def tiny_model(config: DualDiTConfig = TINY) -> DualDiT:
    """An untrained network in which nothing is zero, so that every input reaches every output."""
    torch.manual_seed(0)
    model = DualDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


@functools.cache
def small_codec() -> puppet.Codec:
    """A puppet's codec that is fitted in no time."""
    return puppet.Codec.fit(range(8))


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, one a step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def all_frames(path: Path) -> tuple[Tensor, float]:
    """Every frame of a video file as players show it, (f h w 3) uint8, and frames a second on the average."""
    frames = list(shown_frames(path))
    pixels = torch.from_numpy(np.stack([np.asarray(frame.image()) for frame in frames]))
    last = frames[-1].frame
    return pixels, len(frames) / (frames[-1].time + float(last.duration * last.time_base) - frames[0].time)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A file as train.py writes it: network, motion statistics and codec, all from a few clips."""
    model = tiny_model()
    mean, std = motion_statistics(puppet_motion(puppet.clips(range(64))))
    model.motion_mean.copy_(mean)
    model.motion_std.copy_(std)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    weights.save_weights(path, TINY, model.state_dict(), small_codec().state())
    return path


@pytest.fixture(scope="session")
def body() -> Body:
    """The puppet's."""
    return puppet.body()


@pytest.fixture(autouse=True)
def plain_attention():
    """What an earlier verb put in for its process (kit/devices.py) is taken out again."""
    dual_dit.attention = devices.fused_attention


def run_main(module: ModuleType, *arguments: object) -> None:
    """A script's main in this process, with these arguments of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()


class Ended(NamedTuple):
    """How a verb ended, as a shell would see it."""

    code: int
    out: str
    err: str


@pytest.fixture
def verb(monkeypatch, capsys) -> Callable[..., Ended]:
    """verb(module, *arguments): run a script's main as its command line would."""

    def call(module: ModuleType, *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            files.run(module.main)
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr())

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path in it; none for a folder that does not exist."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pytest_collection_finish() -> None:
    """Modules are left out of garbage collection, which took half of the time of sampling a Wan."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first; without a GPU its tests are deselected, and pytest's last line says how many."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    needs = [item for item in items if item.get_closest_marker("gpu")]
    if needs and not torch.cuda.is_available():
        config.hook.pytest_deselected(items=needs)
        items[:] = [item for item in items if item not in needs]

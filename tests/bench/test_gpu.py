"""bench gpu: at tiny sizes on the CPU, each part within its time, none spoilt by another."""

import json
import time
from pathlib import Path

import pytest
import torch

from bench import gpu

CPU = torch.device("cpu")


def test_parts_that_need_no_process_run_at_tiny_sizes(tmp_path):
    # the parts that a peer or a trained network is not needed for; compiling is left to a GPU
    found = {}
    for name in ("motion", "hybrid"):
        gpu.PARTS[name][0](gpu.TINY, CPU, tmp_path, 60.0, found.setdefault(name, {}).update)
    assert found["motion"]["overhead"] > 0
    assert found["hybrid"]["grid"] == (2, 4, 4) and found["hybrid"]["backward"]["tokens_per_second"] > 0


def test_a_training_step_and_its_rates(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    found = {}
    gpu.train(gpu.TINY, CPU, tmp_path, 60.0, found.update)
    assert found.keys() == {"planned_gib", "plain", "compiled"}
    assert found["plain"].keys() == {"seconds", "tokens_per_second", "tflops"}


def test_the_puppets_step_says_where_its_time_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    found = {}
    gpu.puppet(gpu.TINY, CPU, tmp_path, 60.0, found.update)
    parts = {"clips_per_second", "step", "data", "gradients", "optimizers", "average"}
    assert found["batch_2"].keys() == found["batch_2_compiled"].keys() == parts


def fails(sizes, device, out: Path, left: float, report) -> None:
    report(first=1)
    raise RuntimeError("out of luck")


def lacks(sizes, device, out: Path, left: float, report) -> None:
    import no_such_module  # noqa: F401


def hangs(sizes, device, out: Path, left: float, report) -> None:
    report(first=1)
    time.sleep(600)


def dies(sizes, device, out: Path, left: float, report) -> None:
    import os

    os._exit(3)


def works(sizes, device, out: Path, left: float, report) -> None:
    report(done=True)


def test_no_part_spoils_another(monkeypatch, tmp_path):
    # catches a part that ends the run, takes the others' time, or whose first figures are lost
    parts = {
        name: (part, 60) for name, part in globals().items() if name in ("fails", "lacks", "dies", "works")
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "_part", in_this_module)
    gpu.run_parts([], 10, tmp_path, "cpu")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["fails"]["first"] == 1 and "out of luck" in found["fails"]["error"]
    assert "no_such_module" in found["lacks"]["skipped"]
    assert found["works"]["done"] and found["dies"].keys() == {"took"}


def test_a_part_ends_with_its_time(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PARTS", {"hangs": (hangs, 60)})
    monkeypatch.setattr(gpu, "_part", in_this_module)
    start, found = time.monotonic(), {}
    gpu.run_part("hangs", gpu.TINY, CPU, tmp_path, 25.0, found.update)
    assert found["first"] == 1 and "stopped after 25 s" in found["error"]
    assert time.monotonic() - start < 60


def in_this_module(name: str, *rest: object) -> None:
    """gpu._part in a new process, which knows nothing of what was patched in this one."""
    gpu.PARTS = {name: (globals()[name], 60)}
    real_part(name, *rest)


real_part = gpu._part


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown part trian"):
        gpu.run_parts(["trian"], 1, tmp_path, "cpu")

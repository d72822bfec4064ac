"""bench gpu: at tiny sizes on the CPU, each part within its time, none spoilt by another."""

import functools
import json
import os
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, puppet, timing

CPU = torch.device("cpu")


def test_parts_that_need_no_peer_run_at_tiny_sizes(monkeypatch, tmp_path):
    # compiling is left to a GPU
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(puppet, "training_step", functools.partial(puppet.training_step, frames=5))
    found = {}
    for name in ("train", "motion", "hybrid", "puppet"):
        gpu.PARTS[name][0](gpu.TINY, CPU, tmp_path, 60.0, found.setdefault(name, {}).update)
    train, hybrid, steps = found["train"], found["hybrid"], found["puppet"]
    assert train.keys() == {"planned_gib", "plain", "compiled"}
    assert train["plain"].keys() == {"seconds", "tokens_per_second", "tflops"}
    assert found["motion"]["overhead"] > 0
    assert hybrid["shape"].startswith("2 latents of 2x2") and hybrid["backward"]["tokens_per_second"] > 0
    parts = {"clips_per_second", "step", "data", "gradients", "optimizers", "average"}
    assert steps["batch_2"].keys() == steps["batch_2_compiled"].keys() == parts


def behave(name: str, sizes, device, out: Path, left: float, report) -> None:
    """A part that does what its name says after its first figure."""
    report(first=1)
    if name == "fails":
        raise RuntimeError("out of luck")
    if name == "lacks":
        import no_such_module  # noqa: F401
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    report(done=True)


def in_this_module(name: str, *rest: object) -> None:
    """gpu._part in a new process, which knows nothing of what was patched in this one."""
    gpu.PARTS = {name: (functools.partial(behave, name), 60)}
    real_part(name, *rest)


real_part = gpu._part


def test_no_part_spoils_another(monkeypatch, tmp_path):
    # catches a part that ends the run, takes the others' time, or whose first figures are lost
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(("fails", "lacks", "dies", "works"), (behave, 60)))
    monkeypatch.setattr(gpu, "_part", in_this_module)
    gpu.run_parts([], 10, tmp_path, "cpu")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(figures["first"] == 1 for name, figures in found.items() if name in gpu.PARTS)
    assert "out of luck" in found["fails"]["error"] and "no_such_module" in found["lacks"]["skipped"]
    assert found["works"]["done"] and found["dies"].keys() == {"first", "took"}
    gpu.run_parts(["works"], 0, tmp_path, "cpu")  # there is no time: nothing old is left of this part
    again = json.loads((tmp_path / "gpu.json").read_text())
    assert again == found | {"works": {"skipped": "no time is left"}}  # and all of the others


def test_a_part_ends_with_its_time(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_part", in_this_module)
    start, found = time.monotonic(), {}
    gpu.run_part("hangs", gpu.TINY, CPU, tmp_path, 1.0, found.update)
    assert "stopped after 1 s" in found["error"] and time.monotonic() - start < 60


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown part trian"):
        gpu.run_parts(["trian"], 1, tmp_path, "cpu")

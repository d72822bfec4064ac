"""bench: how it measures, what it plans, and that both sides of a ratio do the same."""

import dataclasses
import itertools
import json
import time

import pytest
import torch

import dual_dit
import train
from bench import __main__ as commands
from bench import gpu, plan, puppet, speed, timing
from dual_dit import PRESETS
from kit import flops
from kit.devices import fused_attention

TINY = dataclasses.replace(PRESETS["wan2.1-1.3b"], layers=2, width=96, heads=2, ffn=160, text_dim=32)
FEW = speed.Shape(2, 4, 6, 5)
KEYS = {
    "forward_ratio_fp32", "forward_ratio_bf16", "train_ratio_fp32", "train_ratio_bf16", "motion_overhead",
    "sample_ratio_fp32", "sample_ratio_bf16", "puppet_sample_seconds", "puppet_step_seconds",
    "puppet_data_ratio",
}  # fmt: skip


# ---------------------------------------------------------------- measuring


def test_calls_take_turns_and_a_ratio_is_of_each_round(monkeypatch):
    # catches times of the round that warms up, and a round that something slowed in the ratio
    clock, order = itertools.count(), []
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) ** 2)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    times = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order == ["a", "b"] * 3
    assert times == {"a": [9, 17], "b": [13, 21]}  # between looks at the clock
    assert timing.ratio([2.0, 20.0], [1.0, 10.0], by=2.0) == [1.0, 1.0]


def test_the_gpus_shape_is_81_frames_of_480x832():
    exact = flops.tokens_of(PRESETS["wan2.1-1.3b"], 81, (480, 832), 8)
    assert gpu.SHAPE.tokens(motion=True) == exact


# ---------------------------------------------------------------- the plan


def planned(preset: str = "wan2.1-1.3b", gpus: int = 1, node: int = 8) -> dict:
    return plan.plan(preset, gpus, node, 2 * gpus, 5, (64, 64), steps=10, peak_tflops=312.0, mfu=0.4)


MEMORY = flops.Memory(*range(1, 1 + len(flops.Memory._fields)))  # where another is long to count


@pytest.mark.parametrize(("gpus", "node", "shards"), ((4, 8, 4), (16, 8, 8), (16, 1, 16)))
def test_plan_shards_as_training_does(gpus, node, shards, capsys, monkeypatch):
    # kit.distributed shards over the ranks of a node, and over all where nodes have one rank each
    asked = []
    monkeypatch.setattr(plan, "training_memory", lambda *how: asked.append(how[1:]) or MEMORY)
    found = planned(gpus=gpus, node=node)["gib"]
    assert asked == [((2, 8, 8), 2, shards, checkpointing) for checkpointing in (False, True)]
    assert found == dict.fromkeys(("False", "True"), sum(MEMORY) / 2**30)
    assert f"sharded over {shards};" in capsys.readouterr().out


def test_motion_costs_what_the_paper_says(capsys, monkeypatch):
    # catches self-attention counted with the rest, and a price at another size than the paper's
    monkeypatch.setattr(plan, "training_memory", lambda *_: MEMORY)
    for preset, count, price in (("wan2.1-1.3b", "2.6", "+12.9"), ("wan2.2-5b", "7.5", "+10.3")):
        result = planned(preset)
        linear, whole = (100 * result["motion_adds"][key] for key in ("linear", "whole"))
        rows = {line[:23].strip(): line[23:].split() for line in capsys.readouterr().out.splitlines()[1:5]}
        assert rows["parameters, billions"] == [f"{result['parameters'] / 1e9:.2f}", count]
        assert rows["motion adds, % of FLOPs"] == [f"{linear:+.1f}", price]
        assert rows["with self-attention"] == [f"{whole:+.1f}"]
        assert abs(linear - float(price)) < 1.5 < whole - linear


# ---------------------------------------------------------------- the runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peer_computes_the_same_and_training_keeps_no_more(dtype, monkeypatch):
    # catches copies kept for the backward pass: of attention's result in another order, of a branch in fp32
    pytest.importorskip("diffusers", reason="pip install -r requirements-wan.txt")
    monkeypatch.setattr(dual_dit, "attention", fused_attention)  # products keep scores, for speed
    sides, shape = speed.Sides(TINY, dtype), speed.Shape(2, 16, 16, 64)
    with torch.no_grad():
        ours, theirs = (call().float() for call in sides.forward(shape).values())
    assert (ours - theirs).norm() / theirs.norm() < (1e-5 if dtype == torch.float32 else 2e-2)
    sides.train(shape)
    models, calls = {"ours": sides.ours, "peer": sides.peer}, sides.forward(shape)
    kept = {side: flops.kept_bytes(calls[side], models[side].parameters()) for side in models}
    assert 0.9 * kept["peer"] < kept["ours"] <= kept["peer"]


def test_training_speed_at_each_length(capsys, monkeypatch):
    # catches a part of a step that is not timed: shares are of the whole
    monkeypatch.setattr(puppet, "BATCH", 1)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(train.run, "CLIP_LENGTHS", ((0.0, 5),))
    monkeypatch.setattr(torch, "compile", lambda block: block)
    (found,) = puppet.lengths().values()
    assert found["clips_per_second"] > 0 and found["compiled"] > 0
    assert sum(found[part] for part in puppet.Parts._fields) == pytest.approx(100)
    assert "of a compiled step" in capsys.readouterr().out


def test_default_run_has_every_key(capsys, monkeypatch):
    pytest.importorskip("diffusers", reason="pip install -r requirements-wan.txt")
    monkeypatch.setattr(puppet, "BATCH", 1)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(speed, "CONFIG", TINY)
    monkeypatch.setattr(speed, "COMPARED", dict.fromkeys(speed.COMPARED, FEW))
    monkeypatch.setattr(speed, "WITH_MOTION", FEW)
    monkeypatch.setattr(commands, "has_bf16_units", lambda device: True)
    result = commands.bench_all()
    assert result.keys() == KEYS | {"spread", "device"} and result["spread"].keys() == KEYS
    for key in KEYS:
        low, high = result["spread"][key]
        assert 0 < low <= result[key] <= high < float("inf"), key
    assert set(capsys.readouterr().out.split()) >= KEYS
    json.dumps(result)


def test_parts_of_bench_gpu_run_at_tiny_sizes(monkeypatch):
    pytest.importorskip("diffusers", reason="pip install -r requirements-wan.txt")
    monkeypatch.setattr(torch, "compile", lambda forward: forward)  # left to a GPU
    found = {name: {} for name in gpu.PARTS}
    for name, part in gpu.PARTS.items():
        for figures in part(TINY, speed.Shape(2, 2, 2, 8), torch.device("cpu")):
            found[name] |= figures
    assert found["train"].keys() == {"planned_gib", "plain", "compiled"}
    assert found["train"]["plain"].keys() == {"seconds", "tokens_per_second", "tflops"}
    assert found["forward"].keys() == {"plain", "compiled"}
    assert found["forward"]["compiled"].keys() == {
        "ours", "peer", "joint", "diffusers_over_ours", "motion_overhead",
    }  # fmt: skip

"""bench: how it measures, what it plans, and that both sides of a ratio do the same."""

import dataclasses
import functools
import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch

import dual_dit
import train
from bench import __main__ as commands
from bench import memory, plan, puppet, speed, timing
from dual_dit import PRESETS
from kit import flops
from kit.devices import fused_attention

TINY = speed.Setting(
    dataclasses.replace(PRESETS["wan2.1-1.3b"], layers=2, width=96, heads=2, ffn=160, text_dim=32),
    shapes=(speed.Shape(2, 4, 6, 5),),
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
KEYS = {
    "forward_ratio_fp32", "forward_ratio_bf16", "train_ratio_fp32", "train_ratio_bf16", "motion_overhead",
    "sample_ratio_fp32", "sample_ratio_bf16", "puppet_sample_seconds", "puppet_step_seconds",
    "puppet_data_ratio",
}  # fmt: skip


# ---------------------------------------------------------------- measuring


def test_figure_is_the_median_with_its_extremes():
    assert timing.figure([3.0, 1.0, 10.0, 2.0]) == (2.5, 1.0, 10.0)
    # a ratio is of each round: what slows a whole round cancels
    assert timing.ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == (2.0, 2.0, 2.2)
    assert timing.ratio([3.0], [1.0], by=1.5).median == 2.0


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (10.0, 5), (6.6, 4)])
def test_calls_take_turns_within_a_budget(monkeypatch, budget, rounds):
    clock, order = itertools.count(0.0, 0.25), []
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))  # a look at it takes a quarter of a second
    monkeypatch.setattr(timing, "ROUNDS", 5)
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.interleaved(calls, budget, least=3)
    assert order == ["a", "b"] * (rounds + 1)  # one more warms up
    assert times == {"a": [0.25] * rounds, "b": [0.25] * rounds}


def test_every_cuda_device_is_waited_for(monkeypatch):
    # catches "cuda" waited for, but not "cuda:1": its times would be those of launches
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cuda", "cuda:1", "cpu"):
        timing.wait(torch.device(name))
    assert waited == [torch.device("cuda"), torch.device("cuda:1")]


def test_shape_is_the_first_that_takes_its_time():
    shapes = (speed.Shape(1, 2, 4, 4), speed.Shape(1, 4, 7, 16), speed.Shape(21, 30, 52))
    setting = speed.Setting(shapes=shapes, seconds=6.0)
    for slow in shapes:
        calls_of = lambda shape, slow=slow: {"call": lambda: time.sleep(0.6 * (shape == slow))}
        assert setting.fitting(calls_of)[0] == slow
    assert setting.fitting(lambda shape: {"call": lambda: None})[0] == shapes[-1]


def test_shapes_keep_the_proportion_of_81_frames_of_480x832():
    exact = speed.SHAPES[-1].tokens()
    assert exact == flops.tokens_of(PRESETS["wan2.1-1.3b"], (21, 60, 104))
    for shape in speed.SHAPES[-6:]:
        video, motion, _ = shape.tokens()
        assert motion / video == pytest.approx(exact.motion / exact.video, rel=0.01)


# ---------------------------------------------------------------- the plan


def planned(preset: str = "wan2.1-1.3b", gpus: int = 1, node: int = 8) -> dict:
    return plan.plan(preset, gpus, node, 2 * gpus, 5, (64, 64), steps=10, peak_tflops=312.0, mfu=0.4)


MEMORY = memory.Memory(*range(1, 1 + len(memory.Memory._fields)))  # where another is long to count


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
    # By hand, from a block's products: catches text or the ends counted as motion's, a square that is not
    # attention's, and a price at another size than the paper's.
    monkeypatch.setattr(plan, "training_memory", lambda *_: MEMORY)
    for preset, blocks, video, motion, paper in (
        ("wan2.1-1.3b", 30, 21 * 30 * 52, 51 * 81, ("2.6", "+12.9")),
        ("wan2.2-5b", 15, 31 * 22 * 40, 51 * 121, ("7.5", "+10.3")),
    ):
        config, result = PRESETS[preset], planned(preset)
        d, f, text = config.width, config.ffn, 512
        a_token = 2 * (6 * d * d + 2 * d * f + 2 * text * d)  # projections, FFN, and attention to the text
        texts = 2 * (2 * text * d * d)  # keys and values of the text, a block
        alone = 30 * (video * a_token + texts)
        linear = blocks * (motion * a_token + texts)
        squares = 30 * 4 * video**2 * d, blocks * 4 * ((video + motion) ** 2 - video**2) * d
        assert result["motion_adds"]["linear"] == pytest.approx(linear / alone, abs=0.002)
        whole = (linear + squares[1]) / (alone + squares[0])
        assert result["motion_adds"]["whole"] == pytest.approx(whole, abs=0.002)
        rows = {line[:23].strip(): line[23:].split() for line in capsys.readouterr().out.splitlines()[1:5]}
        assert rows["parameters, billions"] == [f"{result['parameters'] / 1e9:.2f}", paper[0]]
        assert rows["motion adds, % of FLOPs"] == [f"{100 * result['motion_adds']['linear']:+.1f}", paper[1]]
        assert rows["with self-attention"] == [f"{100 * result['motion_adds']['whole']:+.1f}"]
        assert abs(100 * result["motion_adds"]["linear"] - float(paper[1])) < 1.5


# ---------------------------------------------------------------- the runs


@DTYPES
def test_peer_computes_the_same_and_training_keeps_no_more(dtype, monkeypatch):
    # catches copies kept for the backward pass: of attention's result in another order, of a branch in fp32
    pytest.importorskip("diffusers", reason="pip install -r requirements-wan.txt")
    monkeypatch.setattr(dual_dit, "attention", fused_attention)  # products keep scores, for speed
    sides, shape = speed.Sides(TINY.config, dtype), speed.Shape(2, 16, 16, 64)
    with torch.no_grad():
        ours, theirs = (call().float() for call in sides.forward(shape).values())
    assert (ours - theirs).norm() / theirs.norm() < (1e-5 if dtype == torch.float32 else 2e-2)
    sides.train(shape)
    models, calls = {"ours": sides.ours, "peer": sides.peer}, sides.forward(shape)
    kept = {side: memory.kept_bytes(calls[side], models[side].parameters()) for side in models}
    assert 0.9 * kept["peer"] < kept["ours"] <= kept["peer"]


def test_training_speed_at_each_length(monkeypatch):
    # catches a part of a step that is not timed, and shares under another part's name
    monkeypatch.setattr(torch, "compile", lambda block: block)
    puppet.done(puppet.training_step(1, timing.CPU, False, True, 5))  # a real one
    clock = [0.0]

    def wait(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    parts = puppet.Parts(*(functools.partial(wait, seconds) for seconds in (1, 2, 3, 4)))
    monkeypatch.setattr(puppet, "training_step", lambda *_: parts)
    monkeypatch.setattr(train.run, "CLIP_LENGTHS", ((0.0, 5),))
    (found,) = puppet.lengths().values()
    assert [found[part] for part in puppet.Parts._fields] == [10, 20, 30, 40]
    assert found["clips_per_second"] == found["compiled"] == puppet.BATCH / 10


def test_default_run_has_every_key(capsys, monkeypatch):
    pytest.importorskip("diffusers", reason="pip install -r requirements-wan.txt")
    monkeypatch.setattr(puppet, "BATCH", 1)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(speed, "Setting", lambda: TINY)
    result = commands.bench_all()
    assert result.keys() == KEYS | {"spread", "device"} and result["spread"].keys() == KEYS
    for key in KEYS:
        low, high = result["spread"][key]
        assert 0 < low <= result[key] <= high < float("inf"), key
    assert set(capsys.readouterr().out.split()) >= KEYS
    json.dumps(result)

"""Ablations: equal terms for all variants, runs taken up where they are, means and spreads by hand."""

import json
import math
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import train
from dual_dit import PRESETS
from flow import Task
from kit import flops, puppet
from kit.checkpoints import folder_of
from kit.files import write_record
from kit.run import check
from study import ablate, evaluate, measures, scores
from study.ablate import VARIANTS, Plan

PLAN = Plan(steps=4, batch=1, frames=5, stage_1_share=0.5, device="cpu")


def test_stage_2_alone_computes_as_much_as_both_stages_and_video_tuning_sees_as_many_pairs():
    plan = Plan(5000, 16, 17, stage_1_share=0.1, device="cpu")

    def counted(video: bool) -> int:
        tokens = flops.Tokens(320 * video, 867, puppet.TEXT_LEN)
        return flops.step_flops(PRESETS["puppet"], tokens, checkpointing=False)

    both = 500 * counted(video=False) + 4500 * counted(video=True)
    assert ablate.steps_of("stage 2 alone", plan) * counted(video=True) == pytest.approx(both, rel=1e-3)
    assert 4500 < ablate.steps_of("stage 2 alone", plan) < 5000
    assert ablate.steps_of("video tuning", plan) == 4500
    for name in ("echomotion", "unsynced", "shared noise"):
        assert ablate.steps_of(name, plan) == 5000


@pytest.fixture
def few_real(monkeypatch) -> None:
    monkeypatch.setattr(ablate, "REAL_CLIPS", 24)


@pytest.fixture
def trainings(tiny_weights, monkeypatch) -> list[Namespace]:
    """The options of each training; instead of an hour's work it leaves tiny weights behind."""
    options = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        assert Path(command[1]).samefile(train.__file__)
        monkeypatch.setattr(sys, "argv", command[1:])
        args = train.options()
        try:
            check(args, ranks=1)
        except ValueError:
            return subprocess.CompletedProcess(command, 2)
        options.append(args)
        write_record(args.out / "run.json", args)
        shutil.copy(tiny_weights, args.out / "weights.safetensors")
        folder_of(args.out, args.steps).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ablate.subprocess, "run", run)
    return options


def test_variants_differ_in_one_thing(trainings, tmp_path):
    for name in VARIANTS:
        ablate.trained(name, 3, PLAN, tmp_path, 1)
    first, *others = ({**vars(args), "out": None} for args in trainings)
    changes = [{name for name, value in other.items() if value != first[name]} for other in others]
    assert changes == [{"unsynced"}, {"shared_noise"}, {"stage", "steps"}, {"stage", "steps", "video_only"}]


def test_all_variants_can_start_from_the_same_video_expert(trainings, tiny_weights, tmp_path):
    plan = PLAN._replace(init=str(tiny_weights))
    for name in VARIANTS:
        ablate.trained(name, 0, plan, tmp_path, 1)
    assert {(str(args.init), args.init_motion) for args in trainings} == {(str(tiny_weights), "copy")}
    with pytest.raises(ValueError, match=r"trained with \{'init': .*choose another --runs"):
        ablate.trained("echomotion", 0, PLAN, tmp_path, 1)


def test_a_variant_is_trained_once_and_only_taken_for_what_it_is(trainings, tmp_path):
    first = ablate.trained("stage 2 alone", 3, PLAN, tmp_path, 1)
    assert first.parent.name == "stage-2-alone-3" and first.is_file()
    assert ablate.trained("stage 2 alone", 3, PLAN, tmp_path, 1) == first and len(trainings) == 1
    # weights are also there after a run that was cut short, but no checkpoint of its last step is
    last = folder_of(first.parent, ablate.steps_of("stage 2 alone", PLAN))
    last.rename(last.with_name("step-00000001"))
    ablate.trained("stage 2 alone", 3, PLAN, tmp_path, 1)
    assert len(trainings) == 2 and trainings[1].resume == "auto"
    with pytest.raises(ValueError, match=r"trained with \{'batch': 1\}, expected .*choose another --runs"):
        ablate.trained("stage 2 alone", 3, PLAN._replace(batch=4), tmp_path, 1)
    with pytest.raises(ValueError, match="training stopped"):
        ablate.trained("unsynced", 4, PLAN._replace(frames=6), tmp_path, 1)


def test_spread_by_hand():
    found = ablate.spread([{"a": 1.0}, {"a": 2.0}, {"a": 6.0}])
    assert found == {"a": {"mean": 3.0, "std": pytest.approx(math.sqrt(7))}}
    assert ablate.spread([{"a": 1.0}])["a"]["std"] == 0


def test_real_videos_are_as_good_as_real(few_real):
    # catches a measure that would not give a perfect network its due
    real = ablate.held_out(6, frames=17)
    found = ablate.of_video(real.video, real)
    assert found["video_jerk_ratio"] == found["video_sharpness"] == 1
    noisy = ablate.of_video((real.video + 0.5 * torch.randn(real.video.shape)).clamp(-1, 1), real)
    assert noisy["video_sharpness"] > 2 and noisy["video_jerk_ratio"] > 2
    assert noisy["video_nearest_iou"] < found["video_nearest_iou"]


@pytest.mark.parametrize("found", ("nothing", "everything"))
def test_errors_are_of_the_velocity(few_real, found):
    # catches a wrong sign, noise or time: a network that knows the clips makes no error at any level
    real, codec = ablate.held_out(2, frames=5)._replace(bf16=False), puppet.Codec.fit(range(8))
    clean = codec.encode(real.video), real.motion

    def network(video, motion, t_video, t_motion, text, task):
        inputs = zip((video, motion), clean, (t_video, t_motion), strict=True)
        return [
            None if t is None else (x - x0) / t.view(-1, *[1] * (x.ndim - 1)) * (found == "everything")
            for x, x0, t in inputs
        ]

    network.motion_mean, network.motion_std = torch.zeros(()), torch.ones(())
    errors = ablate.errors(network, codec, (Task.VIDEO_ONLY, Task.JOINT, Task.VIDEO_TO_MOTION), real)
    expected = {
        f"error_{name}": 0.0 if found == "everything" else 1 + x0.square().mean().item()
        for name, x0 in zip(
            ("video_only_video", "joint_video", "joint_motion", "video_to_motion_motion"),
            (clean[0], *clean, clean[1]),
            strict=True,
        )
    }
    assert errors == pytest.approx(expected, rel=0.1, abs=1e-6)


def test_nearest_iou_finds_a_clip_among_the_others(few_real):
    real = ablate.held_out(3, frames=5)
    there = real._replace(shapes=torch.cat((real.shapes, puppet.silhouette(real.video))))
    assert ablate.of_video(real.video, there)["video_nearest_iou"] == 1
    assert ablate.of_video(real.video, real)["video_nearest_iou"] < 1


def test_ablate_writes_every_variant_with_mean_and_spread(
    few_real, tiny_weights, tmp_path, verb, monkeypatch, capsys
):
    asked = []
    both = threading.Barrier(2, timeout=10)  # each of the ten waits for another
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(
        ablate, "trained", lambda *given: (both.wait(), asked.append(given), tiny_weights)[-1]
    )
    monkeypatch.setattr(ablate, "SAMPLING", ablate.SAMPLING._replace(steps=1))
    out = tmp_path / "ablation.json"
    call = ("--frames", 5, "--seeds", 2, "--clips", 2, "--jobs", 2, "--runs", tmp_path, "--out", out)
    ended = verb(evaluate, "ablate", *call)
    assert ended.code == 0, ended.err
    # two at a time, in any order, each with half of the six threads
    assert {network[:2] for network in asked} == {(name, seed) for name in VARIANTS for seed in (0, 1)}
    assert {network[-1] for network in asked} == {3}
    result = json.loads(out.read_text())
    assert result["variants"].pop("real").keys() > {"video_limbs_whole", "video_nearest_iou"}
    assert result["variants"].keys() == VARIANTS.keys()
    for name, found in result["variants"].items():
        assert found.pop("seeds") == [0, 1] and found.pop("steps") > 0
        assert ("attention_41_share_best" in found) == ("m2v_iou" in found) == VARIANTS[name].motion
        assert ("m2v_iou_1.5_3" in found) == (name == "echomotion")
        assert ("attention" in found) == VARIANTS[name].motion
        maps = torch.tensor(found.pop("attention", [[[1.0]]]))
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]), atol=1e-3, rtol=0)
        for measure in found.values():
            assert math.isfinite(measure["mean"]) and measure["std"] == 0  # the same weights twice


def test_video_tuning_is_asked_for_videos_without_motion(few_real, monkeypatch):
    tasks, generate = [], ablate.generate_all
    for module in (ablate, scores):
        monkeypatch.setattr(module, "generate_all", lambda *a, **k: tasks.append(a[3]) or generate(*a, **k))
    monkeypatch.setattr(ablate, "SAMPLING", ablate.SAMPLING._replace(steps=1))
    codec, real = puppet.Codec.fit(range(8)), ablate.held_out(2, frames=5)
    ablate.measured(tiny_model(), codec, False, real)
    assert tasks == [Task.VIDEO_ONLY]
    ablate.measured(tiny_model(), codec, True, real)
    assert set(tasks[1:]) == {Task.JOINT, Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION}


def test_held_out_clips_are_not_those_of_the_bank():
    one, other = measures.held_out(4), measures.held_out(4, "bank")
    assert not torch.equal(one.joints, other.joints)

"""study/ablate.py: networks differ in one thing, are trained once, measured once; sums by hand."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train
from dual_dit import PRESETS
from flow import Task
from kit import flops, puppet
from kit.checkpoints import folder_of
from kit.files import write_record
from study import ablate, scores
from study.ablate import NETWORKS

STEPS = {0: 4, 1: 2, 2: 6}
PARTS = ("table1", "figure8", "a81", "a82", "a83", "table5", "table6")


@pytest.fixture
def start(tiny_weights, tmp_path) -> Path:
    """What train.py leaves of a run of all stages."""
    folder = tmp_path / "run"
    options = {"wan": None, "stage": None, "ablate": None, "steps": 12, "batch": 2}
    write_record(folder / "run.json", options)
    for name in ("stage-0", "stage-1", "weights"):
        shutil.copy(tiny_weights, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def plan(start, tmp_path) -> ablate.Plan:
    return ablate.Plan(
        ablate.start_of(start), 1, 2, None, tmp_path / "runs", tmp_path / "results.json", "cpu"
    )


@pytest.fixture
def trainings(tiny_weights, monkeypatch) -> list[Namespace]:
    """The options of each training; instead of hours of work it leaves tiny weights and two losses."""
    options = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        assert Path(command[1]).samefile(train.__file__)
        monkeypatch.setattr(sys, "argv", command[1:])
        args = train.options()
        options.append(args)
        write_record(args.out / "run.json", vars(args))
        shutil.copy(tiny_weights, args.out / "weights.safetensors")
        rows = [
            {"step": s, "validation": dict.fromkeys(ablate.STAGE_2, 1 / (s + 1))} for s in (0, args.steps)
        ]
        (args.out / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        folder_of(args.out, args.steps).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ablate.subprocess, "run", run)
    return options


@pytest.fixture
def few(monkeypatch) -> None:
    """As little work as shows everything."""
    for name, number in (("BANK_CLIPS", 24), ("READ_CLIPS", 2), ("CHUNK", {"cpu": 2, "cuda": 2})):
        monkeypatch.setattr(scores, name, number)
    monkeypatch.setattr(ablate, "SAMPLING", {"steps": 1})
    ablate.real_clips.cache_clear()


def test_ablations_differ_in_one_thing(trainings, plan):
    # catches other clips, noise, steps or beginnings for the network that is to win
    for name, network in NETWORKS.items():
        if network.frames:
            ablate.trained(name, 0, plan)
    base, *others = ({k: str(v) for k, v in vars(args).items() if k != "out"} for args in trainings)
    changes = [{name for name, value in other.items() if value != base[name]} for other in others]
    assert changes == [{"ablate"}, {"ablate"}, {"ablate", "init"}, {"ablate", "init"}]
    one_stage, single_stream = others[2:]
    assert one_stage["init"] == single_stream["init"] == str(plan.start.weights(0))
    assert base["init"] == str(plan.start.weights(1))


def test_video_tuning_sees_as_many_clips_or_costs_as_much_arithmetic(plan):
    plan = plan._replace(start=plan.start._replace(steps={0: 400, 1: 100, 2: 700}))
    config = PRESETS["puppet"]
    assert ablate.steps_of("video-tuning", plan) == ablate.steps_of("echomotion", plan) == 700

    def cost(video: int, motion: int) -> int:
        tokens = flops.Tokens(320 * video, 867 * motion, puppet.TEXT_LEN)
        return flops.step_flops(config, tokens, checkpointing=False)

    v, m, both = cost(1, 0), cost(0, 1), cost(1, 1)
    # joint always has both, each of the other tasks loses its condition in a tenth of the steps
    by_hand = 10 * (both + 0.9 * both + 0.1 * v + 0.9 * both + 0.1 * m) / 3
    assert ablate.arithmetic(2, 10, puppet.FRAMES) == pytest.approx(by_hand)
    spent = ablate.arithmetic(1, 100) + ablate.arithmetic(2, 700)
    steps = ablate.steps_of("video-tuning-flops", plan)
    assert ablate.arithmetic(0, steps) == pytest.approx(spent, rel=0.01)


def test_a_network_is_trained_once_and_only_taken_for_what_it_is(trainings, plan):
    assert ablate.trained("echomotion", 0, plan) == plan.start.folder  # the run itself
    out = ablate.trained("unsynced", 3, plan)
    assert out.name == "unsynced-3" and ablate.trained("unsynced", 3, plan) == out and len(trainings) == 1
    assert trainings[0].seed == 4  # 0 is the run's own
    folder_of(out, 500).rename(folder_of(out, 1))  # cut short: weights are there, its last step is not
    ablate.trained("unsynced", 3, plan)
    assert len(trainings) == 2 and trainings[1].resume == "auto"
    with pytest.raises(ValueError, match=r"trained with \{'steps': 500\}, expected .*choose another --runs"):
        ablate.trained("unsynced", 3, plan._replace(steps=9))


@pytest.mark.parametrize(("code", "saved"), ((2, True), (0, False)), ids=("fails at its end", "SIGTERM"))
def test_training_that_fails_or_stops_ends_the_work(code, saved, plan, monkeypatch):
    # catches a table of half trained networks; train.py takes SIGTERM for an end
    def run(*_, **__) -> subprocess.CompletedProcess:
        if saved:
            folder_of(plan.runs / "collision-0", 500).mkdir(parents=True)
        return subprocess.CompletedProcess([], code)

    monkeypatch.setattr(ablate.subprocess, "run", run)
    with pytest.raises(ValueError, match="training stopped; the same command goes on"):
        ablate.trained("collision", 0, plan)


def test_a_start_without_its_stages_is_refused(start):
    (start / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(ValueError, match="has not ended"):
        ablate.start_of(start)
    (start / "stage-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*stage-1\.safetensors: train all stages"):
        ablate.start_of(start)


def test_all_parts_are_written_and_measured_once(few, trainings, start, tmp_path, verb, capsys):
    out = tmp_path / "results.json"
    call = ("all", "--from", start, "--seeds", 2, "--clips", 2, "--runs", tmp_path / "runs", "--out", out)
    ended = verb(ablate, *call, "--device", "cpu")
    assert ended.code == 0, ended.err
    results = json.loads(out.read_text())
    assert set(results) == set(PARTS)
    for part in results.values():
        for name, found in part.items():
            assert (
                found["seeds"] == len(found["weights"]) == (2 if name in NETWORKS or "clock" in name else 1)
            )
            assert found["trained_clips"] == 2 * found["steps"]
            for value in found["measures"].values():
                assert value["mean"] == value["mean"] and value["error"] >= 0
                assert ("error_seeds" in value) == (found["seeds"] == 2)
    assert results["a82"]["one-stage"]["curve"]["steps"] == [0, 500]
    assert results["a81"]["collision"]["measures"]["first_loss"]["mean"] == 1
    maps = torch.tensor(results["figure8"]["unsynced"]["motion_to_video"])
    assert maps.shape == (2, 17, 5) and results["figure8"]["unsynced"]["chance"] == 0.2
    assert (maps.sum(-1) - 1).abs().max() < 1e-3
    # catches work done again, and old numbers kept beside new weights
    plan = ablate.Plan(ablate.start_of(start), 2, 2, None, tmp_path / "runs", out, "cpu")
    paths, measured = ablate.all_seeds("unsynced", plan), []
    for _ in range(2):
        ablate.write(plan, "figure8", "unsynced", paths, 500, lambda: measured.append(len(measured)) or {})
        (paths[1] / "weights.safetensors").write_bytes(b"trained again")
    assert measured == [0] and len(trainings) == 15  # eight networks of two seeds, one of them the run itself


def test_table_1_asks_each_network_for_its_own_kind_of_sample(few, trainings, plan, monkeypatch):
    # catches a backbone that is asked for motion, or one clock called motion first
    asked, generate = [], scores.generate

    def listen(model, codec, real, task, **sampling):
        asked.append((task, sampling.get("lead")))
        return generate(model, codec, real, task, **sampling)

    monkeypatch.setattr(ablate.scores, "generate", listen)
    ablate.table1(plan)
    video = (Task.VIDEO_ONLY, None)
    assert asked == [video, (Task.JOINT, 0.0), (Task.JOINT, None), video, video]


def test_curves_are_losses_a_task(tmp_path):
    # joint has two losses, one a modality: they are added as in training, the tasks are averaged
    rows = [
        {"step": 0, "stage": 2, "loss": 9.0},
        {"step": 0, "validation": dict(zip(ablate.STAGE_2, (1.0, 2.0, 3.0, 6.0), strict=True))},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert ablate.curve(tmp_path, ablate.STAGE_2) == ([0], [4.0])
    assert ablate.curve(tmp_path, ("joint/video",)) == ([0], [1.0])

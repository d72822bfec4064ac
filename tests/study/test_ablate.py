"""study/ablate.py: networks differ in one thing, are trained once, measured once; sums by hand."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train
from dual_dit import PRESETS
from flow import Task
from kit import backbone, flops, puppet, weights
from kit.checkpoints import folder_of
from kit.files import write_record
from study import ablate, scores
from study.ablate import NETWORKS


@pytest.fixture
def tiny_weights(tiny_weights, tmp_path) -> Path:
    """Tiny weights that say with which shift they were trained."""
    model, codec = weights.load_weights(tiny_weights)
    settings = {"recipe": {"stage": 2, "shift": 2.0, "ablate": None}}
    weights.save_weights(tmp_path / "tiny", TINY, model.state_dict(), codec, settings=settings)
    return tmp_path / "tiny"


@pytest.fixture
def plan(tiny_weights, tmp_path) -> ablate.Plan:
    """From what train.py leaves of a run of all stages."""
    start = tmp_path / "run"
    options = {"steps": 12, "batch": 2, "frames": None, "lr": 1e-3, "shift": 2.0, "precision": "fp32"}
    options |= {"wan": None, "data": None, "body": None, "ablate": None, "compile": True}
    write_record(start / "run.json", options)
    for name in ("stage-0", "stage-1", "weights"):
        shutil.copy(tiny_weights, start / f"{name}.safetensors")
    where = tmp_path / "runs", tmp_path / "results.json"
    return ablate.Plan(start, 1, 2, None, *where, "cpu", **ablate.check_start(start))


@pytest.fixture
def trainings(tiny_weights, monkeypatch) -> list[Namespace]:
    """The options of each training; instead of hours of work it leaves tiny weights and two losses."""
    options = []

    def run(command: list[str]) -> subprocess.CompletedProcess:
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


def test_ablations_differ_in_one_thing(trainings, plan):
    # catches other clips, noise, steps or beginnings for the network that is to win
    for name, network in NETWORKS.items():
        if network.frames:
            ablate.trained(name, 0, plan)
    base, *others = ({k: str(v) for k, v in vars(args).items() if k != "out"} for args in trainings)
    changes = [{name for name, value in other.items() if value != base[name]} for other in others]
    assert changes == [{"ablate"}, {"ablate"}, {"ablate", "init"}, {"ablate", "init"}]
    one_stage, single_stream = others[2:]
    as_the_run = {"compile": "True", "lr": "0.001", "shift": "2.0", "precision": "fp32"}
    assert as_the_run.items() <= base.items()
    assert one_stage["init"] == single_stream["init"] == str(plan.stage(0))
    assert base["init"] == str(plan.stage(1))


def test_video_tuning_sees_as_many_clips_or_costs_as_much_arithmetic(plan):
    plan = plan._replace(stages={0: 400, 1: 100, 2: 700})
    assert ablate.steps_of("video-tuning", plan) == ablate.steps_of("echomotion", plan) == 700
    assert ablate.steps_of("video-tuning-quarter", plan) == 175
    lengths = [step.frames for step in train.schedule({2: 700}, None)]
    by_hand = sum(
        flops.step_flops(PRESETS["puppet"], flops.Tokens(16 * (f + 3), 51 * f, puppet.TEXT_LEN))
        for f in lengths  # a latent of 8x8 tokens for the first frame, then for each four
    )
    assert ablate.arithmetic(2, 700, None) == pytest.approx(by_hand)
    spent = ablate.arithmetic(1, 100, None) + by_hand
    steps = ablate.steps_of("video-tuning-flops", plan)
    assert ablate.arithmetic(0, steps, None) == pytest.approx(spent, rel=0.01)
    steps = ablate.steps_of("echomotion-short", plan)
    spent = ablate.arithmetic(1, 100, None) + ablate.arithmetic(2, steps, None)
    assert ablate.arithmetic(0, 700, None) == pytest.approx(spent, rel=0.01)
    with pytest.raises(ValueError, match=r"less work than stage 1: --steps \d+ or more"):
        ablate.steps_of("echomotion-short", plan._replace(steps=100))


def test_a_network_is_trained_once_and_only_taken_for_what_it_is(trainings, plan):
    assert ablate.trained("echomotion", 0, plan).parent == plan.start  # the run itself
    out = ablate.trained("unsynced", 3, plan).parent
    ablate.trained("unsynced", 3, plan)
    assert out.name == "unsynced-3" and len(trainings) == 1
    assert trainings[0].seed == 4  # 0 is the run's own
    # cut short: weights are there, its last step is not
    folder_of(out, ablate.ABLATION_STEPS).rename(folder_of(out, 1))
    ablate.trained("unsynced", 3, plan)
    assert len(trainings) == 2 and trainings[1].resume == "auto"
    shutil.rmtree(out / "checkpoints")  # to save disk; it had ended
    ablate.trained("unsynced", 3, plan)
    assert len(trainings) == 2
    with pytest.raises(ValueError, match=r"trained with \{'steps': 500\}, expected .*choose another --runs"):
        ablate.trained("unsynced", 3, plan._replace(steps=9))
    plan.stage(1).write_bytes(b"of another run")
    with pytest.raises(ValueError, match=r"unsynced-3 was trained from other weights of .*run: choose"):
        ablate.trained("unsynced", 3, plan)


@pytest.mark.parametrize(("code", "saved"), ((2, True), (0, False)), ids=("fails at its end", "SIGTERM"))
def test_training_that_fails_or_stops_ends_the_work(code, saved, plan, monkeypatch):
    # catches a table of half trained networks; train.py takes SIGTERM for an end
    def run(*_, **__) -> subprocess.CompletedProcess:
        if saved:
            folder_of(plan.runs / "collision-0", ablate.ABLATION_STEPS).mkdir(parents=True)
        return subprocess.CompletedProcess([], code)

    monkeypatch.setattr(ablate.subprocess, "run", run)
    with pytest.raises(ValueError, match="training stopped; the same command goes on"):
        ablate.trained("collision", 0, plan)


def test_a_start_without_its_stages_or_on_other_data_is_refused(plan):
    record = json.loads((plan.start / "run.json").read_text())
    for name in ("data", "body"):
        write_record(plan.start / "run.json", record["options"] | {name: "mine"})
        with pytest.raises(
            ValueError, match=f"run was trained with --{name}: expected a run on the puppet's"
        ):
            ablate.check_start(plan.start)
    write_record(plan.start / "run.json", record["options"])
    (plan.start / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(ValueError, match="has not ended"):
        ablate.check_start(plan.start)
    (plan.start / "stage-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*stage-1\.safetensors: train all stages"):
        ablate.check_start(plan.start)


def test_all_parts_are_written_and_measured_once(trainings, plan, verb, monkeypatch):
    for name, number in (("BANK_CLIPS", 24), ("READ_CLIPS", 2)):  # little work that shows everything
        monkeypatch.setattr(scores, name, number)
    monkeypatch.setattr(backbone, "PUPPET_DEFAULTS", backbone.PUPPET_DEFAULTS._replace(steps=1))
    asked, shifts, generate, denoise = [], set(), scores.generate, scores.denoise

    def listen(*given, **sampling):
        asked.append((given[2], sampling["redraw"], sampling.get("steps")))
        return generate(*given, **sampling)

    note = lambda *given, **how: shifts.add(how["shift"]) or denoise(*given, **how)
    monkeypatch.setattr(scores, "generate", listen)
    monkeypatch.setattr(scores, "denoise", note)
    call = ("all", "--from", plan.start, "--seeds", 2, "--clips", 2, "--runs", plan.runs, "--out", plan.out)
    ended = verb(ablate, *call, "--device", "cpu")
    assert ended.code == 0, ended.err
    results = json.loads(plan.out.read_text())
    assert set(results) == {"table1", "table1-18", "figure8", "a81", "a82", "a83", "table5", "table6"}
    for part in results.values():
        for name, found in part.items():
            seeds = 2 if name in NETWORKS or "redrawn" in name else 1
            assert found["seeds"] == len(found["weights"]) == seeds
            assert found["trained_clips"] == 2 * found["steps"]
            for value in found["measures"].values():
                assert value["mean"] == value["mean"] and value["error"] >= 0
                assert ("error_seeds" in value) == (seeds == 2)
    assert results["a82"]["one-stage"]["curve"]["steps"] == [0, ablate.ABLATION_STEPS]
    assert results["a81"]["collision"]["measures"]["first_loss"]["mean"] == 1
    maps = torch.tensor(results["figure8"]["unsynced"]["motion_to_video"])
    assert maps.shape == (2, 17, 5) and results["figure8"]["unsynced"]["chance"] == 0.2
    assert (maps.sum(-1) - 1).abs().max() < 1e-3
    measures = results["figure8"]["unsynced"]["measures"]
    shares = [measures[f"motion_to_video_{layer}"]["mean"] for layer in range(2)]
    assert shares == pytest.approx(ablate.frame_share(maps).tolist(), abs=1e-4)  # each layer's own
    mean, ours = (results["table5"][name]["measures"] for name in ("mean-motion", "echomotion"))
    assert all(mean[key]["mean"] != ours[key]["mean"] for key in mean)
    # table 1 comes last, in 1 step and in 18. Catches a backbone that is asked for motion, and a row that
    # says redrawn, or 18 steps, in vain
    table1 = []
    for steps in (None, 18):
        ways = (Task.JOINT, False), (Task.JOINT, True), (Task.VIDEO_ONLY, False)
        joint, redrawn, video = ((*way, steps) for way in ways)
        echomotion = [joint] * 2 + [redrawn] * 2
        table1 += [video, *echomotion, *[video] * 4, *echomotion, *[video] * 2]
    assert asked[-30:] == table1 and shifts == {2.0}  # of training
    # catches work done again, and old numbers kept beside new weights
    measured = []
    for _ in range(2):
        ablate.measure(
            plan._replace(seeds=2), "figure8", "unsynced", lambda paths: measured.append(paths) or {}
        )
        (plan.runs / "unsynced-1" / "weights.safetensors").write_bytes(b"trained again")
    assert len(measured) == 1 and len(trainings) == 19  # ten networks of two seeds, one the run itself


def test_calls_side_by_side_keep_each_others_results(trainings, plan):
    # catches a file read before the measuring and written after it: what the other call wrote would be gone
    def measured(_: list[Path]) -> dict:
        ablate.measure(plan, "a81", "collision", lambda _: {})
        return {}

    ablate.measure(plan, "figure8", "unsynced", measured)
    assert set(json.loads(plan.out.read_text())) == {"a81", "figure8"}


def test_curves_are_losses_a_task(tmp_path):
    # joint has two losses, one a modality: they are added as in training, the tasks are averaged
    rows = [
        {"step": 0, "stage": 2, "loss": 9.0},
        {"step": 0, "validation": dict(zip(ablate.STAGE_2, (1.0, 2.0, 3.0, 6.0), strict=True))},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert ablate.curve(tmp_path, ablate.STAGE_2) == ([0], [4.0])
    assert ablate.curve(tmp_path, ("joint/video",)) == ([0], [1.0])


def test_networks_are_compared_seed_by_seed(plan, monkeypatch):
    # catches one network's seed beside another's: seeds differ more than networks do
    ends = {"one-stage": (1.0, 3.0), "single-stream": (1.5, 3.5)}

    def networks(name: str, plan: ablate.Plan) -> tuple[list[Path], int]:
        folders = [plan.runs / f"{name}-{seed}" for seed in range(2)]
        for folder, end in zip(folders, ends[name], strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            rows = [{"step": s, "validation": {"joint/video": loss}} for s, loss in ((0, 9.0), (4, end))]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
            (folder / "weights.safetensors").write_bytes(str(end).encode())
        return [folder / "weights.safetensors" for folder in folders], 4

    monkeypatch.setattr(ablate, "networks", networks)
    ablate.curves("a83", tuple(ends), ("joint/video",), plan)
    first, second = (ablate.read(plan.out)["a83"][name]["measures"] for name in ends)
    assert first["loss"]["error_seeds"] == second["loss"]["error_seeds"] == 1
    assert first["behind"]["mean"] == first["behind"]["error_seeds"] == 0
    assert (second["behind"]["mean"], second["behind"]["error_seeds"]) == (0.5, 0)
    # the first row's network trained again: the second, itself as before, is measured again
    ends["one-stage"] = (1.0, 3.5)
    ablate.curves("a83", tuple(ends), ("joint/video",), plan)
    assert ablate.read(plan.out)["a83"]["single-stream"]["measures"]["behind"]["mean"] == 0.25

"""train.py: runs that stop and go on, ranks that agree, what each stage may touch, and that it learns."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, contents
from safetensors.torch import load_file

import flow
import train
from dual_dit import DualDiT
from flow import Draw, Task
from kit import checkpoints, devices, distributed, monitor, puppet, validation, weights
from kit.data import batch as batches
from kit.data.batch import Batch, rng
from kit.data.datasets import puppet_motion
from kit.data.motion_files import Motion, save_amass
from kit.data.sources import open_sources
from kit.distributed import World
from kit.geometry import PUPPET

PLAIN = ("--device", "cpu", "--precision", "fp32", "--validate-every", 0)


def run_train(out: Path, *arguments: object, stage_1_share: float = 0.4) -> None:
    """Train in this process; of 10 steps four are stage 1, the last of them and the last two of 9 frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, ("train.py", *PLAIN, "--out", out, *arguments))])
        patch.setattr(train, "STAGE_1_SHARE", stage_1_share)
        train.main()


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, one a step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def curve(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(out)]


def trained(out: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, not averaged."""
    return checkpoints.load_whole(checkpoints.folder_of(out, step), "model")


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory, tiny_weights) -> Path:
    """The folder of an undisturbed run through both stages."""
    out = tmp_path_factory.mktemp("train") / "run"
    run_train(out, "--init", tiny_weights, "--steps", 10, "--batch", 2)
    return out


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, tiny_weights) -> Path:
    """The folder of a run of one step of stage 2."""
    out = tmp_path_factory.mktemp("train") / "run"
    run_train(out, "--init", tiny_weights, "--stage", 2, "--steps", 1, "--batch", 1)
    return out


# ---------------------------------------------------------------- a run's files


def test_every_step_is_one_line_of_metrics_and_loss_is_drawn(ten_steps):
    lines = metrics(ten_steps)
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["stage"] for line in lines] == [1] * 4 + [2] * 6
    assert [line["frames"] for line in lines] == [5, 9, 17, 17, 5, 5, 9, 17, 17, 17]
    for line in lines:
        assert Task[line["task"].upper()] in Task and math.isfinite(line["loss"])
    assert (ten_steps / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_shipped_weights_are_the_moving_average(one_step, tiny_weights):
    # catches raw weights written out; after one step the average is 1/10 the start and 9/10 the result
    raw, start = trained(one_step, 1), load_file(tiny_weights)
    average = load_file(one_step / "weights.safetensors")
    moved = [name for name in raw if not torch.equal(raw[name], start[name])]
    for expert in ("video", "motion"):  # stage 2 trains both
        assert sum(expert in name.split(".") for name in moved) > 50
    for name in moved:
        torch.testing.assert_close(average[name], 0.1 * start[name] + 0.9 * raw[name])
        assert not torch.equal(average[name], raw[name]), name


def test_weights_of_a_run_can_be_loaded_and_carry_codec_and_statistics(one_step, tiny_weights):
    model, extra = weights.load_weights(one_step / "weights.safetensors")
    start, codec = weights.load_weights(tiny_weights)
    assert model.config == TINY
    assert torch.equal(model.motion_mean, start.motion_mean) and torch.equal(
        model.motion_std, start.motion_std
    )
    assert all(torch.equal(extra[name], codec[name]) for name in codec)


# ---------------------------------------------------------------- stop and go on


@pytest.mark.parametrize(
    ("save_every", "stopped_in"),
    ((3, 3), (4, 4), (5, 7)),
    ids=("within stage 1", "between the stages", "two steps past the checkpoint"),
)
def test_stopped_and_resumed_run_is_the_undisturbed_one(
    ten_steps, tiny_weights, tmp_path, monkeypatch, save_every, stopped_in
):
    # catches lost optimizer state, average, random numbers, schedule: all to the last bit
    update = train.update_ema

    def stop(ema, model, step):
        if step == stopped_in:
            raise KeyboardInterrupt
        update(ema, model, step)

    call = ("--init", tiny_weights, "--steps", 10, "--batch", 2, "--save-every", save_every)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update_ema", stop)
        run_train(tmp_path, *call)
    while not checkpoints.folder_of(tmp_path, save_every).exists():  # it is written by another thread
        time.sleep(0.01)
    run_train(tmp_path, *call, "--resume")
    assert curve(tmp_path) == curve(ten_steps)
    weights_file = "weights.safetensors"
    assert (tmp_path / weights_file).read_bytes() == (ten_steps / weights_file).read_bytes()


def test_a_line_cut_off_in_the_log_does_not_keep_a_run_from_going_on(tmp_path):
    # catches a log that only a clean exit leaves readable: a power cut stops in the middle of a line
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "validation": {}}\n{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n'
        '{"step": 2, "validation": {}}\n{"step": 2, "lo'
    )
    monitor.Log(tmp_path, 2, 5).close()
    assert [tuple(line) for line in metrics(tmp_path)] == [("step", "validation"), *[("step", "loss")] * 2]


def test_a_damaged_checkpoint_is_skipped_aloud(ten_steps, tiny_weights, tmp_path, capsys):
    # catches a resume that trusts the newest name, or a marker that says nothing of the other files
    out = tmp_path / "run"
    run_train(out, "--init", tiny_weights, "--steps", 10, "--batch", 2, "--save-every", 4)
    damaged = checkpoints.folder_of(out, 10)
    file = next(damaged.glob("__*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    run_train(out, "--steps", 10, "--batch", 2, "--save-every", 4, "--resume")
    assert f"{damaged} is damaged ({file.name} not as written)" in capsys.readouterr().out
    assert curve(out) == curve(ten_steps)
    assert checkpoints.newest(out, distributed.ALONE).folder == damaged  # made anew
    for folder in out.glob("checkpoints/*"):
        (folder / "done.json").unlink()
    with pytest.raises(ValueError, match=r"all 3 checkpoints of .* are damaged"):
        run_train(out, "--steps", 10, "--batch", 2, "--resume", "auto")


def test_only_the_last_checkpoints_are_kept(tiny_weights, tmp_path):
    run_train(tmp_path, "--init", tiny_weights, "--steps", 5, "--batch", 1, "--save-every", 1, "--keep", 2)
    assert sorted(p.name for p in tmp_path.glob("checkpoints/*")) == ["step-00000004", "step-00000005"]


def test_a_checkpoint_before_damaged_ones_is_kept_and_they_go(tmp_path):
    # catches --keep 1 that keeps the damaged one, because its name is the last
    for step in (4, 8):
        checkpoints.folder_of(tmp_path, step).mkdir(parents=True)
    (tmp_path / "new").mkdir()
    checkpoints.Writer(tmp_path, 1, distributed.ALONE, False)._publish(tmp_path / "new", {"step": 6})
    assert [p.name for p in tmp_path.glob("checkpoints/*")] == ["step-00000006"]


def test_export_is_what_the_run_wrote(ten_steps, tmp_path, verb):
    # catches raw weights exported, or a file without what it takes to sample
    file = tmp_path / "mine.safetensors"
    assert verb(train, "export", "--out", ten_steps, file).code == 0
    assert file.read_bytes() == (ten_steps / "weights.safetensors").read_bytes()
    ended = verb(train, "export", "--out", tmp_path, file)
    assert ended.code == 2 and "nothing to export" in ended.err


# ---------------------------------------------------------------- ranks


def test_two_ranks_follow_the_loss_of_one_process(tiny_weights, tmp_path):
    # catches gradients that are summed or not shared, repeated samples, a loss of one rank only
    call = ("--init", tiny_weights, "--steps", 7, "--batch", 4)
    run_train(tmp_path / "one", *call, stage_1_share=train.STAGE_1_SHARE)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    subprocess.run(
        [*map(str, (*torchrun, "train.py", *PLAIN, "--out", tmp_path / "two", *call))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=600,
    )
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["stage"] for line in one] == [line["stage"] for line in two] == [1] + [2] * 6
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-2)):
        expected = [line[key] for line in one]
        assert [line[key] for line in two] == pytest.approx(expected, rel=tolerance), key


# ---------------------------------------------------------------- watching


def test_watching_a_run_changes_nothing_in_it(ten_steps, tiny_weights, tmp_path):
    # catches averaged weights left in the network, and random numbers drawn for validation
    watched = tmp_path / "run"
    run_train(watched, "--init", tiny_weights, "--steps", 10, "--batch", 2, "--validate-every", 5)
    steps = [line for line in metrics(watched) if "loss" in line]
    assert [(line["step"], line["loss"]) for line in steps] == curve(ten_steps)
    weights_file = "weights.safetensors"
    assert (watched / weights_file).read_bytes() == (ten_steps / weights_file).read_bytes()
    validated = {line["step"]: line["validation"] for line in metrics(watched) if "validation" in line}
    assert list(validated) == [0, 5, 10]
    assert {key for key in validated[0] if key.count("/") == 1} == {"motion_only/motion"}
    made = "joint/video", "joint/motion", "motion_to_video/video", "video_to_motion/motion"
    assert {key for key in validated[5] if key.count("/") == 1} == {*made}
    assert {key for key in validated[5] if "joint/motion" in key} == {
        "joint/motion", *(f"joint/motion/{t}" for t in validation.TIMES)
    }  # fmt: skip
    pictures = sorted(path.name for path in watched.glob("samples/*"))
    assert pictures == ["step-00000000.png", "step-00000005.png", "step-00000010.png"]


def test_validation_is_the_loss_of_the_averaged_weights_on_samples_never_trained_on(one_step, tiny_weights):
    # recomputed sample by sample: catches other clips or noise, raw weights, means over the wrong axis
    sources, held = validation.hold_out(open_sources(["puppet"], PUPPET, puppet.body()))
    assert len(held) == 16 and sources[0].count is None
    model, extra = weights.load_weights(tiny_weights)
    codec = puppet.Codec.from_state(extra)
    samples = validation.read_held_out(held, model, 2, 9, codec, distributed.ALONE)
    averaged, _ = weights.load_weights(one_step / "weights.safetensors")
    with validation.averaged(model, averaged.state_dict()):
        found = validation.validate(model, samples, validation.TASKS[2], 5, False, 1)
    start = load_file(tiny_weights)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    errors = []
    for i, (_, seed) in enumerate(held):
        clip = puppet.clips([seed], frames=9)
        motion = (puppet_motion(clip) - model.motion_mean) / model.motion_std
        torch.testing.assert_close(samples.motion[i], motion[0])
        pixels = puppet.render(clip.joints, clip.betas, clip.shirt)[0]
        torch.testing.assert_close(samples.video[i], codec.encode(pixels)[0])
        assert torch.equal(samples.text[i], puppet.encode_text(clip.caption)[0])
        row = samples.rows(i, i + 1)
        errors.append(flow.loss(averaged, *row[:3], Task.JOINT, row.draw).motion.item())
    assert found["joint/motion"] == pytest.approx(sum(errors) / 16, rel=1e-5)
    assert found["joint/motion/0.375"] == pytest.approx(sum(errors[1::4]) / 4, rel=1e-5)


def test_held_out_samples_of_a_data_set_are_not_trained_on():
    # catches validation on what is trained on
    sources = open_sources(["puppet:60@1", "puppet:400@1"], PUPPET, puppet.body())
    training, held = validation.hold_out(sources)
    assert [source.count for source in training] == [57, 384]
    assert [number for source, number in held if source.count == 57] == [57, 58, 59]
    assert [number for source, number in held if source.count == 384] == list(range(384, 400))
    assert [source.count for source, _ in held[:6]] == [57, 384] * 3


def test_two_ranks_validate_as_one_process_does(tiny_weights, monkeypatch):
    # catches samples counted twice where they do not divide by the ranks
    _, held = validation.hold_out(open_sources(["puppet"], PUPPET, puppet.body()))
    model, extra = weights.load_weights(tiny_weights)
    given = held[:5], model, 1, 5, puppet.Codec.from_state(extra)
    how = validation.TASKS[1], 4, False
    alone = validation.validate(model, validation.read_held_out(*given, distributed.ALONE), *how, 1)
    sums = []
    together = (lambda value, _: sums.append(value) or value, lambda value, _: sums[0] + value)
    for rank, sum_of_ranks in enumerate(together):
        monkeypatch.setattr(distributed, "mean_over_ranks", sum_of_ranks)
        share = validation.read_held_out(*given, World(torch.device("cpu"), rank, 2))
        assert len(share.motion) == 3
        found = validation.validate(model, share, *how, 2)
    assert found == pytest.approx(alone, rel=1e-5)


def test_speed_is_counted_from_what_a_step_computes():
    model = DualDiT(TINY)
    motion = Batch(None, torch.zeros(2, 5, 235), torch.zeros(2, 16, 64), Task.MOTION_ONLY, None)
    joint = motion._replace(video=torch.zeros(2, 48, 2, 8, 8), task=Task.JOINT)
    found = [monitor.speed(model.config, batch, 8, 2.0, 1e12) for batch in (motion, joint)]
    assert [speed["clips_per_second"] for speed in found] == [4, 4]
    assert [speed["tokens_per_second"] for speed in found] == [4 * 5 * 51, 4 * (5 * 51 + 2 * 64)]
    assert 0 < found[0]["mfu"] < found[1]["mfu"] < 1
    assert "mfu" not in monitor.speed(model.config, joint, 8, 2.0, None)


def test_tensorboard_has_the_same_numbers_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.purge_step = purge_step

        def add_scalar(self, name, value, step):
            written.append((name, value, step, self.purge_step))

        def close(self):
            written.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = monitor.Log(tmp_path, 3, 5)
    log.step({"step": 3, "stage": 2, "task": "joint", "loss": 0.5, "grad_norm": math.nan})
    log.validation(4, {"joint/video": 0.25})
    log.close()
    assert written == [("joint/loss", 0.5, 3, 3), ("validation/joint/video", 0.25, 4, 3), "closed"]
    assert metrics(tmp_path)[0] == {"step": 3, "stage": 2, "task": "joint", "loss": 0.5}  # JSON has no NaN


def test_a_run_says_how_it_was_started(ten_steps):
    record = json.loads((ten_steps / "run.json").read_text())
    assert record["command"][0] == "train.py" and "--batch" in record["command"]
    assert record["options"]["batch"] == 2 and record["options"]["seed"] == 0
    assert record["config"]["width"] == TINY.width
    assert record["versions"]["torch"] == torch.__version__
    assert record["ranks"] == 1


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("batch", "given", "calls"), ((16, (), 2), (16, ("--accumulate", 1), 1), (12, (), 1))
)
def test_a_cpu_trains_on_eight_clips_at_a_time(tiny_weights, tmp_path, monkeypatch, batch, given, calls):
    sizes, loss = [], flow.loss
    monkeypatch.setattr(
        flow, "loss", lambda model, *given: sizes.append(len(given[2])) or loss(model, *given)
    )
    plan = ("--init", tiny_weights, "--stage", 2, "--frames", 5, "--steps", 1, "--batch", batch)
    run_train(tmp_path, *plan, *given)
    assert sizes == [batch // calls] * calls


def test_a_gpu_takes_a_batch_as_a_whole():
    assert devices.microbatches(16, torch.device("cuda")) == 1


def test_stage_1_leaves_the_video_expert_bitwise_alone_and_trains_all_of_motions(tiny_weights, tmp_path):
    # catches weight decay, the average or a gradient reaching Wan's weights
    run_train(tmp_path, "--init", tiny_weights, "--stage", 1, "--steps", 3, "--batch", 2)
    start = load_file(tiny_weights)
    finals = trained(tmp_path, 3), load_file(tmp_path / "weights.safetensors")
    for final in finals:
        for expert, moves in (("video", False), ("motion", True)):
            names = [name for name in final if expert in name.split(".")]
            assert len(names) > 50
            wrong = [name for name in names if torch.equal(final[name], start[name]) is moves]
            assert not wrong, expert


def test_one_clip_is_learned_by_heart_and_sampled_back(tiny_weights):
    # catches a velocity of the wrong sign or scale, and a sampler that runs the wrong way
    source, extra = weights.load_weights(tiny_weights)
    clip = puppet.clips([11], frames=5)
    pixels = puppet.render(clip.joints, clip.betas, clip.shirt)[0]
    # the middle of the picture and the strongest components, for speed
    video = puppet.Codec.from_state(extra).encode(pixels)[:, :16, :, 2:6, 2:6]
    motion = (puppet_motion(clip) - source.motion_mean) / source.motion_std
    text = puppet.encode_text(clip.caption)

    torch.manual_seed(0)
    model = DualDiT(dataclasses.replace(TINY, channels=16, width=64))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    steps, copies = 250, 2
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    given = [x.expand(copies, *x.shape[1:]) for x in (video, motion, text)]
    for _ in range(steps):
        t = torch.rand(copies)
        draw = Draw(torch.randn_like(given[0]), torch.randn_like(given[1]), t, t)
        flow.loss(model, *given, Task.JOINT, draw).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    noise = torch.randn_like(video), torch.randn_like(motion)
    result = flow.sample(model, *noise, text, torch.zeros_like(text), Task.JOINT, steps=12)
    for name, found, real in (("video", result.video, video), ("motion", result.motion, motion)):
        error = (found - real).square().mean() / real.square().mean()  # 1 is the error of predicting zero
        assert error < 0.25, f"{name}: {error:.3f}"


@pytest.mark.parametrize("flags", ((), ("--unsynced",), ("--init-motion", "copy")), ids=" ".join)
def test_what_a_run_starts_from(verb, tiny_weights, tmp_path, flags):
    # catches ablations and copies that are dropped in silence where weights come from a file
    call = ("--init", tiny_weights, "--stage", 1, "--steps", 1, "--frames", 5, "--batch", 1, "--lr", 1e-9)
    assert verb(train, *call, *PLAIN, "--out", tmp_path / "run", *flags).code == 0
    source, model = (weights.load_weights(x)[0] for x in (tiny_weights, tmp_path / "run/weights.safetensors"))
    assert model.config == dataclasses.replace(source.config, synced="--unsynced" not in flags)
    expert = source.blocks[1].video if "copy" in flags else source.blocks[1].motion
    for name, value in expert.state_dict().items():
        torch.testing.assert_close(model.blocks[1].motion.state_dict()[name], value, rtol=0, atol=1e-6)
    assert not torch.equal(source.blocks[1].video.ffn[0].weight, source.blocks[1].motion.ffn[0].weight)


# ---------------------------------------------------------------- errors of use


MISUSE = {
    "nothing to resume": (("--resume",), "nothing to resume"),
    "no steps": (("--steps", 0), "--steps"),
    "never saved": (("--save-every", 0), "--save-every"),
    "no clips": (("--batch", 0), "--batch"),
    "no checkpoints": (("--keep", 0), "--keep"),
    "no microbatches": (("--accumulate", 0), "--accumulate"),
    "uneven microbatches": (("--batch", 5, "--accumulate", 2), "3 ranks x 2 microbatches; the nearest is 6"),
    "validation backwards": (("--validate-every", -1), "--validate-every"),
    "6 frames": (("--frames", 6), "4n\\+1, got 6; the nearest is 5"),
    "no shift": (("--shift", 0), "--shift is a number above 0, got 0"),
    "shift is no number": (("--shift", "nan"), "--shift is a number above 0, got nan"),
    "no video to tune": (("--video-only",), "add --stage 2, or leave --video-only out"),
    "motion from nowhere": (("--init-motion", "fresh"), "fresh needs --wan FOLDER without --init"),
    "no such weights": (("--init", "missing.safetensors"), r"missing\.safetensors"),
    "uneven ranks": (("--batch", 4), "multiple of 3 ranks; the nearest is 3"),
}


@pytest.mark.parametrize(("arguments", "words"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_one_line_and_writes_nothing(verb, tiny_weights, tmp_path, monkeypatch, arguments, words):
    if "ranks" in words:
        monkeypatch.setattr(distributed, "start", lambda device: World(torch.device(device), 0, 3))
    call = ("--init", tiny_weights, "--steps", 1, "--batch", 1, *PLAIN, "--out", tmp_path / "run")
    ended = verb(train, *call, *arguments)
    assert ended.code == 2
    assert ended.err.startswith("train.py: error: ") and ended.err.count("\n") == 1
    assert re.search(words, ended.err)
    assert not (tmp_path / "run").exists()


def test_motion_alone_is_refused_before_stage_1_is_trained(verb, tiny_weights, tmp_path):
    clip, folder = puppet.clips([0]), tmp_path / "motions"
    folder.mkdir()
    moving = clip.global_orient[0], clip.body_pose[0], clip.betas[0], clip.transl[0]
    save_amass(folder / "a.npz", Motion(*moving, puppet.FPS, "neutral"), puppet.body())
    call = ("--init", tiny_weights, "--steps", 1, "--batch", 1, *PLAIN, "--out", tmp_path / "run")
    ended = verb(train, *call, "--data", f"amass:{folder}")
    assert ended.code == 2
    assert re.search("stage 2 needs video.*or --stage 1$", ended.err.splitlines()[-1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "shared", "kinds"),
    (
        ((), False, {"JOINT", "MOTION_TO_VIDEO", "VIDEO_TO_MOTION", "VIDEO_ONLY"}),
        (("--shared-noise",), True, {"JOINT", "MOTION_TO_VIDEO", "VIDEO_TO_MOTION", "VIDEO_ONLY"}),
        (("--video-only",), False, {"VIDEO_ONLY"}),
    ),
    ids=("as it is", "one noise level", "video tuning"),
)
def test_ablations_reach_the_batch(verb, tiny_weights, tmp_path, monkeypatch, flags, shared, kinds):
    made, batch = [], batches.batch
    monkeypatch.setattr(batches, "batch", lambda *a, **k: made.append(batch(*a, **k)) or made[-1])
    call = ("--init", tiny_weights, "--stage", 2, "--steps", 8, "--frames", 5, "--batch", 1)
    assert verb(train, *call, *PLAIN, "--out", tmp_path / "run", *flags).code == 0
    assert len(made) == 8 and {one.task.name for one in made} == kinds
    for one in made:
        assert torch.equal(one.draw.t_video, one.draw.t_motion) == shared
    # the same clips and noise, whatever is ablated: the first draws of the step's generators
    expected = rng("noise", 0, 2, 0, 0)
    torch.rand(1, generator=expected)
    assert torch.equal(made[0].draw.noise_video[0], torch.randn(made[0].video.shape[1:], generator=expected))


def test_video_tuning_leaves_the_motion_expert_alone(verb, tiny_weights, tmp_path):
    call = ("--init", tiny_weights, "--stage", 2, "--video-only", "--steps", 2, "--frames", 5, "--batch", 1)
    # PLAIN validates never: what comes later counts
    call += (*PLAIN, "--validate-every", 1)
    assert verb(train, *call, "--out", tmp_path / "run").code == 0
    watched = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {name for line in watched for name in line.get("validation", {})}
    assert losses and all(name.startswith("video_only/video") for name in losses)
    before, after = (load_file(path) for path in (tiny_weights, tmp_path / "run" / "weights.safetensors"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("motion" in name.split(".") for name in changed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        ((), "add --resume"),
        (("--resume", "--steps", 2), "of a run with --steps 1: resume with the same"),
        (("--resume", "--stage", 1), "of a run with --stage 2: resume with the same"),
        (("--resume", "auto", "--seed", 1), "of a run with --seed 0: resume with the same"),
        (("--resume", "--shared-noise"), "of a run with no --shared-noise: resume with the same"),
        (("--resume", "--lr", 1e-4), "of a run with no --lr: resume with the same"),
        (("--resume", "--data", "puppet:8"), "of a run with no --data: resume with the same"),
    ),
    ids=(
        "started anew",
        "other steps",
        "another stage",
        "other seed",
        "other noise",
        "other rate",
        "other data",
    ),
)
def test_a_finished_run_is_not_overwritten(verb, tiny_weights, one_step, arguments, words):
    before = contents(one_step)
    call = ("--init", tiny_weights, "--stage", 2, "--steps", 1, "--batch", 1, *PLAIN, "--out", one_step)
    ended = verb(train, *call, *arguments)
    assert ended.code == 2
    assert words in ended.err and ended.err.count("\n") == 1
    assert contents(one_step) == before


def test_weights_are_not_overwritten_where_checkpoints_are_gone(verb, tiny_weights, tmp_path):
    shutil.copy(tiny_weights, tmp_path / "weights.safetensors")
    before = contents(tmp_path)
    ended = verb(train, "--init", tiny_weights, "--steps", 1, "--batch", 1, *PLAIN, "--out", tmp_path)
    assert ended.code == 2 and "weights.safetensors exists" in ended.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("before", (True, False), ids=("--out before the verb", "after it"))
def test_export_is_of_the_run_that_was_named(verb, one_step, tmp_path, before):
    out, to = ("--out", one_step), tmp_path / "w.safetensors"
    ended = verb(train, *((*out, "export", to) if before else ("export", *out, to)))
    assert ended.code == 0, ended.err
    found, expected = load_file(to), load_file(one_step / "weights.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())

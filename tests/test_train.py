"""train.py: runs that stop and go on, ranks that agree, what each stage may touch, and that it learns."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, contents
from safetensors.torch import load_file

import flow
import train
from dual_dit import DualDiT
from flow import Draw, Task
from kit import data, parallel, puppet, weights

PLAIN = ("--device", "cpu", "--precision", "fp32")


def run_train(out: Path, *arguments: object, stage_1_share: float = 0.4) -> None:
    """Train in this process; of 10 steps four are stage 1, the last of them and the last two of 9 frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *PLAIN, "--out", str(out), *map(str, arguments)])
        patch.setattr(train, "STAGE_1_SHARE", stage_1_share)
        train.main()


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, one a step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def curve(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(out)]


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
    raw, start = torch.load(one_step / "checkpoint.pt")["model"], load_file(tiny_weights)
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
    assert parallel.load_state(tmp_path / "checkpoint.pt")["step"] == save_every
    run_train(tmp_path, *call, "--resume")
    assert curve(tmp_path) == curve(ten_steps)
    weights_file = "weights.safetensors"
    assert (tmp_path / weights_file).read_bytes() == (ten_steps / weights_file).read_bytes()


def test_failed_save_keeps_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    # catches writing in place: a run stopped while saving could never be resumed
    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    parallel.save_state(tmp_path / "checkpoint.pt", {"step": 1})
    before = contents(tmp_path)
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        parallel.save_state(tmp_path / "checkpoint.pt", {"step": 2})
    assert contents(tmp_path) == before


def test_a_line_cut_off_in_the_log_does_not_keep_a_run_from_going_on(tmp_path):
    # catches a log that only a clean exit leaves readable: a power cut stops in the middle of a line
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    train.open_log(path, first_step=2).close()
    assert curve(tmp_path) == [(0, 2.0), (1, 1.0)]


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


# ---------------------------------------------------------------- what is trained


def test_stage_1_leaves_the_video_expert_bitwise_alone_and_trains_all_of_motions(tiny_weights, tmp_path):
    # catches weight decay, the average or a gradient reaching Wan's weights
    run_train(tmp_path, "--init", tiny_weights, "--stage", 1, "--steps", 3, "--batch", 2)
    start = load_file(tiny_weights)
    finals = torch.load(tmp_path / "checkpoint.pt")["model"], load_file(tmp_path / "weights.safetensors")
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
    motion = (data.puppet_motion(clip) - source.motion_mean) / source.motion_std
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


# ---------------------------------------------------------------- errors of use


MISUSE = {
    "nothing to resume": (("--resume",), "nothing to resume"),
    "no steps": (("--steps", 0), "--steps"),
    "never saved": (("--save-every", 0), "--save-every"),
    "no clips": (("--batch", 0), "--batch"),
    "6 frames": (("--frames", 6), "4n\\+1, got 6; the nearest is 5"),
    "no such weights": (("--init", "missing.safetensors"), r"missing\.safetensors"),
    "uneven ranks": (("--batch", 4), "multiple of 3 ranks; the nearest is 3"),
}


@pytest.mark.parametrize(("arguments", "words"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_one_line_and_writes_nothing(verb, tiny_weights, tmp_path, monkeypatch, arguments, words):
    if "ranks" in words:
        monkeypatch.setattr(parallel, "start", lambda device: (torch.device(device), 0, 3))
    call = ("--init", tiny_weights, "--steps", 1, "--batch", 1, *PLAIN, "--out", tmp_path / "run")
    ended = verb(train, *call, *arguments)
    assert ended.code == 2
    assert ended.err.startswith("train.py: error: ") and ended.err.count("\n") == 1
    assert re.search(words, ended.err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        ((), "add --resume"),
        (("--resume", "--steps", 2), "--stage 2 --steps 1: resume with the same"),
        (("--resume", "--stage", 1), "--stage 2 --steps 1: resume with the same"),
    ),
    ids=("started anew", "other steps", "another stage"),
)
def test_a_finished_run_is_not_overwritten(verb, tiny_weights, one_step, arguments, words):
    before = contents(one_step)
    call = ("--init", tiny_weights, "--stage", 2, "--steps", 1, "--batch", 1, *PLAIN, "--out", one_step)
    ended = verb(train, *call, *arguments)
    assert ended.code == 2
    assert words in ended.err and ended.err.count("\n") == 1
    assert contents(one_step) == before

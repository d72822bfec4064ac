"""train.py: its three stages, runs that stop and go on, ablations, validation, and that it learns."""

import dataclasses
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import TINY, contents, metrics, small_codec, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn

import flow
import train
from dual_dit import DualDiT
from flow import Draw, Task
from kit import checkpoints, distributed, monitor, plots, puppet, validation, weights
from kit.data import batch as batches
from kit.data.datasets import puppet_motion
from kit.data.sources import open_sources
from kit.distributed import World
from kit.geometry import PUPPET

PLAIN = ("--device", "cpu", "--precision", "fp32", "--validate-every", 0)
STEPS = {0: 4, 1: 3, 2: 5}  # of each stage; their ends are 4, 7 and 12
RUN = ("--batch", 2, "--keep", 99)
ALONE = World(torch.device("cpu"), 0, 1)


class Call(NamedTuple):
    """What the objective was called with at a step, and the weights that it found."""

    state: dict[str, Tensor]
    draw: Draw
    video: Tensor | None
    motion: Tensor


def run_train(
    out: Path, *arguments: object, stages: dict[int, int] = STEPS, draws: bool = False
) -> list[Call]:
    """Train in this process -> every call of the objective in training. `draws`: loss.png as well."""
    calls, loss = [], flow.loss

    def noted(model, video, motion, text, null_text, draw):
        if torch.is_grad_enabled():  # validation calls it too
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
            calls.append(Call(state, draw, video, motion))
        return loss(model, video, motion, text, null_text, draw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, ("train.py", *PLAIN, "--out", out, *arguments))])
        patch.setitem(train.run.STEPS, "puppet", stages)
        patch.setattr(flow, "loss", noted)
        if not draws:
            patch.setattr(plots, "loss_picture", lambda *_: None)
        train.main()
    return calls


def curve(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(out) if "loss" in line]


def saved(out: Path, step: int, kind: str = "model") -> dict[str, Tensor]:
    """The weights of a checkpoint, or their average ("ema")."""
    return checkpoints.load_whole(checkpoints.folder_of(out, step), kind)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def as_video(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every tensor of the motion expert that has a twin in the video expert: the twin."""
    twins = {name: re.sub(r"\bmotion\b", "video", name) for name in state}
    found = {name: state[twin] for name, twin in twins.items() if twin != name and twin in state}
    return {name: twin for name, twin in found.items() if twin.shape == state[name].shape}


def weights_of(path: Path, stage: int | None, **recipe: float) -> Path:
    """Tiny weights that say of which stage they are."""
    settings = {"recipe": {"stage": stage} | recipe}
    weights.save_weights(path, TINY, tiny_model().state_dict(), small_codec().state(), settings=settings)
    return path


class Run(NamedTuple):
    out: Path
    calls: list[Call]  # one a step


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_weights) -> Run:
    """An undisturbed run through all stages, saved after each step."""
    out = tmp_path_factory.mktemp("train") / "run"
    return Run(out, run_train(out, "--init", tiny_weights, *RUN, "--save-every", 1, draws=True))


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, tiny_weights) -> Path:
    """The folder of a run of one step of stage 2."""
    out = tmp_path_factory.mktemp("train") / "run"
    run_train(out, "--init", tiny_weights, "--stage", 2, "--steps", 1, "--batch", 1)
    return out


# ---------------------------------------------------------------- the three stages


def test_every_step_is_one_line_of_metrics_and_loss_is_drawn(whole):
    lines = metrics(whole.out)
    assert [line["step"] for line in lines] == list(range(12))
    assert [line["stage"] for line in lines] == [0] * 4 + [1] * 3 + [2] * 5
    assert [line["frames"] for line in lines] == [5, 9, 17, 17, 5, 9, 17, 5, 9, 17, 17, 17]
    for line, call in zip(lines, whole.calls, strict=True):
        assert Task[line["task"].upper()] is call.draw.task and math.isfinite(line["loss"])
        assert (call.video is None) == (line["stage"] == 1)
    assert (whole.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_stage_trains_its_own_parameters_and_leaves_the_others_bit_for_bit(whole):
    # catches weight decay, the average or a gradient reaching Wan's weights in stage 1
    with torch.device("meta"):
        model = DualDiT(TINY)
    names = {parameter: name for name, parameter in model.named_parameters()}
    video = {names[parameter] for parameter in model.video_parameters()}
    trained = {0: video, 1: {*names.values()} - video, 2: {*names.values()}}
    for stage, (first, end) in {0: (0, 4), 1: (4, 7), 2: (7, 12)}.items():
        assert differing(whole.calls[first].state, saved(whole.out, end)) == trained[stage], stage
        assert differing(saved(whole.out, first + 1, "ema"), saved(whole.out, end, "ema")) <= trained[stage]


def test_a_stage_starts_from_the_averaged_weights_of_the_one_before(whole):
    # catches raw weights handed over, and a motion expert that copies the raw video expert, or none
    for stage, end in enumerate((4, 7)):
        average, start = saved(whole.out, end, "ema"), whole.calls[end].state
        copied = as_video(average) if end == 4 else {}
        assert not differing(average | copied, start), end
        assert len(copied) == (len(as_video(start)) if end == 4 else 0)
        assert differing(saved(whole.out, end), start), end  # the average is not the last
        # and that average stays beside the run, for other runs to start from
        file = whole.out / f"stage-{stage}.safetensors"
        assert not differing(average, load_file(file))
        assert weights.read_header(file)[1]["recipe"]["stage"] == stage
    assert len(as_video(whole.calls[4].state)) > 50
    # the average starts there, too: after one step it is a tenth the start, nine tenths the result
    start, raw, average = whole.calls[4].state, saved(whole.out, 5), saved(whole.out, 5, "ema")
    for name in start:
        torch.testing.assert_close(average[name], 0.1 * start[name] + 0.9 * raw[name], msg=name)


def test_the_shipped_file_is_the_average_with_codec_statistics_and_settings(whole, tiny_weights):
    # catches raw weights written out, and settings that the next verb needs left out
    file = whole.out / "weights.safetensors"
    model, extra = weights.load_weights(file)
    start, codec = weights.load_weights(tiny_weights)
    assert not differing(saved(whole.out, 12, "ema"), model.state_dict()) and model.config == TINY
    assert differing(saved(whole.out, 12), model.state_dict())
    assert torch.equal(model.motion_mean, start.motion_mean)
    assert torch.equal(model.motion_std, start.motion_std)
    assert not differing(codec, extra)
    recipe = {"stage": 2, "shift": 1.0, "ablate": None}
    assert weights.read_header(file)[1] == {
        "fps": 16, "frames": 17, "height": 64, "width": 64, "text_tokens": 16, "body": puppet.body().digest,
        "recipe": recipe,
    }  # fmt: skip


STARTS = {  # init's stage, --stage, whether the motion expert starts as the video expert's copy
    "stage 1 on stage 0": (0, 1, True),
    "one stage": (0, 2, True),
    "stage 2 on stage 1": (1, 2, False),
    "video tuning": (2, 0, False),
    "weights that say nothing": (None, 1, False),
}


@pytest.mark.parametrize(("of", "stage", "copied"), STARTS.values(), ids=STARTS)
def test_what_a_stage_of_its_own_starts_from(tmp_path, of, stage, copied):
    # catches a motion expert that was trained and is copied over, or not trained and is not
    init = weights_of(tmp_path / "init.safetensors", of)
    plan = ("--stage", stage, "--steps", 2, "--frames", 5, "--batch", 1, "--shift", 8)
    (first, last) = run_train(tmp_path / "run", "--init", init, *plan)
    assert torch.equal(first.draw.t, flow.draw(batches.rng("draw", 0, 0), stage, 1, shift=8.0).t)
    source = load_file(init)
    expected = {name: source[name] for name in first.state}
    assert not differing(expected | (as_video(expected) if copied else {}), first.state)
    _, settings = weights.read_header(tmp_path / "run" / "weights.safetensors")
    assert settings["recipe"]["stage"] == stage
    assert last.draw.task in {x for task in flow.STAGES[stage] for x in (task, task.without_condition)}
    moved = differing(expected, saved(tmp_path / "run", 2))
    assert moved
    if stage == 0:
        assert all("video" in name.split(".") for name in moved)


def test_a_new_puppet_starts_as_its_seed_says_with_the_statistics_of_its_data(tmp_path, monkeypatch):
    # catches statistics or a codec left at nothing where there is no file to take them from; and a seed that
    # is recorded and not used: networks of several seeds would be one
    monkeypatch.setitem(train.run.PRESETS, "puppet", TINY)
    monkeypatch.setattr(batches, "STATISTICS_CLIPS", 64)
    codec = small_codec()
    monkeypatch.setattr(puppet.Codec, "fit", lambda: codec)
    (call,) = run_train(tmp_path, "--stage", 1, "--steps", 1, "--frames", 5, "--batch", 8, "--seed", 5)
    mean, std = call.state["motion_mean"], call.state["motion_std"]
    assert std.max() > 0.1 and mean.abs().max() > 0.1
    assert call.motion.mean().abs() < 0.3 and 0.6 < call.motion.std() < 1.4
    torch.manual_seed(5)
    name = "blocks.0.motion.ffn.0.weight"  # nothing is trained that it could be a copy of
    assert torch.equal(call.state[name], DualDiT(TINY).state_dict()[name])
    assert torch.equal(call.draw.seeds, flow.draw(batches.rng("draw", 5, 0), 1, 8).seeds)
    seeds = [int(torch.randint(2**62, (1,), generator=batches.rng("clip", 5, 1, 0, i))) for i in range(8)]
    torch.testing.assert_close(call.motion, (puppet_motion(puppet.clips(seeds, frames=5)) - mean) / std)
    assert not differing(codec.state(), weights.load_weights(tmp_path / "weights.safetensors")[1])


def test_clips_of_a_step_and_at_a_time_suit_the_device(monkeypatch):
    # catches 16 clips, of which a GPU is done before its host has launched the next kernel
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, batch in (("cuda:1", 32), ("cpu", 16), ("cuda --batch 8", 8), ("cuda --wan FOLDER", 16)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--device", *given.split()])
        assert train.options().batch == batch
    for batch, device, size in ((16, "cpu", 8), (12, "cpu", 12), (32, "cuda", 32)):
        parts = train.run.microbatches(batch, World(torch.device(device), 0, 1), None)
        assert parts == [range(i, i + size) for i in range(0, batch, size)]


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
    steps, copies = 300, 2
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    given = [x.expand(copies, *x.shape[1:]) for x in (video, motion, text)]
    for _ in range(steps):
        kept = torch.zeros(copies, dtype=torch.bool)
        draw = Draw(Task.JOINT, kept, torch.rand(copies), torch.randint(2**62, (copies,)))
        flow.loss(model, *given, torch.zeros_like(text[0]), draw).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    noise = torch.randn_like(video), torch.randn_like(motion)
    how = {"steps": 12, "shift": 1.0, "guidance_text": 1.0}
    made = flow.sample(model, *noise, text, torch.zeros_like(text), Task.JOINT, **how)
    for name, found, real in zip(("video", "motion"), made, (video, motion), strict=True):
        error = (found - real).square().mean() / real.square().mean()  # 1 is the error of predicting zero
        assert error < 0.25, f"{name}: {error:.3f}"


# ---------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("step", (4, 5, 7, 9))  # the first and third are ends of stages
def test_a_run_that_goes_on_is_the_undisturbed_one(whole, tmp_path, monkeypatch, step):
    # catches lost optimizer state, average, schedule, log, a stage begun twice: to the last bit; and half of
    # a run in bf16 because it was moved to another machine
    monkeypatch.setattr(train.devices, "has_bf16_units", lambda device: True)
    out, file = tmp_path / "run", "weights.safetensors"
    shutil.copytree(whole.out, out)
    for later in range(step + 1, 13):
        shutil.rmtree(checkpoints.folder_of(out, later))
    (out / file).unlink()
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 11, "lo')  # what a power cut leaves
    (first, *_) = run_train(out, *RUN, "--resume", "--precision", "auto")
    assert not differing(first.state, whole.calls[step].state)
    assert curve(out) == curve(whole.out)
    assert (out / file).read_bytes() == (whole.out / file).read_bytes()


@pytest.mark.parametrize("what", ("__*", ".metadata"))
def test_a_damaged_checkpoint_is_named(whole, tmp_path, what):
    # catches a traceback of torch's reader in place of what to do
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    folder = checkpoints.newest(out).folder
    file = next(folder.glob(what))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{folder} is damaged .*: delete it"):
        run_train(out, *RUN, "--resume")


def test_a_stage_has_not_ended_before_its_weights_are_written(tmp_path, monkeypatch):
    # catches a checkpoint that a run goes on from, which then never writes stage-0.safetensors again
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "export", full)
    writer = checkpoints.Writer(tmp_path, 1, ALONE)
    writer.save({"step": 6, "stage_ended": 0}, {"model/x": torch.zeros(2)})
    with pytest.raises(OSError, match=r"cannot save .*No space left"):
        writer.wait()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_checkpoints_are_written_by_a_single_thread(tmp_path):
    # catches a second team of OpenMP threads, beside which those of the training loop sleep at every barrier
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    writer = checkpoints.Writer(tmp_path, 1, ALONE)
    with ThreadPoolExecutor(1) as of_torch:
        found = [thread.submit(torch.get_num_threads).result() for thread in (writer.thread, of_torch)]
    assert found == [1, 1] and torch.get_num_threads() == 2
    torch.set_num_threads(usual)


def test_the_rate_rises_and_falls_and_is_what_a_step_is_taken_with():
    # catches no warm-up, a rate that stays or falls to nothing, one that no optimizer gets, no clipping
    rates = [train.learning_rate(2.0, train.Step(0, i, 1000, 17)) for i in (0, 24, 500, 999)]
    assert rates == pytest.approx([0.04, 1.0, 1.05, 0.1], rel=0.01)
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert distributed.clip_gradients(layer, 1.0).item() == pytest.approx(5)
    state, ema = layer.state_dict(), {"weight": torch.ones(1, 2)}
    train.update(state, ema, [torch.optim.SGD(layer.parameters(), lr=7.0)], 0.5, train.Step(0, 0, 1000, 17))
    torch.testing.assert_close(layer.weight.data, torch.tensor([[-0.3, -0.4]]))
    torch.testing.assert_close(ema["weight"], torch.tensor([[0.1 - 0.27, 0.1 - 0.36]]))  # mostly the new one


# ---------------------------------------------------------------- watching


def test_watching_a_run_changes_nothing_in_it(whole, tiny_weights, tmp_path):
    # catches averaged weights left in the network, and random numbers drawn for validation
    watched = tmp_path / "run"
    run_train(watched, "--init", tiny_weights, *RUN, "--validate-every", 4)
    assert curve(watched) == curve(whole.out)
    file = "weights.safetensors"
    assert (watched / file).read_bytes() == (whole.out / file).read_bytes()
    validated = {line["step"]: line["validation"] for line in metrics(watched) if "validation" in line}
    joint = {"joint/video", "joint/motion", "motion_to_video/video", "video_to_motion/motion"}
    expected = {0: {"video_only/video"}, 4: {"motion_only/motion"}, 8: joint, 12: joint}
    assert {step: {k for k in found if k.count("/") == 1} for step, found in validated.items()} == expected
    assert {key for key in validated[8] if "joint/motion" in key} == {
        "joint/motion", *(f"joint/motion/{t}" for t in validation.TIMES)
    }  # fmt: skip
    pictures = sorted(path.name for path in watched.glob("samples/*"))
    assert pictures == [f"step-{step:08}.png" for step in expected]


def test_the_shift_of_earlier_training_is_the_next_ones(tmp_path):
    # catches noise levels that change where a run goes on, from weights or from a checkpoint without --init
    plan = ("--stage", 2, "--steps", 2, "--frames", 5, "--batch", 1, "--save-every", 1)
    init = weights_of(tmp_path / "init.safetensors", 1, shift=3.0)
    (first, _) = run_train(tmp_path / "run", *plan, "--init", init)
    assert torch.equal(first.draw.t, flow.draw(batches.rng("draw", 0, 0), 2, 1, shift=3.0).t)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    (resumed,) = run_train(tmp_path / "run", *plan, "--resume")
    assert torch.equal(resumed.draw.t, flow.draw(batches.rng("draw", 0, 1), 2, 1, shift=3.0).t)


def test_pictures_are_sampled_with_the_shift_of_training(tmp_path, tiny_weights, monkeypatch):
    shifts = []
    listen = lambda model, video, motion, *_, shift, **__: shifts.append(shift) or (video, motion)
    monkeypatch.setattr(flow, "sample", listen)
    plan = ("--stage", 0, "--steps", 1, "--frames", 5, "--batch", 1, "--shift", 3)
    run_train(tmp_path, "--init", tiny_weights, *plan, "--validate-every", 1)
    assert shifts == [3.0, 3.0]


def test_a_run_that_died_in_its_last_validation_has_it_after_a_resume(tmp_path, tiny_weights, monkeypatch):
    # catches a last checkpoint from which a run is over before it was measured
    call = (tmp_path / "run", "--init", tiny_weights, "--stage", 2, "--steps", 2, "--batch", 1)

    def dies_at_the_end(out, step, *_):
        while step == 2:
            if checkpoints.folder_of(out, 1).is_dir():  # it is written in the background
                raise KeyboardInterrupt
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "watch", dies_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            run_train(*call, "--validate-every", 9, "--save-every", 1)
    run_train(*call, "--validate-every", 9, "--resume")
    assert [line["step"] for line in metrics(tmp_path / "run") if "validation" in line] == [2]


def test_validation_is_the_loss_of_the_averaged_weights_on_samples_never_trained_on(one_step, tiny_weights):
    # recomputed sample by sample: catches other clips or noise, raw weights, means over the wrong axis
    sources, held = validation.hold_out(open_sources(["puppet"], PUPPET, puppet.body()))
    assert len(held) == 16 and sources[0].count is None
    model, extra = weights.load_weights(tiny_weights)
    codec = puppet.Codec.from_state(extra)
    samples = validation.read_held_out(held, model, 2, 9, codec, ALONE.device)
    assert samples.t.tolist() == [*validation.TIMES] * 4
    averaged, _ = weights.load_weights(one_step / "weights.safetensors")
    tasks = Task.JOINT, Task.VIDEO_TO_MOTION
    with validation.averaged(model, averaged.state_dict()):
        found = validation.validate(model, samples, tasks, 5, False)
    start = load_file(tiny_weights)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    errors = {task: [] for task in tasks}
    for i, (_, seed) in enumerate(held):
        clip = puppet.clips([seed], frames=9)
        motion = (puppet_motion(clip) - model.motion_mean) / model.motion_std
        torch.testing.assert_close(samples.motion[i], motion[0])
        pixels = puppet.render(clip.joints, clip.betas, clip.shirt)[0]
        torch.testing.assert_close(samples.video[i], codec.encode(pixels)[0])
        assert torch.equal(samples.text[i], puppet.encode_text(clip.caption)[0])
        row = samples.rows(i, i + 1)
        for task in tasks:  # video to motion never has text
            text = row.null_text if task is Task.VIDEO_TO_MOTION else row.text
            draw = Draw(task, torch.tensor([False]), row.t, row.seeds)
            loss = flow.loss(averaged, row.video, row.motion, text, row.null_text, draw)
            errors[task].append(loss.motion.item())
    for task in tasks:
        key = f"{task.name.lower()}/motion"
        assert found[key] == pytest.approx(sum(errors[task]) / 16, rel=1e-5)
        assert found[f"{key}/0.375"] == pytest.approx(sum(errors[task][1::4]) / 4, rel=1e-5)


def test_held_out_samples_of_a_data_set_are_not_trained_on():
    # catches validation on what is trained on
    sources = open_sources(["puppet:60@1", "puppet:400@1"], PUPPET, puppet.body())
    training, held = validation.hold_out(sources)
    assert [source.count for source in training] == [57, 384]
    assert [number for source, number in held if source.count == 57] == [57, 58, 59]
    assert [number for source, number in held if source.count == 384] == list(range(384, 400))
    assert [source.count for source, _ in held[:6]] == [57, 384] * 3


def test_log_and_tensorboard_have_the_same_numbers(tmp_path, monkeypatch):
    # catches NaN in JSON, losses under other names, tokens and FLOPs of what is absent
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.MagicMock())
    monkeypatch.setattr(monitor, "peak_flops", lambda *_: 1e12)
    log = monitor.Log(tmp_path, 3, 5, TINY, PUPPET, 16, ALONE, False)
    tokens = {Task.MOTION_ONLY: 5 * 51, Task.JOINT: 5 * 51 + 2 * 64, Task.VIDEO_ONLY: 2 * 64}
    for task in tokens:
        losses = (0.5, 0.25, 0.125) if task is Task.JOINT else (0.5, 0.25)
        log.step(3, 2, 5, task, losses, math.nan, 8, 2.0)
    log.validation(4, {"joint/video": 0.25})
    log.close()
    lines = metrics(tmp_path)
    for first, kept in ((5, 4), (4, 3)):  # a run that has ended, whose last validation is not made again
        monitor.Log(tmp_path, first, 5, TINY, PUPPET, 16, ALONE, False).close()
        assert metrics(tmp_path) == lines[:kept]
    motion, joint, video, validation = lines
    assert [line["tokens_per_second"] for line in (motion, joint, video)] == [4 * n for n in tokens.values()]
    assert 0 < video["mfu"] < motion["mfu"] < joint["mfu"] < 1
    speed = {key: video[key] for key in ("tokens_per_second", "mfu")}
    where = {"step": 3, "stage": 2, "frames": 5, "task": "video_only"}
    assert video == where | {"loss": 0.5, "video": 0.25, "skipped": 3, "seconds": 2.0} | speed
    assert validation == {"step": 4, "validation": {"joint/video": 0.25}}
    writer = sys.modules["torch.utils.tensorboard"].SummaryWriter.return_value
    written = [call.args for call in writer.add_scalar.call_args_list]
    expected = [
        (f"{line['task']}/{name}", value, 3)
        for line in lines[:3] for name, value in line.items() if isinstance(value, float)
    ]  # fmt: skip
    assert written == [*expected, ("validation/joint/video", 0.25, 4)]


# ---------------------------------------------------------------- ablations

ABLATED = {  # fields of the configuration, and the stages whose losses stay what they were
    None: ({}, {0, 1, 2}),
    "unsynced": ({"synced": False}, {0}),
    "collision": ({"apart": False}, {0, 1}),  # without video there is nothing to collide with
    "single-stream": ({"shared": True}, {0}),
}


@pytest.fixture(scope="module")
def ablations(tmp_path_factory) -> dict[str | None, Run]:
    """Short runs that differ in their ablation alone."""
    runs, folder = {}, tmp_path_factory.mktemp("ablations")
    init = weights_of(folder / "stage-0.safetensors", stage=0)
    for name in ABLATED:
        out = folder / str(name)
        given = ("--init", init, "--frames", 5, "--batch", 1, *(("--ablate", name) if name else ()))
        runs[name] = Run(out, run_train(out, *given, stages={0: 1, 1: 1, 2: 2}))
    return runs


@pytest.mark.parametrize("name", [name for name in ABLATED if name])
def test_an_ablation_changes_what_it_says_and_nothing_else(ablations, name):
    plain, (out, calls) = ablations[None], ablations[name]
    fields, same = ABLATED[name]
    stages = [line["stage"] for line in metrics(out)]
    assert stages == [0, 1, 2, 2]
    config, settings = weights.read_header(out / "weights.safetensors")
    assert settings["recipe"] == {"stage": 2, "shift": 1.0, "ablate": name}
    assert config == dataclasses.replace(TINY, **fields)
    for one, other in zip(plain.calls, calls, strict=True):
        drawn, expected = other.draw, one.draw
        assert torch.equal(drawn.t, expected.t) and torch.equal(drawn.seeds, expected.seeds)
        assert drawn.task is expected.task and torch.equal(other.motion, one.motion)
    equal = [a == b for a, b in zip(curve(plain.out), curve(out), strict=True)]
    assert all(e for e, stage in zip(equal, stages, strict=True) if stage in same)
    assert not all(equal)  # where both streams meet it is another network


def test_one_stage_leaves_out_stage_1():
    for steps, expected in ((None, {0: 3500, 2: 11_300}), (100, {0: 24, 2: 76})):
        assert train.stage_steps("puppet", None, steps, one_stage=True) == expected


# ---------------------------------------------------------------- errors of use


MISUSE = {
    "nothing to resume": (("--resume",), "nothing to resume"),
    "no steps": (("--steps", 0), "--steps: expected a number of at least 1, got '0'"),
    "uneven ranks": (("--batch", 5, "--accumulate", 2), "3 ranks x 2 microbatches; the nearest is 6"),
    "shift is no number": (("--shift", "nan"), "--shift: expected a number above 0, got 'nan'"),
    "two streams in one": (("--ablate", "single-stream"), "single-stream has one set of weights: start from"),
    "no such weights": (("--init", "missing.safetensors"), r"missing\.safetensors"),
    "a body of no use": (("--wan", "folder", "--data", "cache:x", "--body", "x"), "--body: a cache"),
    "a body without data": (("--body", "x"), "--body is the body of --data"),
    "an ablation's missing stage": (("--stage", 1, "--ablate", "one-stage"), "one-stage leaves stage 1 out"),
    "Wan without data": (("--wan", "folder"), "--wan trains on latents"),
}


@pytest.mark.parametrize(("arguments", "words"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_one_line_and_writes_nothing(verb, tiny_weights, tmp_path, monkeypatch, arguments, words):
    if "ranks" in words:
        monkeypatch.setattr(distributed, "start", lambda device: World(torch.device(device), 0, 3))
    refused(verb, tmp_path / "run", words, "--init", tiny_weights, *arguments)


def refused(verb: Callable, out: Path, words: str, *arguments: object) -> None:
    before = contents(out)
    ended = verb(train, "--steps", 1, "--batch", 1, *PLAIN, "--out", out, *arguments)
    assert ended.code == 2
    assert ended.err.startswith("train.py: error: ") and ended.err.count("\n") == 1, ended.err
    assert re.search(words, ended.err)
    assert contents(out) == before


def test_weights_of_one_ablation_do_not_become_another(verb, ablations, tmp_path):
    for name in ("unsynced", "collision", "single-stream"):
        init = ("--init", ablations[name].out / "weights.safetensors")
        other = ("--ablate", "collision" if name == "unsynced" else "unsynced")
        for given in ((), other):
            refused(verb, tmp_path / "run", f"trained with --ablate {name}: add that", *init, *given)
        call = ("--stage", 2, "--steps", 1, "--batch", 1, "--frames", 5, "--ablate", name, *init, *PLAIN)
        assert verb(train, *call, "--out", tmp_path / name).code == 0


@pytest.mark.parametrize("arguments", [(), ("--ablate", "one-stage")])
def test_a_trained_motion_expert_is_not_overwritten_by_all_stages(verb, tmp_path, arguments):
    for stage in (1, 2):
        init = weights_of(tmp_path / f"{stage}.safetensors", stage)
        words = f"{stage}.safetensors has a trained motion expert, .* --stage 2"
        refused(verb, tmp_path / "run", words, "--init", init, *arguments)


def test_weights_trained_on_other_motion_are_told(tmp_path, tiny_weights, capsys):
    # catches metres away from the camera that are read as hundreds of deviations, without a word
    plan = ("--stage", 1, "--steps", 1, "--frames", 5, "--batch", 1)
    run_train(tmp_path / "same", "--init", tiny_weights, *plan)
    assert "other motion" not in capsys.readouterr().out
    model, codec = weights.load_weights(tiny_weights)
    model.motion_mean += 10 * model.motion_std
    weights.save_weights(tmp_path / "other.safetensors", TINY, model.state_dict(), codec)
    run_train(tmp_path / "other", "--init", tmp_path / "other.safetensors", *plan)
    said = capsys.readouterr().out
    assert re.search(r"other\.safetensors was trained on other motion: .* of 10\d instead of 1", said)


def test_motion_alone_is_refused_before_stage_1_is_trained(verb, tiny_weights, tmp_path, monkeypatch):
    (source,) = open_sources(["puppet"], PUPPET, puppet.body())
    monkeypatch.setattr(train.run, "open_sources", lambda *_, **__: [source._replace(paired=False)])
    refused(verb, tmp_path / "run", "stages 0 and 2 need video.*or --stage 1$", "--init", tiny_weights)


PLANS = {
    "started anew": ((), "add --resume"),
    "others": (("--resume", "--steps", 2, "--ablate", "unsynced"), "with steps 1, ablate None: resume with"),
    "another body": (("--resume", "--steps", 1, "--body", "x.npz"), "with body None: resume with"),
    "another start": (("--resume", "--steps", 1, "--init", "x"), r"with init .*\.safetensors: resume with"),
    "another precision": (("--resume", "--steps", 1, "--precision", "bf16"), "with precision fp32: resume"),
}


@pytest.mark.parametrize(("arguments", "words"), PLANS.values(), ids=PLANS)
def test_a_finished_run_is_not_overwritten(verb, tiny_weights, one_step, arguments, words):
    refused(verb, one_step, words, "--init", tiny_weights, "--stage", 2, *arguments)


def test_weights_are_not_overwritten_where_checkpoints_are_gone(verb, tiny_weights, tmp_path):
    shutil.copy(tiny_weights, tmp_path / "weights.safetensors")
    for resume in ((), ("--resume",), ("--resume", "auto")):
        refused(verb, tmp_path, r"weights\.safetensors exists", "--init", tiny_weights, *resume)


def test_export_writes_the_average_and_says_what_the_run_was(whole, tmp_path, verb):
    # catches raw weights, those or a summary of another run, and bf16 where numbers are small
    file = tmp_path / "mine.safetensors"
    assert verb(train, "--out", whole.out, "export", file).code == 0
    assert file.read_bytes() == (whole.out / "weights.safetensors").read_bytes()
    ended = verb(train, "export", "--out", tmp_path, file)
    assert ended.code == 2 and "nothing to export" in ended.err
    (tmp_path / "b.json").write_text("{}")
    for other in ("a.json", "b.safetensors"):  # the record's own name; another's file beside it
        ended = verb(train, "export", "--out", whole.out, tmp_path / other)
        assert ended.code == 2 and "where the record of the weights would go" in ended.err
    assert verb(train, "export", "--out", whole.out, "--bf16", file).code == 0
    record, lines = json.loads(file.with_suffix(".json").read_text()), metrics(whole.out)
    steps = [line for line in lines if "loss" in line]
    assert record["steps"] == len(steps) and record["options"]["seed"] == 0 and record["versions"]["torch"]
    assert record["command"][0] == "train.py" and record["config"]["width"] == TINY.width
    assert record["validation"] == [line for line in lines if "validation" in line]
    exact, half = load_file(whole.out / "weights.safetensors"), load_file(file)
    assert half["blocks.0.video.ffn.0.weight"].dtype is torch.bfloat16
    for name, x in exact.items():
        torch.testing.assert_close(half[name].float(), x, rtol=2**-8, atol=0, msg=name)
        if any(part in name for part in ("time_", "norm", "modulation", "extra.", "motion_", "task_hint")):
            assert torch.equal(half[name], x), name
    slow = shutil.copytree(whole.out, tmp_path / "slow")  # catches minutes, which round to as little
    rows = [json.dumps(line | ({"seconds": 1800.0} if "loss" in line else {})) for line in lines]
    (slow / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert verb(train, "export", "--out", slow, tmp_path / "slow.safetensors").code == 0
    assert json.loads((tmp_path / "slow.json").read_text())["hours"] == 0.5 * len(steps)


def test_the_average_is_over_hundreds_of_steps_however_long_the_stage():
    # catches weights from the beginning of a stage that its average never forgets
    state, ema = {"weight": torch.ones(1)}, {"weight": torch.zeros(1)}
    train.update(state, ema, [], 0.5, train.Step(2, 20_000, 30_000, 17))
    assert ema["weight"].item() == pytest.approx(0.002)


def test_gradients_are_clipped_in_training(tiny_weights, tmp_path, monkeypatch):
    # catches a norm that is only looked at
    norms, update = [], train.update

    def noted(state, ema, opts, rate, now):
        gradients = [
            p.grad.flatten() for o in opts for g in o.param_groups for p in g["params"] if p.grad is not None
        ]
        norms.append(torch.cat(gradients).norm().item())
        update(state, ema, opts, rate, now)

    monkeypatch.setattr(train, "update", noted)
    run_train(tmp_path, "--init", tiny_weights, "--stage", 2, "--steps", 1, "--frames", 5, "--batch", 1)
    assert metrics(tmp_path)[0]["grad_norm"] > 1 and norms == pytest.approx([1.0], rel=1e-3)


def test_what_a_killed_run_left_is_removed(tmp_path):
    # catches halves of checkpoints that fill the disk, one a kill
    for name in (".step-00000002", "step-00000001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoints.Writer(tmp_path, 1, ALONE)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_what_a_user_keeps_beside_checkpoints_is_none(whole, tmp_path):
    # catches a copy that is resumed from, and then deleted
    run = tmp_path / "run"
    shutil.copytree(whole.out, run)
    kept = shutil.copytree(checkpoints.folder_of(run, 12), run / "checkpoints" / "step-00000012-good")
    (run / "checkpoints" / "step-99999999.tar").touch()
    assert checkpoints.newest(run).folder == checkpoints.folder_of(run, 12)
    shutil.rmtree(checkpoints.folder_of(run, 12))
    run_train(run, *RUN, "--resume", "--keep", 1)
    assert contents(kept) and sorted((run / "checkpoints").glob("step-*")) == [
        checkpoints.folder_of(run, 12), kept, run / "checkpoints" / "step-99999999.tar",
    ]  # fmt: skip

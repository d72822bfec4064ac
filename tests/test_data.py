"""kit/data.py: a step's batch is a pure function of (seed, step), whoever computes which part of it."""

from collections import Counter

import pytest
import torch
from conftest import TINY

from flow import Task
from kit import data, puppet, weights
from kit.data import draw_task, rng

STEPS = 3000  # for shares: three standard deviations of a third are 0.026


@pytest.fixture(scope="module")
def batch(tiny_weights):
    """batch(seed, step, stage, samples): with the tiny weights' codec and statistics, 5 frames."""
    model, extra = weights.load_weights(tiny_weights)
    codec = puppet.Codec.from_state(extra)

    def make(seed: int = 0, step: int = 0, stage: int = 2, samples: range = range(4)) -> data.Batch:
        where = {"frames": 5, "samples": samples, "device": torch.device("cpu")}
        return data.puppet_batch(
            codec, model.motion_mean, model.motion_std, seed=seed, step=step, stage=stage, **where
        )

    return make


def tensors(batch: data.Batch) -> dict[str, torch.Tensor]:
    every = batch._asdict() | batch.draw._asdict()
    return {name: x for name, x in every.items() if isinstance(x, torch.Tensor)}


def step_of(task: Task, dropped: bool) -> int:
    """The first step of seed 0 that draws this."""
    return next(step for step in range(1000) if draw_task(0, step, 2) == (task, dropped))


# ---------------------------------------------------------------- randomness


def test_rng_depends_on_its_key_alone():
    # catches a generator that follows torch's own, or that moves it
    torch.manual_seed(1)
    first, expected = torch.randn(5, generator=rng("noise", 0, 1)), torch.randn(5)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.randn(5), expected, atol=0, rtol=0)
    torch.testing.assert_close(torch.randn(5, generator=rng("noise", 0, 1)), first, atol=0, rtol=0)


def test_rng_is_the_same_in_every_process_and_version():
    # catches Python's own hash(), which is salted anew in every process
    assert rng("noise", 0, 1).initial_seed() == 5109899978712744302


def test_rng_keys_do_not_run_together():
    keys = [("noise", 1, 23), ("noise", 12, 3), ("noise", 123), ("noise", "1", 23), ("clip", 1, 23)]
    assert len({rng(*key).initial_seed() for key in keys}) == len(keys)


# ---------------------------------------------------------------- the batch


@pytest.mark.parametrize("stage", (1, 2))
def test_slices_of_two_ranks_are_the_batch_of_one_process(batch, stage):
    # catches noise drawn for the batch as a whole, and a rank-dependent task
    whole = batch(step=3, stage=stage)
    parts = [batch(step=3, stage=stage, samples=samples) for samples in (range(2), range(2, 4))]
    assert {part.task for part in parts} == {whole.task}
    together = {name: torch.cat([tensors(part)[name] for part in parts]) for name in tensors(parts[0])}
    assert together.keys() == tensors(whole).keys()
    for name, value in tensors(whole).items():
        # rendering and encoding multiply matrices whose rounding may depend on how many clips there are
        rounding = 1e-5 if name in ("video", "motion") else 0
        torch.testing.assert_close(together[name], value, atol=rounding, rtol=rounding, msg=name)


@pytest.mark.parametrize("other", ({"seed": 1}, {"step": 1}, {"samples": range(4, 8)}), ids=str)
def test_another_seed_step_or_sample_is_other_data(batch, other):
    # catches a key that forgets one of them: training would see the same clips or noise again
    here, there = tensors(batch()), tensors(batch(**other))
    same = [name for name in here.keys() & there.keys() if torch.equal(here[name], there[name])]
    assert not same


def test_samples_of_a_batch_differ(batch):
    for name, value in tensors(batch(samples=range(2))).items():
        assert not torch.equal(value[0], value[1]), name


def test_the_same_step_is_the_same_batch_twice(batch):
    for first, second in zip(tensors(batch()).values(), tensors(batch()).values(), strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_stage_1_has_motion_alone(batch):
    first = batch(stage=1)
    assert (first.video, first.draw.noise_video, first.task) == (None, None, Task.MOTION_ONLY)
    assert first.motion.shape == first.draw.noise_motion.shape == (4, 5, 235)


def test_stage_2_has_video_of_the_same_frames(batch):
    second = batch(stage=2)
    assert second.video.shape == second.draw.noise_video.shape == (4, TINY.channels, 2, 8, 8)


def test_motion_is_normalised_by_the_statistics_it_is_given(batch):
    # catches mean and std swapped or left out: the tiny statistics are of clips much like these
    motion = batch(stage=1, samples=range(64)).motion
    assert motion.mean().abs() < 0.1
    assert 0.7 < motion.std() < 1.2


# ---------------------------------------------------------------- what is dropped, and how often


def test_dropped_text_is_the_empty_caption_and_kept_text_the_clips(batch, monkeypatch):
    made = []
    clips = puppet.clips
    monkeypatch.setattr(puppet, "clips", lambda *a, **k: made.append(clips(*a, **k)) or made[-1])
    text = batch(stage=1, samples=range(200)).text
    kept = puppet.encode_text(made[0].caption)
    empty = puppet.encode_text([""]).expand_as(kept)
    dropped = (text == empty).all(dim=(1, 2))
    torch.testing.assert_close(text, torch.where(dropped[:, None, None], empty, kept), atol=0, rtol=0)
    assert 0.04 < dropped.float().mean() < 0.18  # DROP_TEXT is 0.1, 200 samples


def test_times_are_shifted_and_shared_by_both_modalities(batch):
    # the median of s·t / (1 + (s-1)·t) for uniform t and s = 3 is 0.75, unshifted 0.5
    draw = batch(stage=1, samples=range(200)).draw
    assert 0.66 < draw.t_motion.median() < 0.83
    assert 0 <= draw.t_motion.min() < 0.2 and 0.95 < draw.t_motion.max() <= 1
    assert torch.equal(draw.t_video, draw.t_motion)


@pytest.mark.parametrize("task", (Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION))
def test_dropping_condition_and_text_leaves_neither(batch, task):
    # catches one kept without the other: guidance's u(x, ∅, ∅) would never be trained
    dropped = batch(step=step_of(task, dropped=True), samples=range(8))
    assert dropped.task is task.unconditional
    assert not dropped.text.any()
    kept = batch(step=step_of(task, dropped=False), samples=range(8))
    assert kept.task is task
    assert kept.text.any()


def test_tasks_are_drawn_equally_and_a_tenth_of_the_conditional_ones_dropped():
    draws = [draw_task(0, step, stage=2) for step in range(STEPS)]
    count = Counter(draws)
    shares = {task: (count[task, False] + count[task, True]) / STEPS for task in Task}
    assert [shares[task] for task in (Task.MOTION_ONLY, Task.VIDEO_ONLY)] == [0, 0]
    for task in (Task.JOINT, Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION):
        assert 0.3 < shares[task] < 0.37, task.name
    assert count[Task.JOINT, True] == 0  # it has no condition
    for task in (Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION):
        assert 0.06 < count[task, True] / (shares[task] * STEPS) < 0.14, task.name


def test_stage_1_draws_motion_only():
    assert {draw_task(0, step, stage=1) for step in range(50)} == {(Task.MOTION_ONLY, False)}

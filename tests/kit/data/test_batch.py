"""kit/data/batch.py: a step's batch is a pure function of (seed, step), whoever computes which part of it."""

from collections import Counter

import pytest
import torch
from conftest import TINY

from flow import Task, shift_time
from kit import puppet, weights
from kit.data import batch as batches
from kit.data.batch import Batch, draw_task, locate, rng
from kit.data.datasets import puppet_motion
from kit.data.sources import Read, Source, open_sources
from kit.geometry import PUPPET
from motion_tokens import motion_statistics

STEPS = 3000  # for shares: three standard deviations of a third are 0.026
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch(tiny_weights):
    """batch(seed, step, stage, samples): with the tiny weights' codec and statistics, 5 frames."""
    model, extra = weights.load_weights(tiny_weights)
    given = {"codec": puppet.Codec.from_state(extra), "frames": 5, "device": CPU}
    sources = open_sources(["puppet"], PUPPET, puppet.body())

    def make(seed: int = 0, step: int = 0, stage: int = 2, samples: range = range(4), **more) -> Batch:
        where = {"seed": seed, "step": step, "stage": stage, "samples": samples, "batch": 8} | more
        return batches.batch(sources, model.motion_mean, model.motion_std, **where, **given)

    return make


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
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


def test_the_puppets_stream_stays_what_it_was(batch, tiny_weights):
    # catches draws from other keys or in another order: a resumed run would go on with other data
    model, extra = weights.load_weights(tiny_weights)
    seeds = [int(torch.randint(2**62, (1,), generator=rng("clip", 0, 2, 3, i))) for i in (1, 2)]
    clips = puppet.clips(seeds, frames=5)
    video = puppet.Codec.from_state(extra).encode(puppet.render(clips.joints, clips.betas, clips.shirt)[0])
    motion = (puppet_motion(clips) - model.motion_mean) / model.motion_std
    t_video, t_motion, noise_video, noise_motion = [], [], [], []
    for i in (1, 2):
        generator = rng("noise", 0, 2, 3, i)
        torch.rand(1, generator=generator)  # whether the text is dropped
        noise_video.append(torch.randn(video.shape[1:], generator=generator))
        noise_motion.append(torch.randn(motion.shape[1:], generator=generator))
        for times in (t_video, t_motion):
            times.append(shift_time(torch.rand(1, generator=generator), 3.0))
    expected = {
        "video": video, "motion": motion, "t_video": torch.cat(t_video), "t_motion": torch.cat(t_motion),
        "noise_video": torch.stack(noise_video), "noise_motion": torch.stack(noise_motion),
    }  # fmt: skip
    found = tensors(batch(step=3, samples=range(1, 3), shift=3.0))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0, msg=name)


def test_the_puppets_statistics_stay_what_they_were(monkeypatch):
    monkeypatch.setattr(batches, "STATISTICS_CLIPS", 64)
    sources = open_sources(["puppet"], PUPPET, puppet.body())
    seeds = torch.randint(2**62, (64,), generator=rng("statistics", 7)).tolist()
    expected = motion_statistics(puppet_motion(puppet.clips(seeds)))
    for found, value in zip(batches.statistics(sources, 7), expected, strict=True):
        torch.testing.assert_close(found, value, atol=0, rtol=0)


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


def test_times_are_shifted_and_each_modality_has_its_own(batch):
    # the median of s·t / (1 + (s-1)·t) for uniform t and s = 3 is 0.75, unshifted 0.5
    draw = batch(stage=1, samples=range(200), shift=3.0).draw
    assert 0.66 < draw.t_motion.median() < 0.83
    assert 0 <= draw.t_motion.min() < 0.2 and 0.95 < draw.t_motion.max() <= 1
    # each modality has its own, unless they are to share it
    assert torch.corrcoef(torch.stack(draw[2:]))[0, 1].abs() < 0.2
    assert 0.41 < batch(stage=1, samples=range(200)).draw.t_motion.median() < 0.59
    shared = batch(stage=1, samples=range(200), shift=3.0, shared_noise=True).draw
    assert torch.equal(shared.t_video, shared.t_motion) and torch.equal(shared.t_video, draw.t_video)


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


# ---------------------------------------------------------------- finite data: which sample when


def numbered(count: int | None, weight: float = 1.0, paired: bool = True, offset: float = 0.0) -> Source:
    """A source whose motion says which sample it is, and whose captions are its number in two languages."""

    def read(numbers: list[int], frames: int, video: bool, codec: None, device: torch.device) -> Read:
        motion = torch.tensor([offset + number for number in numbers])[:, None, None].expand(-1, frames, 235)
        latents = torch.zeros(len(numbers), 2, 2, 1, 1) + motion[:, :1, :1, None, None] if video else None
        texts = [[torch.full((2, 3), 1.0 + n), torch.full((3, 3), -1.0 - n)] for n in numbers]
        return Read(motion.float(), latents, texts)

    return Source(weight, count, 5, paired, "", torch.full((4, 3), 0.5), read)


def drawn(sources: list[Source], steps: range, batch: int, ranks: int = 1, stage: int = 1, seed: int = 0):
    """The sample numbers of these steps, as the ranks' batches say them, in the order of the global batch."""
    found = []
    for step in steps:
        for rank in range(ranks):
            samples = range(batch // ranks * rank, batch // ranks * (rank + 1))
            where = {"seed": seed, "step": step, "stage": stage, "frames": 5, "batch": batch, "device": CPU}
            part = batches.batch(sources, torch.zeros(235), torch.ones(235), samples=samples, **where)
            found += part.motion[:, 0, 0].long().tolist()
    return found


@pytest.mark.parametrize("count", (1, 23, 48))
def test_an_epoch_has_every_sample_once(count):
    # catches sampling with replacement, epochs counted in batches, and a tail that is left out
    found = drawn([numbered(count)], range(48), batch=4)
    for start in range(0, len(found) - count + 1, count):
        assert sorted(found[start : start + count]) == list(range(count))


def test_epochs_and_seeds_are_shuffled_anew():
    first, second = (drawn([numbered(40)], range(k, k + 10), batch=4) for k in (0, 10))
    assert first != second and first != sorted(first)
    assert first != drawn([numbered(40)], range(10), batch=4, seed=1)


def test_resuming_with_more_ranks_neither_repeats_nor_skips():
    sources = [numbered(100, weight=3), numbered(50, weight=1, offset=1000)]
    whole = drawn(sources, range(40), batch=8)
    assert (
        drawn(sources, range(17), batch=8, ranks=2) + drawn(sources, range(17, 40), batch=8, ranks=4) == whole
    )


@pytest.mark.parametrize("weights", ((1, 1), (5, 2, 1), (1, 1e-9), (1e6, 1, 1), (1, 1, 1)), ids=str)
def test_every_block_has_the_exact_shares(weights):
    # catches shares that are drawn at random, and a small set that gets nothing at all
    given = batches.shares(weights)
    assert sum(given) == batches.BLOCK and min(given) >= 1
    for weight, share in zip(weights, given, strict=True):
        assert abs(share - batches.BLOCK * weight / sum(weights)) <= max(1, len(weights) - 1)
    sources = [numbered(37, weight) for weight in weights]
    for block in (0, 5):
        positions = range(block * batches.BLOCK, (block + 1) * batches.BLOCK)
        found = Counter(locate(sources, 0, position)[0] for position in positions)
        assert tuple(found[j] for j in range(len(weights))) == given


def test_mixing_leaves_each_sources_epochs_whole():
    sources = [numbered(300, weight=2), numbered(70, weight=1)]
    for j, count in ((0, 300), (1, 70)):
        places = [locate(sources, 3, position) for position in range(4 * batches.BLOCK)]
        numbers = [number for source, number in places if source == j]
        for start in range(0, len(numbers) - count + 1, count):
            assert sorted(numbers[start : start + count]) == list(range(count))


def test_sources_are_mixed_within_a_batch_and_keep_their_places():
    sources = [numbered(10), numbered(10, offset=1000)]
    expected = [1000 * j + number for j, number in (locate(sources, 0, position) for position in range(64))]
    assert drawn(sources, range(1), batch=64) == expected
    assert {number >= 1000 for number in expected[:8]} == {True, False}


def test_stage_2_draws_from_what_has_video():
    sources = [numbered(10, weight=9, paired=False, offset=1000), numbered(10)]
    assert max(drawn(sources, range(8), batch=4, stage=2)) < 1000
    with pytest.raises(ValueError, match="stage 2 needs video"):
        drawn(sources[:1], range(1), batch=4, stage=2)


def test_more_frames_than_there_are_is_an_error():
    where = {"seed": 0, "step": 0, "stage": 1, "batch": 1, "samples": range(1), "device": CPU}
    with pytest.raises(ValueError, match="9 frames are asked for, but there is a data set of 5"):
        batches.batch([numbered(3)], torch.zeros(235), torch.ones(235), frames=9, **where)


def test_text_is_a_caption_of_its_own_sample_padded_with_zeros():
    # catches captions that do not follow their sample into place, and the null text shining through
    where = {"seed": 0, "step": 0, "stage": 1, "frames": 5, "batch": 400, "device": CPU}
    sources = [numbered(200), numbered(200, offset=1000)]
    part = batches.batch(sources, torch.zeros(235), torch.ones(235), samples=range(400), **where)
    seen = Counter()
    for motion, text in zip(part.motion[:, 0, 0].tolist(), part.text, strict=True):
        n = motion % 1000 + 1
        known = {"null": [0.5] * 4, "first": [n, n, 0, 0], "second": [-n, -n, -n, 0]}
        seen[next(name for name, column in known.items() if text[:, 0].tolist() == column)] += 1
    assert 20 < seen["null"] < 65 and min(seen["first"], seen["second"]) > 140

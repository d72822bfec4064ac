"""kit/data/batch.py: a step's clips are a pure function of (seed, step), whoever reads which part of them."""

from collections import Counter

import pytest
import torch

from kit import puppet, weights
from kit.data import batch as batches
from kit.data.batch import Wanted, locate, rng
from kit.data.datasets import puppet_motion
from kit.data.sources import Read, Source, open_sources
from kit.geometry import PUPPET
from motion_tokens import motion_statistics

CPU = torch.device("cpu")


def test_rng_depends_on_its_key_alone():
    # catches a generator that follows torch's own, or that moves it; and Python's own hash(), which is salted
    # anew in every process
    torch.manual_seed(1)
    first, expected = torch.randn(5, generator=rng("noise", 0, 1)), torch.randn(5)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.randn(5), expected, atol=0, rtol=0)
    torch.testing.assert_close(torch.randn(5, generator=rng("noise", 0, 1)), first, atol=0, rtol=0)
    assert rng("noise", 0, 1).initial_seed() == 5109899978712744302


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_the_puppets_stream_stays_what_it_was(tiny_weights, stage):
    # catches clips of other keys or in another order: a resumed run would go on with other data, or with the
    # same clips again
    model, extra = weights.load_weights(tiny_weights)
    codec, sources = puppet.Codec.from_state(extra), open_sources(["puppet"], PUPPET, puppet.body())
    where = {"seed": 4, "batch": 8, "device": CPU, "codec": codec}
    wanted = [Wanted(stage, 3, 5, range(1, 3))]
    (found,) = batches.read(sources, model.motion_mean, model.motion_std, wanted, **where)
    seeds = [int(torch.randint(2**62, (1,), generator=rng("clip", 4, stage, 3, i))) for i in (1, 2)]
    clips = puppet.clips(seeds, frames=5)
    video = codec.encode(puppet.render(clips.joints, clips.betas, clips.shirt)[0])
    motion = (puppet_motion(clips) - model.motion_mean) / model.motion_std
    text, null_text = puppet.encode_text(clips.caption), puppet.encode_text([""])[0]
    expected = (None if stage == 1 else video, motion, text, null_text)
    torch.testing.assert_close(tuple(found), expected, atol=0, rtol=0)


def test_the_puppets_statistics_stay_what_they_were(monkeypatch):
    monkeypatch.setattr(batches, "STATISTICS_CLIPS", 64)
    sources = open_sources(["puppet"], PUPPET, puppet.body())
    seeds = torch.randint(2**62, (64,), generator=rng("statistics", 7)).tolist()
    expected = motion_statistics(puppet_motion(puppet.clips(seeds)))
    for found, value in zip(batches.statistics(sources, 7, batches.STATISTICS_CLIPS), expected, strict=True):
        torch.testing.assert_close(found, value, atol=0, rtol=0)


def numbered(count: int | None, weight: float = 1.0, paired: bool = True, offset: float = 0.0) -> Source:
    """A source whose motion says which sample it is, and whose captions are its number in two languages."""

    def read(numbers: list[int], frames: int, video: bool, codec: None, device: torch.device) -> Read:
        motion = torch.tensor([offset + number for number in numbers])[:, None, None].expand(-1, frames, 235)
        latents = torch.zeros(len(numbers), 2, 2, 1, 1) + motion[:, :1, :1, None, None] if video else None
        texts = [[torch.full((2, 3), 1.0 + n), torch.full((3, 3), -1.0 - n)] for n in numbers]
        return Read(motion.float(), latents, texts)

    return Source(weight, count, 5, paired, "", torch.full((4, 3), 0.5), read)


def read(sources: list[Source], batch: int, samples: range, step: int = 0, stage: int = 1):
    wanted = [Wanted(stage, step, 5, samples)]
    given = {"seed": 0, "batch": batch, "device": CPU}
    return batches.read(sources, torch.zeros(235), torch.ones(235), wanted, **given)[0]


def drawn(sources: list[Source], steps: range, ranks: int = 1, stage: int = 1) -> list[int]:
    """The sample numbers of these steps of 8, as the ranks' batches say them, in the global batch's order."""
    found = []
    for step in steps:
        for rank in range(ranks):
            samples = range(8 // ranks * rank, 8 // ranks * (rank + 1))
            found += read(sources, 8, samples, step, stage).motion[:, 0, 0].long().tolist()
    return found


def test_resuming_with_more_ranks_neither_repeats_nor_skips():
    sources = [numbered(100, weight=3), numbered(50, weight=1, offset=1000)]
    resumed = drawn(sources, range(17), ranks=2) + drawn(sources, range(17, 40), ranks=4)
    assert resumed == drawn(sources, range(40))


@pytest.mark.parametrize("weights", ((5, 2, 1), (1, 1e-9), (1e6, 1, 1), (1, 1, 1)), ids=str)
def test_every_block_has_the_exact_shares(weights):
    # catches shares that are drawn at random, and a small set that gets nothing at all
    given = batches.shares(weights)
    assert sum(given) == batches.BLOCK and min(given) >= 1
    for weight, share in zip(weights, given, strict=True):
        assert abs(share - batches.BLOCK * weight / sum(weights)) <= max(1, len(weights) - 1)
    sources = [numbered(37, weight) for weight in weights]
    found = Counter(locate(sources, 0, 5 * batches.BLOCK + k)[0] for k in range(batches.BLOCK))
    assert tuple(found[j] for j in range(len(weights))) == given


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own():
    # catches sampling with replacement, epochs cut by blocks, a tail that is left out, and one order for all
    sources = [numbered(300, weight=2), numbered(70, weight=1), numbered(1, weight=1)]
    places, other = ([locate(sources, seed, k) for k in range(4 * batches.BLOCK)] for seed in (3, 4))
    assert {j for j, _ in places[:16]} == {0, 1, 2} and places != other
    for j, count in enumerate((300, 70, 1)):
        numbers = [number for source, number in places if source == j]
        epochs = [numbers[start : start + count] for start in range(0, len(numbers) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert count == 1 or (epochs[0] != sorted(epochs[0]) and epochs[0] != epochs[1])


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_motion_without_video_is_drawn_in_stage_1_and_in_no_other(stage):
    # catches motion alone that is never trained on, which is what stage 1 is for
    sources = [numbered(10, weight=9, paired=False, offset=1000), numbered(10)]
    numbers = drawn(sources, range(4), stage=stage)
    assert min(numbers) < 1000 and (max(numbers) >= 1000) == (stage == 1)


def test_text_is_a_caption_of_its_own_sample_padded_with_zeros():
    # catches captions that do not follow their sample into place, and the null text shining through
    part = read([numbered(200), numbered(200, offset=1000)], 400, range(400))
    seen = Counter()
    for motion, text in zip(part.motion[:, 0, 0].tolist(), part.text, strict=True):
        n = motion % 1000 + 1
        known = {"first": [n, n, 0, 0], "second": [-n, -n, -n, 0]}
        seen[next(name for name, column in known.items() if text[:, 0].tolist() == column)] += 1
    assert min(seen["first"], seen["second"]) > 160
    assert part.null_text[:, 0].tolist() == [0.5] * 4
    # where there is no caption the null text stands
    silent = numbered(4)._replace(read=lambda *given: numbered(4).read(*given)._replace(texts=[[], []]))
    assert (read([silent], 2, range(2)).text == 0.5).all()


def test_statistics_are_of_all_sources_in_their_shares():
    # catches the first data set's statistics taken for all
    sources = [numbered(64, weight=3), numbered(64, weight=1, offset=1000)]
    mean, std = batches.statistics(sources, 0, batches.STATISTICS_CLIPS)
    torch.testing.assert_close(mean, torch.full((235,), 31.5 + 250))
    torch.testing.assert_close(std, torch.full((235,), 433.5), atol=1, rtol=0)

"""kit/data/cache.py: what is stored is what the networks make, made once, whoever makes which part when."""

import shutil
import sys
import weakref
from pathlib import Path

import clip_folder
import pytest
import torch
from conftest import contents, run_main
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kit import puppet
from kit.data import __main__ as commands
from kit.data import batch as batches
from kit.data import cache
from kit.data.clips import Sample
from kit.data.datasets import DataSet, open_dataset
from kit.data.sources import open_sources
from kit.geometry import Geometry, geometry_of
from kit.pictures import from_frames

FAKE = Geometry(16, 9, 64, 64, 8)
COUNT, FEW = 40, 20  # items: two whole shards and a half; one and a quarter
CPU = torch.device("cpu")


class Fake:
    """Encoders that are quick, and count; `fail_at` is the call that dies."""

    def __init__(self, fail_at: int = -1):
        self.calls, self.fail_at = [], fail_at

    def note(self, what: object) -> None:
        self.calls.append(what)
        if len(self.calls) - 1 == self.fail_at:
            raise KeyboardInterrupt

    def video(self, video: torch.Tensor) -> torch.Tensor:
        self.note("video")
        return video[:, :1, ::4, ::8, ::8].repeat(1, 2, 1, 1, 1)

    def text(self, prompts: list[str]) -> torch.Tensor:
        self.note(prompts[0])
        features = torch.zeros(len(prompts), 12, 3)
        for row, prompt in zip(features, prompts, strict=True):
            row[: 1 + len(prompt.split())] = 1 + len(prompt)
        return features

    def both(self) -> cache.Encoders:
        return cache.Encoders(self.video, self.text)


def made_up(count: int = COUNT, paired: bool = True, bad: tuple[int, ...] = ()) -> DataSet:
    """Items of one or two samples each, cheap; those in `bad` fail after their first sample."""

    def read(item: int):
        for part in range(1 + item % 2):
            motion = torch.full((9, 235), 10.0 * item + part)
            video = torch.full((9, 64, 64, 3), item, dtype=torch.uint8) if paired else None
            yield Sample(f"clip {item}", (f"words of {item}",) if item % 3 else (), motion, video, None)
            if item in bad:
                raise ValueError(f"clip {item} is bad")

    return DataSet([f"clip {item}" for item in range(count)], read, paired, ["line 7: empty"])


def settings(data_set: DataSet, **other: object) -> dict:
    names = dict.fromkeys(("data", "names", "vae", "text_encoder", "body"), "x")
    made = {"version": cache.VERSION, "items": len(data_set.names), "paired": data_set.paired}
    return made | FAKE._asdict() | names | other


def write(folder: Path, data_set: DataSet, fake: Fake | None = None, rank: int = 0, ranks: int = 1) -> None:
    cache.prepare(folder, settings(data_set))
    cache.write(data_set, folder, (fake or Fake()).both(), torch.float32, rank, ranks)


def not_finished(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not finished"):
        cache.open_cache(folder)


# ---------------------------------------------------------------- with networks of the real format


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    wan_folder = pytest.importorskip("wan_folder", reason="pip install -r requirements-wan.txt")
    return wan_folder.write(tmp_path_factory.mktemp("wan") / "2.1", "2.1")


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    shape = ("--frames", "5", "--size", "64x64", "--device", "cpu")
    return ["cache", f"puppet:{FEW}", "--wan", str(folder), "--out", str(out), *shape, *more]


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "made"
    with pytest.raises(SystemExit, match="0"):
        run_main(commands, *arguments(folder, out))
    return out


def test_two_ranks_make_the_cache_of_one(folder, made, tmp_path, verb, monkeypatch):
    # catches shards divided by rank, a cache of one rank's shards, and ranks that wait for each other
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert verb(commands, *arguments(folder, tmp_path / "a")).code == 0
        if rank == "1":
            not_finished(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(made)


def test_a_cache_holds_what_the_networks_make(folder, made):
    from kit import wan

    geometry = geometry_of(folder, 5, (64, 64))
    tensors = load_file(made / "shard-00001.safetensors")
    sample = next(open_dataset(f"puppet:{FEW}", geometry, puppet.body()).read(16))
    latents = wan.VideoVAE(folder).encode(from_frames(sample.video)[None])[0]
    torch.testing.assert_close(tensors["0.latents"], latents.bfloat16(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(tensors["0.motion"], sample.motion, atol=1e-6, rtol=0)
    text = wan.TextEncoder(folder, torch.bfloat16)
    features = text([sample.captions[0], ""])
    for stored, full in zip((tensors["0.text.0"], _null_text(made)), features, strict=True):
        assert stored.dtype == torch.bfloat16 and stored.any(dim=1).all()
        torch.testing.assert_close(stored, full[: len(stored)], atol=0.02, rtol=0.02)
        assert not full[len(stored) :].any()


def _null_text(out: Path) -> torch.Tensor:
    return load_file(out / "shard-00000.safetensors")["null_text"]


def test_training_from_a_cache_loads_no_encoder(folder, made, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing them is an error now
    monkeypatch.setitem(sys.modules, "transformers", None)
    geometry = geometry_of(folder, 5, (64, 64))
    sources = open_sources([f"cache:{made}"], geometry, puppet.body(), wan=True)
    wanted = [batches.Wanted(2, 0, 5, range(FEW))]
    where = {"seed": 0, "batch": FEW, "device": CPU}
    (part,) = batches.read(sources, torch.zeros(235), torch.ones(235), wanted, **where)
    assert part.video.shape == (FEW, 16, 2, 8, 8) and part.text.shape == (FEW, 512, 32)
    assert {part.video.dtype, part.motion.dtype, part.text.dtype} == {torch.float32}
    torch.testing.assert_close(sources[0].null_text[:1], _null_text(made), atol=0, rtol=0)
    assert not sources[0].null_text[1:].any()


def test_other_settings_are_refused_and_leave_the_cache_alone(folder, made, verb):
    # catches motion that was checked beside motion that was taken as it is
    before = contents(made)
    for option, reason in (
        (("--dtype", "fp32"), "(dtype was bf16, now fp32): use the same, or another --out"),
        (("--force",), "(force was False, now True)"),
    ):
        ended = verb(commands, *arguments(folder, made, *option))
        assert ended.code == 2 and reason in ended.err
    assert contents(made) == before


# ---------------------------------------------------------------- with encoders that count


def test_it_may_die_at_any_call_and_makes_nothing_twice(tmp_path):
    # catches shards that are there before they are whole, and a restart that begins anew
    whole = Fake()
    write(tmp_path / "whole", made_up(), whole)
    for dies_at in range(0, len(whole.calls), 7):
        out, first, second = tmp_path / str(dies_at), Fake(dies_at), Fake()
        with pytest.raises(KeyboardInterrupt):
            write(out, made_up(), first)
        not_finished(out)
        finished = len(list(out.glob("shard-*")))
        write(out, made_up(), second)
        assert contents(out) == contents(tmp_path / "whole")
        again = len(first.calls) - 1 + len(second.calls) - len(whole.calls)
        assert 0 <= again <= len(whole.calls) // 2 and (finished == 0 or len(second.calls) < len(whole.calls))


def test_a_shard_is_whole_or_not_there(tmp_path, monkeypatch):
    def killed_while_writing(tensors: dict, path: Path, record: dict) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "save_file", killed_while_writing)
        write(tmp_path / "a", made_up())
    assert contents(tmp_path / "a").keys() == {"settings.json"}
    (tmp_path / "a" / ".shard-00001.123.safetensors").write_bytes(b"half")  # as SIGKILL leaves it
    write(tmp_path / "a", made_up())
    assert not list((tmp_path / "a").glob(".shard*"))


def test_a_bad_item_leaves_no_sample_and_its_reason(tmp_path):
    write(tmp_path / "a", made_up(bad=(3, 16)))
    made = cache.open_cache(tmp_path / "a")
    assert made.rejected == ["line 7: empty", "clip 3 is bad", "clip 16 is bad"]
    names = [name for _, _, name, _ in made.samples]
    assert len(names) == COUNT * 3 // 2 - 3 and not {"clip 3", "clip 16"} & set(names)
    for number, (_, _, name, captions) in enumerate(made.samples):
        sample = cache.read_sample(made, number, video=True)
        item = int(name.split()[1])
        assert sample.motion[0, 0] // 10 == item
        torch.testing.assert_close(sample.latents, torch.full((2, 3, 8, 8), item / 127.5 - 1))
        assert len(sample.texts) == captions == min(item % 3, 1)
        for text in sample.texts:  # four tokens of "words of N" and their end
            assert text.shape == (4, 3) and text.all()


@pytest.mark.parametrize("what", ["motion", "latents", "text.0"])
def test_a_sample_that_holds_nan_is_named(tmp_path, what):
    # catches a check that looks at one kind of tensor only: one such sample would spoil every step it is in
    write(tmp_path, made_up())
    assert cache.damaged_samples(cache.open_cache(tmp_path)) == []
    file = cache.shards_of(tmp_path, COUNT)[0]
    tensors = load_file(file)
    with safe_open(file, "pt") as shard:
        record = shard.metadata()
    tensors[f"2.{what}"].flatten()[-1] = torch.nan
    save_file(tensors, file, record)
    (damaged,) = cache.damaged_samples(cache.open_cache(tmp_path))
    assert damaged.startswith(f"{file}: sample 2, clip ") and "holds NaN" in damaged


def test_motion_alone_is_cached_without_latents(tmp_path):
    write(tmp_path / "a", made_up(paired=False))
    source = open_sources([f"cache:{tmp_path / 'a'}"], FAKE, puppet.body(), wan=True)[0]
    assert (source.paired, source.count) == (False, 60)
    assert not any("latents" in name for name in load_file(tmp_path / "a" / "shard-00000.safetensors"))
    read = source.read([3, 4], 9, False, None, CPU)
    assert read.latents is None and [len(texts) for texts in read.texts] == [1, 0]


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path):
    alive, peaks = weakref.WeakSet(), []
    plain = made_up()

    def read(item: int):
        for sample in plain.read(item):
            alive.add(sample.video)
            peaks.append(len(alive))
            yield sample

    write(tmp_path / "a", plain._replace(read=read))
    assert len(peaks) == 60 and max(peaks) <= 3


def test_shorter_clips_are_the_beginning_of_longer_ones(tmp_path):
    # catches latents cut at the motion's frame numbers: latent 0 holds one frame, the others four
    write(tmp_path / "a", made_up())
    geometry, spec = FAKE._replace(frames=5), f"cache:{tmp_path / 'a'}"
    source = open_sources([spec], geometry, puppet.body(), wan=True)[0]
    short, whole = (source.read([7], frames, True, None, CPU) for frames in (5, 9))
    assert short.motion.shape == (1, 5, 235) and short.latents.shape == (1, 2, 2, 8, 8)
    torch.testing.assert_close(short.latents, whole.latents[:, :, :2])


def test_caches_that_do_not_fit_are_refused(tmp_path):
    for name in ("a", "b"):
        cache.prepare(tmp_path / name, settings(made_up(count=2), body=name))
        cache.write(made_up(count=2), tmp_path / name, Fake().both(), torch.float32, 0, 1)
    first, second = (f"cache:{tmp_path / name}" for name in ("a", "b"))
    for asked in ({"frames": 13}, {"fps": 24}, {"width": 128}, {"stride": 16}):
        with pytest.raises(ValueError, match=r"has .*frames=9, .*asked for is"):
            open_sources([first], FAKE._replace(**asked), puppet.body(), wan=True)
    with pytest.raises(ValueError, match="joints of different bodies"):
        open_sources([first, second], FAKE, puppet.body(), wan=True)


# ---------------------------------------------------------------- sources that change


@pytest.fixture
def mended(tmp_path) -> DataSet:
    """What the cache tmp_path/a was made of, with other sources of items 17, 20 and 39 since then."""
    files = [tmp_path / f"{item}.npz" for item in range(COUNT)]
    for file in files:
        file.write_bytes(file.name.encode())
    data = made_up()._replace(sources=lambda item: {"caption": f"words {item}", "motion": files[item]})
    write(tmp_path / "a", data)
    before, fake = contents(tmp_path / "a"), Fake()
    write(tmp_path / "a", data, fake)
    assert fake.calls == [] and contents(tmp_path / "a") == before

    files[17].write_bytes(b"another motion")
    files[20].unlink()
    captions = lambda item: data.sources(item) | ({"caption": "mended"} if item == 39 else {})
    return data._replace(sources=captions)


def test_only_what_changed_is_made_again(tmp_path, mended, capsys):
    # catches old captions that stay, and everything made anew
    out = tmp_path / "a"
    before = contents(out)
    for rank in (1, 0):
        write(out, mended, None, rank, 2)
    said = capsys.readouterr().out
    for words in ("17: its motion changed", "20: its motion changed", "39: its caption changed"):
        assert words in said
    assert said.count("clip") == 3 and said.count("is made again") == 2
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {
        "shard-00001.safetensors", "shard-00002.safetensors",
    }  # fmt: skip
    write(tmp_path / "fresh", mended)
    assert after == contents(tmp_path / "fresh")


def test_a_cache_of_which_a_part_is_old_is_not_finished(tmp_path, mended):
    # catches a cache that counts as finished while some of it is still to be made again
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", mended, Fake(5))  # at shard 1
    not_finished(tmp_path / "a")
    write(tmp_path / "a", mended, None, rank=1, ranks=2)  # shard 2 is of rank 0
    not_finished(tmp_path / "a")
    write(tmp_path / "a", mended, None, rank=0, ranks=2)
    write(tmp_path / "fresh", mended)
    assert contents(tmp_path / "a") == contents(tmp_path / "fresh")


def test_check_compares_a_cache_with_its_sources(tmp_path, capsys):
    # catches a check that finds all well with a cache of captions and motions that were mended since
    folder = clip_folder.write(tmp_path / "clips", (1, 2))
    spec, out = f"clips:{folder}", tmp_path / "a"
    data = open_dataset(spec, FAKE, puppet.body())
    cache.prepare(out, settings(data, data=spec, names=cache.hash_of_names(data)))
    cache.write(data, out, Fake().both(), torch.float32, 0, 1)

    def compared() -> list[str]:
        capsys.readouterr()
        commands.check(f"cache:{out}", FAKE, puppet.body())
        return capsys.readouterr().out.splitlines()

    (folder / "0.mp4").touch()
    assert compared()[0] == f"{spec} is as it was when it was cached"
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace("a person", "a dancer", 1))
    (folder / "1.mp4").write_bytes((folder / "0.mp4").read_bytes())
    (folder / "motions/1.npz").write_bytes(b"x")
    assert compared()[:3] == [
        "0.mp4: its row in metadata.csv changed since it was cached",
        "1.mp4: its video and motion changed since it was cached",
        f"run the command that made {out} again: it makes these items again",
    ]
    clip_folder.write_metadata(folder, [("0.mp4", "text", "motions/0.npz")])
    assert compared()[0] == f"{spec} lists other items now: cache it again, into another --out"
    data = open_dataset(spec, FAKE, puppet.body())
    with pytest.raises(ValueError, match=r"lists other items than when .* was made: choose another --out"):
        cache.prepare(out, settings(data, data=spec, names=cache.hash_of_names(data)))
    shutil.rmtree(folder)
    assert compared()[0].startswith("not compared with what it was made of: no folder")


def test_a_cache_of_other_encoders_is_refused(folder, made, verb, tmp_path):
    # catches features of two text encoders or tokenizers, or latents of two VAEs, in one cache: their files
    # are as large
    (folder / "vae" / ".DS_Store").touch()  # no part of a Wan
    assert verb(commands, *arguments(folder, made)).code == 0
    for part in ("vae", "text_encoder", "tokenizer"):
        other = shutil.copytree(folder, tmp_path / part)
        file = next((other / part).glob("tokenizer.json" if part == "tokenizer" else "*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        ended = verb(commands, *arguments(other, made))
        assert ended.code == 2 and f"({part} was " in ended.err

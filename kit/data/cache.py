"""A data set encoded once: latents, text features and motion in safetensors shards.

    DIR/settings.json               what everything in DIR was made with, and of how many items
    DIR/shard-00000.safetensors     the samples of 16 items, and which items were rejected

Each shard is written atomically, so that a killed run continues with the shard it was at; each rank writes
its share of them. A cache is finished when no shard is missing. A shard keeps hashes of its items' sources:
if a caption or a file has changed since, the shard is deleted first, then made again.

In a shard, sample k has the tensors "k.motion" (f 235) fp32, where it has video "k.latents" (c T h w), and
for each caption "k.text.0", "k.text.1", ... (tokens text_dim). Shard 0 also has "null_text", the features of
the empty prompt.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from kit.body import Body
from kit.data.clips import Sample
from kit.data.datasets import DataSet, open_dataset, read_item
from kit.files import whole_file
from kit.geometry import Geometry
from kit.pictures import from_frames
from kit.wan.load import fingerprint
from motion_tokens import MOTION_DIM

VERSION = 3
SHARD_ITEMS = 16  # few, so that a killed run loses little
SETTINGS = "settings.json"


def shards_of(folder: Path, items: int) -> list[Path]:
    """The files of a finished cache of so many items."""
    return [folder / f"shard-{shard:05d}.safetensors" for shard in range(math.ceil(items / SHARD_ITEMS))]


# ---------------------------------------------------------------- writing


class Encoders(NamedTuple):
    """What turns pixels and prompts into what the network sees."""

    video: Callable[[Tensor], Tensor] | None  # (b 3 f h w) in [-1, 1] -> (b c T h w); None for motion alone
    text: Callable[[list[str]], Tensor]  # prompts -> (b l text_dim), zeros after each prompt's last token


def settings_of(
    spec: str, data: DataSet, geometry: Geometry, dtype: str, wan: Path, body: Body, force: bool
) -> dict:
    """All that a cache's content depends on, except its sources, which are hashed item by item (`hashes`)."""
    return {
        "version": VERSION,
        "data": spec,
        "items": len(data.names),
        "names": hash_of_names(data),
        "paired": data.paired,
        **geometry._asdict(),
        "dtype": dtype,
        "vae": fingerprint(wan / "vae"),
        "text_encoder": fingerprint(wan / "text_encoder"),
        "tokenizer": fingerprint(wan / "tokenizer"),
        "body": body.digest,
        **{f"{gender} body": body.of(gender).digest for gender in sorted(body.genders())},
        "force": force,
    }


def hash_of_names(data: DataSet) -> str:
    """Tells lists of items apart."""
    return _hash(json.dumps(data.names))


def prepare(out: Path, settings: dict) -> None:
    """Make the folder and record the settings; ValueError if it holds anything made with other settings."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / SETTINGS
    if not file.exists():
        names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
        if names - {SETTINGS}:  # another rank may have been faster
            raise ValueError(f"{out} is not empty and has no {SETTINGS}: choose an empty folder with --out")
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
    known = read_settings(out)
    changed = sorted(name for name in known.keys() | settings if known.get(name) != settings.get(name))
    if {"names", "items"} & set(changed) and known["data"] == settings["data"]:
        raise ValueError(f"{known['data']} lists other items than when {out} was made: choose another --out")
    if changed:
        changes = "; ".join(f"{name} was {known.get(name)}, now {settings.get(name)}" for name in changed)
        raise ValueError(f"{out} was made with other settings ({changes}): use the same, or another --out")


def write(data: DataSet, out: Path, encoders: Encoders, dtype: torch.dtype, rank: int, ranks: int) -> None:
    """Make this rank's shards that are missing or whose sources changed."""
    items = range(len(data.names))
    files = shards_of(out, len(items))
    parts = [items[start : start + SHARD_ITEMS] for start in items[::SHARD_ITEMS]]
    mine = list(zip(files, parts, strict=True))[rank::ranks]

    for file, part in mine:  # before any is made: a run that is killed leaves no cache of old and new
        if file.exists():
            with _opened(file) as shard:
                known = json.loads(shard.metadata()["record"])["sources"]
            now = [hashes(data, item) for item in part]
            if changes := changed([data.names[item] for item in part], known, now):
                print(*changes, f"{file} is made again", sep="\n")
                file.unlink()

    def made(sample: Sample) -> tuple[str, tuple[str, ...], dict[str, Tensor]]:
        return sample.name, sample.captions, encode(sample, encoders, dtype)

    for file, part in tqdm(mine, desc="caching", unit="shard", disable=rank > 0):
        if file.exists():
            continue
        for left in out.glob(f".{file.stem}.*"):  # files of a killed run
            left.unlink()
        tensors, samples = {}, []
        rejected = list(data.problems) if file == files[0] else []
        sources = [hashes(data, item) for item in part]  # before they are read
        for item in part:
            for name, captions, encoded in read_item(data, item, made, rejected):
                tensors |= {f"{len(samples)}.{what}": tensor for what, tensor in encoded.items()}
                samples.append([name, captions])
        if file == files[0]:
            tensors["null_text"] = encode_text("", encoders, dtype)
        record = json.dumps({"samples": samples, "rejected": rejected, "sources": sources})
        with whole_file(file) as temporary:
            save_file(tensors, temporary, {"record": record})


def changed(names: list[str], known: list[dict[str, str]], now: list[dict[str, str]]) -> list[str]:
    """A line for each item whose sources' hashes have changed: `known` before, `now` today."""
    changes = []
    for name, before, after in zip(names, known, now, strict=True):
        if parts := [part for part in before | after if before.get(part) != after.get(part)]:
            changes.append(f"{name}: its {' and '.join(parts)} changed since it was cached")
    return changes


def hashes(data: DataSet, item: int) -> dict[str, str]:
    """A hash of each source of an item; of a file, the hash of its content."""
    return {part: _hash(source) for part, source in data.sources(item).items()}


def _hash(source: str | Path) -> str:
    if isinstance(source, str):
        return hashlib.blake2b(source.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    with suppress(OSError):
        if source.is_file():  # reading a pipe would block
            with open(source, "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return "unreadable"


def encode(sample: Sample, encoders: Encoders, dtype: torch.dtype) -> dict[str, Tensor]:
    """A sample's tensors, as stored in a shard."""
    tensors = {"motion": sample.motion}
    if sample.video is not None:
        latents = encoders.video(rearrange(from_frames(sample.video), "c f h w -> 1 c f h w"))
        tensors["latents"] = latents[0].to("cpu", dtype)
    texts = {f"text.{i}": encode_text(caption, encoders, dtype) for i, caption in enumerate(sample.captions)}
    # copies: safetensors takes no tensors that share memory
    return {name: tensor.clone().contiguous() for name, tensor in (tensors | texts).items()}


def encode_text(prompt: str, encoders: Encoders, dtype: torch.dtype) -> Tensor:
    """Features of the prompt's own tokens (tokens text_dim); the zeros after them are put back on reading."""
    features = encoders.text([prompt])[0]
    tokens = int(features.any(dim=-1).nonzero().max()) + 1
    return features[:tokens].to("cpu", dtype).clone()


# ---------------------------------------------------------------- reading


class Cache(NamedTuple):
    """A finished cache; its samples are numbered through all shards."""

    folder: Path
    settings: dict
    geometry: Geometry  # of its samples
    samples: list[tuple[Path, int, str, int]]  # shard, number in it, name, number of captions
    rejected: list[str]
    null_text: Tensor  # (tokens text_dim)
    sources: list[dict[str, str]]  # hashes of each item's


def read_settings(folder: str | Path) -> dict:
    """What a cache was made with, finished or not; FileNotFoundError or ValueError if it is no cache."""
    file = Path(folder) / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: expected what `python -m kit.data cache` wrote")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings["version"] != VERSION:
            raise ValueError(f"version {settings['version']}, expected {VERSION}")
        return settings
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged or of another version ({error}): make the cache again"
        ) from error


def geometry_in(settings: dict) -> Geometry:
    """What the clips of a cache with these settings are like."""
    return Geometry(*(settings[name] for name in Geometry._fields))


def open_cache(folder: str | Path) -> Cache:
    """Read all of a cache but its samples, and check that every shard is there and whole.

    FileNotFoundError if it is not finished, ValueError if it is damaged or of another version.
    """
    folder, settings = Path(folder), read_settings(folder)
    files = shards_of(folder, settings["items"])
    samples, rejected, sources = [], [], []
    for path in files:
        with _opened(path) as shard:
            record = json.loads(shard.metadata()["record"])
            for k, (name, captions) in enumerate(record["samples"]):
                samples.append((path, k, name, len(captions)))
            rejected += record["rejected"]
            sources += record["sources"]
    with _opened(files[0]) as shard:
        null_text = shard.get_tensor("null_text")
    return Cache(folder, settings, geometry_in(settings), samples, rejected, null_text, sources)


class CachedSample(NamedTuple):
    """One sample of a cache, in the dtype it is stored in."""

    motion: Tensor  # (f 235) fp32
    latents: Tensor | None  # (c T h w)
    texts: list[Tensor]  # for each caption (tokens text_dim)


def read_sample(cache: Cache, number: int, video: bool) -> CachedSample:
    """The sample of this number, from disk; its latents only if `video`."""
    path, k, _, captions = cache.samples[number]
    with _opened(path) as shard:
        latents = shard.get_tensor(f"{k}.latents") if video else None
        texts = [shard.get_tensor(f"{k}.text.{i}") for i in range(captions)]
        return CachedSample(shard.get_tensor(f"{k}.motion"), latents, texts)


def damaged_samples(cache: Cache) -> list[str]:
    """Read every sample -> a line for each that holds NaN or has another shape than the cache's."""
    problems = []
    frames, (T, h, w) = cache.geometry.frames, cache.geometry.grid
    for number, (path, k, name, _) in enumerate(tqdm(cache.samples, desc="reading", unit="sample")):
        motion, latents, texts = read_sample(cache, number, cache.settings["paired"])
        right = motion.shape == (frames, MOTION_DIM) and (latents is None or latents.shape[1:] == (T, h, w))
        tensors = [motion, *texts] if latents is None else [motion, latents, *texts]
        if not right or not all(x.isfinite().all() for x in tensors):
            expected = f"motion ({frames}, {MOTION_DIM}), latents (c, {T}, {h}, {w})"
            problems.append(f"{path}: sample {k}, {name}, holds NaN or another shape, expected {expected}")
    return problems


def compared(cached: Cache, body: Body) -> list[str]:
    """Compare a cache with its data set as it is now -> lines to print: changes, or why they are unknown."""
    spec = cached.settings["data"]
    try:
        data = open_dataset(spec, cached.geometry, body)
    except (ValueError, OSError) as error:
        return [f"not compared with what it was made of: {error}"]
    if hash_of_names(data) != cached.settings["names"]:
        return [f"{spec} lists other items now: cache it again, into another --out"]
    now = [hashes(data, item) for item in range(len(data.names))]
    if changes := changed(data.names, cached.sources, now):
        return [*changes, f"run the command that made {cached.folder} again: it makes these items again"]
    return [f"{spec} is as it was when it was cached"]


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """An open shard; FileNotFoundError if it is missing, ValueError if it lacks what is read from it."""
    try:
        with safe_open(path, "pt") as shard:
            yield shard
    except FileNotFoundError as error:
        lacks = f"{path.parent} is not finished, it has no {path.name}"
        raise FileNotFoundError(f"{lacks}: run its cache command again to go on") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and run the cache command again"
        ) from error

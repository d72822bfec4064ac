"""What training draws samples from: the puppet world, data sets in memory, caches on disk."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kit import puppet
from kit.body import Body
from kit.data import cache
from kit.data.datasets import PUPPET_SEED, open_dataset, parse, puppet_count, puppet_motion, read_all
from kit.devices import upload
from kit.geometry import PUPPET, Geometry
from kit.pictures import from_frames
from kit.wan.names import TEXT_TOKENS

PRINTED = 10  # lines, of what was rejected and of what was assumed


class Read(NamedTuple):
    """n samples of a source, as the network takes them."""

    motion: Tensor  # (n f 235) not normalised
    latents: Tensor | None  # (n c T h w)
    texts: list[list[Tensor]]  # of each sample, of each of its captions: features (tokens text_dim)


class Source(NamedTuple):
    """A data set, ready for training."""

    weight: float | None  # its share of the samples, relative to the other sources'
    count: int | None  # samples; None: endless, and the number of a sample is its seed
    frames: int  # of a sample; a request for fewer gets the first ones (of the puppet: a window)
    paired: bool  # whether samples have video
    body: str  # Body.digest of its joints' body
    null_text: Tensor  # (l text_dim) features of the empty prompt, zeros after its last token
    # sample numbers, frames, whether video is wanted, the codec for what is pixels, device
    read: Callable[[list[int], int, bool, puppet.Codec | None, torch.device], Read]


def open_sources(
    specs: Sequence[str], geometry: Geometry, body: Body, wan: bool = False, rank: int = 0
) -> list[Source]:
    """Open data sets for training; rank 0 prints how many samples each has and what is wrong with the rest.

    For the puppet preset a data set is read into memory as a whole, and "puppet" is endless; for Wan each is
    a cache. Without @WEIGHT all samples count the same. Raises ValueError or FileNotFoundError if a data set
    holds nothing usable or does not fit the geometry.
    """
    parsed = [parse(spec) for spec in specs]
    weights = [weight for *_, weight in parsed]
    endless = ("puppet", "") in [(kind, where) for kind, where, _ in parsed]
    if len(specs) > 1 and None in weights and (endless or any(weights)):
        raise ValueError(
            f"{', '.join(specs)}: state the weight of every data set, such as {specs[weights.index(None)]}@1"
        )
    sources = []
    for spec, (kind, where, weight) in zip(specs, parsed, strict=True):
        if wan and kind != "cache":
            command = f"python -m kit.data cache {spec} --wan FOLDER --body SMPL --out DIR"
            raise ValueError(f"{spec}: Wan trains on latents, made by `{command}`, then --data cache:DIR")
        if kind == "cache" and not wan:
            raise ValueError(f"{spec} holds Wan's latents: the puppet preset takes the data set itself")
        if kind == "puppet":
            source, rejected = _puppet_source(where, geometry), []
        elif kind == "cache":
            source, rejected = _cached_source(where, geometry)
        else:
            source, rejected = _read_source(spec, geometry, body, rank)
        reasons = _shortened(rejected, spec)
        if source.count == 0:
            raise ValueError(f"{spec}: nothing usable, {len(rejected)} rejected: {'; '.join(reasons)}")
        if rank == 0 and source.count:
            print(f"{spec}: {source.count} samples, {len(rejected)} rejected", *reasons, sep="\n")
        sources.append(source._replace(weight=weight or source.count or 1.0))
    if len({source.body for source in sources}) > 1:
        raise ValueError(f"{', '.join(specs)} have joints of different bodies: use one --body for all")
    return sources


def _shortened(lines: list[str], spec: str) -> list[str]:
    more = [f"... and more, see `python -m kit.data check {spec}`"] if len(lines) > PRINTED else []
    return lines[:PRINTED] + more


def cached_geometry(spec: str, frames: int | None) -> Geometry:
    """The geometry of cache:DIR, or of its first `frames` frames; of another data set, the puppet's."""
    kind, where, _ = parse(spec)
    if kind != "cache":
        return PUPPET  # open_sources says that Wan needs a cache
    made = cache.geometry_in(cache.read_settings(where))
    return made._replace(frames=frames or made.frames)


def _puppet_source(where: str, geometry: Geometry) -> Source:
    """The embedded world, drawn anew for every batch: endless, or the COUNT clips of puppet:COUNT."""
    first, count = (PUPPET_SEED, puppet_count(where)) if where else (0, None)

    def read(numbers: list[int], frames: int, video: bool, codec: puppet.Codec | None, device) -> Read:
        clips = puppet.clips([first + number for number in numbers], frames=frames, device=device)
        latents = codec.encode(puppet.render(clips.joints, clips.betas, clips.shirt)[0]) if video else None
        return Read(puppet_motion(clips), latents, [[_features(caption)] for caption in clips.caption])

    frames = max(geometry.frames, puppet.FRAMES)
    return Source(None, count, frames, True, puppet.body().digest, _features(""), read)


def _read_source(spec: str, geometry: Geometry, body: Body, rank: int) -> tuple[Source, list[str]]:
    """A data set in memory, as motion vectors and pixels -> the source, and what was rejected."""
    data = open_dataset(spec, geometry, body)
    samples, rejected = read_all(data, lambda sample: sample, title="" if rank else spec)
    if rank == 0 and (said := data.reading.lines()):  # what was assumed or cut
        print(*_shortened(said, spec), sep="\n")

    def read(numbers: list[int], frames: int, video: bool, codec: puppet.Codec | None, device) -> Read:
        chosen = [samples[number] for number in numbers]
        motion = upload(torch.stack([sample.motion[:frames] for sample in chosen]), device)
        latents = None
        if video:
            pixels = torch.stack([from_frames(sample.video[:frames]) for sample in chosen])
            latents = codec.encode(upload(pixels, device))
        return Read(motion, latents, [[_features(text) for text in sample.captions] for sample in chosen])

    source = Source(None, len(samples), geometry.frames, data.paired, body.digest, _features(""), read)
    return source, rejected


def _cached_source(folder: str, geometry: Geometry) -> tuple[Source, list[str]]:
    """What kit.data.cache wrote -> the source, and what was rejected when it was written."""
    cached = cache.open_cache(folder)
    made, settings = cached.geometry, cached.settings
    if made._replace(frames=geometry.frames) != geometry or made.frames < geometry.frames:
        raise ValueError(f"{folder} has {made}, asked for is {geometry}: ask for the same, or cache again")

    def read(numbers: list[int], frames: int, video: bool, codec: puppet.Codec | None, device) -> Read:
        samples = [cache.read_sample(cached, number, video) for number in numbers]
        motion = upload(torch.stack([sample.motion[:frames] for sample in samples]), device)
        latents = None
        if video:  # the codec is causal: the first latents are those of the first frames
            latents = torch.stack([sample.latents[:, : (frames - 1) // 4 + 1] for sample in samples])
            latents = upload(latents, device).float()
        return Read(motion, latents, [sample.texts for sample in samples])

    null_text = F.pad(cached.null_text, (0, 0, 0, TEXT_TOKENS - len(cached.null_text)))
    paired, body = settings["paired"], settings["body"]
    return Source(None, len(cached.samples), made.frames, paired, body, null_text, read), cached.rejected


@functools.lru_cache(maxsize=4096)
def _features(caption: str) -> Tensor:
    """Features (16 64) of a caption, which is cut after 16 words, as tokenizers do."""
    words = caption.replace(".", " ").replace(",", " ").split()
    return puppet.encode_text([" ".join(words[: puppet.TEXT_LEN])])[0]

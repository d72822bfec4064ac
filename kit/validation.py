"""Losses on held-out samples, always the same samples with the same noise, and pictures of samples."""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flow
from dual_dit import DualDiT
from flow import Draw, Role, Task
from kit import pictures, puppet
from kit.backbone import PUPPET_DEFAULTS
from kit.data.batch import padded, rng
from kit.data.sources import Source
from kit.distributed import local
from kit.monitor import Log
from motion_tokens import decode_smpl

SAMPLES = 16
TIMES = (0.125, 0.375, 0.625, 0.875)  # noise levels of samples 0 4 8 ..., 1 5 9 ... and so on
PICTURE = 160  # height of a skeleton, pixels


class HeldOut(NamedTuple):
    """The n samples that losses are measured on; every rank has all of them."""

    video: Tensor | None  # (n c T h w) latents
    motion: Tensor  # (n f 235) normalised
    text: Tensor  # (n l text_dim)
    null_text: Tensor  # (n l text_dim)
    t: Tensor  # (n,)
    seeds: Tensor  # (n,) of the noise

    def rows(self, first: int, end: int) -> "HeldOut":
        return HeldOut(*(x if x is None else x[first:end] for x in self))


def hold_out(sources: Sequence[Source]) -> tuple[list[Source], list[tuple[Source, int]]]:
    """Hold out 16 samples of each source, at most a twentieth -> what is left to train on, and pairs of a
    source and a held-out sample's number; for an endless source that is a seed that training does not draw.
    """
    training, held = [], []
    for source in sources:
        if source.count is None:
            numbers = torch.randint(2**62, (SAMPLES,), generator=rng("held-out seeds")).tolist()
        else:
            numbers = range(source.count - min(SAMPLES, source.count // 20), source.count)
            source = source._replace(count=numbers.start)
        training.append(source)
        held.append([(source, number) for number in numbers])
    return training, [pair for pair in chain(*zip_longest(*held)) if pair]


def read_held_out(
    held: Sequence[tuple[Source, int]],
    model: DualDiT,
    stage: int,
    frames: int,
    codec: puppet.Codec | None,
    device: torch.device,
) -> HeldOut | None:
    """The first 16 that the stage can use; None if it can use none."""
    held = [(source, number) for source, number in held if stage == 1 or source.paired][:SAMPLES]
    if not held:
        return None
    samples = []
    for i, (source, number) in enumerate(held):
        read = source.read([number], frames, stage != 1, codec, device)
        motion = (read.motion[0] - model.motion_mean) / model.motion_std
        video = None if read.latents is None else read.latents[0]
        null_text = source.null_text.float()
        text = padded(read.texts[0][:1] or [None], null_text)[0]
        t, seed = TIMES[i % len(TIMES)], torch.randint(2**62, (), generator=rng("validation noise", i))
        samples.append((video, motion, text, null_text, torch.tensor(t), seed))
    *columns, seeds = zip(*samples, strict=True)
    columns = (None if c[0] is None else torch.stack(c).to(device) for c in columns)
    return HeldOut(*columns, torch.stack(seeds))


@contextlib.contextmanager
@torch.no_grad()
def averaged(model: DualDiT, ema: dict[str, Tensor]) -> Iterator[None]:
    """Within this context the model has its averaged weights."""
    state = {name: local(value) for name, value in model.state_dict().items()}
    trained = {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        value.copy_(local(ema[name]))
    yield
    for name, value in state.items():
        value.copy_(trained[name])


def watch(
    run: Path,
    step: int,
    stage: int,
    model: DualDiT,
    ema: dict[str, Tensor],
    held: HeldOut,
    codec: puppet.Codec | None,
    chunk: int,
    bf16: bool,
    log: Log | None,
    shift: float,
) -> None:
    """Losses of the averaged weights, and for the puppet a picture in RUN/samples; only rank 0 has a log."""
    tasks = flow.STAGES[stage]
    with averaged(model, ema):
        losses = validate(model, held, tasks, chunk, bf16)
        if codec:
            path = run / "samples" / f"step-{step:08}.png" if log else None
            picture(path, model, held, tasks, codec, bf16, shift)
    if log:
        log.validation(step, losses)


@torch.no_grad()
def validate(
    model: DualDiT, held: HeldOut, tasks: Sequence[Task], chunk: int, bf16: bool
) -> dict[str, float]:
    """Losses, computed `chunk` samples at a time: of each task and modality at each noise level
    ("joint/video/0.125"), and over all levels ("joint/video")."""
    losses = {}
    for task in tasks:
        errors, no_text = [], torch.full(held.t.shape, task is Task.VIDEO_TO_MOTION)
        for first in range(0, len(held.t), chunk):
            part = held.rows(first, first + chunk)
            with torch.autocast(held.t.device.type, torch.bfloat16, enabled=bf16):
                draw = Draw(task, no_text[first : first + chunk], part.t, part.seeds)
                errors.append(flow.loss(model, *part[:-2], draw))
        for name, of_parts in zip(flow.Loss._fields, zip(*errors, strict=True), strict=True):
            if of_parts[0] is not None:
                error, key = torch.cat(of_parts), f"{task.name.lower()}/{name}"
                losses[key] = error.mean().item()
                for i, t in enumerate(TIMES[: len(error)]):
                    losses[f"{key}/{t}"] = error[i :: len(TIMES)].mean().item()
    return losses


@torch.no_grad()
def picture(
    path: Path | None, model: DualDiT, held: HeldOut, tasks: Sequence[Task], codec: puppet.Codec, bf16: bool,
    shift: float,
) -> None:  # fmt: skip
    """A contact sheet of the first held-out sample: real, and as each task generates it; None: no file."""
    rows, titles = [], []

    def show(title: str, video: Tensor | None, motion: Tensor | None) -> None:
        if video is not None:
            rows.append(pictures.to_frames(codec.decode(video.float())[0].cpu()))
            titles.append(f"{title}: video")
        if motion is not None:
            joints = decode_smpl((motion.float() * model.motion_std + model.motion_mean).cpu())["joints"][0]
            rows.append(pictures.draw_skeleton(joints, puppet.project, PICTURE))
            titles.append(f"{title}: motion")

    one, how = held.rows(0, 1), PUPPET_DEFAULTS._replace(shift=shift)._asdict()
    del how["redraw"]  # motion to video is a picture of its own
    show("held out", one.video, one.motion)
    for task in tasks:
        both = ((one.video, one.seeds, task.video), (one.motion, one.seeds + 1, task.motion))
        inputs = [flow.by_role(x, torch.ones(1), seeds, role)[0] for x, seeds, role in both]  # noise at t = 1
        with torch.autocast(held.t.device.type, torch.bfloat16, enabled=bf16):
            made = flow.sample(model, *inputs, one.text, one.null_text, task, **how)
        # a condition is returned unchanged: the first rows show it
        video, motion = (x if role is Role.NOISY else None for x, (*_, role) in zip(made, both, strict=True))
        show(task.name.lower().replace("_", " "), video, motion)
    if path:  # the other ranks only take part in the calls of the network
        path.parent.mkdir(exist_ok=True)
        pictures.contact_sheet(path, rows, titles)

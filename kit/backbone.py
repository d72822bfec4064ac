"""A backbone as sampling sees it: a text encoder, a video codec and a transformer, with their sizes.

There are two: the embedded puppet world, and a real Wan in a local folder. Each part is loaded on request and
freed when no longer referenced, so that one of Wan's three networks is in memory at a time.
"""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dual_dit import DualDiT
from kit import devices, puppet, wan, weights
from kit.body import Body
from kit.geometry import Geometry, geometry_of
from kit.pictures import Project


class Defaults(NamedTuple):
    """Sampling options of a backbone, unless overridden."""

    steps: int  # of the solver
    guidance_text: float
    guidance_condition: float
    shift: float
    redraw: bool  # make the video of a joint sample once more, from its motion


SHIPPED = Path(__file__).parent.parent / "assets" / "puppet.safetensors"
# what an ablation changes in DualDiTConfig; the first two change positions, no weights
CHANGES = {"unsynced": {"synced": False}, "collision": {"apart": False}, "single-stream": {"shared": True}}

PUPPET_DEFAULTS = Defaults(6, guidance_text=1.5, guidance_condition=1.5, shift=1.0, redraw=True)
WAN_DEFAULTS = Defaults(50, guidance_text=6.0, guidance_condition=6.0, shift=8.0, redraw=False)


class Backbone(NamedTuple):
    geometry: Geometry
    defaults: Defaults
    autocast: bool  # compute in bf16 what is stored in fp32
    body: Body
    text_encoder: Callable[[], Callable[[list[str]], Tensor]]  # loads prompts -> (b l text_dim)
    codec: Callable[[], puppet.Codec | wan.VideoVAE]  # loads (b 3 f h w) in [-1, 1] <-> (b c T h w)
    transformer: Callable[[], DualDiT]
    project: Project | None  # the camera, where it is known

    def sampling(self) -> dict[str, object]:
        """What sample.denoise is called with, unless an option changes it."""
        return self.defaults._asdict() | {"bf16": self.autocast}


def open_backbone(
    folder: Path | None, file: Path | None, body: Path | None, frames: int | None,
    size: tuple[int, int] | None, fps: float | None, precision: str | None, device: str,
) -> Backbone:  # fmt: skip
    """The Wan in `folder`, or the puppet, with the weights in `file` (default: the shipped puppet's).

    Frames, size, rate and shift default to what the weights were trained with, or without weights to the
    published settings.
    """
    file = file or (None if folder else SHIPPED)
    trained = weights.read_header(file)[1] if file else {}
    own = Body.load(body) if body else puppet.body()
    known = trained.get("body") or (own if folder else puppet.body()).digest
    if known != own.digest:
        print(f"{file} was trained on another body than {body or 'that of the puppet'}: name it with --body")
    if not folder:
        given = {"frames": frames, "size": size, "fps": fps, "precision": precision}
        if wrong := [name for name, value in given.items() if value]:
            raise ValueError(f"--{wrong[0]} is for --wan; the puppet has one size and one rate")
        return puppet_backbone(file, device)._replace(body=own)
    if file:
        check_weights(file, folder)
    if not body:
        print("no --body: joints are the puppet's, not SMPL's")
    if fps and trained.get("fps", fps) != fps:
        print(f"{file} was trained on {trained['fps']:g} frames a second, {fps:g} are asked for")
    frames, fps = frames or trained.get("frames"), fps or trained.get("fps")
    if not size and "height" in trained:
        size = trained["height"], trained["width"]
    precision = precision or ("bf16" if device.startswith("cuda") else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]

    def transformer() -> DualDiT:
        if file:
            return weights.load_weights(file, device, dtype)[0]
        print("no --weights: the motion expert is untrained, motion it makes means nothing; try --task video")
        torch.manual_seed(0)  # the untrained motion expert is the same in every call
        return wan.load_transformer(folder, dtype, device)

    return Backbone(
        geometry_of(folder, frames, size, fps),
        as_trained(WAN_DEFAULTS, trained),
        False,
        own,
        lambda: wan.TextEncoder(folder, dtype, device),
        lambda: wan.VideoVAE(folder, device=device),
        transformer,
        None,
    )


def puppet_backbone(file: Path, device: str) -> Backbone:
    """The embedded world with trained weights; its network is small enough to stay in memory."""
    model, extra = weights.load_weights(file, device)
    _, trained = weights.read_header(file)
    codec = puppet.Codec.from_state(extra)
    return Backbone(
        geometry_of(None, trained.get("frames")),
        as_trained(PUPPET_DEFAULTS, trained),
        devices.has_bf16_units(torch.device(device)),  # as it was trained and measured
        puppet.body(),
        lambda: puppet.encode_text,
        lambda: codec,
        lambda: model,
        puppet.project,
    )


def as_trained(defaults: Defaults, trained: dict) -> Defaults:
    """The same, with the shift that weights of these settings were trained with."""
    return defaults._replace(shift=trained.get("recipe", {}).get("shift", defaults.shift))


def check_weights(file: Path, folder: Path) -> None:
    """ValueError unless the weights belong to the Wan in `folder`; only headers are read."""
    config, _ = weights.read_header(file)
    for name, value in dataclasses.asdict(wan.transformer_config(folder)).items():
        found = getattr(config, name)
        if found != value and not any(name in change for change in CHANGES.values()):
            of = f"{file} has {name} {found}, {folder} {value}"
            raise ValueError(f"{of}: name the Wan of these weights")


def free_memory(device: str) -> None:
    """Free the memory of parts that are no longer referenced."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()

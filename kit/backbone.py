"""A backbone as sampling sees it: a text encoder, a video codec and a transformer, with their sizes.

There are two: the embedded puppet world, and a real Wan in a local folder. Each part is loaded when it is
asked for and freed when its user lets go of it, so that one of Wan's three networks is resident at a time.
"""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dual_dit import DualDiT
from kit import puppet, wan, weights
from kit.body import Body
from kit.geometry import PUPPET, Geometry
from kit.wan.names import read_config, transformer_folder


class Defaults(NamedTuple):
    """How a backbone is sampled unless told otherwise."""

    steps: int  # of each modality
    guidance_text: float
    guidance_condition: float
    shift: float
    lead: float  # of motion ahead of video in joint sampling (flow.clocks)


PUPPET_DEFAULTS = Defaults(6, guidance_text=1.5, guidance_condition=1.5, shift=1.0, lead=0.5)


class Backbone(NamedTuple):
    geometry: Geometry
    defaults: Defaults
    body: Body
    text_encoder: Callable[[], Callable[[list[str]], Tensor]]  # loads prompts -> (b l text_dim)
    codec: Callable[[], puppet.Codec | wan.VideoVAE]  # loads (b 3 f h w) in [-1, 1] <-> (b c t h w)
    transformer: Callable[[], DualDiT]
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None  # the camera, where it is known


def puppet_backbone(file: Path, device: str) -> Backbone:
    """The embedded world with trained weights; its network is small enough to stay."""
    model, extra = weights.load_weights(file, device)
    codec = puppet.Codec.from_state(extra)
    return Backbone(
        PUPPET,
        PUPPET_DEFAULTS,
        puppet.body(),
        lambda: puppet.encode_text,
        lambda: codec,
        lambda: model,
        puppet.project,
    )


def wan_backbone(
    folder: Path, file: Path | None, device: str, dtype: torch.dtype, body: Body, geometry: Geometry
) -> Backbone:
    """Wan in `folder`; `file` has trained weights, without it the motion expert is untrained."""

    def transformer() -> DualDiT:
        if file is None:
            torch.manual_seed(0)  # the untrained motion expert is the same in every call
            return wan.load_transformer(folder, dtype, device)
        model, _ = weights.load_weights(file, device, dtype)
        for name, value in (read_config(transformer_folder(folder)) or {}).items():
            if (found := getattr(model.config, name)) != (tuple(value) if name == "patch" else value):
                raise ValueError(
                    f"{file} has {name} {found}, {folder} {value}: give the Wan that these weights are of"
                )
        return model

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "echomotion" / "text"
    return Backbone(
        geometry,
        Defaults(steps=50, guidance_text=5.0, guidance_condition=1.5, shift=5.0, lead=0.0),
        body,
        lambda: wan.TextEncoder(folder, dtype, device, cache),
        lambda: wan.VideoVAE(folder, device=device),
        transformer,
        None,
    )


def free(device: str) -> None:
    """Give back the memory of parts that nobody holds any more."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()

"""A backbone as the verbs see it: a text encoder, a video codec and a transformer, with their sizes.

There are two: the embedded puppet world, and a real Wan in a local folder. Wan's three networks are loaded
when they are called and freed when the call ends, so that one of them is resident at a time.
"""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dual_dit import DualDiT
from kit import data, puppet, wan, weights
from kit.body import Body
from kit.geometry import PUPPET, Geometry


class Defaults(NamedTuple):
    """How a backbone is sampled unless told otherwise."""

    steps: int
    guidance_text: float
    guidance_condition: float
    shift: float


class Backbone(NamedTuple):
    geometry: Geometry
    defaults: Defaults
    body: Body
    encode_text: Callable[[list[str]], Tensor]  # prompts -> (b l text_dim)
    encode_video: Callable[[Tensor], Tensor]  # (b 3 f h w) in [-1, 1] -> latents (b c t h w)
    decode_video: Callable[[Tensor], Tensor]  # and back
    transformer: Callable[[], DualDiT]
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None  # the camera, where it is known


def puppet_backbone(file: Path, device: str) -> Backbone:
    """The embedded world with trained weights; its network is small enough to stay."""
    model, extra = weights.load_weights(file, device)
    codec = puppet.Codec.from_state(extra)
    return Backbone(
        PUPPET,
        Defaults(steps=12, guidance_text=1.5, guidance_condition=1.5, shift=data.SHIFT),
        puppet.body(),
        puppet.encode_text,
        lambda video: codec.encode(video.to(device)),
        codec.decode,
        lambda: model,
        puppet.project,
    )


def wan_backbone(
    folder: Path, file: Path | None, device: str, dtype: torch.dtype, body: Body, geometry: Geometry
) -> Backbone:
    """Wan in `folder`; `file` has trained weights, without it the motion expert is untrained."""

    def once(load: Callable, *inputs: object) -> Tensor:
        result = load()(*inputs)
        free(device)  # the network that load() made ends with its call
        return result

    def transformer() -> DualDiT:
        if file is None:
            torch.manual_seed(0)  # the untrained motion expert is the same in every call
            return wan.load_transformer(folder, dtype, device)
        return weights.load_weights(file, device, dtype)[0]

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "echomotion" / "text"
    return Backbone(
        geometry,
        Defaults(steps=50, guidance_text=5.0, guidance_condition=1.5, shift=5.0),
        body,
        lambda prompts: once(lambda: wan.TextEncoder(folder, dtype, device, cache), prompts),
        lambda video: once(lambda: wan.VideoVAE(folder, device=device).encode, video),
        lambda latents: once(lambda: wan.VideoVAE(folder, device=device).decode, latents),
        transformer,
        None,
    )


def free(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()

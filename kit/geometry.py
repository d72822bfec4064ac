"""The geometry of clips: frame rate, length, size. Every backbone has its own; a user may choose another."""

import json
from pathlib import Path
from typing import NamedTuple

from kit import puppet


class Geometry(NamedTuple):
    """Rate, length and size of clips, and the stride of their codec."""

    fps: float
    frames: int
    height: int  # pixels
    width: int
    stride: int  # pixels a latent, in height and width; in time it is 4

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T h w) of the latents."""
        return (self.frames - 1) // 4 + 1, self.height // self.stride, self.width // self.stride


PUPPET = Geometry(puppet.FPS, puppet.FRAMES, puppet.SIZE, puppet.SIZE, 8)
# by the codec's stride: Wan2.1's and Wan2.2-TI2V's published settings
WAN = {8: Geometry(16, 81, 480, 832, 8), 16: Geometry(24, 121, 704, 1280, 16)}


def geometry_of(
    folder: Path | None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> Geometry:
    """Geometry of the Wan in `folder`, or of the puppet (None), with a given length, size or rate replaced.

    size is (height, width). FileNotFoundError or ValueError if there is no such Wan, or it cannot make that.
    """
    return adjusted(PUPPET if folder is None else _published(folder), frames, size, fps)


def adjusted(
    published: Geometry, frames: int | None, size: tuple[int, int] | None, fps: float | None = None
) -> Geometry:
    """The same at another length, size (height, width) or rate; ValueError if that is impossible."""
    # a token of Wan is a patch of 2 x 2 latents
    step = published.stride if published == PUPPET else 2 * published.stride
    frames = published.frames if frames is None else frames
    fps = published.fps if fps is None else fps
    height, width = size or (published.height, published.width)
    if min(height, width) < step or height % step or width % step:
        nearest = "x".join(str(max(step, round(x / step) * step)) for x in (height, width))
        raise ValueError(f"size {height}x{width} is no multiple of {step}; the nearest is {nearest}")
    if not 1 <= fps <= 240:
        raise ValueError(f"{fps} frames a second, expected 1 to 240")
    return Geometry(fps, frames, height, width, published.stride)


def _published(folder: Path) -> Geometry:
    path = folder / "vae" / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: expected a Wan in the Diffusers layout, with its vae/ there")
    try:
        return WAN[json.loads(path.read_text()).get("scale_factor_spatial", 8)]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}): fetch it again") from error
    except KeyError as error:
        raise ValueError(f"{path}: its stride is {error}, a Wan's is one of {list(WAN)}") from error

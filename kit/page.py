"""Samples as an offline HTML page: video, a skeleton to turn, and what motion tokens attend to."""

import base64
import functools
import io
import json
import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from kit.body import JOINT_NAMES, PARENTS, SIDES
from kit.files import whole_file

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN = 12  # samples at most
LOSSLESS = 128  # pixels: at the best quality, videos of at most this height are embedded as they are
BEST = 70  # quality of WebP
RUNGS = ((256, BEST), (256, 50), (192, 50), (128, 40), (96, 30))  # height and quality of videos
LIMIT = 2_000_000  # bytes of the page


class PageSample(NamedTuple):
    """One sample as the page shows it."""

    name: str
    task: str  # in words, such as "motion to video"
    prompt: str
    video: np.ndarray  # (f h w 3) uint8
    joints: np.ndarray | None  # (f 24 3) metres, y up; None without motion
    fps: float
    attention: Tensor | None  # (layers f T), each latent's share of a frame's attention to video


def write_page(path: Path, samples: list[PageSample], total: int) -> None:
    """Write one HTML file below 2 MB that shows these samples and says how many there are in all.

    A video becomes one WebP image with all its frames, shrunk and compressed as far as the limit requires; if
    there is room, videos of up to 128 pixels are lossless. If that is not enough, the last samples are left
    out.
    """
    template, head = TEMPLATE.read_text(encoding="utf-8"), JOINT_NAMES.index("head")
    page = {"total": total, "parents": PARENTS, "sides": SIDES, "head": head}
    drawn = functools.cache(lambda i, rung: described(samples[i], *rung))
    for shown, rung in product(range(len(samples), 0, -1), RUNGS):
        page["samples"] = [drawn(i, rung) for i in range(shown)]
        data = json.dumps(page, separators=(",", ":")).replace("<", "\\u003c")  # a prompt may hold </script>
        html = template.replace("{{page}}", data)
        if len(html) < LIMIT:
            break
    with whole_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def described(sample: PageSample, height: int, quality: int) -> dict:
    """What the page's script reads: joints in millimetres, attention in thousandths."""
    return sample._asdict() | {
        "frames": len(sample.video),
        "video": sheet(sample.video, height, quality),
        "joints": thousandths(sample.joints),
        "attention": thousandths(sample.attention),
    }


def thousandths(x: np.ndarray | Tensor | None) -> list | None:
    """Rounded to thousandths and counted in them: short in JSON."""
    return None if x is None else np.rint(1000 * np.asarray(x)).astype(int).tolist()


def sheet(video: np.ndarray, height: int, quality: int) -> dict:
    """All frames in one image, row by row."""
    f, h, w = video.shape[:3]
    lossless = h <= LOSSLESS and quality == BEST
    if not lossless and h > height:
        w, h = max(1, round(w * height / h)), height
    columns = math.ceil(math.sqrt(f * h / w))  # about as wide as high: a browser limits both
    picture = Image.new("RGB", (columns * w, math.ceil(f / columns) * h))
    for i, frame in enumerate(video):
        tile = Image.fromarray(frame).resize((w, h), Image.Resampling.LANCZOS)
        picture.paste(tile, (i % columns * w, i // columns * h))
    data = io.BytesIO()
    picture.save(data, "WEBP", lossless=lossless, quality=20 if lossless else quality, method=2)
    uri = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"sheet": uri, "width": w, "height": h, "columns": columns}

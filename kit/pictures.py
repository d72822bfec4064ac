"""What people look at: videos, skeletons and contact sheets -> MP4, GIF, PNG.

Frames are (f h w 3) uint8 tensors; the network's video is (3 f h w) in [-1, 1]. Every picture has an opaque
light background, so that it looks the same on light and dark pages; the same input gives the same bytes.
"""

import textwrap
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.codec.context import Flags
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from kit.body import PARENTS, SIDES
from kit.files import whole_file

PAPER, INK, FAINT = (250, 250, 248), (45, 45, 50), (225, 225, 222)
SIDE_COLOURS = {"left": (31, 119, 180), "right": (214, 88, 39), "middle": (95, 95, 105)}
SUPERSAMPLING = 4
# found without importing matplotlib, which takes half a second
FACE = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
TILE_HEIGHT, COLUMNS = 160, 6  # of a contact sheet: pixels of a frame, frames in a row
X264 = {"crf": "12", "tune": "zerolatency", "x264-params": "sliced-threads=0"}
BT709 = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
# a camera: points (... 3), metres -> pixels (... 2) as (column, row), and depth from the camera (...)
Project = Callable[[Tensor], tuple[Tensor, Tensor]]

# ---------------------------------------------------------------- frames and files


def to_frames(video: Tensor) -> Tensor:
    """Video (3 f h w), clipped to [-1, 1] -> frames (f h w 3) uint8. ValueError for NaN."""
    if not video.isfinite().all():
        raise ValueError("video holds NaN or infinity; the weights or the sampler diverged")
    levels = ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(levels, "c f h w -> f h w c").cpu()


def from_frames(frames: Tensor) -> Tensor:
    """Frames (f h w 3) uint8 -> video (3 f h w) float32 in [-1, 1]; the inverse of `to_frames`."""
    return rearrange(frames, "f h w c -> c f h w").float() / 127.5 - 1


def write_video(path: str | Path, frames: Tensor, fps: float) -> None:
    """Write frames (f h w 3) uint8 as .mp4 (h264: even sizes only) or as a looping .gif.

    A GIF counts time in hundredths of a second and joins equal neighbouring frames into one longer one.
    """
    write = _write_gif if Path(path).suffix == ".gif" else _write_mp4
    with whole_file(path) as temporary:
        write(temporary, frames.cpu().numpy(), fps)


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    rate = Fraction(fps).limit_denominator(1001)  # 29.97 is 30000/1001
    options = {"movflags": "faststart", "fflags": "bitexact"}  # bitexact: no dates and versions in the file
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options=X264)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # the number of threads changes the bytes
        context.flags |= Flags.bitexact
        # without these tags players guess BT.601 or BT.709 from the size
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(rgb.reformat(format="yuv420p", **BT709)))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    count, height, width = frames.shape[:3]
    # one palette for all frames: with several the picture flickers
    stack = rearrange(frames, "f h w c -> (f h) w c")
    # a palette of every ninth pixel looks the same and takes a quarter of the time
    palette = Image.fromarray(np.ascontiguousarray(stack[::3, ::3])).quantize(256)
    stack = Image.fromarray(stack).quantize(palette=palette, dither=Image.Dither.NONE)
    images = [stack.crop((0, f * height, width, (f + 1) * height)) for f in range(count)]
    duration = max(20, round(1000 / fps))  # milliseconds; viewers play shorter ones at a tenth of a second
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


# ---------------------------------------------------------------- motion


def draw_skeleton(
    joints: Tensor, project: Project, size: int, image_size: int = 64, background: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Joints (f 24 3) in metres -> frames (f size w 3) uint8: bones and joints, the nearest drawn last.

    `project` is the camera; its pixels are those of an image of `image_size` and are scaled to `size`. Left
    is blue, right orange, spine and head grey. `background` (f size w 3) uint8 replaces the plain square.
    """
    if background is None:
        background = torch.tensor(PAPER, dtype=torch.uint8).expand(len(joints), size, size, 3)
    pixels, depth = project(joints)
    pixels = (pixels * (size * SUPERSAMPLING / image_size)).tolist()
    poses = zip(pixels, depth.tolist(), background.cpu().numpy(), strict=True)
    return torch.from_numpy(np.stack([_draw_pose(*pose) for pose in poses]))


def _draw_pose(pixels: list, depth: list[float], background: np.ndarray) -> np.ndarray:
    """One frame of `draw_skeleton`, drawn large and shrunk: pillow's own lines have hard edges."""
    picture = ImageOps.scale(Image.fromarray(background), SUPERSAMPLING, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    bone = max(1, max(picture.size) // 60)
    strokes = []  # (depth, joint, parent), a joint alone is a dot
    for joint, parent in enumerate(PARENTS):
        strokes.append((depth[joint] - 1e-3, joint, None))  # at equal depth a joint lies on its bones
        if parent >= 0:
            strokes.append(((depth[joint] + depth[parent]) / 2, joint, parent))
    for _, joint, parent in sorted(strokes, key=lambda stroke: -stroke[0]):
        if depth[joint] <= 0 or (parent is not None and depth[parent] <= 0):  # behind the camera
            continue
        colour = SIDE_COLOURS[SIDES[joint]]
        x, y = pixels[joint]
        if parent is None:
            draw.circle((x, y), 0.75 * bone, fill=colour)
        else:
            draw.line((*pixels[parent], x, y), fill=PAPER, width=bone + 2 * SUPERSAMPLING)  # a light edge
            draw.line((*pixels[parent], x, y), fill=colour, width=bone)
    return np.asarray(picture.reduce(SUPERSAMPLING))


def fitted(joints: Tensor) -> Project:
    """A view along -z, without perspective, that fits joints (f 24 3) into an image of 64 pixels."""
    low, high = joints.amin(dim=(0, 1)), joints.amax(dim=(0, 1))
    scale = 56 / (high - low)[:2].max().clamp_min(1e-3)  # pixels a metre, a margin of 4 on each side
    nearest = high[2] + 1.0

    def project(points: Tensor) -> tuple[Tensor, Tensor]:
        offset = (points[..., :2] - (low + high)[:2] / 2) * scale
        return 32 + offset * offset.new_tensor((1.0, -1.0)), nearest - points[..., 2]

    return project


def resized(frames: Tensor, height: int) -> Tensor:
    """Frames (f h w 3) uint8 -> (f height any 3) uint8, of the same proportions."""
    size = (height, max(1, round(frames.shape[2] * height / frames.shape[1])))
    pixels = rearrange(frames, "f h w c -> f c h w").float()
    pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=height < frames.shape[1])
    return rearrange(pixels.round().clamp(0, 255).to(torch.uint8), "f c h w -> f h w c")


def side_by_side(video: Tensor, skeleton: Tensor) -> Tensor:
    """Video (f h w 3), at the skeleton's height, left of skeleton (f height any 3); all frames uint8."""
    height = skeleton.shape[1]
    gap = torch.tensor(FAINT, dtype=torch.uint8).expand(len(video), height, 4, 3)
    return torch.cat([resized(video, height), gap, skeleton], dim=2)


# ---------------------------------------------------------------- contact sheets


def contact_sheet(path: str | Path, rows: Sequence[Tensor], titles: Sequence[str]) -> None:
    """Write a .png: for each row (f h w 3) its title, then six of its frames, evenly spaced and numbered.

    Titles are one per row, such as the prompt; a long one is broken into lines.
    """
    large, small = ImageFont.truetype(FACE, 16), ImageFont.truetype(FACE, 12)
    margin, strip, line = 8, 18, 22  # pixels: between tiles, under a tile, of one line of title
    tile = max(round(TILE_HEIGHT * row.shape[2] / row.shape[1]) for row in rows)
    width = margin + COLUMNS * (tile + margin)
    room = width - 2 * margin
    titles = [" ".join(title.split()) for title in titles]  # a prompt may have line breaks
    letters = [int(len(title) * room / (large.getlength(title) + 1)) for title in titles]  # of a line
    blocks = [textwrap.wrap(title, max(1, n)) for title, n in zip(titles, letters, strict=True)]
    height = margin + sum(line * len(block) + TILE_HEIGHT + strip + margin for block in blocks)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = margin
    for row, block in zip(rows, blocks, strict=True):
        for text in block:
            draw.text((margin, y), text, fill=INK, font=large)
            y += line
        for column, frame in enumerate(torch.linspace(0, len(row) - 1, COLUMNS).round().long().tolist()):
            x = margin + column * (tile + margin)
            image = Image.fromarray(row[frame].cpu().numpy())
            size = (round(TILE_HEIGHT * image.width / image.height), TILE_HEIGHT)
            sheet.paste(image.resize(size, Image.Resampling.BICUBIC), (x, y))
            draw.text((x, y + TILE_HEIGHT + 2), f"frame {frame}", fill=SIDE_COLOURS["middle"], font=small)
        y += TILE_HEIGHT + strip + margin
    with whole_file(path) as temporary:
        sheet.save(temporary)

"""A pose read back from the puppet's videos, by the colours of its limbs; all in pixels.

Left limbs are blue, right ones orange, dark above elbow and knee and light below: eight segments in four
colours. A piece is a connected region of one colour. A dark piece belongs to the arm or the leg by whether it
is nearer to the shoulders or the hips, a light one by whether it is nearer to the upper arm or the foot.
Nothing here assumes how a body moves, so videos in which it moves wrongly can be judged.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from kit.puppet.drawing import BACKGROUND, BODY_COLOURS, SHIRTS

POINTS = tuple(f"{side}_{part}" for side in ("left", "right") for part in ("elbow", "hand", "knee", "ankle"))
SEGMENTS = tuple(
    f"{side}_{part}" for side in ("left", "right") for part in ("upper_arm", "forearm", "thigh", "shin")
)
CHUNK = 8  # clips at a time, to save memory
KEPT = 3  # largest pieces of a colour in a frame
SMALLEST = 6  # pixels of a piece; fewer are edges
NEAR = 0.35  # largest distance from a colour, of channels in [0, 1], at which a pixel has it
REACH = 8  # pixels from a piece of shin to its foot or thigh; a shin is some 12 long
FAR = 1e4  # pixels: of what is not there
PALETTE = {f"shirt {name}": colour for name, colour in SHIRTS.items()} | {"ground": BACKGROUND} | BODY_COLOURS
INDEX = {name: k for k, name in enumerate(PALETTE)}


class Pose(NamedTuple):
    """What b clips of f frames show."""

    points: Tensor  # (b f 8 2) POINTS as (column, row)
    seen: Tensor  # (b f 8) bool: whether the point was found
    bend: Tensor  # (b f 4) angle of elbow and knee, left then right, in the picture, radians; NaN if unseen
    pieces: Tensor  # (b f 8) number of pieces of each of SEGMENTS: 1 is right, 0 missing, 2 or 3 torn


class Pieces(NamedTuple):
    """The largest connected pieces of each colour: n frames, c colours, k pieces."""

    area: Tensor  # (n c k), 0 where there is none
    ends: Tensor  # (n c k 2 2) both ends of its axis, as (column, row)


# ---------------------------------------------------------------- pixels


def colours_of(video: Tensor) -> Tensor:
    """Video (b 3 f h w) in [-1, 1] -> (b f h w) index into PALETTE, -1 where no colour is near."""
    palette = video.new_tensor(list(PALETTE.values()))
    distance = torch.cdist(rearrange((video + 1) / 2, "b c f h w -> b (f h w) c"), palette)
    nearest, index = distance.min(dim=-1)
    index = torch.where(nearest < NEAR, index, -1)
    return rearrange(index, "b (f h w) -> b f h w", f=video.shape[2], h=video.shape[3])


def connected(mask: Tensor) -> Tensor:
    """Masks (m h w) bool -> (m h w): each piece's pixels have its own number, other pixels 0."""
    size = mask.shape[-2] * mask.shape[-1]
    numbers = torch.arange(1.0, size + 1, device=mask.device).view(mask.shape[1:]) * mask
    while True:  # the largest number of a piece spreads through it, a pixel a round
        x = F.pad(numbers, (1, 1, 1, 1))
        x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
        spread = torch.maximum(torch.maximum(x[:, :-2], x[:, 1:-1]), x[:, 2:]) * mask
        if torch.equal(spread, numbers):
            return numbers.long()
        numbers = spread


def pieces_of(mask: Tensor) -> Pieces:
    """Masks (n c h w) bool -> the KEPT largest pieces of each."""
    n, _, height, width = mask.shape
    numbers = rearrange(connected(rearrange(mask, "n c h w -> (n c) h w")), "m h w -> m (h w)")
    area = torch.zeros(len(numbers), height * width + 1, device=mask.device)
    area.scatter_add_(1, numbers, (numbers > 0).float())
    largest, which = area.topk(KEPT, dim=1)
    belongs = (numbers[:, None] == which[..., None]) & (which[..., None] > 0)  # (m k hw)
    weight = belongs / belongs.sum(-1, keepdim=True).clamp_min(1)
    row, column = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    place = torch.stack((column.flatten(), row.flatten()), dim=-1).to(mask.device)  # (hw 2)
    centre = weight @ place
    offset = place - centre[:, :, None]  # (m k hw 2)
    spread = torch.einsum("mkp,mkpi,mkpj->mkij", weight, offset, offset)
    variance, axes = torch.linalg.eigh(spread)  # ascending
    along = torch.einsum("mkpi,mki->mkp", offset, axes[..., -1])
    # a limb is as long as its pixels reach, minus half its width at each end for the capsule's caps
    reach = [torch.where(belongs, sign * along, -FAR).amax(-1) for sign in (-1, 1)]
    half_width = 2 * variance[..., 0].clamp_min(0).sqrt()
    ends = [
        centre + (sign * (r - half_width).clamp_min(0))[..., None] * axes[..., -1]
        for sign, r in zip((-1, 1), reach, strict=True)
    ]
    area = torch.where(largest >= SMALLEST, largest, 0)
    ends = torch.where((area > 0)[..., None, None], torch.stack(ends, dim=2), FAR)
    return Pieces(*(rearrange(x, "(n c) k ... -> n c k ...", n=n) for x in (area, ends)))


def centre_of(mask: Tensor) -> Tensor:
    """Masks (n h w) bool -> their centres (n 2) as (column, row), FAR where there is nothing."""
    weight = mask.float()
    row = (weight.sum(2) * (torch.arange(mask.shape[1], device=mask.device) + 0.5)).sum(1)
    column = (weight.sum(1) * (torch.arange(mask.shape[2], device=mask.device) + 0.5)).sum(1)
    total = weight.sum((1, 2))[:, None]
    return torch.where(total >= SMALLEST, torch.stack((column, row), 1) / total.clamp_min(1), FAR)


# ---------------------------------------------------------------- limbs


def nearest_ends(a: Tensor, b: Tensor) -> Tensor:
    """Ends (n k 2 2) of pieces, and (n 2 2) of another or (n 1 2) a point -> smallest distance (n k)."""
    return (a[:, :, :, None] - b[:, None, None]).norm(dim=-1).flatten(2).amin(-1)


def largest_of(pieces: Pieces, colour: int, mine: Tensor) -> Tensor:
    """Ends (n 2 2) of the largest of a colour's pieces that are `mine` (n k); FAR if there is none."""
    area = torch.where(mine, pieces.area[:, colour], 0)
    best = area.argmax(dim=1)
    ends = pieces.ends[torch.arange(len(best)), colour, best]
    return torch.where(area.amax(dim=1)[:, None, None] > 0, ends, FAR)


def joined(upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ends (n 2 2) of two segments of a limb -> their joint, the lower one's far end, the bend between them.

    Where either is not there, none of these is known: FAR, FAR, NaN.
    """
    distance = (upper[:, :, None] - lower[:, None]).norm(dim=-1).flatten(1)  # (n 4): upper end, lower end
    which = distance.argmin(dim=1)
    rows = torch.arange(len(which))
    near_upper, far_upper = upper[rows, which // 2], upper[rows, 1 - which // 2]
    # the joint is the end of the lower segment, which is mostly drawn in front
    joint, tip = lower[rows, which % 2], lower[rows, 1 - which % 2]
    (ux, uy), (lx, ly) = (near_upper - far_upper).unbind(-1), (tip - joint).unbind(-1)
    bend = torch.atan2(ux * ly - uy * lx, ux * lx + uy * ly)
    there = (upper[:, 0, :1] < FAR) & (lower[:, 0, :1] < FAR)
    return *(torch.where(there, x, FAR) for x in (joint, tip)), torch.where(there[:, 0], bend, torch.nan)


def read_pose(video: Tensor) -> Pose:
    """Video (b 3 f h w) in [-1, 1] -> Pose."""
    parts = zip(*(_read(part) for part in video.split(CHUNK)), strict=True)
    return Pose(*(torch.cat(part) for part in parts))


def _read(video: Tensor) -> Pose:
    index = colours_of(video)
    frames = index.shape[1]
    shirts = torch.stack([(index == INDEX[f"shirt {name}"]).sum((1, 2, 3)) for name in SHIRTS], dim=1)
    worn = repeat(shirts.argmax(dim=1), "b -> (b f) 1 1", f=frames)  # shirts are the palette's first
    index = rearrange(index, "b f h w -> (b f) h w")
    chest, hips = centre_of(index == worn), centre_of(index == INDEX["hips"])
    shoulders = chest + 0.5 * (chest - hips)
    colours = [f"{side} {part}" for side in ("left", "right") for part in ("upper", "lower", "foot")]
    pieces = pieces_of(torch.stack([index == INDEX[name] for name in colours], dim=1))
    points, bends, counts, rows = [], [], [], torch.arange(len(index))
    there = pieces.area > 0
    for upper in (0, 3):  # left, right
        lower = upper + 1
        foot = largest_of(pieces, upper + 2, there[:, upper + 2])
        to_shoulder, to_hips = (nearest_ends(pieces.ends[:, upper], p[:, None]) for p in (shoulders, hips))
        arm = there[:, upper] & (to_shoulder < to_hips)
        leg = there[:, upper] & ~arm
        upper_arm, thigh = (largest_of(pieces, upper, mine) for mine in (arm, leg))
        to_arm = nearest_ends(pieces.ends[:, lower], upper_arm)
        to_leg, to_thigh = (nearest_ends(pieces.ends[:, lower], x) for x in (foot, thigh))
        to_leg = torch.where(foot[:, 0, :1] < FAR, to_leg, to_thigh)
        below_leg = there[:, lower] & (to_leg < to_arm) & (to_leg < REACH)
        below_arm = there[:, lower] & ~below_leg
        forearm, shin = (largest_of(pieces, lower, mine) for mine in (below_arm, below_leg))
        for joint, tip, bend in (joined(upper_arm, forearm), joined(thigh, shin)):
            points += [joint, tip]
            bends.append(bend)
        # the foot covers the end of the shin, so it shows better where the ankle is
        heel = foot[rows, (foot - points[-1][:, None]).norm(dim=-1).argmin(dim=1)]
        points[-1] = torch.where((heel < FAR) & (points[-1] < FAR), heel, points[-1])
        counts += [mine.sum(dim=1) for mine in (arm, below_arm, leg, below_leg)]
    points, bend, counts = (
        rearrange(torch.stack(x, dim=1), "(b f) ... -> b f ...", f=frames) for x in (points, bends, counts)
    )
    return Pose(points, points[..., 0] < FAR, bend, counts)


# ---------------------------------------------------------------- what a pose says of a video


def anatomy(pose: Pose, bends: Tensor) -> dict[str, Tensor]:
    """How intact the body in each video is, (b,) each; `bends` (n 4): real ones, in the order of Pose.bend.

    limbs_whole: share of segments that are in one piece; limbs_missing: in none. length_variation: deviation
    over mean of a forearm's or shin's length within a clip (not 0 for real clips: they are foreshortened).
    odd_bends: share of elbows and knees bent as only one in a hundred real ones is. Where there is nothing to
    measure, these two are 1. plausible_postures: share of frames in which a bend is seen and none is odd.
    """
    low, high = torch.nanquantile(bends, 0.005, dim=0), torch.nanquantile(bends, 0.995, dim=0)
    odd, bent = (pose.bend < low) | (pose.bend > high), pose.bend.isfinite()  # (b f 4)
    length = (pose.points[:, :, 1::2] - pose.points[:, :, ::2]).norm(dim=-1)  # (b f 4)
    length = torch.where(pose.seen[:, :, 1::2], length, torch.nan)
    mean = length.nanmean(dim=1, keepdim=True)
    degrees = length.isfinite().sum(dim=1) - 1  # of freedom: a limb that is seen once gives 0/0, NaN
    variation = ((length - mean).square().nansum(dim=1) / degrees).sqrt() / mean[:, 0]
    return {
        "limbs_whole": (pose.pieces == 1).float().mean(dim=(1, 2)),
        "limbs_missing": (pose.pieces == 0).float().mean(dim=(1, 2)),
        "length_variation": variation.nanmean(dim=1).nan_to_num(1.0),
        "odd_bends": (odd.sum(dim=(1, 2)) / bent.sum(dim=(1, 2))).nan_to_num(1.0),
        "plausible_postures": (bent.any(-1) & ~odd.any(-1)).float().mean(dim=1),
    }

"""The puppet in pixels: a camera, and limbs drawn as capsules with soft edges; pixels, metres, y up.

The camera stands in front of the body and looks along -z.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from kit.body import JOINT_NAMES
from kit.devices import constant
from kit.puppet.skeleton import GIRTH

SIZE = 64
SHIRTS = {
    "red": (0.85, 0.22, 0.22),
    "green": (0.25, 0.65, 0.30),
    "yellow": (0.95, 0.85, 0.25),
    "purple": (0.55, 0.28, 0.70),
    "black": (0.27, 0.27, 0.30),
    "pink": (0.93, 0.40, 0.65),
}
CAMERA_HEIGHT = 1.0
CAMERA_DISTANCE = 4.5
FOCAL = 132.0  # pixels: 1.7 m at the origin spans 50
BACKGROUND = (0.85, 0.87, 0.91)
SOFT = 1.5  # width of an edge, pixels
# left limbs are blue, right ones orange; upper: above elbow and knee, lower: below; a shirt's is the clip's
BODY_COLOURS = {
    "hips": (0.46, 0.46, 0.52),
    "skin": (0.85, 0.60, 0.42),
    "hair": (0.42, 0.30, 0.24),
    "nose": (0.75, 0.15, 0.15),
    "left upper": (0.22, 0.36, 0.78),
    "left lower": (0.30, 0.62, 0.95),
    "left foot": (0.26, 0.32, 0.60),
    "right upper": (0.72, 0.36, 0.15),
    "right lower": (0.98, 0.62, 0.25),
    "right foot": (0.54, 0.30, 0.17),
}
# (from, to, radius in metres, colour)
CAPSULES = (
    ("spine1", "spine3", 0.135, "shirt"),
    ("left_collar", "right_collar", 0.115, "shirt"),
    ("left_hip", "right_hip", 0.110, "hips"),
    ("head", "crown", 0.120, "skin"),
    ("nape", "scalp", 0.108, "hair"),
    ("nose", "nose", 0.050, "nose"),
    ("left_shoulder", "left_elbow", 0.084, "left upper"),
    ("left_elbow", "left_hand", 0.080, "left lower"),
    ("right_shoulder", "right_elbow", 0.084, "right upper"),
    ("right_elbow", "right_hand", 0.080, "right lower"),
    ("left_hip", "left_knee", 0.100, "left upper"),
    ("left_knee", "left_ankle", 0.082, "left lower"),
    ("right_hip", "right_knee", 0.100, "right upper"),
    ("right_knee", "right_ankle", 0.082, "right lower"),
    ("left_ankle", "left_toe", 0.065, "left foot"),
    ("right_ankle", "right_toe", 0.065, "right foot"),
)
EXTRA_POINTS = ("crown", "nape", "scalp", "nose", "left_toe", "right_toe")
POINT = {name: index for index, name in enumerate(JOINT_NAMES + EXTRA_POINTS)}
TAILS, TIPS = (tuple(POINT[c[end]] for c in CAPSULES) for end in (0, 1))
RADII = tuple(c[2] for c in CAPSULES)
# by shirt, red, green, blue and coverage of each capsule, the background last: (shirts k+1 4)
LOOKS = tuple(
    (*((*(BODY_COLOURS | {"shirt": shirt})[c[3]], 1.0) for c in CAPSULES), (*BACKGROUND, 0.0))
    for shirt in SHIRTS.values()
)


def project(points: Tensor) -> tuple[Tensor, Tensor]:
    """World points (... 3), metres -> pixels (... 2) as (column, row), and depth from the camera (...)."""
    depth = CAMERA_DISTANCE - points[..., 2]
    centre, flipped = (constant(xy, points.device) for xy in ((0.0, CAMERA_HEIGHT), (1.0, -1.0)))
    offset = (points[..., :2] - centre) * FOCAL / rearrange(depth, "... -> ... 1")
    return SIZE / 2 + offset * flipped, depth


def _points(joints: Tensor) -> Tensor:
    """Joints (n 24 3) -> joints and EXTRA_POINTS (n 30 3); the head faces where the shoulders face."""
    neck, head = joints[:, POINT["neck"]], joints[:, POINT["head"]]
    lateral = joints[:, POINT["left_shoulder"]] - joints[:, POINT["right_shoulder"]]
    up = F.normalize(neck - joints[:, POINT["spine2"]], dim=-1)
    forward = F.normalize(torch.linalg.cross(lateral, up), dim=-1)
    crown, nape, nose = head + 0.08 * up, head + 0.05 * up - 0.05 * forward, head + 0.05 * up + 0.13 * forward
    scalp = crown + 0.04 * up - 0.05 * forward
    feet, ankles = (
        torch.stack([joints[:, POINT[f"{side}_{part}"]] for side in ("left", "right")], dim=1)
        for part in ("foot", "ankle")
    )
    toes = 1.5 * feet - 0.5 * ankles
    return torch.cat((joints, torch.stack((crown, nape, scalp, nose), dim=1), toes), dim=1)


@torch.no_grad()
def render(joints: Tensor, betas: Tensor, shirt: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the body: joints (b f 24 3), metres, betas (b 10), shirt (b,) index into SHIRTS
    -> video (b 3 f 64 64) in [-1, 1] and silhouette (b f 64 64) in [0, 1].

    A limb is a capsule with a soft edge; capsules are composed front to back by the depth of their middle.
    """
    batch, frames = joints.shape[:2]
    device = joints.device
    points = _points(rearrange(joints, "b f j xyz -> (b f) j xyz"))
    points[..., 2].clamp_(max=CAMERA_DISTANCE - 0.1)  # a bad sample of a model may be behind the camera
    pixels, depth = project(points)
    tails, tips = (constant(ends, device) for ends in (TAILS, TIPS))
    middle = (depth[:, tails] + depth[:, tips]) / 2
    girth = 1 + betas @ constant(GIRTH, device).type_as(betas)
    metres = rearrange(girth, "b -> b 1") * constant(RADII, device)
    radius = FOCAL * repeat(metres, "b k -> (b f) k", f=frames) / middle

    order = middle.argsort(dim=-1)
    tail, tip = (pixels[:, ends].gather(1, repeat(order, "n k -> n k xy", xy=2)) for ends in (tails, tips))
    radius = radius.gather(1, order)
    with_background = repeat(F.pad(order, (0, 1), value=len(CAPSULES)), "n k -> n k c", c=4)
    colour = repeat(constant(LOOKS, device)[shirt], "b k c -> (b f) k c", f=frames).gather(1, with_background)

    reach = rearrange(radius + SOFT, "n k -> n k 1")
    low = (torch.minimum(tail, tip) - reach).amin(1).floor().clamp(0, SIZE - 1).long()
    high = (torch.maximum(tail, tip) + reach).amax(1).ceil().clamp(1, SIZE).long()
    image = repeat(colour[:, -1], "n c -> n c h w", h=SIZE, w=SIZE).contiguous()
    on_cpu = device.type == "cpu"
    step = 8 if on_cpu else 1024  # frames drawn at once; on a CPU they should fit its cache
    rows = columns = slice(0, SIZE)
    for start in range(0, batch * frames, step):
        part = slice(start, start + step)
        if on_cpu:  # only where the body is; with a GPU the host would have to wait for low and high
            (left, top), (right, bottom) = low[part].amin(0).tolist(), high[part].amax(0).tolist()
            rows, columns = slice(top, bottom), slice(left, right)
        capsules = (tail[part], tip[part], radius[part], colour[part])
        image[part, :, rows, columns] = _draw(*capsules, rows, columns)
    image = rearrange(image, "(b f) c h w -> b c f h w", b=batch)
    return image[:, :3] * 2 - 1, image[:, 3]


def _draw(tail: Tensor, tip: Tensor, radius: Tensor, colour: Tensor, rows: slice, columns: slice) -> Tensor:
    """Capsules from front to back, (n k 2), (n k) pixels, and colours (n k+1 c), the background last
    -> the image of these rows and columns (n c h w)."""
    centres = torch.arange(SIZE, device=tail.device, dtype=tail.dtype) + 0.5
    bone = tip - tail
    length2 = bone.square().sum(-1).clamp(min=1e-6)
    sharpness = 1 / (2 * radius * SOFT)
    # the place along the bone, 0 at its tail and 1 at its tip, is a column's share plus a row's share; so is
    # the squared distance to its tail
    shares, squares = [], []
    for axis, span in enumerate((columns, rows)):
        offset = centres[span] - tail[..., axis, None]
        shares.append(offset * (bone[..., axis] / length2)[..., None])
        squares.append(offset.square() * sharpness[..., None])
    place = rearrange(shares[0], "n k w -> n k 1 w") + rearrange(shares[1], "n k h -> n k h 1")
    # distance² to the bone = distance² to its tail - length²·u·(2·place - u), u = place held to the bone
    inside = place.clamp(0, 1)
    gain = torch.sub(inside, place, alpha=2).mul_(inside)
    # (distance² - radius²) / (2·radius) is, near the edge, the distance from it, without a square root
    level = rearrange(radius / (2 * SOFT) - 0.5, "n k -> n k 1")
    clear = rearrange(squares[0] - level, "n k w -> n k 1 w") + rearrange(squares[1], "n k h -> n k h 1")
    clear.addcmul_(gain, rearrange(length2 * sharpness, "n k -> n k 1 1")).clamp_(0, 1)
    through = rearrange(clear.cumprod(dim=1), "n k h w -> n k (h w)")
    # what passes the first k capsules shows the colour of the next one instead of the k-th
    change = rearrange(colour[:, 1:] - colour[:, :-1], "n k c -> n c k")
    image = rearrange(colour[:, 0], "n c -> n c 1") + change @ through
    return rearrange(image, "n c (h w) -> n c h w", h=place.shape[2])


def silhouette(video: Tensor) -> Tensor:
    """Video (b 3 f h w) in [-1, 1] -> (b f h w) bool: where it differs clearly from the background."""
    background = rearrange(constant(BACKGROUND, video.device) * 2 - 1, "c -> c 1 1 1")
    return (video - background).square().sum(dim=1) > 0.5

"""The embedded world: a small body that moves, its videos and captions, a tiny video codec and text encoder.

Everything is a pure function of a seed and needs no download: the body is procedural but runs through
smplx, so that a real SMPL file is a drop-in. 16 frames a second, 64x64 pixels, metres, y up; the camera
stands in front of the body and looks along -z.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

from kit.body import JOINT_NAMES
from kit.puppet_actions import STANCE, TABLE
from kit.puppet_body import body
from kit.puppet_render import (  # noqa: F401 (for callers)
    BACKGROUND,
    CAMERA_DISTANCE,
    CAMERA_HEIGHT,
    FOCAL,
    SHIRTS,
    SIZE,
    project,
    render,
    silhouette,
)
from motion_tokens import axis_angle_to_matrix, matrix_to_axis_angle

FPS = 16
FRAMES = 17
LATENT_CHANNELS = 48
TEXT_DIM = 64
TEXT_LEN = 16

ACTIONS = tuple(TABLE)
COLOURS = tuple(SHIRTS)
JOINT = {name: index for index, name in enumerate(JOINT_NAMES)}

# ---------------------------------------------------------------- motion


class Clips(NamedTuple):
    """b clips of f frames: SMPL parameters (radians, metres), their joints, and what they show."""

    caption: list[str]
    action: Tensor  # (b,) index into ACTIONS
    shirt: Tensor  # (b,) index into COLOURS
    global_orient: Tensor  # (b f 3)
    body_pose: Tensor  # (b f 23 3)
    betas: Tensor  # (b 10)
    transl: Tensor  # (b f 3)
    joints: Tensor  # (b f 24 3)


# height of a joint above the floor when the body rests on it
CLEARANCE = {
    "left_knee": 0.06, "right_knee": 0.06, "left_ankle": 0.07, "right_ankle": 0.07, "left_foot": 0.02,
    "right_foot": 0.02,
}  # fmt: skip
ROOT = 24  # the motion table's row of the root's translation
HEADING = math.radians(65)
PACE = 0.9  # by how much of itself it may change; from 1 on, motions would run backwards


@functools.cache
def _motion_table(device: str | torch.device) -> Tensor:
    """(actions, 25, 3, 5): per joint and axis (bias, amp1, phase1, amp2, phase2), radians; row 24 metres."""
    table = torch.zeros(len(ACTIONS), 25, 3, 5)
    for row, track in zip(table, TABLE.values(), strict=True):
        for channel, numbers in (STANCE | track).items():
            joint, axis = channel.split(".")
            unit = 1.0 if joint == "root" else math.pi / 180
            scale = torch.tensor((unit, unit, 1.0, unit, 1.0))
            padded = torch.tensor(numbers + (0,) * (5 - len(numbers)))
            row[ROOT if joint == "root" else JOINT[joint], "xyz".index(axis)] = padded * scale
    return table.to(device)


def _euler_to_matrix(angles: Tensor) -> Tensor:
    """(... 3) radians -> Rx·Ry·Rz (... 3 3)."""
    # row k of the diagonal matrix is the axis-angle of the turn about axis k
    x, y, z = axis_angle_to_matrix(torch.diag_embed(angles)).unbind(-3)
    return x @ y @ z


def clips(seeds: Sequence[int], frames: int = FRAMES, device: str | torch.device = "cpu") -> Clips:
    """One clip per seed, each a pure function of its own seed; fewer than 17 frames are a window of it."""
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames must be 4n+1, got {frames}; the nearest is {nearest_frames(frames)}")
    draws = [torch.rand(22, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    pick, colour, phase, speed, strength, turn, x, z, window, *more = torch.stack(draws, dim=1).to(device)
    shape, pace = more[:10], more[10:]
    action, shirt = (pick * len(ACTIONS)).long(), (colour * len(COLOURS)).long()
    betas = (math.sqrt(2) * torch.erfinv(2 * torch.stack(shape, dim=1) - 1)).clamp(-2, 2)

    start = (window * (max(FRAMES - frames, 0) + 1)).floor()
    frame = rearrange(start, "b -> b 1") + torch.arange(frames, device=device)
    cycles = phase[:, None] + (1 + 0.6 * speed)[:, None] * _own_time(frame / FRAMES, *pace)
    pose, path = _move(action, cycles, amplitude=0.9 + 0.3 * strength)

    zero = torch.zeros_like(turn)
    facing = axis_angle_to_matrix(torch.stack((zero, HEADING * (2 * turn - 1), zero), dim=-1))
    global_orient = matrix_to_axis_angle(rearrange(facing, "b i k -> b 1 i k") @ pose[:, :, 0])
    body_pose = matrix_to_axis_angle(pose[:, :, 1:])
    lift = path[..., 1]
    place = torch.stack((0.35 * (2 * x - 1), zero, 0.15 * (2 * z - 1)), dim=-1)
    level = path * path.new_tensor((1.0, 0.0, 1.0))
    transl = rearrange(place, "b i -> b 1 i") + einsum(facing, level, "b i k, b f k -> b f i")
    joints = body(device).joints(global_orient, body_pose, rearrange(betas, "b k -> b 1 k"), transl)
    # the lowest of knees, ankles and feet stands on the floor, unless the action lifts it
    clearance = joints.new_tensor(tuple(CLEARANCE.values()))
    sole = (joints[:, :, [JOINT[name] for name in CLEARANCE], 1] - clearance).amin(-1)
    up = F.pad(rearrange(lift - sole, "b f -> b f 1"), (1, 1))

    names = zip(shirt.tolist(), action.tolist(), strict=True)
    captions = [f"a person in a {COLOURS[worn]} shirt {ACTIONS[done]}" for worn, done in names]
    return Clips(
        caption=captions,
        action=action,
        shirt=shirt,
        global_orient=global_orient,
        body_pose=body_pose,
        betas=betas,
        transl=transl + up,
        joints=joints + rearrange(up, "b f i -> b f 1 i"),
    )


def _own_time(time: Tensor, swing: Tensor, rate: Tensor, onset: Tensor) -> Tensor:
    """Time (b f), in clips, for someone who is no clock: now ahead of it, now behind, never backwards.

    Where a frame follows from any other, nothing asks a network to look at the right one (README, Results).
    """
    swing, rate, onset = (x[:, None] for x in (swing, rate, onset))
    angular = 2 * math.pi * (1 + rate)  # one to two swings of the pace a clip
    return time + PACE * swing * torch.sin(angular * time + 2 * math.pi * onset) / angular


def _move(action: Tensor, cycles: Tensor, amplitude: Tensor) -> tuple[Tensor, Tensor]:
    """Actions (b,) at these cycles (b f) -> rotations (b f 24 3 3) and the root's path (b f 3), metres."""
    table = _motion_table(cycles.device)[action]
    bias, amp1, phase1, amp2, phase2 = rearrange(table, "b j xyz n -> n b 1 j xyz")
    cycles = rearrange(cycles, "b f -> b f 1 1")
    once, twice = (torch.sin(2 * math.pi * c) for c in (cycles + phase1, 2 * cycles + phase2))
    tracks = bias + rearrange(amplitude, "b -> b 1 1 1") * (amp1 * once + amp2 * twice)
    return _euler_to_matrix(tracks[:, :, :ROOT]), tracks[:, :, ROOT]


def nearest_frames(frames: int) -> int:
    """The nearest frame count of the form 4n+1."""
    return max(1, 4 * round((frames - 1) / 4) + 1)


# ---------------------------------------------------------------- codec


FIT_SEEDS = range(1 << 20, (1 << 20) + 512)
RIDGE = 1e-5  # of a latent's variance


class Codec:
    """A linear video codec with the geometry of Wan's VAE: 4x in time, 8x in space, first frame alone.

    A latent frame is the principal components of 4 frames of 8x8 pixels; decoding reads a latent and its
    eight neighbours, which removes the blocks' edges. The components are not whitened: one number scales
    them all to a mean variance of 1, so that weak ones stay weak.
    """

    def __init__(self, encode: Tensor, decode: Tensor, mean: Tensor, scale: Tensor):
        self.weight = encode  # (c, 768)
        self.kernel = decode  # (768, c, 3, 3)
        self.mean = mean  # (768,): the mean block
        self.scale = scale  # (): the root of the components' mean variance

    @classmethod
    def fit(cls, seeds: Sequence[int] = FIT_SEEDS, channels: int = LATENT_CHANNELS) -> "Codec":
        """Closed form, from the clips of these seeds: PCA, then ridge regression from latents to blocks."""
        shown = map(clips, torch.tensor(seeds).split(64))
        videos = [render(clip.joints, clip.betas, clip.shirt)[0] for clip in shown]
        total = sum(_blocks(video).shape[:-1].numel() for video in videos)
        mean = sum(reduce(_blocks(video), "b t h w p -> p", "sum") for video in videos) / total
        covariance = 0.0
        for video in videos:
            block = rearrange(_blocks(video) - mean, "b t h w p -> (b t h w) p")
            covariance = covariance + block.T @ block / total
        variances, components = torch.linalg.eigh(covariance.double())  # ascending
        encode = rearrange(components[:, -channels:].flip(1), "p c -> c p").float().contiguous()
        scale = variances[-channels:].mean().sqrt().float()

        codec = cls(encode, torch.zeros(len(mean), channels, 3, 3), mean, scale)
        gram, cross = 0.0, 0.0
        for video in videos:
            block = rearrange(_blocks(video) - mean, "b t h w p -> (b t h w) p")
            latents = rearrange(codec.encode(video), "b c t h w -> (b t) c h w")
            around = rearrange(F.unfold(latents, 3, padding=1), "n c hw -> (n hw) c")
            gram, cross = gram + around.T @ around / total, cross + around.T @ block / total
        solution = torch.linalg.solve((gram + RIDGE * torch.eye(len(gram))).double(), cross.double())
        codec.kernel = rearrange(solution.float(), "(c i j) p -> p c i j", i=3, j=3).contiguous()
        return codec

    def encode(self, video: Tensor) -> Tensor:
        """Video (b 3 f H W) in [-1, 1], f = 4n+1, H and W multiples of 8 -> latents (b c n+1 H/8 W/8)."""
        frames, height, width = video.shape[-3:]
        if frames % 4 != 1:
            raise ValueError(
                f"a video must have 4n+1 frames, got {frames}; the nearest is {nearest_frames(frames)}"
            )
        if height % 8 or width % 8:
            fits = f"{max(8, 8 * round(height / 8))}x{max(8, 8 * round(width / 8))}"
            raise ValueError(f"height and width must be multiples of 8, got {height}x{width}; nearest {fits}")
        self._follow(video)
        latents = (_blocks(video) - self.mean) @ self.weight.T / self.scale
        return rearrange(latents, "b t h w c -> b c t h w")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b c t h w) -> video (b 3 4(t-1)+1 8h 8w), clamped to [-1, 1]."""
        if latents.shape[1] != len(self.weight):
            raise ValueError(f"this codec's latents have {len(self.weight)} channels, got {latents.shape[1]}")
        self._follow(latents)
        flat = rearrange(latents, "b c t h w -> (b t) c h w")
        blocks = F.conv2d(flat, self.kernel, self.mean, padding=1).unflatten(0, (len(latents), -1))
        video = rearrange(blocks, "b t (c k p q) h w -> b c t k (h p) (w q)", k=4, p=8, q=8)
        first = reduce(video[:, :, 0], "b c k h w -> b c 1 h w", "mean")
        rest = rearrange(video[:, :, 1:], "b c t k h w -> b c (t k) h w")
        return torch.cat((first, rest), dim=2).clamp(-1, 1)

    def _follow(self, like: Tensor) -> None:
        """Move to where the data is."""
        for name in ("weight", "kernel", "mean", "scale"):
            setattr(self, name, getattr(self, name).to(like.device, like.dtype))

    def state(self) -> dict[str, Tensor]:
        """The codec as tensors, to travel with the weights."""
        return {"encode": self.weight, "decode": self.kernel, "mean": self.mean, "scale": self.scale}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Codec":
        missing = {"encode", "decode", "mean", "scale"} - state.keys()
        if missing:
            raise ValueError(
                f"no puppet codec in these weights: {sorted(missing)} missing. Weights of a real Wan need "
                "--wan FOLDER; the puppet's, written by train.py, have one"
            )
        return cls(**state)


def _blocks(video: Tensor) -> Tensor:
    """(b 3 f H W) -> (b t h w 768): blocks of 4 frames of 8x8 pixels; the first frame is held for four."""
    held = torch.cat((repeat(video[:, :, 0], "b c h w -> b c 4 h w"), video[:, :, 1:]), dim=2)
    return rearrange(held, "b c (t k) (h p) (w q) -> b t h w (c k p q)", k=4, p=8, q=8)


# ---------------------------------------------------------------- text


@functools.cache
def _code(key: str) -> Tensor:
    """A fixed random vector (64,) of unit variance for a word or a position."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def encode_text(captions: Sequence[str]) -> Tensor:
    """Captions -> (b 16 64): a fixed vector per word plus one per position, zeros after the last word.

    The empty caption is all zeros, the null text of guidance.
    """
    text = torch.zeros(len(captions), TEXT_LEN, TEXT_DIM)
    for row, caption in zip(text, captions, strict=True):
        words = caption.lower().replace(".", " ").replace(",", " ").split()
        if len(words) > TEXT_LEN:
            raise ValueError(f"a caption may have {TEXT_LEN} words, got {len(words)}: {caption!r}")
        for position, word in enumerate(words):
            row[position] = _code(word) + 0.5 * _code(f"position {position}")
    return text

"""Measures of motion, of video, and of both together, a value for each clip (4:1: kit/attention.py)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kit import puppet
from kit.data.batch import rng
from motion_tokens import axis_angle_to_matrix

OFFSETS = range(-4, 5)  # frames, for the synchrony of video and motion
FEATURES = 32  # dimensions of the joints' space in which distributions are compared
PARTS = 16  # parts that the jackknife leaves out in turn


def summary(values: Tensor) -> dict[str, float]:
    """Values (seeds clips) -> their mean and its standard errors, over clips and, if several, over seeds."""
    values = values.double()
    error = lambda x: (x.std() / len(x) ** 0.5).item() if len(x) > 1 else 0.0
    found = {"mean": values.mean().item(), "error": error(values.mean(0))}
    return found | ({"error_seeds": error(values.mean(1))} if len(values) > 1 else {})


def held_out(count: int, stream: str = "held out") -> puppet.Clips:
    """Clips from a stream of seeds that training never draws from."""
    seeds = [int(torch.randint(2**62, (1,), generator=rng(stream, i))) for i in range(count)]
    return puppet.clips(seeds)


# ---------------------------------------------------------------- measures of motion


def centred(joints: Tensor) -> Tensor:
    """Joints (... j 3) relative to the pelvis."""
    return joints - joints[..., :1, :]


def mpjpe(predicted: Tensor, real: Tensor) -> Tensor:
    """Mean distance of joints (b f j 3) after aligning the pelvis, per clip (b,), in millimetres."""
    return 1000 * (centred(predicted) - centred(real)).norm(dim=-1).mean(dim=(1, 2))


def pa_mpjpe(predicted: Tensor, real: Tensor) -> Tensor:
    """As mpjpe after the best similarity transform of each frame (Procrustes), per clip (b,), mm."""
    a, b = (x - x.mean(dim=-2, keepdim=True) for x in (predicted.double(), real.double()))
    u, s, vh = torch.linalg.svd(a.mT @ b)
    sign = torch.ones_like(s)
    sign[..., -1] = torch.linalg.det(u @ vh)  # a rotation, not a reflection
    rotation = (u * sign[..., None, :]) @ vh
    scale = (s * sign).sum(-1) / a.square().sum((-1, -2))
    return 1000 * (scale[..., None, None] * (a @ rotation) - b).norm(dim=-1).mean(dim=(1, 2)).float()


def facing_camera(joints: Tensor) -> Tensor:
    """Joints (b f j 3) about the pelvis, turned so that the hips of the mean pose lie along x."""
    joints = centred(joints)
    across = (joints[:, :, 1] - joints[:, :, 2]).mean(dim=1)  # right hip to left hip
    angle = torch.atan2(across[:, 2], across[:, 0])
    turn = axis_angle_to_matrix(angle[:, None] * torch.tensor((0.0, 1.0, 0.0)))
    return torch.einsum("bik,bfjk->bfji", turn, joints)


def nearest_action(joints: Tensor, bank: puppet.Clips) -> Tensor:
    """Action (b,) of the real clip whose joints are nearest over the whole clip, regardless of heading."""
    distance = torch.cdist(facing_camera(joints).flatten(1), facing_camera(bank.joints).flatten(1))
    return bank.action[distance.argmin(dim=1)]


def bone_variation(joints: Tensor, parents: Tensor) -> Tensor:
    """Standard deviation over mean of each bone's length within a clip, averaged: (b f j 3) -> (b,)."""
    bones = (joints[:, :, 1:] - joints[:, :, parents[1:]]).norm(dim=-1)  # (b f bone)
    return (bones.std(dim=1) / bones.mean(dim=1)).mean(dim=1)


def jerk(joints: Tensor) -> Tensor:
    """Mean size of the third difference of positions over frames: (b f j 3) -> (b,)."""
    return joints.diff(n=3, dim=1).norm(dim=-1).mean(dim=(1, 2))


def usual_poses(body_pose: Tensor, real: Tensor) -> Tensor:
    """Share (b,) of joints turned by at most the 99th percentile of their real angles; (b f j 3) radians."""
    usual = real.norm(dim=-1).flatten(0, 1).quantile(0.99, dim=0)
    return (body_pose.norm(dim=-1) <= usual).float().mean(dim=(1, 2))


def frechet(joints: Tensor, real: Tensor) -> Tensor:
    """Fréchet distance of two sets of motions (n f j 3), cm² a joint -> (parts,) jackknife pseudo-values.

    Normal distributions are fitted to the joints, facing the camera, in the largest FEATURES principal
    components of the real ones. The mean of the pseudo-values is the distance without the bias of few
    samples, their spread gives its error.
    """
    x, y = (100 * facing_camera(part).flatten(1).double() for part in (joints, real))  # cm
    middle, scale = y.mean(0), (y.shape[1] / 3) ** 0.5
    axes = torch.linalg.svd(y - middle, full_matrices=False).Vh[:FEATURES].mT / scale
    x, y = (x - middle) @ axes, (y - middle) @ axes
    parts = min(PARTS, len(x))
    part = torch.arange(len(x)) % parts
    whole = _frechet(x, y)
    return torch.stack([parts * whole - (parts - 1) * _frechet(x[part != i], y) for i in range(parts)])


def _frechet(x: Tensor, y: Tensor) -> Tensor:
    """|difference of means|² + tr(A + B - 2·(A^½ B A^½)^½) of features (n d) with covariances A and B."""
    a, b = (torch.cov(z.mT, correction=int(len(z) > 1)).view(x.shape[1], -1) for z in (x, y))
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    common = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * common


# ---------------------------------------------------------------- measures of video


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of silhouettes (b f h w) bool, per clip (b,)."""
    return (a & b).sum((1, 2, 3)) / (a | b).sum((1, 2, 3)).clamp_min(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of videos (b ...) in [-1, 1], per clip (b,), in dB."""
    return -10 * torch.log10(((a - b) / 2).square().flatten(1).mean(dim=1))


def iou_by_offset(video: Tensor, motion: Tensor) -> Tensor:
    """IoU of video frame f with motion frame f + k -> (b, offsets); silhouettes (b f h w) bool."""
    f = video.shape[1]
    overlaps = [(slice(max(0, -k), f - max(0, k)), slice(max(0, k), f + min(0, k))) for k in OFFSETS]
    return torch.stack([iou(video[:, ours], motion[:, theirs]) for ours, theirs in overlaps], dim=1)


def change(video: Tensor, n: int) -> Tensor:
    """Mean size of the n-th difference over frames, (b,): n = 1 measures movement, n = 3 flicker."""
    return video.diff(n=n, dim=2).abs().mean(dim=(1, 2, 3, 4))


def sharpness(video: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels, (b,): on the puppet, the proxy for aesthetics."""
    return sum(video.diff(dim=axis).abs().mean(dim=(1, 2, 3, 4)) for axis in (-1, -2))


def outlines(shape: Tensor) -> Tensor:
    """Silhouettes (b f h w) bool -> (b n), at half the size, each clip centred horizontally."""
    columns = shape.float().sum(dim=(1, 2))  # (b w)
    middle = (columns * torch.arange(columns.shape[1])).sum(1) / columns.sum(1).clamp_min(1)
    shifts = (shape.shape[-1] // 2 - middle.round()).int().tolist()
    rolled = torch.stack([clip.roll(shift, -1) for clip, shift in zip(shape, shifts, strict=True)])
    return rearrange(F.avg_pool2d(rolled.float(), 2), "b f h w -> b (f h w)")

"""The measures of study/evaluate.py: of motion, of video, of both together (4:1 is kit/attention.py's)."""

import torch
from torch import Tensor

from kit import puppet
from kit.data.batch import rng
from motion_tokens import axis_angle_to_matrix, decode_smpl

OFFSETS = range(-4, 5)  # frames, for the synchrony of video and motion


def held_out(count: int, stream: str = "held out", frames: int = puppet.FRAMES) -> puppet.Clips:
    """Clips from a stream of seeds that training never draws from."""
    seeds = [int(torch.randint(2**62, (1,), generator=rng(stream, i))) for i in range(count)]
    return puppet.clips(seeds, frames)


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
    turn = axis_angle_to_matrix(
        torch.stack((torch.zeros_like(angle), angle, torch.zeros_like(angle)), dim=-1)
    )
    return torch.einsum("bik,bfjk->bfji", turn, joints)


def nearest_action(joints: Tensor, bank: puppet.Clips) -> Tensor:
    """Action (b,) of the real clip whose joints are nearest over the whole clip, heading aside."""
    distance = torch.cdist(facing_camera(joints).flatten(1), facing_camera(bank.joints).flatten(1))
    return bank.action[distance.argmin(dim=1)]


def bone_variation(joints: Tensor, parents: Tensor) -> float:
    """Standard deviation over mean of each bone's length within a clip, averaged."""
    bones = (joints[:, :, 1:] - joints[:, :, parents[1:]]).norm(dim=-1)  # (b f bone)
    return (bones.std(dim=1) / bones.mean(dim=1)).mean().item()


def jerk(joints: Tensor) -> float:
    """Mean size of the third difference of positions over frames."""
    return joints.diff(n=3, dim=1).norm(dim=-1).mean().item()


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


def peak_rate(by_offset: Tensor) -> float:
    """Share of clips whose IoU is highest at offset 0."""
    return (by_offset.argmax(dim=1) == OFFSETS.index(0)).float().mean().item()


def silhouettes_of_motion(motion: Tensor, shirt: Tensor) -> Tensor:
    """What the motion's joints and shape look like, rendered: (b f 235) -> (b f h w) bool."""
    smpl = decode_smpl(motion)
    return puppet.silhouette(puppet.render(smpl["joints"], smpl["betas"], shirt)[0])

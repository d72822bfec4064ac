"""The measures of study/evaluate.py: of motion, of video, of both together, and of the 4:1 alignment."""

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

import flow
from dual_dit import DualDiT
from flow import Task
from kit import puppet
from kit.data.batch import rng
from motion_tokens import GROUPS, axis_angle_to_matrix, decode_smpl
from rope import FRAMES_PER_LATENT, TOKENS_PER_FRAME

OFFSETS = range(-4, 5)  # frames, for the synchrony of video and motion
ATTENTION_TIME = 0.5  # noise level of the motion whose attention is measured


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


# ---------------------------------------------------------------- the 4:1 alignment


def own_latent(f: int) -> Tensor:
    """The latent frame that holds each motion frame (f,): ⌈f/4⌉, the codec being causal."""
    return torch.arange(f).add(FRAMES_PER_LATENT - 1).div(FRAMES_PER_LATENT, rounding_mode="floor")


@torch.no_grad()
def attention_mass(model: DualDiT, video: Tensor, motion: Tensor, text: Tensor, noise: Tensor) -> Tensor:
    """What motion tokens give of their attention to each latent, while motion is made -> (layers f i t).

    video (b c t h w) clean latents, motion (b f 235) normalised, noise like motion. Mean over heads and
    clips; a token's sum over t is below 1: the rest falls on motion.
    """
    t = motion.new_full(motion.shape[:1], ATTENTION_TIME)
    masses = []

    def record(block, streams):
        experts = zip((block.video, block.motion), streams, strict=True)
        (_, k_video, _), (q, k_motion, _) = (expert.before_attention(stream) for expert, stream in experts)
        logits = q @ torch.cat((k_video, k_motion), dim=2).mT / q.shape[-1] ** 0.5
        on_video = logits.softmax(-1)[..., : k_video.shape[2]]
        split = {"i": TOKENS_PER_FRAME, "t": video.shape[2]}
        on_frames = reduce(on_video, "b heads (f i) (t hw) -> b heads f i t", "sum", **split)
        masses.append(on_frames.mean(dim=(0, 1)))

    hooks = [block.register_forward_pre_hook(record) for block in model.blocks]
    try:
        model(video, flow.noised(motion, noise, t), None, t, text, Task.VIDEO_TO_MOTION)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(masses)


def attention_map(mass: Tensor) -> Tensor:
    """Of all that falls on video, where: (layers f i t) -> (layers f t), rows sum to 1.

    Tokens count by their mass: who hardly looks at the video hardly counts.
    """
    return F.normalize(mass.sum(dim=2), p=1, dim=-1)


def attention_share(maps: Tensor) -> Tensor:
    """Mass that frames put on the latent frame that holds them: (layers f t) -> (layers,)."""
    frames = torch.arange(maps.shape[1])
    return maps[:, frames, own_latent(maps.shape[1])].mean(dim=1)


def attention_share_by_group(mass: Tensor) -> dict[str, Tensor]:
    """attention_share of position, rotation and shape tokens: (layers f i t) -> (layers,) each."""
    groups = mass.split([tokens for tokens, _ in GROUPS.values()], dim=2)
    return {name: attention_share(attention_map(part)) for name, part in zip(GROUPS, groups, strict=True)}

"""Samples of a network for held-out puppet clips, and their measures, a value for each clip."""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from flow import Task
from kit import puppet
from kit.attention import motion_to_video, shared_out, video_to_motion
from kit.backbone import Backbone
from kit.data.datasets import puppet_motion
from motion_tokens import decode_smpl
from sample import denoise
from study import measures, pose

CHUNK = 16  # clips at a time; each chunk has a seed of its own
BANK_CLIPS = 1024  # real clips that stand for "the data": nearest neighbours, mean motion
READ_CLIPS = 128  # of the bank, whose elbows and knees tell which bends are usual
Columns = dict[str, Tensor]  # measures (b,), or as many values as stand for them


class Real(NamedTuple):
    """Real clips that everything is measured on, and others, the bank, that it is compared with."""

    clips: puppet.Clips
    motion: Tensor  # (b f 235)
    video: Tensor  # (b 3 f h w)
    bank: puppet.Clips
    outlines: Tensor  # (n ...) of the bank's silhouettes
    bends: Tensor  # (m 4) of the bank's elbows and knees


def held_out(count: int) -> Real:
    clips, bank = measures.held_out(count), measures.held_out(BANK_CLIPS, "bank")
    video = puppet.render(clips.joints, clips.betas, clips.shirt)[0]
    others = lambda part: puppet.render(bank.joints[part], bank.betas[part], bank.shirt[part])[0]
    # all of the bank's videos at once take much memory
    parts = [slice(start, start + READ_CLIPS) for start in range(0, BANK_CLIPS, READ_CLIPS)]
    outlines = torch.cat([measures.outlines(puppet.silhouette(others(part))) for part in parts])
    bends = pose.read_pose(others(parts[0])).bend.flatten(0, 1)
    return Real(clips, puppet_motion(clips), video, bank, outlines, bends)


# ---------------------------------------------------------------- made by a network, on its own device


def generate(
    backbone: Backbone, real: Real, task: Task, **sampling: float
) -> tuple[Tensor | None, Tensor | None]:
    """Samples for the clips' captions, from their video or motion if the task has a condition.

    -> video (n 3 f h w), motion (n f 235), None if absent; on the CPU.
    """
    model, codec, parts = backbone.transformer(), backbone.codec(), []
    device = model.motion_mean.device
    for part in tqdm(chunks(real), desc=task.name.lower(), leave=False):
        latents, motion = codec.encode(real.video[part].to(device)), real.motion[part].to(device)
        text = puppet.encode_text(real.clips.caption[part])
        inputs = {"latents": latents, "motion": motion, "grid": latents.shape[2:], "seed": part.start}
        inputs |= backbone.sampling() | sampling
        made, moved = denoise(model, task, text, puppet.encode_text([""]), **inputs)
        parts.append((None if made is None else codec.decode(made.float()).cpu(), moved))
    return tuple(None if x[0] is None else torch.cat(x).float().cpu() for x in zip(*parts, strict=True))


def chunks(real: Real) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, len(real.video), CHUNK)]


def through_codec(codec: puppet.Codec, real: Real) -> Tensor:
    """The clips' own video, encoded and decoded: what no network can exceed."""
    return codec.decode(codec.encode(real.video.to(codec.mean.device))).cpu()


def maps(backbone: Backbone, real: Real) -> tuple[Tensor, Tensor]:
    """Attention of motion to the video that it is made from (layers f T), and of video to the motion that
    it is made from (layers T f). Rows sum to 1."""
    model, codec = backbone.transformer(), backbone.codec()
    device, to_video, to_motion = model.motion_mean.device, 0.0, 0.0
    for part in chunks(real):
        motion = (real.motion[part].to(device) - model.motion_mean) / model.motion_std
        text = puppet.encode_text(real.clips.caption[part]).to(device)
        no_text = puppet.encode_text([""]).to(device).expand_as(text)
        inputs = model, codec.encode(real.video[part].to(device)), motion
        share = len(motion) / len(real.video)
        to_video += share * motion_to_video(*inputs, no_text, Task.VIDEO_TO_MOTION, seed=part.start).cpu()
        to_motion += share * video_to_motion(*inputs, text, Task.MOTION_TO_VIDEO, seed=part.start).cpu()
    return shared_out(to_video), shared_out(to_motion)


# ---------------------------------------------------------------- what the measures say


def of_real(x: Tensor, real: Tensor) -> Tensor:
    """A measure (b,) relative to that of the clips' real data (b,) -> (b,) whose mean is the ratio of means.

    Their spread gives the error of that ratio (delta method): what a clip shares with its real data cancels.
    """
    ratio = x.mean() / real.mean()
    return ratio + (x - ratio * real) / real.mean()


def of_video(video: Tensor, real: Real) -> Columns:
    """Measures of a video on its own, under the paper's names (docs/results.md)."""
    nearest = torch.cdist(measures.outlines(puppet.silhouette(video)), real.outlines).argmin(dim=1)
    return {
        **pose.anatomy(pose.read_pose(video), real.bends),
        "flicker": of_real(measures.change(video, 3), measures.change(real.video, 3)),
        "dynamic_degree": of_real(measures.change(video, 1), measures.change(real.video, 1)),
        "sharpness": of_real(measures.sharpness(video), measures.sharpness(real.video)),
        "prompt_following": (real.bank.action[nearest] == real.clips.action).float(),
    }


def of_motion(motion: Tensor, real: Real) -> Columns:
    """Measures of a motion (b f 235) on its own, made from text."""
    smpl, body = decode_smpl(motion), puppet.body()
    joints = smpl["joints"]
    posed = body.joints(smpl["global_orient"], smpl["body_pose"], smpl["betas"][:, None], smpl["transl"])
    return {
        "frechet_cm2": measures.frechet(joints, real.bank.joints),
        "usual_poses": measures.usual_poses(smpl["body_pose"], real.bank.body_pose),
        "right_action": (measures.nearest_action(joints, real.bank) == real.clips.action).float(),
        "jerk": of_real(measures.jerk(joints), measures.jerk(real.clips.joints)),
        "bone_variation": measures.bone_variation(joints, body.parents),
        "fk_error_mm": 1000 * (posed - joints).norm(dim=-1).mean(dim=(1, 2)),
    }


def of_pair(video: Tensor, motion: Tensor, real: Real) -> Columns:
    """How well a video and a motion fit each other."""
    smpl = decode_smpl(motion)
    shown = puppet.render(smpl["joints"], smpl["betas"], real.clips.shirt)[0]
    by_offset = measures.iou_by_offset(puppet.silhouette(video), puppet.silhouette(shown))
    middle = measures.OFFSETS.index(0)
    return {"iou": by_offset[:, middle], "in_step": (by_offset.argmax(dim=1) == middle).float()}


def of_both(video: Tensor, motion: Tensor, real: Real) -> Columns:
    """All that is measured of a video and a motion made together."""
    return of_pair(video, motion, real) | of_motion(motion, real) | of_video(video, real)


def of_pose(joints: Tensor, real: Real) -> Columns:
    """Errors of joints (b f j 3) against the clips' own."""
    found = joints, real.clips.joints
    return {"mpjpe_mm": measures.mpjpe(*found), "pa_mpjpe_mm": measures.pa_mpjpe(*found)}


def of_likeness(video: Tensor, real: Real) -> Columns:
    """How similar a video is to the clips' own."""
    shapes = puppet.silhouette(video), puppet.silhouette(real.video)
    return {"iou": measures.iou(*shapes), "psnr": measures.psnr(video, real.video)}


def mean_motion(real: Real) -> Tensor:
    """The bank's mean pose in every frame: a guess without the clip."""
    return measures.centred(real.bank.joints).mean(dim=(0, 1)).expand_as(real.clips.joints)

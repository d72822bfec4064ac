"""How good a network is on held-out puppet clips: what study/evaluate.py prints."""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dual_dit import DualDiT
from flow import Task
from kit import puppet
from kit.attention import frame_map, frame_share, frame_share_by_group, motion_to_video
from kit.data.datasets import puppet_motion
from motion_tokens import decode_smpl
from sample import denoise
from study.measures import (
    OFFSETS,
    bone_variation,
    centred,
    iou,
    iou_by_offset,
    jerk,
    mpjpe,
    nearest_action,
    pa_mpjpe,
    peak_rate,
    psnr,
    silhouettes_of_motion,
)

CHUNK = 16  # puppet clips at a time


class Scores(NamedTuple):
    """Of one network on some clips."""

    values: dict[str, float | list[float]]  # by plain name; baselines and ceilings among them
    attention: Tensor  # (layers f t) motion -> video
    video: Tensor  # (b 3 f h w) made together with motion, from text


def generate_all(
    model: DualDiT,
    codec: puppet.Codec,
    clips: puppet.Clips,
    task: Task,
    video: Tensor,
    motion: Tensor,
    bf16: bool,
    **sampling,
) -> tuple[Tensor, Tensor | None]:
    """Samples, some at a time, of these clips' captions, given their video or motion if the task is.

    -> video (n 3 f h w), motion (n f 235) or None.
    """
    latents, parts = codec.encode(video), []
    for start in tqdm(range(0, len(video), CHUNK), desc=task.name.lower()):
        part = slice(start, start + CHUNK)
        text, null_text = (
            puppet.encode_text(texts) for texts in (clips.caption[part], [""] * len(latents[part]))
        )
        given = {"latents": latents[part], "motion": motion[part], "grid": latents.shape[2:], "seed": start}
        made, moved = denoise(model, task, text, null_text, **given, bf16=bf16, **sampling)
        parts.append((codec.decode(made), moved))
    return tuple(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))


def attention_of_clips(
    model: DualDiT, codec: puppet.Codec, clips: puppet.Clips, video: Tensor, motion: Tensor
) -> Tensor:
    """motion_to_video, some clips at a time; video (b 3 f h w), motion (b f 235) not normalised."""
    given = codec.encode(video), (motion - model.motion_mean) / model.motion_std
    columns = (x.split(CHUNK) for x in (*given, puppet.encode_text(clips.caption)))
    masses = [
        motion_to_video(model, *part, Task.VIDEO_TO_MOTION, seed=i) * len(part[0])
        for i, part in enumerate(zip(*columns, strict=True))
    ]
    return torch.stack(masses).sum(0) / len(video)


def scores(
    model: DualDiT, codec: puppet.Codec, clips: puppet.Clips, bank: puppet.Clips, bf16: bool, **sampling
) -> Scores:
    """Sample all three tasks for these clips and measure; `bank` has other real clips, "the data"."""
    body, now = puppet.body(), OFFSETS.index(0)
    real_motion = puppet_motion(clips)
    real_video = puppet.render(clips.joints, clips.betas, clips.shirt)[0]
    given = (real_video, real_motion, bf16)
    _, v2m = generate_all(model, codec, clips, Task.VIDEO_TO_MOTION, *given, **sampling)
    m2v, _ = generate_all(model, codec, clips, Task.MOTION_TO_VIDEO, *given, **sampling)
    joint_video, joint_motion = generate_all(model, codec, clips, Task.JOINT, *given, **sampling)
    coded = codec.decode(codec.encode(real_video))
    real_shape, coded_shape, m2v_shape, joint_shape = (
        puppet.silhouette(x) for x in (real_video, coded, m2v, joint_video)
    )
    motion_shape = silhouettes_of_motion(joint_motion, clips.shirt)
    offsets, shuffled = (iou_by_offset(x, motion_shape) for x in (joint_shape, joint_shape.roll(1, 0)))
    v2m_joints = decode_smpl(v2m)["joints"]
    # phases and speeds differ: the mean motion is the mean pose, standing still
    mean_joints = centred(bank.joints).mean(dim=(0, 1)).expand_as(clips.joints)
    smpl = decode_smpl(joint_motion)
    joints = smpl["joints"]
    posed = body.joints(smpl["global_orient"], smpl["body_pose"], smpl["betas"][:, None], smpl["transl"])
    mass = attention_of_clips(model, codec, clips, real_video, real_motion)
    attention = frame_map(mass)

    def right(joints: Tensor) -> float:
        return (nearest_action(joints, bank) == clips.action).float().mean().item()

    values = {
        "v2m_mpjpe_mm": mpjpe(v2m_joints, clips.joints).mean().item(),
        "v2m_mean_baseline_mm": mpjpe(mean_joints, clips.joints).mean().item(),
        "v2m_pa_mpjpe_mm": pa_mpjpe(v2m_joints, clips.joints).mean().item(),
        "v2m_pa_mean_baseline_mm": pa_mpjpe(mean_joints, clips.joints).mean().item(),
        "m2v_iou": iou(m2v_shape, real_shape).mean().item(),
        "m2v_iou_shuffled": iou(m2v_shape, real_shape.roll(1, 0)).mean().item(),
        "codec_iou": iou(coded_shape, real_shape).mean().item(),
        "m2v_psnr": psnr(m2v, real_video).mean().item(),
        "m2v_psnr_shuffled": psnr(m2v, real_video.roll(1, 0)).mean().item(),
        "codec_psnr": psnr(coded, real_video).mean().item(),
        "joint_iou": offsets[:, now].mean().item(),
        "joint_iou_shuffled": shuffled[:, now].mean().item(),
        "joint_sync_peak_rate": peak_rate(offsets),
        "joint_sync_shuffled": peak_rate(shuffled),
        "codec_sync_peak_rate": peak_rate(iou_by_offset(coded_shape, real_shape)),
        "text_action_accuracy": right(joints),
        "text_chance": 1 / len(puppet.ACTIONS),
        "text_real": right(clips.joints),
        "bone_cv": bone_variation(joints, body.parents),
        "bone_cv_real": bone_variation(clips.joints, body.parents),
        "fk_error_mm": 1000 * (posed - joints).norm(dim=-1).mean().item(),
        "jerk_ratio": jerk(joints) / jerk(clips.joints),
        "attention_41_share": frame_share(attention).tolist(),
        "attention_chance": 1 / attention.shape[-1],
    }
    for group, share in frame_share_by_group(mass).items():
        values[f"attention_41_share_{group}"] = share.tolist()
    return Scores(values, attention, joint_video)

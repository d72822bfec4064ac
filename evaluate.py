"""The measures: how good are trained weights on puppet clips they have never seen?

    python evaluate.py [--weights FILE] [--clips 64] [--json FILE] [--attention FILE.png]

Each measure stands beside its baseline (what knowing nothing gives) and its ceiling (what the codec, or
real motion, gives).
"""

import argparse
import json
from pathlib import Path

import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

import flow
from dual_dit import DualDiT
from flow import Task
from kit import cli, data, parallel, puppet, render, weights
from kit.backbone import PUPPET_DEFAULTS
from kit.files import whole_file
from motion_tokens import axis_angle_to_matrix, decode_smpl
from rope import FRAMES_PER_LATENT, TOKENS_PER_FRAME
from sample import SHIPPED, denoise

BANK_CLIPS = 2048  # real clips that stand for "the data": mean motion, nearest neighbours
OFFSETS = range(-4, 5)  # frames, for the synchrony of video and motion
CHUNK = 16  # clips at a time
ATTENTION_TIME = 0.5  # noise level of the motion whose attention is measured


def held_out(count: int, stream: str = "held out") -> puppet.Clips:
    """Clips from a stream of seeds that training never draws from."""
    return puppet.clips(
        [int(torch.randint(2**62, (1,), generator=data.rng(stream, i))) for i in range(count)]
    )


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


# ---------------------------------------------------------------- the 4:1 alignment


def own_latent(f: int) -> Tensor:
    """The latent frame that holds each motion frame (f,): ⌈f/4⌉, the codec being causal."""
    return torch.arange(f).add(FRAMES_PER_LATENT - 1).div(FRAMES_PER_LATENT, rounding_mode="floor")


@torch.no_grad()
def attention_map(model: DualDiT, video: Tensor, motion: Tensor, text: Tensor, noise: Tensor) -> Tensor:
    """How motion attends to video while motion is made from it -> (layers f t), rows sum to 1.

    video (b c t h w) clean latents, motion (b f 235) normalised, noise like motion. Averaged over heads,
    tokens and clips; only the mass that falls on video counts.
    """
    t = motion.new_full(motion.shape[:1], ATTENTION_TIME)
    maps = []

    def record(block, streams):
        (q, _, _), (_, k, _) = (
            e.before_attention(s) for e, s in zip((block.motion, block.video), streams[::-1], strict=True)
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        mass = reduce(
            logits.softmax(-1), "b heads (f i) (t hw) -> f t", "sum", i=TOKENS_PER_FRAME, t=video.shape[2]
        )
        maps.append(mass / mass.sum(dim=1, keepdim=True))

    hooks = [block.register_forward_pre_hook(record) for block in model.blocks]
    try:
        model(video, flow.noised(motion, noise, t), torch.zeros_like(t), t, text, Task.VIDEO_TO_MOTION)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


def attention_share(maps: Tensor) -> Tensor:
    """Mass that frames put on the latent frame that holds them: (layers f t) -> (layers,)."""
    frames = torch.arange(maps.shape[1])
    return maps[:, frames, own_latent(maps.shape[1])].mean(dim=1)


# ---------------------------------------------------------------- all of it


def silhouettes_of_motion(motion: Tensor, shirt: Tensor) -> Tensor:
    """What the motion's joints and shape look like, rendered: (b f 235) -> (b f h w) bool."""
    smpl = decode_smpl(motion)
    return puppet.silhouette(puppet.render(smpl["joints"], smpl["betas"], shirt)[0])


def generate_all(
    model, codec, clips: puppet.Clips, task: Task, video: Tensor, motion: Tensor, bf16: bool, **sampling
) -> tuple[Tensor, Tensor]:
    """Samples conditioned on these clips, some at a time -> video (n 3 f h w), motion (n f 235)."""
    latents, parts = codec.encode(video), []
    for start in tqdm(range(0, len(video), CHUNK), desc=task.name.lower()):
        part = slice(start, start + CHUNK)
        text, null_text = (
            puppet.encode_text(texts) for texts in (clips.caption[part], [""] * len(latents[part]))
        )
        given = {"latents": latents[part], "motion": motion[part], "grid": latents.shape[2:], "seed": start}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            made, moved = denoise(model, task, text, null_text, **given, **sampling)
        parts.append((codec.decode(made), moved))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def measure(model: DualDiT, codec: puppet.Codec, count: int, **sampling) -> tuple[dict, list[tuple], Tensor]:
    """Every measure -> (plain keys, rows of the table, attention maps (layers f t))."""
    clips, bank, body = held_out(count), held_out(BANK_CLIPS, "bank"), puppet.body()
    real_motion = data.puppet_motion(clips)
    real_video = puppet.render(clips.joints, clips.betas, clips.shirt)[0]
    real_shape = puppet.silhouette(real_video)
    coded = codec.decode(codec.encode(real_video))
    coded_shape = puppet.silhouette(coded)
    given = (real_video, real_motion)

    _, v2m = generate_all(model, codec, clips, Task.VIDEO_TO_MOTION, *given, **sampling)
    m2v, _ = generate_all(model, codec, clips, Task.MOTION_TO_VIDEO, *given, **sampling)
    joint_video, joint_motion = generate_all(model, codec, clips, Task.JOINT, *given, **sampling)

    v2m_joints = decode_smpl(v2m)["joints"]
    mean_joints = centred(bank.joints).mean(dim=(0, 1)).expand_as(clips.joints)
    m2v_shape = puppet.silhouette(m2v)
    smpl = decode_smpl(joint_motion)
    joints = smpl["joints"]
    posed = body.joints(smpl["global_orient"], smpl["body_pose"], smpl["betas"][:, None], smpl["transl"])
    offsets = iou_by_offset(puppet.silhouette(joint_video), silhouettes_of_motion(joint_motion, clips.shirt))

    generator = data.rng("attention")
    noise = torch.randn(real_motion.shape, generator=generator)
    normal = (real_motion - model.motion_mean) / model.motion_std
    text = puppet.encode_text(clips.caption)
    latents = codec.encode(real_video)
    parts = [slice(i, i + CHUNK) for i in range(0, count, CHUNK)]
    maps = [attention_map(model, latents[p], normal[p], text[p], noise[p]) * len(latents[p]) for p in parts]
    attention = torch.stack(maps).sum(0) / count

    def share(hits: Tensor) -> float:
        return hits.float().mean().item()

    result = {
        "v2m_mpjpe_mm": mpjpe(v2m_joints, clips.joints).mean().item(),
        "v2m_pa_mpjpe_mm": pa_mpjpe(v2m_joints, clips.joints).mean().item(),
        "v2m_mean_baseline_mm": mpjpe(mean_joints, clips.joints).mean().item(),
        "m2v_iou": iou(m2v_shape, real_shape).mean().item(),
        "m2v_iou_shuffled": iou(m2v_shape, real_shape.roll(1, 0)).mean().item(),
        "m2v_psnr": psnr(m2v, real_video).mean().item(),
        "joint_iou": offsets[:, OFFSETS.index(0)].mean().item(),
        "joint_sync_peak_rate": peak_rate(offsets),
        "text_action_accuracy": share(nearest_action(joints, bank) == clips.action),
        "text_chance": 1 / len(puppet.ACTIONS),
        "bone_cv": bone_variation(joints, body.parents),
        "fk_error_mm": 1000 * (posed - joints).norm(dim=-1).mean().item(),
        "jerk_ratio": jerk(joints) / jerk(clips.joints),
        "attention_41_share": attention_share(attention).tolist(),
        "attention_chance": 1 / attention.shape[-1],
        "codec_iou": iou(coded_shape, real_shape).mean().item(),
        "codec_psnr": psnr(coded, real_video).mean().item(),
    }
    shuffled = iou_by_offset(
        puppet.silhouette(joint_video).roll(1, 0), silhouettes_of_motion(joint_motion, clips.shirt)
    )
    r, joint0 = result, OFFSETS.index(0)
    mean_pa = pa_mpjpe(mean_joints + clips.joints[:, :, :1], clips.joints).mean().item()
    psnr_shuffled = psnr(m2v, real_video.roll(1, 0)).mean().item()
    codec_peak = peak_rate(iou_by_offset(coded_shape, real_shape))
    real_accuracy = share(nearest_action(clips.joints, bank) == clips.action)
    real_bones = bone_variation(clips.joints, body.parents)
    mean, pairs, real, chance = "mean motion", "shuffled pairs", "real motion", r["attention_chance"]
    # fmt: off
    rows = [  # measure, ours, baseline and what it is, ceiling and what it is
        ("video→motion MPJPE, mm ↓", r["v2m_mpjpe_mm"], r["v2m_mean_baseline_mm"], mean, 0, real),
        ("video→motion PA-MPJPE, mm ↓", r["v2m_pa_mpjpe_mm"], mean_pa, mean, 0, real),
        ("motion→video IoU ↑", r["m2v_iou"], r["m2v_iou_shuffled"], pairs, r["codec_iou"], "codec"),
        ("motion→video PSNR, dB ↑", r["m2v_psnr"], psnr_shuffled, pairs, r["codec_psnr"], "codec"),
        ("joint IoU ↑", r["joint_iou"], shuffled[:, joint0].mean().item(), pairs, r["codec_iou"], "codec"),
        ("joint sync at 0 ↑", r["joint_sync_peak_rate"], peak_rate(shuffled), pairs, codec_peak, "codec"),
        ("text: right action ↑", r["text_action_accuracy"], r["text_chance"], "chance", real_accuracy, real),
        ("bone-length variation ↓", r["bone_cv"], None, "", real_bones, real),
        ("joints against FK, mm ↓", r["fk_error_mm"], None, "", 0, real),
        ("jerk / real jerk", r["jerk_ratio"], None, "", 1, real),
    ]
    # fmt: on
    for layer, value in enumerate(r["attention_41_share"]):
        rows.append(
            (f"4:1 attention share, layer {layer} ↑", value, chance, "chance", 1, "all on its latent")
        )
    return result, rows, attention


def print_table(rows: list[tuple]) -> None:
    print(f"{'measure':33}{'ours':>9}{'baseline':>10} {'':16}{'ceiling':>9}")
    for name, value, baseline, baseline_name, ceiling, ceiling_name in rows:
        low = "" if baseline is None else f"{baseline:.3g}"
        print(f"{name:33}{value:>9.3g}{low:>10} {baseline_name:16}{ceiling:>9.3g} {ceiling_name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=SHIPPED, metavar="FILE")
    parser.add_argument("--clips", type=int, default=64, help="held-out clips (default %(default)s)")
    usual = PUPPET_DEFAULTS
    parser.add_argument("--steps", type=int, default=usual.steps, help="solver steps (default %(default)s)")
    parser.add_argument("--solver", choices=flow.SOLVERS, default="ab2")
    parser.add_argument("--guidance-text", type=float, default=usual.guidance_text, metavar="W1")
    parser.add_argument("--guidance-condition", type=float, default=usual.guidance_condition, metavar="W2")
    what = "of motion in joint sampling (default %(default)s)"
    parser.add_argument("--lead", type=float, default=usual.lead, metavar="SHARE", help=what)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--attention", type=Path, metavar="FILE.png", help="draw the attention maps there")
    args = parser.parse_args()
    if args.clips < 2:
        raise ValueError(f"--clips must be at least 2 (shuffled pairs are the baseline), got {args.clips}")
    model, extra = weights.load_weights(args.weights)
    sampling = {name: getattr(args, name) for name in ("solver", *usual._fields) if name != "shift"}
    sampling |= {"shift": usual.shift, "bf16": parallel.faster_in_bf16(torch.device("cpu"))}
    result, rows, attention = measure(model, puppet.Codec.from_state(extra), args.clips, **sampling)
    print_table(rows)
    if args.json:
        with whole_file(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    if args.attention:
        render.attention_picture(
            args.attention, attention, attention_share(attention), "motion → video attention"
        )


if __name__ == "__main__":
    cli.run(main)

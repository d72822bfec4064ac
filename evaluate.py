"""The measures: how good are trained weights on puppet clips they have never seen?

    python evaluate.py [--weights FILE] [--clips 64] [--json FILE] [--attention FILE.png]
    python evaluate.py ablate [--steps 5000] [--seeds 3] [--runs DIR]       the paper's claims at small scale

Each measure stands beside its baseline (what knowing nothing gives) and its ceiling (what the codec, or
real motion, gives).
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import flow
from dual_dit import DualDiT
from flow import Task
from kit import ablation, cli, data, parallel, puppet, render, weights
from kit.backbone import PUPPET_DEFAULTS
from kit.files import whole_file
from kit.generate import CHUNK, generate_all
from kit.measures import (
    OFFSETS,
    attention_map,
    attention_share,
    bone_variation,
    centred,
    held_out,
    iou,
    iou_by_offset,
    jerk,
    mpjpe,
    nearest_action,
    pa_mpjpe,
    peak_rate,
    psnr,
    silhouettes_of_motion,
)  # fmt: skip
from motion_tokens import decode_smpl
from sample import SHIPPED
from train import STAGE_1_SHARE

ABLATION = SHIPPED.with_name("ablation.json")
BANK_CLIPS = 2048  # real clips that stand for "the data": mean motion, nearest neighbours


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


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", type=Path, default=SHIPPED, metavar="FILE")
    add("--clips", type=int, default=64, metavar="N", help="held-out clips (default %(default)s)")
    usual = PUPPET_DEFAULTS
    add("--steps", type=int, default=usual.steps, help="solver steps (default %(default)s)")
    add("--solver", choices=flow.SOLVERS, default="ab2")
    add("--guidance-text", type=float, default=usual.guidance_text, metavar="W1")
    add("--guidance-condition", type=float, default=usual.guidance_condition, metavar="W2")
    what = "of motion in joint sampling (default %(default)s)"
    add("--lead", type=float, default=usual.lead, metavar="SHARE", help=what)
    add("--json", type=Path, metavar="FILE", help="write the numbers there")
    add("--attention", type=Path, metavar="FILE.png", help="draw the attention maps there")
    verbs = parser.add_subparsers(dest="verb", metavar="ablate")
    what = "train networks that differ in one thing, and measure them alike"
    add = verbs.add_parser("ablate", help=what, description=what).add_argument
    add("--steps", type=int, default=5000, metavar="N", help="of training (default %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="clips a step (default %(default)s)")
    add("--frames", type=int, default=puppet.FRAMES, metavar="N", help="of a clip (default %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each (default %(default)s)")
    add("--clips", type=int, default=64, metavar="N", help="held-out clips (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that trains")
    what = "trained networks, and where to put them (default %(default)s)"
    add("--runs", type=Path, default=Path("runs/ablation"), metavar="DIR", help=what)
    add("--out", type=Path, default=ABLATION, metavar="FILE", help="default: assets/ablation.json")
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.clips < 2:
        raise ValueError(f"--clips must be at least 2 (shuffled pairs are the baseline), got {args.clips}")
    if args.verb == "ablate":
        plan = ablation.Plan(args.steps, args.batch, args.frames, STAGE_1_SHARE, args.device)
        ablation.print_table(ablation.ablate(plan, range(args.seeds), args.clips, args.runs, args.out))
        return
    model, extra = weights.load_weights(args.weights)
    sampling = {name: getattr(args, name) for name in ("solver", *PUPPET_DEFAULTS._fields) if name != "shift"}
    sampling |= {"shift": PUPPET_DEFAULTS.shift, "bf16": parallel.faster_in_bf16(torch.device("cpu"))}
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

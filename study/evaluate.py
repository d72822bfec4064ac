"""The measures: how good are trained weights on puppet clips they have never seen?

    python -m study.evaluate [--weights FILE] [--clips 64] [--json FILE] [--attention FILE.png]
    python -m study.evaluate ablate [--steps 5000] [--seeds 3] [--runs DIR]  the paper's claims at small scale
    python -m study.evaluate pw3d DIR --wan FOLDER --weights FILE            video to motion on 3DPW (pw3d.py)

Each measure stands beside its baseline (what knowing nothing gives) and its ceiling (what the codec, or
real motion, gives).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import flow
from kit import devices, files, plots, puppet, weights
from kit.attention import frame_share
from kit.backbone import PUPPET_DEFAULTS, SHIPPED
from kit.files import whole_file
from motion_tokens import GROUPS
from study import ablate, pw3d
from study.measures import held_out
from study.scores import scores

BANK_CLIPS = 2048  # real clips that stand for "the data": mean motion, nearest neighbours


def table(r: dict) -> list[tuple]:
    """Rows of what is printed: measure, ours, baseline and what it is, ceiling and what it is."""
    mean, pairs, real, codec, chance = "mean motion", "shuffled pairs", "real motion", "codec", "chance"
    # fmt: off
    rows = [
        ("video→motion MPJPE, mm ↓", r["v2m_mpjpe_mm"], r["v2m_mean_baseline_mm"], mean, 0, real),
        ("video→motion PA-MPJPE, mm ↓", r["v2m_pa_mpjpe_mm"], r["v2m_pa_mean_baseline_mm"], mean, 0, real),
        ("motion→video IoU ↑", r["m2v_iou"], r["m2v_iou_shuffled"], pairs, r["codec_iou"], codec),
        ("motion→video PSNR, dB ↑", r["m2v_psnr"], r["m2v_psnr_shuffled"], pairs, r["codec_psnr"], codec),
        ("joint IoU ↑", r["joint_iou"], r["joint_iou_shuffled"], pairs, r["codec_iou"], codec),
        ("joint sync at 0 ↑", r["joint_sync_peak_rate"], r["joint_sync_shuffled"], pairs,
         r["codec_sync_peak_rate"], codec),
        ("text: right action ↑", r["text_action_accuracy"], r["text_chance"], chance, r["text_real"], real),
        ("bone-length variation ↓", r["bone_cv"], None, "", r["bone_cv_real"], real),
        ("joints against FK, mm ↓", r["fk_error_mm"], None, "", 0, real),
        ("jerk / real jerk", r["jerk_ratio"], None, "", 1, real),
    ]
    # fmt: on
    for layer, value in enumerate(shares := r["attention_41_share"]):
        name = f"4:1 attention share, layer {layer} ↑"
        rows.append((name, value, r["attention_chance"], chance, 1, "all on its latent"))
    best = shares.index(max(shares))
    for group in GROUPS:
        name, value = f"  of layer {best}'s {group} tokens ↑", r[f"attention_41_share_{group}"][best]
        rows.append((name, value, r["attention_chance"], chance, 1, "all on its latent"))
    return rows


def print_table(rows: list[tuple]) -> None:
    print(f"{'measure':33}{'ours':>9}{'baseline':>10} {'':16}{'ceiling':>9}")
    for name, value, baseline, baseline_name, ceiling, ceiling_name in rows:
        low = "" if baseline is None else f"{baseline:.3g}"
        print(f"{name:33}{value:>9.3g}{low:>10} {baseline_name:16}{ceiling:>9.3g} {ceiling_name}")


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m study.evaluate", description=__doc__.splitlines()[0])
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
    what = "of training (default %(default)s)"
    add("--steps", dest="training_steps", type=int, default=5000, metavar="N", help=what)
    add("--batch", type=int, default=16, metavar="N", help="clips a step (default %(default)s)")
    add("--frames", type=int, default=puppet.FRAMES, metavar="N", help="of a clip (default %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each (default %(default)s)")
    # what the parser above has read is not to be forgotten
    add("--clips", type=int, default=argparse.SUPPRESS, metavar="N", help="as above")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that trains")
    what = "networks that train at a time (default %(default)s)"
    add("--jobs", type=int, default=1, metavar="N", help=what)
    what = "start all from this network's video expert, such as one of train.py --video-only"
    add("--init", metavar="FILE", help=what)
    what = "trained networks, and where to put them (default %(default)s)"
    add("--runs", type=Path, default=Path("runs/ablation"), metavar="DIR", help=what)
    add("--out", type=Path, metavar="FILE", help="default: ablation.json in --runs")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["pw3d"]:
        pw3d.main(sys.argv[2:])
        return
    args = options()
    if args.clips < 2:
        raise ValueError(f"--clips must be at least 2 (shuffled pairs are the baseline), got {args.clips}")
    if args.verb == "ablate":
        for name in ("jobs", "seeds"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        size = args.training_steps, args.batch, args.frames
        plan = ablate.Plan(*size, STAGE_1_SHARE, args.device, args.init)
        out = args.out or args.runs / "ablation.json"
        out.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours
        result = ablate.ablate(plan, range(args.seeds), args.clips, args.runs, out, args.jobs)
        ablate.print_table(result)
        return
    model, extra = weights.load_weights(args.weights)
    given = ("steps", "solver", "guidance_text", "guidance_condition", "lead")
    sampling = PUPPET_DEFAULTS._asdict() | {name: getattr(args, name) for name in given}
    clips, bank = held_out(args.clips), held_out(BANK_CLIPS, "bank")
    bf16 = devices.has_bf16_units(torch.device("cpu"))
    result = scores(model, puppet.Codec.from_state(extra), clips, bank, bf16, **sampling)
    print_table(table(result.values))
    if args.json:
        with whole_file(args.json) as temporary:
            temporary.write_text(json.dumps(result.values, indent=2) + "\n")
    if args.attention:
        maps = result.attention
        plots.attention_picture(args.attention, maps, frame_share(maps), "motion → video attention")


if __name__ == "__main__":
    files.run(main)

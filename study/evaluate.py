"""The measures: how good are trained weights on puppet clips that they were not trained on?

    python -m study.evaluate [--weights FILE] [--clips 64] [--no-redraw] [--json FILE] [--attention FILE.png]
    python -m study.evaluate pw3d DIR --wan FOLDER --weights FILE    video to motion on 3DPW (study/pw3d.py)

Each measure is printed with its standard error over clips, its baseline (what a guess gives) and its ceiling
(what the codec, or real clips, give). The video of a joint sample is redrawn from its motion, as sample.py
does; with --no-redraw it is the one made together with the motion, as in the paper.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from flow import Task
from kit import files, plots, puppet
from kit.attention import frame_share, latent_share
from kit.backbone import PUPPET_DEFAULTS, SHIPPED, Backbone, puppet_backbone
from motion_tokens import decode_smpl
from study import pw3d, scores
from study.measures import summary
from study.scores import Real

# what is printed, by measure: its name, which way is better, baseline and ceiling if there are any
ROWS = {
    "mpjpe_mm": ("MPJPE, mm ↓", "mean motion", ""),
    "pa_mpjpe_mm": ("PA-MPJPE, mm ↓", "mean motion", ""),
    "iou": ("IoU ↑", "shuffled pairs", "codec"),
    "psnr": ("PSNR, dB ↑", "shuffled pairs", "codec"),
    "in_step": ("in step ↑", "shuffled pairs", "codec"),
    "right_action": ("right action ↑", "chance", "real"),
    "frechet_cm2": ("Fréchet distance, cm² ↓", "", "real"),
    "usual_poses": ("usual poses ↑", "", "real"),
    "jerk": ("jerk, of real", "", "real"),
    "bone_variation": ("bone-length variation ↓", "", "real"),
    "fk_error_mm": ("joints against FK, mm ↓", "", "real"),
    "limbs_whole": ("limbs whole ↑", "", "codec"),
    "limbs_missing": ("limbs missing ↓", "", "codec"),
    "length_variation": ("length variation ↓", "", "codec"),
    "odd_bends": ("odd bends ↓", "", "codec"),
    "plausible_postures": ("plausible postures ↑", "", "codec"),
    "flicker": ("flicker, of real", "", "codec"),
    "dynamic_degree": ("dynamic degree, of real", "", "codec"),
    "sharpness": ("sharpness, of real", "", "codec"),
    "prompt_following": ("prompt following ↑", "chance", "codec"),
}
Numbers = dict[str, dict[str, dict]]  # task -> "ours", "baseline", "ceiling" -> measures


def measured(backbone: Backbone, real: Real, **sampling: float) -> Numbers:
    """All three tasks sampled and measured, each with its baseline and ceiling."""
    coded = scores.through_codec(backbone.codec(), real)
    chance = torch.full((len(real.video),), 1 / len(puppet.ACTIONS))
    make = lambda task: scores.generate(backbone, real, task, **sampling)
    found = {}
    _, motion = make(Task.VIDEO_TO_MOTION)
    found["video to motion"] = {
        "ours": scores.of_pose(decode_smpl(motion)["joints"], real),
        "baseline": scores.of_pose(scores.mean_motion(real), real),
    }
    video, _ = make(Task.MOTION_TO_VIDEO)
    found["motion to video"] = {
        "ours": scores.of_likeness(video, real),
        "baseline": scores.of_likeness(video.roll(1, 0), real),
        "ceiling": scores.of_likeness(coded, real),
    }
    video, motion = make(Task.JOINT)
    shuffled = scores.of_pair(video.roll(1, 0), motion, real)
    found["joint"] = {
        "ours": scores.of_both(video, motion, real),
        "baseline": shuffled | {"right_action": chance, "prompt_following": chance},
        "ceiling": scores.of_both(coded, real.motion, real),
    }
    return {
        task: {side: {k: summary(v[None]) for k, v in of.items()} for side, of in sides.items()}
        for task, sides in found.items()
    }


def print_table(numbers: Numbers) -> None:
    print(f"{'measure':42}{'ours':>9} {'':8}{'baseline':>9} {'':15}{'ceiling':>9}")
    for task, sides in numbers.items():
        for measure, ours in sides["ours"].items():
            name, *beside = ROWS[measure]
            line = f"{task + ': ' + name:42}{ours['mean']:9.3g} ±{ours['error']:<7.2g}"
            for side, what in zip(("baseline", "ceiling"), beside, strict=True):
                line += f"{sides[side][measure]['mean']:9.3g} {what:15}" if what else " " * 25
            print(line.rstrip())


def attention_picture(path: Path, attention: Tensor) -> None:
    """Write a .png of motion -> video attention (layers f T), one panel a layer; the line is k = f/4."""
    layers, frames, latents = attention.shape
    figure = plots.blank_figure(2.3 * layers + 1.2, 2.7)
    (panels,) = figure.subplots(1, layers, squeeze=False, sharex=True, sharey=True)
    for layer, (panel, share) in enumerate(zip(panels, frame_share(attention), strict=True)):
        shown, most = attention[layer].T.numpy(), attention.max()
        heat = panel.imshow(shown, cmap="magma", vmin=0, vmax=most, origin="lower", aspect="auto")
        panel.plot([0, frames - 1], [0, (frames - 1) / 4], color="white", linewidth=1, linestyle=(0, (2, 3)))
        panel.set(xticks=range(0, frames, 4), yticks=range(latents))
        panel.set_title(f"layer {layer}: {100 * share:.0f}% on own latent", fontsize=8)
        panel.tick_params(labelsize=7)
    figure.suptitle(f"motion → video attention (chance {100 / latents:.0f}%)", fontsize=10)
    figure.supxlabel("motion frame f", fontsize=8)
    figure.supylabel("latent k", fontsize=8)
    figure.colorbar(heat, ax=panels, fraction=0.06 / layers, pad=0.02).ax.tick_params(labelsize=7)
    plots.save_figure(figure, path)


def options() -> argparse.Namespace:
    parser = files.Parser(prog="python -m study.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", type=Path, default=SHIPPED, metavar="FILE")
    add("--clips", type=files.count, default=64, metavar="N", help="held-out clips (default %(default)s)")
    usual = PUPPET_DEFAULTS
    add("--steps", type=files.count, default=usual.steps, help="solver steps (default %(default)s)")
    add("--guidance-text", type=files.finite, default=usual.guidance_text, metavar="W1")
    add("--guidance-condition", type=files.finite, default=usual.guidance_condition, metavar="W2")
    what = "generate the video of a joint sample once more, from its motion"
    add("--redraw", action=argparse.BooleanOptionalAction, default=usual.redraw, help=what)
    add("--device", type=files.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=files.new_file, metavar="FILE", help="write the numbers there")
    add("--attention", type=files.new_file, metavar="FILE.png", help="draw the attention maps there")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["pw3d"]:
        pw3d.main(sys.argv[2:])
        return
    args = options()
    if args.clips < 2:
        raise ValueError(f"--clips must be at least 2 (shuffled pairs are the baseline), got {args.clips}")
    backbone, real = puppet_backbone(args.weights, args.device), scores.held_out(args.clips)
    names = "steps", "guidance_text", "guidance_condition", "redraw"
    numbers = measured(backbone, real, **{name: getattr(args, name) for name in names})
    to_video, to_motion = scores.maps(backbone, real)
    there, back, chance = frame_share(to_video), latent_share(to_motion), 1 / to_video.shape[-1]
    print_table(numbers)
    print(f"\nattention on its own latent, or own frames, chance {chance:.2f}")
    for layer in range(len(there)):
        print(f"layer {layer}    motion→video {there[layer]:.3f}    video→motion {back[layer]:.3f}")
    if args.json:
        shares = {"motion_to_video": there.tolist(), "video_to_motion": back.tolist()}
        numbers["attention"] = shares | {"chance": chance}
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")
    if args.attention:
        attention_picture(args.attention, to_video)


if __name__ == "__main__":
    files.run(main)

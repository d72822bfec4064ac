"""study/evaluate.py: what it prints, writes and refuses; the measures themselves are in test_measures.py."""

import json
import math

import pytest
import torch
from conftest import TINY

from flow import Task
from kit import puppet, weights
from kit.attention import motion_to_video, shared_out, video_to_motion
from kit.backbone import puppet_backbone
from kit.data.datasets import puppet_motion
from study import evaluate, measures, scores


@pytest.fixture
def few(monkeypatch) -> None:
    for name, number in (("BANK_CLIPS", 24), ("READ_CLIPS", 2), ("CHUNK", 2)):
        monkeypatch.setattr(scores, name, number)


def test_evaluate_writes_every_measure_with_its_error_and_draws_the_maps(
    few, verb, tiny_weights, tmp_path, monkeypatch
):
    asked, denoise = [], scores.denoise
    record = lambda task, how: asked.append((task.name, how["redraw"], how["shift"]))
    listen = lambda *given, **how: record(given[1], how) or denoise(*given, **how)
    model, codec = weights.load_weights(tiny_weights)
    settings = {"recipe": {"stage": 2, "shift": 2.0, "ablate": None}}
    weights.save_weights(tmp_path / "trained", TINY, model.state_dict(), codec, settings=settings)
    monkeypatch.setattr(scores, "denoise", listen)
    files = ("--json", tmp_path / "measures.json", "--attention", tmp_path / "maps.png")
    how = ("--clips", 3, "--steps", 1, "--no-redraw", "--device", "cpu")
    ended = verb(evaluate, "--weights", tmp_path / "trained", *how, *files)
    assert ended.code == 0, ended.err
    tasks = ("VIDEO_TO_MOTION", "MOTION_TO_VIDEO", "JOINT")
    assert list(dict.fromkeys(asked)) == [(task, False, 2.0) for task in tasks]
    result = json.loads((tmp_path / "measures.json").read_text())
    attention = result.pop("attention")
    assert attention["chance"] == 1 / 5
    assert len(attention["motion_to_video"]) == len(attention["video_to_motion"]) == TINY.layers
    assert result.keys() == {"video to motion", "motion to video", "joint"}
    for sides in result.values():
        for found in (value for side in sides.values() for value in side.values()):
            assert math.isfinite(found["mean"]) and found["error"] >= 0
    assert {name for sides in result.values() for name in sides["ours"]} == evaluate.ROWS.keys()
    assert result["joint"]["baseline"]["right_action"]["mean"] == pytest.approx(1 / len(puppet.ACTIONS))
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--json", "--attention"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(verb, tmp_path, option):
    ended = verb(evaluate, option, tmp_path / "none" / "a")
    assert ended.code == 2 and f"{option}: expected a file in a folder that exists" in ended.err


def test_real_clips_are_as_good_as_real(few):
    # catches a measure that would not give a perfect network its due
    real = scores.held_out(4)
    assert not torch.equal(real.bank.joints[:4], real.clips.joints)
    found = scores.of_both(real.video, real.motion, real)
    for name in ("flicker", "dynamic_degree", "sharpness", "in_step"):
        assert found[name].tolist() == pytest.approx([1] * 4)
    assert found["jerk"].tolist() == pytest.approx([1] * 4, rel=1e-2)
    assert found["iou"].min() > 0.99 and found["bone_variation"].max() < 1e-5
    assert found["fk_error_mm"].max() < 0.1 and found["usual_poses"].mean() > 0.9
    bank = real.clips._replace(action=real.clips.action.flip(0))  # in another order than the clips
    outlines = measures.outlines(puppet.silhouette(real.video)).flip(0)
    there = real._replace(bank=bank, outlines=outlines)
    assert scores.of_video(real.video, there)["prompt_following"].mean() == 1
    noise = torch.randn(real.video.shape, generator=torch.Generator().manual_seed(0))
    noisy = scores.of_video((real.video + 0.5 * noise).clamp(-1, 1), real)
    assert noisy["flicker"].mean() > 2 and noisy["sharpness"].mean() > 2
    assert noisy["limbs_whole"].mean() < found["limbs_whole"].mean() - 0.2


def test_a_ratio_to_real_is_that_of_the_means_and_its_error_the_delta_methods():
    # catches an error of all that differs between clips, as if the real ones were others
    generator = torch.Generator().manual_seed(0)
    real = 1 + torch.rand(4000, 50, generator=generator)
    x = 2 * real + 0.1 * torch.randn(4000, 50, generator=generator)  # 4,000 times 50 clips
    ratios = torch.stack([scores.of_real(*each) for each in zip(x, real, strict=True)])
    torch.testing.assert_close(ratios.mean(1), x.mean(1) / real.mean(1))
    assert (ratios.std(1) / 50**0.5).mean().item() == pytest.approx(ratios.mean(1).std().item(), rel=0.05)


def test_a_row_has_ours_baseline_and_ceiling_in_their_columns(capsys):
    means = {"ours": 1, "baseline": 2, "ceiling": 3}
    sides = {side: {"in_step": {"mean": mean, "error": 0.5}} for side, mean in means.items()}
    evaluate.print_table({"joint": sides})
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["joint:", "in", "step", "↑", "1", "±0.5", "2", "shuffled", "pairs", "3", "codec"]


def test_one_clip_is_refused_for_want_of_a_shuffled_pair(verb, tiny_weights):
    ended = verb(evaluate, "--weights", tiny_weights, "--clips", 1)
    assert ended.code == 2
    assert "--clips must be at least 2" in ended.err and ended.err.count("\n") == 1


def test_each_clip_is_asked_for_its_own_text_against_none_and_with_noise_of_its_own(
    few, tiny_weights, monkeypatch
):
    # catches the same noise in every chunk, and a caption as null text, for which guidance does nothing
    asked = []
    listen = lambda model, task, text, null_text, seed, latents, motion, **_: (
        asked.append((text, null_text, seed)) or (latents, motion)
    )
    monkeypatch.setattr(scores, "denoise", listen)
    real = scores.held_out(3)
    _, motion = scores.generate(puppet_backbone(tiny_weights, "cpu"), real, Task.JOINT)
    texts, nulls, seeds = zip(*asked, strict=True)
    assert torch.equal(motion, real.motion) and seeds == (0, 2)
    assert torch.equal(torch.cat(texts), puppet.encode_text(real.clips.caption))
    assert all(torch.equal(null.expand(1, -1, -1), puppet.encode_text([""])) for null in nulls)


def test_maps_are_of_the_networks_own_inputs(few, tiny_weights):
    # catches motion that is not normalised, text where there is none, a short chunk counted as a whole one
    backbone, real = puppet_backbone(tiny_weights, "cpu"), scores.held_out(3)
    model, codec = backbone.transformer(), backbone.codec()
    latents, motion = codec.encode(real.video), (real.motion - model.motion_mean) / model.motion_std
    text, no_text = (puppet.encode_text(words) for words in (real.clips.caption, [""] * 3))
    to_video, to_motion = 0, 0
    for part, share in ((slice(0, 2), 2 / 3), (slice(2, 3), 1 / 3)):
        given = (model, latents[part], motion[part])
        to_video += share * motion_to_video(*given, no_text[part], Task.VIDEO_TO_MOTION, part.start)
        to_motion += share * video_to_motion(*given, text[part], Task.MOTION_TO_VIDEO, part.start)
    found = scores.maps(backbone, real)
    torch.testing.assert_close(found, (shared_out(to_video), shared_out(to_motion)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("late", (2, -2))
def test_a_motion_that_is_late_or_early_is_out_of_step_and_fits_less(few, late):
    # catches the best IoU of all offsets for that of now, and a lag that counts to one side only
    real = scores.held_out(4)
    found = scores.of_pair(real.video, real.motion.roll(late, 1), real)
    assert found["in_step"].tolist() == [0] * 4
    assert found["iou"].max() < 0.95 and scores.of_pair(real.video, real.motion, real)["iou"].min() > 0.99


def test_known_faults_of_a_motion_are_measured(few):
    # catches measures of a motion against itself, and a baseline that has seen the clips
    real = scores.held_out(4)
    moved = real.motion.clone()
    moved[..., 3:75:3] += 0.1  # joints, not the rotations that they should follow from
    assert scores.of_motion(moved, real)["fk_error_mm"].tolist() == pytest.approx([100] * 4, rel=1e-2)
    bent = puppet_motion(real.clips._replace(body_pose=4 * real.clips.body_pose))
    usual = [scores.of_motion(motion, real)["usual_poses"].mean() for motion in (real.motion, bent)]
    assert usual[1] < usual[0] - 0.1
    mean = measures.centred(real.bank.joints).flatten(0, 1).mean(0)
    torch.testing.assert_close(scores.mean_motion(real), mean.expand_as(real.clips.joints))


def test_likeness_is_to_the_clips_own_video(few):
    real = scores.held_out(2)
    found = scores.of_likeness(0.8 * real.video, real)
    torch.testing.assert_close(found["psnr"], measures.psnr(0.8 * real.video, real.video))
    assert scores.of_likeness(real.video.roll(1, 0), real)["iou"].max() < 0.8


def test_baseline_and_ceiling_are_not_ours(few, tiny_weights, monkeypatch):
    # a network that makes each clip of another's caption. Catches pairs that are not shuffled, its own motion
    # in the ceiling
    real = scores.held_out(4)
    made = real.video.roll(1, 0), real.motion.roll(1, 0)
    monkeypatch.setattr(scores, "generate", lambda *_, **__: made)
    joint = evaluate.measured(puppet_backbone(tiny_weights, "cpu"), real)["joint"]
    iou = {side: found["iou"]["mean"] for side, found in joint.items()}
    assert iou["ours"] > 0.9 and iou["baseline"] < 0.7 and iou["ceiling"] > iou["baseline"] + 0.2

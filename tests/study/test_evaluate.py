"""study/evaluate.py: what it prints, writes and refuses; the measures themselves are in test_measures.py."""

import json
import math

import pytest
import torch
from conftest import TINY

from kit import puppet
from study import evaluate, measures, scores


@pytest.fixture
def few(monkeypatch) -> None:
    for name, number in (("BANK_CLIPS", 24), ("READ_CLIPS", 2), ("CHUNK", 2)):
        monkeypatch.setattr(scores, name, number)


def test_evaluate_writes_every_measure_with_its_error_and_draws_the_maps(
    few, verb, tiny_weights, tmp_path, monkeypatch
):
    asked, denoise = [], scores.denoise
    listen = lambda *given, **how: asked.append((given[1].name, how["redraw"])) or denoise(*given, **how)
    monkeypatch.setattr(scores, "denoise", listen)
    files = ("--json", tmp_path / "measures.json", "--attention", tmp_path / "maps.png")
    how = ("--clips", 3, "--steps", 1, "--no-redraw", "--device", "cpu")
    ended = verb(evaluate, "--weights", tiny_weights, *how, *files)
    assert ended.code == 0, ended.err
    tasks = ("VIDEO_TO_MOTION", "MOTION_TO_VIDEO", "JOINT")
    assert list(dict.fromkeys(asked)) == [(task, False) for task in tasks]
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
    there = real._replace(bank=real.clips, outlines=measures.outlines(puppet.silhouette(real.video)))
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

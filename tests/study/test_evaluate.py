"""study/evaluate.py: what it prints, writes and refuses; the measures themselves are in test_measures.py."""

import json
import math
from itertools import chain

from conftest import TINY

from kit import puppet
from motion_tokens import GROUPS
from study import evaluate

KEYS = {
    "v2m_mpjpe_mm",
    "v2m_pa_mpjpe_mm",
    "v2m_mean_baseline_mm",
    "m2v_iou",
    "m2v_iou_shuffled",
    "m2v_psnr",
    "joint_iou",
    "joint_sync_peak_rate",
    "text_action_accuracy",
    "text_chance",
    "bone_cv",
    "fk_error_mm",
    "jerk_ratio",
    "attention_chance",
}


def test_evaluate_writes_every_measure_as_a_plain_number_and_draws_the_maps(
    verb, tiny_weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "BANK_CLIPS", 24)
    files = ("--json", tmp_path / "measures.json", "--attention", tmp_path / "maps.png")
    ended = verb(evaluate, "--weights", tiny_weights, "--clips", 2, "--steps", 1, *files)
    assert ended.code == 0
    result = json.loads((tmp_path / "measures.json").read_text())
    shares = {"attention_41_share", *(f"attention_41_share_{group}" for group in GROUPS)}
    assert result.keys() >= KEYS | shares
    lists = [result.pop(name) for name in shares]
    assert all(len(by_layer) == TINY.layers for by_layer in lists)
    for number in chain(*lists, result.values()):
        assert type(number) is float and math.isfinite(number)
    assert result["text_chance"] == 1 / len(puppet.ACTIONS) and result["attention_chance"] == 1 / 5
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_one_clip_is_refused_for_want_of_a_shuffled_pair(verb, tiny_weights):
    ended = verb(evaluate, "--weights", tiny_weights, "--clips", 1)
    assert ended.code == 2
    assert "--clips must be at least 2" in ended.err and ended.err.count("\n") == 1

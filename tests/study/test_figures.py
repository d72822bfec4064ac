"""study/figures.py, study/tables.py: what pictures and tables show is what was computed and measured."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from kit import backbone
from study import diagrams, figures, tables

ROWS = {
    "table1": ("real", "backbone", "echomotion", "echomotion-redrawn", "video-tuning"),
    "table5": ("mean-motion", "echomotion"),
    "table6": ("real", "stage-1", "echomotion"),
    "a81": ("mvs-rope", "collision"),
    "a82": ("mvs-rope", "one-stage"),
    "a83": ("one-stage", "single-stream"),
    "figure8": ("mvs-rope", "unsynced", "collision"),
}


@pytest.fixture
def results() -> dict:
    """Of the shape that study.ablate writes."""
    sides = [f"{side}_{layer}" for side in ("motion_to_video", "video_to_motion") for layer in (0, 1)]
    more = {
        "curve": {"steps": [0, 5, 10], "mean": [3.0, 2.0, 1.0], "error_seeds": [0.1, 0.1, 0.1]},
        "motion_to_video": torch.rand(2, 17, 5).tolist(),
        "video_to_motion": torch.rand(2, 5, 17).tolist(),
        "chance": 0.2,
    }

    def entry(part: str, mean: float) -> dict:
        value = {"mean": mean, "error": 0.01, "error_seeds": 0.02}
        measures = {name: value.copy() for name in tables.COLUMNS.get(part, sides)}
        counts = {"seeds": 3, "clips": 8, "steps": 10, "trained_clips": 160}
        return counts | more | {"measures": measures}

    found = {
        part: {name: entry(part, 0.1 * i) for i, name in enumerate(names, 1)} for part, names in ROWS.items()
    }
    found["figure8"]["mvs-rope"]["measures"]["motion_to_video_1"]["mean"] = 0.7
    return found


def test_each_figure_is_written_and_the_same_again(results, tiny_weights, tmp_path, verb, monkeypatch):
    monkeypatch.setattr(backbone, "PUPPET_DEFAULTS", backbone.PUPPET_DEFAULTS._replace(steps=1))
    (tmp_path / "results.json").write_text(json.dumps(results))
    for name in ("mvs-rope", "collision"):
        (tmp_path / "runs" / f"{name}-0").mkdir(parents=True)
        shutil.copy(tiny_weights, tmp_path / "runs" / f"{name}-0" / "weights.safetensors")
    given = ("--weights", tiny_weights, "--results", tmp_path / "results.json", "--runs", tmp_path / "runs")
    pictures = []
    for names in ((), ("figure8", "a82", "collision")):
        folder = tmp_path / f"out{len(names)}"
        folder.mkdir()
        assert verb(figures, *names, *given, "--out", folder).code == 0
        pictures.append({path.name: path.read_bytes() for path in folder.iterdir()})
        for path in folder.iterdir():
            assert np.asarray(Image.open(path).convert("L")).std() > 5, path
    first, again = pictures
    assert first.keys() == {"tasks.gif", *(f"{name}.png" for name in (*diagrams.DRAWN, *figures.READ))}
    assert all(first[name] == picture for name, picture in again.items() if name != "collision.png")


def test_tables_have_every_network_with_the_larger_error(results):
    text = "a <!-- table5 -->\nold\n<!-- /table5 --> b <!-- a81 -->\n\n<!-- /a81 -->"
    filled = tables.filled(text, {"table5": results["table5"]})
    assert filled.startswith("a <!-- table5 -->\n| ") and "old" not in filled
    assert "| mean motion | 0.100 ± 0.020 | 0.100 ± 0.020 | 3 | 160 |" in filled
    assert f"b <!-- a81 -->\n{tables.MISSING}\n<!-- /a81 -->" in filled
    assert tables.filled(filled, {"table5": results["table5"]}) == filled
    figure8 = tables.shares(results, "figure8")
    assert "| MVS-RoPE | 0.700 ± 0.020 | 0.400 |" in figure8 and "unsynced | 0.200" in figure8
    for part in tables.COLUMNS:
        assert tables.table(results, part).count("\n| ") == len(results[part]) + 1


@pytest.mark.parametrize(
    ("mean", "error", "shown"),
    (
        (0.59672, 0.0123, "0.597 ± 0.012"),
        (50.21, 3.4, "50.2 ± 3.4"),
        (294.2, 23.1, "294 ± 23"),
        (5.0, 0, "5"),
    ),
)
def test_a_cell_has_two_digits_of_its_error(mean, error, shown):
    assert tables.cell({"mean": mean, "error": error}) == shown


def test_pages_are_in_step_with_the_results():
    pages = [page.read_text() for page in figures.PAGES]
    results = json.loads(figures.RESULTS.read_text())
    assert pages == [tables.filled(page, results) for page in pages], "say `python -m study.figures --docs`"
    assert all(f"<!-- {name} -->" in "".join(pages) for name in tables.BLOCKS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("blocs",), "no figure 'blocs': choose from frames"),
        (("a81", "--results", "nowhere"), "nowhere has no a81: measure it"),
        (("tasks", "--weights", "nowhere"), "nowhere"),
    ),
)
def test_misuse_is_one_line(arguments, words, verb):
    ended = verb(figures, *arguments)
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1

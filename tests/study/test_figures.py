"""study/figures.py, study/tables.py: what pictures and tables show is what was computed and measured."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from study import figures, tables


def draw(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["study.figures", *map(str, arguments)])
    figures.main()


@pytest.fixture
def few(monkeypatch) -> None:
    """As little work as shows everything."""
    monkeypatch.setattr(figures, "PUPPET_DEFAULTS", figures.PUPPET_DEFAULTS._replace(steps=1))


def measures(columns: dict, mean: float) -> dict:
    return {name: {"mean": mean, "error": 0.01, "error_seeds": 0.02} for name in columns}


def entry(columns: dict, mean: float, **more: object) -> dict:
    found = {"seeds": 3, "clips": 8, "steps": 10, "trained_clips": 160, "measures": measures(columns, mean)}
    return found | more


@pytest.fixture
def results() -> dict:
    """Of the shape that study.ablate writes."""
    curve = {"steps": [0, 5, 10], "mean": [3.0, 2.0, 1.0], "error_seeds": [0.1, 0.1, 0.1]}
    sides = [f"{side}_{layer}" for side in ("motion_to_video", "video_to_motion") for layer in (0, 1)]
    seen = {
        "motion_to_video": torch.rand(2, 17, 5).tolist(),
        "video_to_motion": torch.rand(2, 5, 17).tolist(),
    }
    rows = {
        "table1": ("real", "backbone", "echomotion-one-clock", "echomotion", "video-tuning"),
        "table5": ("mean-motion", "echomotion"),
        "table6": ("real", "stage-1", "echomotion-one-clock", "echomotion"),
        "a81": ("mvs-rope", "collision"),
        "a82": ("mvs-rope", "one-stage"),
        "a83": ("one-stage", "single-stream"),
    }  # fmt: skip
    found = {
        part: {name: entry(tables.COLUMNS[part], 0.1 * i, curve=curve) for i, name in enumerate(names, 1)}
        for part, names in rows.items()
    }
    found["figure8"] = {
        name: entry(dict.fromkeys(sides), 0.2, chance=0.2, **seen)
        for name in ("mvs-rope", "unsynced", "collision")
    }
    found["figure8"]["mvs-rope"]["measures"]["motion_to_video_1"]["mean"] = 0.7
    return found


def test_each_figure_is_written_and_the_same_again(few, results, tiny_weights, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps(results))
    runs = [tmp_path / "runs" / f"{name}-0" for name in ("mvs-rope", "collision")]
    for run in runs:
        run.mkdir(parents=True)
        shutil.copy(tiny_weights, run / "weights.safetensors")
    given = ("--weights", tiny_weights, "--results", tmp_path / "results.json", "--runs", tmp_path / "runs")
    pictures = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        folder.mkdir()
        names = () if folder.name == "first" else ("table1", "figure8", "a82", "collision")
        draw(monkeypatch, *names, *given, "--out", folder)
        pictures.append({path.name: path.read_bytes() for path in folder.iterdir()})
    first, again = pictures
    drawn = {f"{name}.png" for name in figures.READ}
    assert first.keys() == drawn | {"tasks.gif"}
    assert all(first[name] == picture for name, picture in again.items() if name in first)
    for path in (*(tmp_path / "first").iterdir(), tmp_path / "again" / "collision.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5, path
    with Image.open(tmp_path / "first" / "tasks.gif") as film:
        assert film.n_frames > 1


def test_tables_have_every_network_with_the_larger_error(results):
    text = "a <!-- table5 -->\nold\n<!-- /table5 --> b <!-- a81 -->\n\n<!-- /a81 -->"
    filled = tables.filled(text, {"table5": results["table5"]})
    assert filled.startswith("a <!-- table5 -->\n| ") and "old" not in filled
    assert "| mean motion | 0.100 ± 0.020 | 0.100 ± 0.020 | 3 | 160 |" in filled
    assert f"b <!-- a81 -->\n{tables.MISSING}\n<!-- /a81 -->" in filled
    assert tables.filled(filled, {"table5": results["table5"]}) == filled
    figure8 = tables.shares(results)
    assert (
        "| MVS-RoPE | 0.700 ± 0.020 | 0.450 |" in figure8
        and tables.best_layer(results, "motion_to_video") == 1
    )
    assert "unsynced | 0.200" in figure8
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


def test_results_page_is_in_step_with_the_results():
    results = json.loads(figures.RESULTS.read_text()) if figures.RESULTS.is_file() else {}
    page = (ROOT / "docs" / "results.md").read_text()
    assert tables.filled(page, results) == page, "say `python -m study.figures --docs`"
    assert all(f"<!-- {name} -->" in page for name in tables.BLOCKS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("blocs",), "no figure 'blocs': choose from tasks"),
        (("table1", "--results", "nowhere"), "nowhere has no table1: measure it"),
        (("tasks", "--out", "nowhere"), "nowhere: no such folder"),
        (("tasks", "--weights", "nowhere"), "nowhere"),
    ),
)
def test_misuse_is_one_line(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["study.figures", *arguments, *(() if "--out" in arguments else ("--out", "."))]
    )
    with pytest.raises(SystemExit) as ended:
        figures.files.run(figures.main)
    assert ended.value.code == 2 and words in capsys.readouterr().err

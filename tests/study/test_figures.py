"""study/figures.py, study/tables.py: what pictures and tables show is what was computed and measured."""

import json

import numpy as np
import pytest
from PIL import Image

from kit import backbone
from study import diagrams, figures, tables


def test_the_shipped_pictures_are_todays(tiny_weights, tmp_path, verb, monkeypatch):
    # catches a change of the method, of the puppet or of the results that its pictures do not show
    monkeypatch.setattr(backbone, "PUPPET_DEFAULTS", backbone.PUPPET_DEFAULTS._replace(steps=1))
    assert verb(figures, "--weights", tiny_weights, "--out", tmp_path).code == 0
    drawn = {path.stem: path for path in tmp_path.iterdir()}
    assert drawn.keys() == {*diagrams.DRAWN, "tasks", *figures.READ}
    assert np.asarray(Image.open(drawn.pop("tasks")).convert("L")).std() > 5
    for name, path in drawn.items():
        both = path, figures.ASSETS / path.name
        ours, shipped = (np.asarray(Image.open(p).convert("L"), float) for p in both)
        # another letter changes pixels by 100 and more; the shipped ones have few colours, to be small
        assert ours.shape == shipped.shape and np.abs(ours - shipped).max() < 64, name


def test_blocks_are_filled_between_their_markers():
    text = "a <!-- table5 -->\nold\n<!-- /table5 --> b <!-- a81 -->\n\n<!-- /a81 -->"
    measures = {"mpjpe_mm": {"mean": 0.2, "error": 0.01}, "pa_mpjpe_mm": {"mean": 0.1, "error": 0.01}}
    found = {"seeds": 3, "clips": 8, "steps": 10, "trained_clips": 1600, "measures": measures}
    filled = tables.filled(text, {"table5": {"echomotion": found, "mean-motion": found | {"steps": 0}}})
    assert filled.startswith("a <!-- table5 -->\n| ") and "old" not in filled
    assert "| mean motion | 0.100 ± 0.010 | 0.200 ± 0.010 | 3 |  |\n" in filled
    assert "| EchoMotion | 0.100 ± 0.010 | 0.200 ± 0.010 | 3 | 1,600 |\n\nOn 8 held-out clips" in filled
    assert f"b <!-- a81 -->\n{tables.MISSING}\n<!-- /a81 -->" in filled


@pytest.mark.parametrize(
    ("mean", "errors", "shown"),
    (
        (0.59672, (0.0123, 0.002), "0.597 ± 0.012"),  # over clips, over seeds
        (50.21, (3.0, 4.0), "50.2 ± 5.0"),
        (294.2, (23.1, 0.0), "294 ± 23"),
        (5.0, (0, 0), "5"),
    ),
)
def test_a_cell_has_two_digits_of_its_error(mean, errors, shown):
    assert tables.cell({"mean": mean, "error": errors[0], "error_seeds": errors[1]}) == shown


def test_pages_are_in_step_with_the_results():
    pages = [page.read_text() for page in figures.PAGES]
    results = json.loads(figures.RESULTS.read_text())
    assert pages == [tables.filled(page, results) for page in pages], "say `python -m study.figures --docs`"
    assert all(f"<!-- {name} -->" in "".join(pages) for name in tables.BLOCKS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("blocs",), "invalid choice: 'blocs' (choose from 'frames'"),
        (("a81", "--results", "nowhere"), "nowhere has no a81: measure it"),
    ),
)
def test_misuse_is_one_line(arguments, words, verb):
    ended = verb(figures, *arguments)
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1

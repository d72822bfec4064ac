"""What each of the four concept files shows when it is run by itself."""

import re
import runpy

import pytest
from conftest import ROOT


def shown(name: str, capsys: pytest.CaptureFixture) -> str:
    runpy.run_path(str(ROOT / name), run_name="__main__")
    return capsys.readouterr().out


def test_rope_shows_the_4_to_1_alignment(capsys):
    rows = shown("rope.py", capsys).splitlines()[1:]
    largest = [
        [t for t, cell in enumerate(re.findall(r"\d+\.\d{3}.", row)) if cell[-1] == "*"] for row in rows
    ]
    # half-way between two latents both are nearest
    assert largest == [[0], [0], [0, 1], [1], [1], [1], [1, 2], [2], [2]]


def test_motion_tokens_counts_51_tokens_and_235_numbers(capsys):
    out = shown("motion_tokens.py", capsys)
    assert "50..50  betas" in out and "numbers 225..234" in out and "(1, 867, 128)" in out


def test_dual_dit_shows_the_shapes_through_a_block(capsys):
    out = shown("dual_dit.py", capsys)
    assert "into a block        (1, 320, 128), (1, 867, 128)" in out
    assert "velocities          (1, 48, 5, 8, 8), (1, 17, 235)" in out


def test_flow_shows_the_terms_of_guidance(capsys):
    calls = [re.findall(r"u\(x, (.), (.)\)", part) for part in shown("flow.py", capsys).split("ω1 =")[1:]]
    assert calls == [
        [("m", "y")],
        [("m", "y"), ("∅", "∅")],
        [("m", "y"), ("m", "∅"), ("∅", "∅")],
    ]

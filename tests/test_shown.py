"""What each of the four concept files shows when it is run by itself, and that it takes seconds."""

import re
import runpy
import time

import pytest
from conftest import ROOT

SECONDS = 20  # of one core


@pytest.fixture
def shown(capsys):
    """shown(file): what it prints; fails where it takes long, in time of the processor."""

    def run(name: str) -> str:
        before = time.process_time()
        runpy.run_path(str(ROOT / name), run_name="__main__")
        assert time.process_time() - before < SECONDS
        return capsys.readouterr().out

    return run


def test_rope_shows_the_4_to_1_alignment(shown):
    peaks = []
    for row in shown("rope.py").splitlines()[2::4]:  # frames that stand on their latent
        cells = re.findall(r"(\d+\.\d)(\*?)", row)
        peaks.append([max(part)[1] == "*" for part in (cells[:5], cells[5:])])
    synced, unsynced = zip(*peaks, strict=True)
    assert synced == (True,) * 5 and not all(unsynced)


def test_motion_tokens_counts_51_tokens_and_235_numbers(shown):
    out = shown("motion_tokens.py")
    assert "50..50  betas" in out and "numbers 225..234" in out and "(1, 867, 128)" in out


def test_dual_dit_shows_the_shapes_through_a_block(shown):
    out = shown("dual_dit.py")
    assert re.search(r"out of a block +video \(1, 320, 128\), motion \(1, 867, 128\)", out)
    assert re.search(r"velocities +video \(1, 48, 5, 8, 8\), motion \(1, 17, 235\)", out)
    assert out.splitlines()[-1].endswith("video (1, 320, 128)")  # the video alone


def test_flow_learns_two_coupled_modalities_each_way(shown):
    # half of the circle's points are 1.4 away from a guess; the mean distance of two of them is 1.27
    out = shown("flow.py")
    errors = dict(re.findall(r"(joint|motion to video|video to motion) +(\d\.\d+)", out))
    assert float(errors["joint"]) < 0.4
    assert max(float(errors["motion to video"]), float(errors["video to motion"])) < 0.15
    assert int(re.search(r"(\d+)% in the half", out)[1]) > 90

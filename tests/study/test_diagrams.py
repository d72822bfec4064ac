"""study/diagrams.py: the shipped pictures are what it draws, and it draws what the code computes."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from flow import Role, Task
from study import diagrams, figures


def test_the_shipped_pictures_are_todays(tmp_path, verb):
    # catches a change of the method, or of the puppet, that its pictures do not show
    assert verb(figures, *diagrams.DRAWN, "--out", tmp_path).code == 0
    for path in tmp_path.iterdir():
        both = path, ROOT / "assets" / path.name
        ours, shipped = (np.asarray(Image.open(p).convert("L"), float) for p in both)
        assert ours.shape == shipped.shape and np.abs(ours - shipped).mean() < 1, path.name
    assert {path.stem for path in tmp_path.iterdir()} == set(diagrams.DRAWN)


@pytest.mark.parametrize("task", diagrams.EQUATIONS)
def test_equations_call_the_network_as_the_task_says(task: Task):
    # x and m: absent only where the condition is dropped; y only where the task has text
    made, condition = ("m", "x") if task.motion is Role.NOISY else ("x", "m")
    terms = " ".join(diagrams.EQUATIONS[task])
    assert "ω1" in terms if "y" in terms else task is Task.VIDEO_TO_MOTION
    assert ("ω2" in terms) == (Role.CLEAN in (task.video, task.motion))
    assert made in terms and condition in terms

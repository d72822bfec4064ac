"""kit/plots.py: the picture of a run's losses."""

import numpy as np
from scipy.ndimage import uniform_filter1d

from kit import plots


def test_the_line_is_a_centred_mean_and_long_runs_have_few_dots(tmp_path, monkeypatch):
    # catches a line that lags behind its losses, and dots so many that they hide it
    losses = np.exp(-np.arange(5000) / 1000) + np.random.default_rng(0).uniform(size=5000)
    log = [{"step": i, "stage": 2, "task": "joint", "loss": loss} for i, loss in enumerate(losses)]
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plots.loss_picture(tmp_path / "loss.png", log)
    dots, line = figures[0].axes[0].lines
    inner = slice(125, -125)  # beyond, the window is cut
    expected = uniform_filter1d(losses, 251)[inner]
    np.testing.assert_allclose(line.get_ydata()[inner], expected, rtol=1e-9)
    steps = dots.get_xdata()
    assert len(steps) <= 2000 and steps[-1] >= 4990
    np.testing.assert_array_equal(dots.get_ydata(), losses[steps])

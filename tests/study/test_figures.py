"""study/figures.py: what the pictures show is what the code computes."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

from kit import plots
from kit.attention import holds
from rope import TOKENS_PER_FRAME
from study import figures


def draw(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["study.figures", *map(str, arguments)])
    figures.main()


@pytest.fixture
def few(monkeypatch) -> None:
    """As little work as shows everything."""
    monkeypatch.setattr(figures, "PUPPET_DEFAULTS", figures.PUPPET_DEFAULTS._replace(steps=1))
    monkeypatch.setattr(figures, "OMEGAS", ((1.0, 2.0), (0.0, 1.0)))


def test_each_figure_is_written_and_the_same_again(few, tiny_weights, tmp_path, monkeypatch):
    pictures = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        folder.mkdir()
        draw(monkeypatch, "--weights", tiny_weights, "--out", folder)
        pictures.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert pictures[0].keys() == {
        "blocks.png", "lattice.png", "alignment.png", "ablation.png", "tasks.gif", "trajectory.png",
        "guidance.png",
    }  # fmt: skip
    assert pictures[0] == pictures[1]
    for path in (tmp_path / "first").iterdir():
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5, path
    with Image.open(tmp_path / "first" / "tasks.gif") as film:
        assert film.n_frames > 1


def by_hand(frames: int, synced: bool, latents: int, dim: int = 128) -> torch.Tensor:
    """Equal content: a pair of channels turned by angles a and b has the product 2·cos(a - b)."""
    sizes = (dim - 2 * (dim // 6) * 2, dim // 6 * 2, dim // 6 * 2)
    found = torch.zeros(frames, latents)
    place = torch.arange(8.0)
    token = torch.arange(float(TOKENS_PER_FRAME))
    for f in range(frames):
        for t in range(latents):
            axes = (
                [(f / 4 if synced else f) - t],
                [(8 + token if synced else token)[:, None] - place],
                [(8 + token if synced else token)[:, None] - place],
            )
            total = 0.0
            for size, (difference,) in zip(sizes, axes, strict=True):
                rates = 10_000.0 ** (-torch.arange(0, size, 2) / size)
                angle = torch.as_tensor(difference, dtype=torch.float32)[..., None] * rates
                total += 2 * angle.cos().sum(-1).mean()
            found[f, t] = total / dim**0.5
    return found


@pytest.mark.parametrize("synced", (True, False))
def test_alignment_shows_the_logits_of_positions(synced):
    found = figures.by_position(9, synced)
    torch.testing.assert_close(found, by_hand(9, synced, 3), atol=2e-3, rtol=1e-3)
    peaks = found.argmax(dim=1).tolist()
    assert all(abs(peak - f / 4) <= 0.5 for f, peak in enumerate(peaks)) == synced


def test_ablation_shows_each_variants_own_attention(tmp_path, monkeypatch):
    # catches rows that are swapped, or named after the other variant
    own = holds(17).float()
    maps = {"echomotion": [own.tolist()] * 2, "unsynced": [torch.full((17, 5), 0.2).tolist()] * 2}
    (tmp_path / "ablation.json").write_text(
        json.dumps({"variants": {name: {"seeds": [0], "attention": x} for name, x in maps.items()}})
    )
    monkeypatch.setattr(figures, "ABLATION", tmp_path / "ablation.json")
    drawn = []
    monkeypatch.setattr(plots, "attention_picture", lambda *given: drawn.append(given))
    figures.ablation(tmp_path / "a.png")
    ((_, attention, shares, title, names),) = drawn
    assert attention.shape == (4, 17, 5) and "1 seeds" in title
    assert shares.tolist() == pytest.approx([1, 1, 0.2, 0.2])
    assert [name.split(",")[0] for name in names] == ["MVS-RoPE"] * 2 + ["unsynced"] * 2


def test_curves_are_a_runs_losses(tmp_path, monkeypatch):
    rows = [f'{{"step": {k}, "stage": 2, "task": "joint", "loss": {1 / (k + 1)}}}' for k in range(9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    draw(monkeypatch, "curves", "--run", tmp_path, "--out", tmp_path)
    plots.loss_picture(tmp_path / "metrics.jsonl", tmp_path / "other.png")
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_lattice_draws_the_positions_of_the_code(tmp_path, monkeypatch):
    figures.lattice(tmp_path / "as_it_is.png")
    shifted = figures.motion_positions
    monkeypatch.setattr(figures, "motion_positions", lambda *a, **k: shifted(*a, **k) + 3)
    figures.lattice(tmp_path / "shifted.png")
    pictures = [matplotlib.image.imread(tmp_path / name) for name in ("as_it_is.png", "shifted.png")]
    assert pictures[0].shape != pictures[1].shape or (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("blocs",), "no figure 'blocs': choose from blocks"),
        (("curves",), "add --run RUN"),
        (("blocks", "--out", "nowhere"), "nowhere: no such folder"),
        (("curves", "--run", "nowhere"), "nowhere/metrics.jsonl: no such file"),
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

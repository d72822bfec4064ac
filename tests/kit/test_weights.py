"""kit/weights.py: what is saved comes back, and a bad file is refused with words that help."""

import json
import resource
from pathlib import Path

import pytest
import torch
from conftest import TINY, contents, tiny_model
from safetensors.torch import load_file, save_file

from dual_dit import DualDiTConfig
from kit import weights
from kit.weights import load_weights, save_weights

EXTRA = {"encode": torch.arange(6.0).view(2, 3), "scale": torch.tensor(0.1)}


@pytest.fixture(scope="module")
def model():
    model = tiny_model().eval()
    model.motion_mean.copy_(torch.linspace(-1, 1, 235))
    return model


@pytest.fixture
def saved(tmp_path, model):
    path = tmp_path / "new folder" / "w.safetensors"
    save_weights(path, TINY, model.state_dict(), EXTRA)
    return path


def edit(path: Path, config: str | None = None, **tensors: torch.Tensor) -> None:
    """Rewrite a weights file with another configuration, and with these tensors changed."""
    save_file(load_file(path) | tensors, path, {"config": config or json.dumps(vars(TINY))})


def test_network_configuration_and_extras_come_back(saved, model):
    back, extra = load_weights(saved)
    assert back.config == model.config and not back.training
    assert not any(p.requires_grad for p in back.parameters())
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), atol=0, rtol=0)
    torch.testing.assert_close(extra, EXTRA, atol=0, rtol=0)


def test_a_full_disk_is_an_error_in_one_line_and_leaves_the_old_file_and_nothing_else(saved, model):
    # catches writing in place, which would cost the last good weights; and safetensors' own error, which is
    # neither a ValueError nor an OSError: a user would see its traceback
    before, (soft, hard) = contents(saved.parent), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes of a file
    try:
        with pytest.raises(OSError, match=r"cannot write .*w\.safetensors: .*File too large"):
            save_weights(saved, TINY, model.state_dict(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(saved.parent) == before


def test_every_field_of_the_configuration_comes_back(tmp_path):
    # catches fields that leave no trace in the tensors: the ablation would be sampled as the real thing
    sizes = {"layers": 1, "width": 12, "heads": 1, "ffn": 8, "channels": 2, "text_dim": 4, "freq_dim": 4}
    config = DualDiTConfig(**sizes, synced=False, apart=False, eps=1e-5, patch=(1, 2, 2), dual=(0,))
    save_weights(tmp_path / "w", config, weights.DualDiT(config).state_dict(), {})
    assert load_weights(tmp_path / "w")[0].config == config


def test_the_same_weights_give_the_same_bytes(tmp_path, model):
    # catches a second entry of metadata: safetensors writes those in random order
    for k in range(8):
        save_weights(tmp_path / f"{k}", TINY, model.state_dict(), EXTRA, settings={"fps": 16, "frames": 9})
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated"),
    "no configuration": (
        lambda path: save_file(load_file(path), path),
        "not written by this version.*config",
    ),
    "unknown field": (lambda path: edit(path, '{"depth": 3}'), "not written by this version.*depth"),
    "configuration of another tool": (lambda path: edit(path, "tiny.yaml"), "not written by this version"),
    "missing tensor": (
        lambda path: edit(path, json.dumps(vars(TINY) | {"layers": 3})),
        r"Missing key.*blocks\.2\.motion\.ffn",
    ),
    "unknown tensor": (lambda path: edit(path, stranger=torch.ones(1)), "Unexpected key.*stranger"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_refused_by_name_and_reason(saved, damage, words):
    damage(saved)
    with pytest.raises(ValueError, match=f"(?s){saved.name}.*{words}"):
        load_weights(saved)


def test_a_bf16_network_keeps_in_fp32_what_needs_it(saved, model):
    # catches statistics, noise levels and norms that are rounded on the way in
    state = load_weights(saved, dtype=torch.bfloat16)[0].state_dict()
    assert {name: x.dtype for name, x in state.items()} == {
        name: weights.stored_dtype(name, torch.bfloat16) for name in state
    }
    assert torch.equal(state["motion_mean"], model.motion_mean)
    assert {x.dtype for x in state.values()} == {torch.bfloat16, torch.float32}

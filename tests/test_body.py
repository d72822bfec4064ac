"""kit/body.py: joints without the mesh, and model files that cannot run code."""

import copyreg
import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from kit.body import FIELDS, Body
from kit.puppet_body import _body_data, body
from motion_tokens import axis_angle_to_matrix, matrix_to_axis_angle


def parameters(*lead: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3,), (23, 3), (10,), (3,))
    return tuple(torch.randn(*lead, *shape, generator=generator) for shape in shapes)


def test_joints_equal_smplx():
    pose = parameters(2, 5)
    vertices, joints = body().mesh(*pose)
    assert vertices.shape == (2, 5, len(body().smpl.v_template), 3)
    torch.testing.assert_close(body().joints(*pose), joints, atol=2e-6, rtol=1e-5)


def test_leading_axes_broadcast_and_gradients_flow():
    orient, pose, betas, transl = parameters(2, 5)
    betas = betas[:, :1].requires_grad_()
    joints = body().joints(orient, pose, betas, transl)
    torch.testing.assert_close(joints, body().joints(orient, pose, betas.expand(2, 5, 10), transl))
    joints.square().sum().backward()
    assert betas.grad.abs().sum() > 0
    single = body().joints(orient[0, 0], pose[0, 0], betas[0, 0], transl[0, 0])
    torch.testing.assert_close(single, joints[0, 0])


def test_turning_the_parameters_turns_the_body():
    """The root turns about the pelvis' rest position, so a turn about the origin also moves `transl`."""
    orient, pose, betas, transl = parameters(3)
    turn = axis_angle_to_matrix(torch.tensor((0.3, -1.2, 0.5)))
    pelvis = body().rest_joints(betas)[:, 0]
    turned_orient = matrix_to_axis_angle(turn @ axis_angle_to_matrix(orient))
    turned_transl = (pelvis + transl) @ turn.T - pelvis
    vertices, joints = body().mesh(orient, pose, betas, transl)
    turned_vertices, turned_joints = body().mesh(turned_orient, pose, betas, turned_transl)
    torch.testing.assert_close(turned_vertices, vertices @ turn.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned_joints, joints @ turn.T, atol=1e-5, rtol=1e-5)


def test_the_puppet_stands_like_smpl():
    joints = body().rest_joints(torch.zeros(10))
    names = body().joint_names
    assert joints[names.index("left_hand"), 0] > 0.6 > -0.6 > joints[names.index("right_hand"), 0]
    vertices, _ = body().mesh(torch.zeros(3), torch.zeros(23, 3), torch.zeros(10), torch.zeros(3))
    assert 1.6 < vertices[:, 1].max() - vertices[:, 1].min() < 1.8
    assert body().parents.tolist()[:5] == [-1, 0, 0, 0, 1] and body().faces.max() == len(vertices) - 1


def assert_same_body(loaded: Body) -> None:
    pose = parameters(4)
    for ours, theirs in zip(body().mesh(*pose), loaded.mesh(*pose), strict=True):
        torch.testing.assert_close(theirs, ours)


def test_npz_round_trip(tmp_path):
    np.savez(tmp_path / "SMPL_NEUTRAL.npz", **_body_data())
    assert_same_body(Body.load(tmp_path / "SMPL_NEUTRAL.npz"))
    assert_same_body(Body.load(tmp_path))


@pytest.fixture
def chumpy(monkeypatch):
    """Classes under chumpy's names, to write pickles that hold them, as the official files do."""
    module, ch, reordering = (types.ModuleType(n) for n in ("chumpy", "chumpy.ch", "chumpy.reordering"))
    ch.Ch = type("Ch", (), {"__module__": "chumpy.ch"})
    reordering.Select = type("Select", (), {"__module__": "chumpy.reordering"})
    for written in (module, ch, reordering):
        monkeypatch.setitem(sys.modules, written.__name__, written)
    return types.SimpleNamespace(Ch=ch.Ch, Select=reordering.Select)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_official_pickle(tmp_path, chumpy, protocol):
    sparse = pytest.importorskip("scipy.sparse")
    data = _body_data()
    data["J_regressor"] = sparse.csc_matrix(data["J_regressor"])
    data["v_template"], wrapped = chumpy.Ch(), data["v_template"]
    data["v_template"].x = wrapped
    wide, select = np.concatenate((data["shapedirs"], data["shapedirs"] * 7), axis=2), chumpy.Select()
    select.a, select.idxs = chumpy.Ch(), np.arange(wide.size).reshape(wide.shape)[..., :10].ravel()
    select.a.x, select.preferred_shape = np.asfortranarray(wide), data["shapedirs"].shape
    data["shapedirs"] = select
    data["bs_type"] = "lrotmin"
    (tmp_path / "SMPL_NEUTRAL.pkl").write_bytes(pickle.dumps(data, protocol=protocol))
    for name in ("chumpy", "chumpy.ch", "chumpy.reordering"):
        del sys.modules[name]  # a reader does not have it
    assert_same_body(Body.load(tmp_path))


class Touch:
    """Unpickled by the plain reader, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return io.open, (self.path, "w")


class Forged:
    """An object array over raw memory: numpy's own unpickling would take the bytes for pointers."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), bytearray(8))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_hostile_pickle_is_refused(tmp_path, protocol):
    bait, file = tmp_path / "bait", tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({**_body_data(), "bs_type": Touch(bait)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"io\.open"):
        Body.load(file)
    assert not bait.exists()
    file.write_bytes(pickle.dumps(Forged(), protocol=protocol))
    with pytest.raises((ValueError, TypeError)):
        Body.load(file)


def test_extension_codes_meet_the_allow_list(tmp_path):
    copyreg.add_extension("os", "getcwd", 0x7FFF)
    try:
        (tmp_path / "model.pkl").write_bytes(pickle.PROTO + b"\x02" + pickle.EXT2 + b"\xff\x7f)R.")
        with pytest.raises(ValueError, match=r"os\.getcwd"):
            Body.load(tmp_path / "model.pkl")
    finally:
        copyreg.remove_extension("os", "getcwd", 0x7FFF)


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="SMPL_NEUTRAL"):
        Body.load(tmp_path)
    np.savez(tmp_path / "other.npz", poses=np.zeros(3))
    with pytest.raises(ValueError, match="v_template"):
        Body.load(tmp_path / "other.npz")
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(ValueError, match=r"\.npz or \.pkl"):
        Body.load(tmp_path / "model.txt")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(dict.fromkeys(FIELDS))[:-9])
    with pytest.raises(ValueError, match=r"cut\.pkl"):
        Body.load(tmp_path / "cut.pkl")
    with pytest.raises(ValueError, match="52"):
        Body({**_body_data(), "weights": np.zeros((5, 52))})
    orient, pose, betas, transl = parameters(2)
    with pytest.raises(ValueError, match="body_pose"):
        body().joints(orient, pose[:, :21], betas, transl)
    with pytest.raises(ValueError, match="betas"):
        body().joints(orient, pose, betas[:, :4], transl)

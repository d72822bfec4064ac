"""kit/body.py: joints without the mesh, and model files that cannot run code."""

import pickle
import struct
from typing import ClassVar

import numpy as np
import pytest
import torch

from kit.body import Body
from kit.puppet.skeleton import _body_data, body


def parameters(*lead: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3,), (23, 3), (10,), (3,))
    return tuple(torch.randn(*lead, *shape, generator=generator) for shape in shapes)


def test_joints_equal_smplx_and_leading_axes_broadcast():
    orient, pose, betas, transl = parameters(2, 5)
    betas = betas[:, :1]
    joints = body().joints(orient, pose, betas, transl)
    vertices, expected = body().mesh(orient, pose, betas.expand(2, 5, 10), transl)
    assert vertices.shape == (2, 5, len(body().smpl.v_template), 3)
    torch.testing.assert_close(joints, expected, atol=2e-6, rtol=1e-5)
    single = body().joints(orient[0, 0], pose[0, 0], betas[0, 0], transl[0, 0])
    torch.testing.assert_close(single, joints[0, 0])


def assert_same_body(loaded: Body) -> None:
    pose = parameters(4)
    for ours, theirs in zip(body().mesh(*pose), loaded.mesh(*pose), strict=True):
        torch.testing.assert_close(theirs, ours)


GOOD = _body_data()
# official .npz files have 300 numbers of shape
WIDE = GOOD | {"shapedirs": np.pad(GOOD["shapedirs"], ((0, 0), (0, 0), (0, 290)), constant_values=1)}
NAMES = [
    ("neutral", "SMPL_NEUTRAL.npz"), ("neutral", "smpl/SMPL_NEUTRAL.pkl"),
    ("neutral", "basicmodel_neutral_lbs_10_207_0_v1.1.0.pkl"), ("female", "smpl/SMPL_FEMALE.npz"),
    ("female", "basicModel_f_lbs_10_207_0_v1.0.0.pkl"), ("male", "basicmodel_m_lbs_10_207_0_v1.0.0.pkl"),
]  # fmt: skip


@pytest.mark.parametrize("gender, name", NAMES)
def test_a_folder_holds_a_model_for_each_gender(tmp_path, gender, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".npz":
        np.savez(file, **WIDE)
    else:
        file.write_bytes(pickle.dumps(GOOD))
    assert_same_body(Body.load(tmp_path, gender=gender))
    other = "male" if gender == "female" else "female"
    with pytest.raises(FileNotFoundError, match=f"SMPL_{other.upper()}.npz.*basicModel_{other[0]}_lbs"):
        Body.load(tmp_path, gender=other)


class Python2(pickle._Pickler):
    """Writes texts, bytes and names of modules as Python 2 did."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, value: object, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core").replace("builtins", "__builtin__")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())


def foreign(name: str, **state: object) -> object:
    """An object of the class module.name, with what chumpy keeps beside its numbers."""
    module, _, kind = name.rpartition(".")
    thing = type(kind, (), {"__module__": module})()
    vars(thing).update({"_dirty_vars": {"x"}, "_itr": None, "_make_dense": False, **state})
    return thing


def test_a_pickle_of_python_2(tmp_path):
    """As the SMPL release has it: written without Python 2, chumpy or scipy."""
    data = _body_data()
    rows, columns = np.nonzero(data["J_regressor"].T)[::-1]
    counts = np.bincount(columns, minlength=data["J_regressor"].shape[1])
    wide = np.asfortranarray(np.concatenate((data["shapedirs"], data["shapedirs"] * 7), axis=2))
    chosen = np.arange(wide.size).reshape(wide.shape)[..., :10].ravel()
    regressor = {
        "_shape": data["J_regressor"].shape, "data": data["J_regressor"][rows, columns],
        "indices": rows.astype(np.int32), "indptr": np.concatenate(([0], counts.cumsum())).astype(np.int32),
    }  # fmt: skip
    selection = {"a": foreign("chumpy.ch.Ch", x=wide), "idxs": chosen, "preferred_shape": (len(wide), 3, 10)}
    data |= {
        "J_regressor": foreign("scipy.sparse.csc.csc_matrix", **regressor),
        "v_template": foreign("chumpy.ch.Ch", x=data["v_template"]),
        "shapedirs": foreign("chumpy.reordering.Select", **selection),
        "kintree_table": data["kintree_table"].astype(np.uint32),  # the root's parent is 4294967295
        "J": foreign("chumpy.reordering.transpose", a=None),  # not needed, not evaluated
        "pose_training_info": {"gender": "female", "note": "\xe9"},
    }
    file = tmp_path / "basicModel_f_lbs_10_207_0_v1.0.0.pkl"
    Python2(file.open("wb"), protocol=2).dump(data)
    assert_same_body(Body.load(tmp_path, "female"))
    data["v_template"] = foreign("chumpy.ch_ops.add", x=data["v_template"])
    Python2(file.open("wb"), protocol=2).dump(data)
    with pytest.raises(ValueError, match=r"v1\.0\.0\.pkl.*got add"):
        Body.load(file)


class Forged:
    """An object array over raw memory: numpy's own unpickling would take the bytes for pointers."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), bytearray(8))


def test_an_array_over_raw_memory_is_refused(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Forged()))
    with pytest.raises(ValueError, match=r"model\.pkl"):
        Body.load(tmp_path / "model.pkl")


HOSTILE = [
    "posix system", "builtins eval", "__builtin__ execfile", "builtins getattr", "numpy fromfile",
    "numpy.core.multiarray fromfile", "scipy.sparse load_npz", "scipy.sparse.os system", "chumpyx.ch Ch",
    "_codecs lookup", "pickle loads",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_outside_the_allow_list(tmp_path, name):
    file = tmp_path / "model.pkl"
    module, attribute = name.split()
    file.write_bytes(f"c{module}\n{attribute}\n(S'bait'\ntR.".encode())
    with pytest.raises(ValueError, match=rf"model\.pkl.*{module}\.{attribute}"):
        Body.load(file)


MALFORMED = [
    ({"v_template": None}, "lacks.*v_template"),
    ({"shapedirs": GOOD["shapedirs"][..., :9]}, "shapedirs has 9 .*expected 10"),
    ({"weights": np.zeros((5, 52))}, "24 joints"),
]


@pytest.mark.parametrize("change, message", MALFORMED)
def test_malformed_models(tmp_path, change, message):
    data = {name: value for name, value in (GOOD | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **data)
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        Body.load(tmp_path / "bad.npz")


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"SMPL_NEUTRAL.*basicmodel_neutral.*smpl/SMPL_NEUTRAL"):
        Body.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pkl"):
        Body.load(tmp_path / "none.pkl")
    contents = {"model.txt": (b"", r"\.npz or \.pkl"), "cut.npz": (b"PK", "cut.npz cannot be read")}
    contents["list.pkl"] = pickle.dumps([]), "list.pkl: it holds a list"
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Body.load(tmp_path / name)

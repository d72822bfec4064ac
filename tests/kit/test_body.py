"""kit/body.py: joints without the mesh, and model files that cannot run code."""

import copyreg
import pickle
import struct

import numpy as np
import pytest
import torch

from kit.body import Body
from kit.puppet.skeleton import _body_data, body
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


def assert_same_body(loaded: Body) -> None:
    pose = parameters(4)
    for ours, theirs in zip(body().mesh(*pose), loaded.mesh(*pose), strict=True):
        torch.testing.assert_close(theirs, ours)


def test_three_hundred_shapes_are_read_as_ten(tmp_path):
    data = _body_data()
    data["shapedirs"] = np.concatenate((data["shapedirs"], np.ones((*data["v_template"].shape, 290))), axis=2)
    np.savez(tmp_path / "wide.npz", **data)
    assert_same_body(Body.load(tmp_path / "wide.npz"))


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
        np.savez(file, **_body_data())
    else:
        file.write_bytes(pickle.dumps(_body_data()))
    assert_same_body(Body.load(tmp_path, gender=gender))
    other = "male" if gender == "female" else "female"
    with pytest.raises(FileNotFoundError, match=f"SMPL_{other.upper()}.npz.*basicModel_{other[0]}_lbs"):
        Body.load(tmp_path, gender=other)


def python2(value: object) -> bytes:
    """A value as Python 2 pickled it at protocol 2: byte strings, old module names, chumpy's state."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin1")
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(value[key]) for key in value) + b"u"
    if isinstance(value, set):
        return b"c__builtin__\nset\n(](" + b"".join(map(python2, sorted(value))) + b"etR"
    if isinstance(value, np.ndarray):
        code = value.dtype.str[1:]
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        empty += python2((0,)) + python2("b") + b"tR"
        dtype = b"cnumpy\ndtype\n" + python2((code, 0, 1)) + b"R"
        dtype += python2((3, "<", None, None, None, -1, -1, 0)) + b"b"
        order = "F" if value.flags.f_contiguous else "C"
        content = b"T" + struct.pack("<i", value.nbytes) + value.tobytes(order)
        state = b"(" + python2(1) + python2(value.shape) + dtype + python2(order == "F") + content + b"t"
        return empty + state + b"b"
    name, state = value
    return f"c{name[0]}\n{name[1]}\n".encode() + b")\x81" + python2(state) + b"b"


def python2_object(name: str, **state: object) -> list:
    """An object of the class module.name, with what chumpy keeps beside its numbers."""
    return [name.rsplit(".", 1), {"_dirty_vars": {"x"}, "_itr": None, "_make_dense": False, **state}]


def test_a_pickle_of_python_2(tmp_path):
    """As the SMPL release has it: written by hand, without Python 2, chumpy or scipy."""
    data = _body_data()
    rows, columns = np.nonzero(data["J_regressor"].T)[::-1]
    counts = np.bincount(columns, minlength=data["J_regressor"].shape[1])
    wide = np.asfortranarray(np.concatenate((data["shapedirs"], data["shapedirs"] * 7), axis=2))
    chosen = np.arange(wide.size).reshape(wide.shape)[..., :10].ravel()
    regressor = {
        "_shape": data["J_regressor"].shape, "data": data["J_regressor"][rows, columns],
        "indices": rows.astype(np.int32), "indptr": np.concatenate(([0], counts.cumsum())).astype(np.int32),
    }  # fmt: skip
    selection = {
        "a": python2_object("chumpy.ch.Ch", x=wide),
        "idxs": chosen,
        "preferred_shape": data["shapedirs"].shape,
    }
    data |= {
        "J_regressor": python2_object("scipy.sparse.csc.csc_matrix", **regressor),
        "v_template": python2_object("chumpy.ch.Ch", x=data["v_template"]),
        "shapedirs": python2_object("chumpy.reordering.Select", **selection),
        "kintree_table": data["kintree_table"].astype(np.uint32),  # the root's parent is 4294967295
        "J": python2_object("chumpy.reordering.transpose", a=None),  # not needed, not evaluated
        "pose_training_info": {"gender": "female", "note": "\xe9"},
    }
    file = tmp_path / "basicModel_f_lbs_10_207_0_v1.0.0.pkl"
    file.write_bytes(b"\x80\x02" + python2(data) + b".")
    assert_same_body(Body.load(tmp_path, "female"))
    data["v_template"] = python2_object("chumpy.ch_ops.add", x=_body_data()["v_template"])
    file.write_bytes(b"\x80\x02" + python2(data) + b".")
    with pytest.raises(ValueError, match=r"v1\.0\.0\.pkl.*got add"):
        Body.load(file)


class Forged:
    """An object array over raw memory: numpy's own unpickling would take the bytes for pointers."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), bytearray(8))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_an_array_over_raw_memory_is_refused(tmp_path, protocol):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Forged(), protocol=protocol))
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


def test_a_pickle_leaves_nothing_behind(tmp_path):
    """BUILD can set attributes on a class that a pickle names: the next pickle must not inherit them."""
    file, named = tmp_path / "model.pkl", b"\x80\x02cchumpy.ch\nCh\n"
    file.write_bytes(named + b"(N}U\x01xK\x05stb.")  # Ch.x = 5
    with pytest.raises(ValueError, match=r"model\.pkl"):
        Body.load(file)
    file.write_bytes(b"\x80\x02}U\x0av_template" + named[2:] + b")\x81s.")  # a Ch without x
    with pytest.raises(ValueError, match="no attribute 'x'"):
        Body.load(file)


def test_extension_codes_meet_the_allow_list(tmp_path):
    copyreg.add_extension("os", "getcwd", 0x7FFF)
    try:
        (tmp_path / "model.pkl").write_bytes(pickle.PROTO + b"\x02" + pickle.EXT2 + b"\xff\x7f)R.")
        with pytest.raises(ValueError, match=r"os\.getcwd"):
            Body.load(tmp_path / "model.pkl")
    finally:
        copyreg.remove_extension("os", "getcwd", 0x7FFF)


GOOD = _body_data()
MALFORMED = [
    ({"v_template": None}, "lacks.*v_template"),
    ({"v_template": GOOD["v_template"].ravel()}, "v_template is"),
    ({"v_template": GOOD["v_template"] * np.nan}, "v_template.*finite"),
    ({"shapedirs": GOOD["shapedirs"][..., :9]}, r"shapedirs is .*9\), expected .*10"),
    ({"posedirs": GOOD["posedirs"].astype(str)}, "posedirs.*finite numbers"),
    ({"J_regressor": GOOD["J_regressor"].T}, "J_regressor is"),
    ({"weights": np.zeros((5, 52))}, "24 joints"),
    ({"weights": np.array(1.0)}, "24 joints"),
    ({"kintree_table": GOOD["kintree_table"][:, ::-1]}, "come before its joint"),
    ({"f": GOOD["f"] + 10_000}, "f names vertices"),
    ({"f": GOOD["f"][:0]}, "f is"),
    ({"f": np.array(3)}, "f is"),
]


@pytest.mark.parametrize("change, message", MALFORMED)
def test_malformed_models(tmp_path, change, message):
    data = {name: value for name, value in (GOOD | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **data)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(data))
    for suffix in ("npz", "pkl"):
        with pytest.raises(ValueError, match=rf"bad\.{suffix}.*{message}"):
            Body.load(tmp_path / f"bad.{suffix}")


def test_what_is_no_model(tmp_path):
    """Damaged files: test_untrusted.py."""
    with pytest.raises(FileNotFoundError, match=r"none\.pkl"):
        Body.load(tmp_path / "none.pkl")
    for name, content, message in (
        ("model.txt", b"", r"\.npz or \.pkl"),
        ("model.npz", b"no archive", r"model\.npz cannot be read"),
        ("model.pkl", pickle.dumps(5), r"model\.pkl: it holds a int"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Body.load(tmp_path / name)

"""The SMPL body: model files -> joints and mesh, through smplx's own SMPL class.

Rotations are axis-angle in radians, lengths metres. SMPL rotates about the pelvis' rest position, not
about the origin: the pelvis stands at `rest_joints(betas)[0] + transl` whatever `global_orient` is.
"""

import contextlib
import hashlib
import io
from pathlib import Path

import numpy as np
import smplx
import torch
from einops import einsum, rearrange
from smplx.lbs import batch_rigid_transform
from torch import Tensor

from kit.untrusted import read_arrays, read_object
from motion_tokens import axis_angle_to_matrix

JOINT_NAMES = (
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle",
    "right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head",
    "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
    "left_hand", "right_hand",
)  # fmt: skip
SIDES = tuple(name.split("_")[0] if "_" in name else "middle" for name in JOINT_NAMES)  # left, right, middle
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
FIELDS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
NUM_BETAS = 10
GENDERS = {"female": "f", "male": "m", "neutral": "neutral"}  # and what the official file names call them


class Body(torch.nn.Module):
    """A body with SMPL's 24 joints, its linear shape space and its skinned mesh of V vertices.

    `data` maps SMPL's field names to arrays: v_template (V 3), shapedirs (V 3 >=10), posedirs (V 3 207),
    J_regressor (24 V), weights (V 24), kintree_table (2 24), f (F 3). All methods take any leading axes.
    """

    def __init__(self, data: dict[str, np.ndarray]):
        super().__init__()
        _check(data)
        # smplx also reports landmarks at named vertices; nothing here reads them, so any vertex will do
        landmarks = dict.fromkeys(("nose", "reye", "leye", "rear", "lear"), 0)
        with contextlib.redirect_stdout(io.StringIO()):  # smplx prints a warning for ten-number shape spaces
            self.smpl = smplx.SMPL(
                "", data_struct=smplx.utils.Struct(**data), vertex_ids=landmarks, num_betas=NUM_BETAS,
                use_hands=False, use_feet_keypoints=False, create_betas=False, create_global_orient=False,
                create_body_pose=False, create_transl=False,
            )  # fmt: skip
        parents = self.smpl.parents  # (24,) long: each joint's parent, -1 for the pelvis
        del self.smpl.parents  # a buffer: smplx reads it joint by joint, and a GPU's host would wait
        self.parents = self.smpl.parents = parents  # on the CPU always
        regressor = self.smpl.J_regressor
        # joints are linear in the shape, so the mesh is not needed to place them
        self.register_buffer("joint_template", regressor @ self.smpl.v_template)
        shapes = einsum(regressor, self.smpl.shapedirs, "j v, v xyz k -> j xyz k")
        self.register_buffer("joint_shapes", shapes)
        template = data["v_template"].astype(np.float32).tobytes()
        # identifies the body in records of what was made with it
        self.digest = hashlib.blake2b(template, digest_size=8).hexdigest()
        self.folder: Path | None = None  # of models of several genders
        self.others: dict[str, Body] = {}  # by gender

    def rest_joints(self, betas: Tensor) -> Tensor:
        """Shape (... 10) -> joint positions in the rest pose (... 24 3), metres."""
        return self.joint_template + einsum(betas, self.joint_shapes, "... k, j xyz k -> ... j xyz")

    def joints(self, global_orient: Tensor, body_pose: Tensor, betas: Tensor, transl: Tensor) -> Tensor:
        """Forward kinematics without the mesh: (... 3), (... 23 3), (... 10), (... 3) -> (... 24 3), metres.

        Differentiable; leading axes broadcast, e.g. betas (b 1 10) against poses (b f ...).
        """
        pose, betas, transl, lead = _flatten(global_orient, body_pose, betas, transl)
        posed, _ = batch_rigid_transform(axis_angle_to_matrix(pose), self.rest_joints(betas), self.parents)
        return (posed + rearrange(transl, "n xyz -> n 1 xyz")).reshape(*lead, 24, 3)

    def mesh(
        self, global_orient: Tensor, body_pose: Tensor, betas: Tensor, transl: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `joints`, through smplx's skinning: -> vertices (... V 3) and joints (... 24 3), metres."""
        pose, betas, transl, lead = _flatten(global_orient, body_pose, betas, transl)
        out = self.smpl(
            global_orient=pose[:, 0],
            body_pose=rearrange(pose[:, 1:], "n j xyz -> n (j xyz)"),
            betas=betas,
            transl=transl,
        )
        return out.vertices.reshape(*lead, -1, 3), out.joints[:, :24].reshape(*lead, 24, 3)

    @classmethod
    def load(cls, path: str | Path, gender: str = "neutral") -> "Body":
        """Read an SMPL model: `.npz`, official or converted `.pkl`, or a folder that holds one of `gender`.

        In a folder, the official names are tried, there and in `smpl/`. Raises FileNotFoundError with the
        paths tried, ValueError naming a file that is damaged, is no SMPL model or could run code.
        """
        path = Path(path)
        tried = _official_paths(path, gender) if path.is_dir() else [path]
        file = next((candidate for candidate in tried if candidate.is_file()), None)
        if file is None:
            places = ", ".join(map(str, tried))
            raise FileNotFoundError(f"no SMPL model: get one from https://smpl.is.tue.mpg.de as {places}")
        if file.suffix not in (".npz", ".pkl"):
            raise ValueError(f"{file}: expected an SMPL model file ending in .npz or .pkl")
        read = read_arrays(file, FIELDS) if file.suffix == ".npz" else read_object(file, "SMPL model", FIELDS)
        try:
            if not isinstance(read, dict):
                raise ValueError(f"it holds a {type(read).__name__}, expected an SMPL model's dictionary")
            body = cls({name: np.asarray(array) for name, array in read.items()})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if path.is_dir():
            body.folder, body.others = path, {gender: body}
        return body

    def genders(self) -> list[str]:
        """The genders of the models in this body's folder; none if it was loaded from a file."""
        paths = {gender: _official_paths(self.folder, gender) for gender in GENDERS if self.folder}
        return [gender for gender, files in paths.items() if any(file.is_file() for file in files)]

    def of(self, gender: str) -> "Body":
        """The body of this gender if this one was loaded from a folder that has it; else this one."""
        if gender not in self.others and gender in self.genders():
            self.others[gender] = Body.load(self.folder, gender)
        return self.others.get(gender, self)


def _official_paths(folder: Path, gender: str) -> list[Path]:
    """Where in a folder a model may be, as smplx (SMPL_*) and the SMPL releases (basicmodel_*) name it."""
    names = [f"SMPL_{gender.upper()}{suffix}" for suffix in (".npz", ".pkl")]
    for version in ("1.1.0", "1.0.0"):  # the releases differ in a capital letter, and by gender
        names += [f"basic{m}odel_{GENDERS[gender]}_lbs_10_207_0_v{version}.pkl" for m in "mM"]
    return [folder / place / name for place in ("", "smpl") for name in names]


def _flatten(
    global_orient: Tensor, body_pose: Tensor, betas: Tensor, transl: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Broadcast the leading axes and fold them into one: pose (n 24 3), betas (n 10), transl (n 3), lead."""
    lead = np.broadcast_shapes(  # torch's imports sympy, half a second
        global_orient.shape[:-1], body_pose.shape[:-2], betas.shape[:-1], transl.shape[:-1]
    )
    root = rearrange(global_orient, "... xyz -> ... 1 xyz").expand(*lead, 1, 3)
    pose = torch.cat((root, body_pose.expand(*lead, 23, 3)), dim=-2)
    flat_pose = rearrange(pose, "... j xyz -> (...) j xyz")
    flat_betas = rearrange(betas.expand(*lead, NUM_BETAS), "... k -> (...) k")
    flat_transl = rearrange(transl.expand(*lead, 3), "... xyz -> (...) xyz")
    return flat_pose, flat_betas, flat_transl, lead


def _check(data: dict[str, np.ndarray]) -> None:
    """Raise ValueError unless `data` holds the arrays of an SMPL model."""
    if missing := [name for name in FIELDS if name not in data]:
        raise ValueError(f"not an SMPL model: it lacks {missing}; expected the fields {list(FIELDS)}")
    if data["weights"].shape[-1:] != (24,):
        raise ValueError(f"weights is {data['weights'].shape}: expected 24 joints, not SMPL-H's or SMPL-X's")
    vertices = data["v_template"].size // 3
    shapes = {
        "v_template": (vertices, 3), "shapedirs": (vertices, 3, NUM_BETAS), "posedirs": (vertices, 3, 207),
        "J_regressor": (24, vertices), "weights": (vertices, 24), "kintree_table": (2, 24),
        "f": (data["f"].size // 3, 3),
    }  # fmt: skip
    for name, shape in shapes.items():
        array = data[name][..., :NUM_BETAS] if name == "shapedirs" else data[name]
        if array.shape != shape or not array.size:
            raise ValueError(f"{name} is {array.shape}, expected {shape}")
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError(f"{name} ({array.dtype}) holds values that are not finite numbers")
    parents, faces = data["kintree_table"][0, 1:].astype(np.int64), data["f"]
    if not ((parents >= 0) & (parents < np.arange(1, 24))).all():
        raise ValueError(f"kintree_table has the parents {parents}, expected each to come before its joint")
    if not 0 <= faces.min() <= faces.max() < vertices:
        raise ValueError(f"f names vertices {faces.min()} to {faces.max()}, expected 0 to {vertices - 1}")

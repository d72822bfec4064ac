"""One person's arrays, under each tool's names -> rotations, translation, camera and axes."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kit.data.motion_files import AXES
from kit.untrusted import read_object
from motion_tokens import matrix_to_axis_angle, sixd_to_matrix

NAMES = {  # of the same thing in different tools; the first one present is used
    "root": ("global_orient", "root_orient"),
    "body": ("body_pose", "pose_body"),
    "pose": ("pred_rotmat", "poses", "pose", "pose_cam", "smpl_pose", "pred_pose"),
    "transl": ("transl", "trans", "trans_cam", "cam_trans", "cam_t", "pred_cam_t", "pred_trans", "camera"),
    "betas": ("betas", "shape", "pred_shape", "pred_betas"),
    "frames": ("frame_ids", "frame_id", "frame", "frames", "time"),
    "rate": ("mocap_frame_rate", "mocap_framerate", "fps"),  # AMASS's SMPL-X and SMPL+H releases differ
    "intrinsics": ("K_fullimg", "cam_int", "cam_intrinsics", "intrinsics", "K"),
    "focal": ("focal_length", "img_focal", "focal"),
    "weak": ("pred_cam", "camera_bbox", "cam"),  # s, tx, ty in a box
    "box": ("box_size", "bbox_size", "scale"),
    "centre": ("box_center", "bbox_center", "center"),
}
MORE = ("Rh", "bbx_xys", "expression", "gender", "pose_world", "size", "surface_model_type")
READ = sorted({*MORE, *(name for names in NAMES.values() for name in names)})  # of an .npz
PARTS = {"root": (1,), "body": (21, 23, 51, 54), "pose": (22, 24, 52, 55)}  # joints of SMPL, SMPL+H, SMPL-X
ONLY_RECOVERED = ("pose_world", "pred_rotmat", "smpl_params_incam", "camera")  # no file of mocap has these
CROP_FOCAL, CROP = 5000.0, 256  # 4D-Humans: the focal length of a crop, in pixels, and its size
BOX_UNIT = 200  # pixels, in which some tools write the size of a box
TOOLS = "GVHMR, WHAM, TRAM, 4D-Humans, CameraHMR, HY-Motion or AMASS"
NO_POSE = f"it holds no person with an SMPL pose under a known name: expected a motion of {TOOLS}"

Size = tuple[int, int]  # height, width


def pick(record: dict, *things: str) -> np.ndarray | None:
    """The first of these things that a record has, as an array; None if it has none."""
    names = (name for thing in things for name in NAMES[thing])
    return next((np.asarray(record[name]) for name in names if record.get(name) is not None), None)


def pose_of(record: dict) -> Tensor:
    """All rotations (f 24 3) float64, no fingers; hand joints are identity unless the file has SMPL's."""
    root, body, pose = (_rotations(record, part) for part in PARTS)
    if pose is not None and body is None:
        root, body = pose[:, :1], pose[:, 1:]
        if "Rh" in record and not root.any():  # HY-Motion has the root's rotation in Rh only
            root = _rotations({"root_orient": record["Rh"]}, "root")
    if root is None or body is None:
        raise ValueError(NO_POSE)
    if len(root) != len(body):
        raise ValueError(f"the root has {len(root)} frames, the pose {len(body)}")
    body = body if body.shape[1] == 23 else F.pad(body[:, :21], (0, 0, 0, 2))
    return torch.cat([root, body], dim=1)


def _rotations(record: dict, part: str) -> Tensor | None:
    """Axis-angles, matrices, or 6D (a matrix's first column, then its second) -> axis-angles (f j 3)."""
    value = pick(record, part)
    if value is None:
        return None
    if not value.size or value.dtype.kind not in "fiu":
        raise ValueError(f"its {part} is {value.dtype} {value.shape}, expected numbers, a row for each frame")
    if part != "root" and value.shape in [(joints, 3) for joints in PARTS[part]]:
        value = value[None]  # the file holds one frame
    flat = torch.from_numpy(value.astype(np.float64).reshape(len(value), -1))
    numbers = next((n for n in (3, 6, 9) for joints in PARTS[part] if flat.shape[1] == n * joints), None)
    if numbers is None:
        name = next(name for name in NAMES[part] if name in record)
        known = f"{', '.join(map(str, PARTS[part]))} joints as axis-angle, matrix or 6D"
        raise ValueError(f"{name} is {value.shape}, expected for each frame one of {known}")
    if numbers == 3:
        return rearrange(flat, "f (j c) -> f j c", c=3)
    if numbers == 6:
        rows = value.shape[-2:] == (3, 2)  # columns side by side, else one after the other
        sixd = rearrange(flat, f"f (j {'r c' if rows else 'c r'}) -> f j (c r)", r=3, c=2)
        return matrix_to_axis_angle(sixd_to_matrix(sixd))
    matrix = rearrange(flat, "f (j r c) -> f j r c", r=3, c=3)
    skewed = (matrix @ matrix.mT - torch.eye(3)).abs().amax((2, 3)) > 0.01
    if (skewed | (torch.linalg.det(matrix) < 0)).any():
        raise ValueError(f"the matrices of its {part} are no rotations, expected orthonormal ones")
    return matrix_to_axis_angle(matrix)


def transl_of(record: dict, size: Size | None, notes: list[str]) -> np.ndarray:
    """(f 3) in the file's axes, metres: as it is, or from a weak-perspective camera (4D-Humans' rule).

    What is assumed is added to the notes.
    """
    transl, weak = pick(record, "transl"), pick(record, "weak")
    if transl is not None:
        if transl.shape[-1:] != (3,):
            raise ValueError(f"its transl is {transl.shape}, expected (frames, 3)")
        return transl.reshape(-1, 3)
    box, centre = pick(record, "box"), pick(record, "centre")
    if "bbx_xys" in record:  # GVHMR's name
        centre, box = np.split(np.asarray(record["bbx_xys"]), [2], axis=-1)
    if weak is None or box is None or centre is None:
        raise ValueError("it has no transl, and no camera (s, tx, ty) with a box and the box's centre")
    if size is None:
        hint = "give the file with its video, or add `size`, an array of its height and width, to it"
        raise ValueError(f"a camera (s, tx, ty) needs the size of the picture: {hint}")
    box = box.reshape(len(weak), -1).max(axis=1)
    if box.max() < BOX_UNIT / 10:
        box = box * BOX_UNIT
        notes.append(f"the sizes of its boxes are taken for units of {BOX_UNIT} pixels")
    (s, x, y), (cx, cy) = weak.reshape(-1, 3).T, centre.reshape(-1, 2).T
    (height, width), metre = size, box * s / 2  # a metre at the person's distance, in pixels
    away = _focal(record, size) / metre
    return np.stack([x + (cx - width / 2) / metre, y + (cy - height / 2) / metre, away], axis=1)


def _focal(record: dict, size: Size) -> float:
    given = pick(record, "focal")
    return CROP_FOCAL / CROP * max(size) if given is None else given.reshape(-1)[0]


def intrinsics_of(record: dict, path: Path, size: Size | None, notes: list[str]) -> Tensor | None:
    """(3 3), from the file, from TRAM's camera.npy beside it, or by the rule of the tool."""
    given, beside = pick(record, "intrinsics"), tram_camera(path)
    if given is not None:
        if given.ndim == 3 and np.ptp(given, axis=0).max() > 0.01 * given.max():
            notes.append("its intrinsics change: those of its first frame are used")
        return pinhole(given[0] if given.ndim == 3 else given)
    if "pred_rotmat" in record and beside:
        camera = read_object(beside, "camera of TRAM")
        return _lens(camera["img_focal"], *np.ravel(camera["img_center"]))
    if size is None:
        return None
    if "pose_world" in record:
        notes.append("WHAM's file has no camera: the one that it takes without --calib is assumed")
        return _lens(np.hypot(*size), size[1] / 2, size[0] / 2)
    if pick(record, "focal") is not None or "camera" in record or pick(record, "transl") is None:
        return _lens(_focal(record, size), size[1] / 2, size[0] / 2)
    return None


def tram_camera(path: Path) -> Path | None:
    """The file of TRAM's camera that belongs to one of its tracks."""
    beside = path.parent.parent / "camera.npy"
    return beside if path.parent.name == "hps" and beside.is_file() else None


def _lens(focal: float, x: float, y: float) -> Tensor:
    focal = np.ravel(focal)[0]
    return pinhole(np.array([[focal, 0, x], [0, focal, y], [0, 0, 1]]))


def pinhole(camera: np.ndarray) -> Tensor:
    """Intrinsics (3 3); ValueError if they are no pinhole's."""
    if camera.shape != (3, 3) or camera.dtype.kind not in "fiu":
        raise ValueError(f"camera is {camera.dtype} {camera.shape}, expected numbers (3, 3)")
    camera = torch.from_numpy(camera.astype(np.float32))
    zeros = camera * torch.tensor(((1, 0, 1), (0, 1, 1), (0, 0, 1)))
    if not torch.equal(camera, zeros) or camera[2, 2] != 1 or not camera.diagonal().gt(0).all():
        raise ValueError(f"camera is {camera.tolist()}, expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")
    return camera


def axes_of(record: dict) -> str:
    """The axes, one of AXES, that the kind of file implies; ValueError if it implies none."""
    if "Rh" in record:
        return "yup"  # HY-Motion's
    if any(name in record for name in ONLY_RECOVERED) or pick(record, "frames") is not None:
        return "opencv"
    if "trans" in record and pick(record, "rate") is not None:
        return "zup"  # as AMASS
    if pick(record, "intrinsics", "weak", "focal") is not None:
        return "opencv"
    raise ValueError(f"its axes are not known: name them, {', '.join(AXES)}, with @axes= or in metadata.csv")

"""A puppet clip's motion, written as tools of human mesh recovery write it, and where their cameras see it.

The tools' axes are OpenCV's: x right, y down, z ahead, the camera at the origin. Turned there by scipy.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from clip_folder import CAMERA, PLACE
from scipy.spatial.transform import Rotation

from kit import puppet

SMPLX_PELVIS = (0.00312326, -0.35140744, 0.01203655)  # of the neutral model at rest
FLIP = np.diag([1.0, -1.0, -1.0])  # from y up, looking along -z


def apart(a, b) -> float:
    """The largest angle between rotations, whose vectors may differ by full turns."""
    a, b = (Rotation.from_rotvec(np.asarray(x).reshape(-1, 3)) for x in (a, b))
    return (a.inv() * b).magnitude().max()


class Person(NamedTuple):
    """SMPL's parameters in OpenCV's axes."""

    orient: np.ndarray  # (f 3)
    pose: np.ndarray  # (f 23 3)
    betas: np.ndarray  # (10,)
    transl: np.ndarray  # (f 3)

    def rows(self, rows) -> "Person":
        return self._replace(orient=self.orient[rows], pose=self.pose[rows], transl=self.transl[rows])

    @property
    def full(self) -> np.ndarray:
        """(f 24 3)"""
        return np.concatenate([self.orient[:, None], self.pose], axis=1)

    @property
    def matrices(self) -> np.ndarray:
        """(f 24 3 3)"""
        return Rotation.from_rotvec(self.full.reshape(-1, 3)).as_matrix().reshape(-1, 24, 3, 3)

    def joints(self) -> np.ndarray:
        """(f 24 3), in OpenCV's axes: the body's own kinematics, which know nothing of cameras."""
        fields = (torch.from_numpy(x).float() for x in self)
        return puppet.body().joints(*fields).numpy()


def person(seed: int, frames: int) -> Person:
    """The puppet of this seed as its camera sees it, in OpenCV's axes."""
    clip = puppet.clips([seed], frames)
    orient, pose, betas, transl = (
        x[0].double().numpy() for x in (clip.global_orient, clip.body_pose, clip.betas, clip.transl)
    )
    pelvis = puppet.body().rest_joints(clip.betas[0])[0].double().numpy()
    transl = (pelvis + transl - PLACE.double().numpy()) @ FLIP.T - pelvis
    orient = (Rotation.from_matrix(FLIP) * Rotation.from_rotvec(orient)).as_rotvec()
    return Person(orient, pose, betas, transl)


def by_frame(who: Person) -> np.ndarray:
    return np.tile(who.betas, (len(who.transl), 1)).astype(np.float32)


def gvhmr(path: Path, who: Person) -> None:
    """Its transl moves SMPL-X, whose pelvis is elsewhere at rest."""

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x)).float()

    params = {
        "body_pose": tensor(who.pose[:, :21].reshape(-1, 63)),
        "betas": tensor(by_frame(who)),
        "global_orient": tensor(who.orient),
        "transl": tensor(who.transl + puppet.body().rest_joints(torch.zeros(10))[0].numpy() - SMPLX_PELVIS),
    }
    world = {name: torch.full_like(x, 9.0) for name, x in params.items()}
    cameras = tensor(CAMERA).repeat(len(who.transl), 1, 1)
    content = {"smpl_params_global": world, "smpl_params_incam": params, "K_fullimg": cameras}
    torch.save(content | {"net_outputs": {"model_output": tensor(who.orient)}}, path)


def wham_track(who: Person, frames: np.ndarray) -> dict:
    pose = who.full.reshape(-1, 72).astype(np.float32)
    return {
        "pose": pose, "trans": who.transl.astype(np.float32), "pose_world": pose * 0, "betas": by_frame(who),
        "trans_world": np.full_like(who.transl, 9), "verts": np.zeros((len(pose), 4, 3)), "frame_ids": frames,
    }  # fmt: skip


def wham(path: Path, who: Person) -> None:
    """A track's number is one of np.unique's, no int."""
    path.write_bytes(pickle.dumps({np.int64(7): wham_track(who, np.arange(len(who.transl)))}))


def tram(path: Path, who: Person) -> None:
    """hps/hps_track_0.npy in `path`'s folder, and camera.npy above it."""
    content = {
        "pred_cam": torch.ones(len(who.transl), 3),
        "pred_pose": torch.from_numpy(who.matrices[..., :2].swapaxes(-1, -2).reshape(-1, 144)).float(),
        "pred_shape": torch.from_numpy(by_frame(who)),
        "pred_rotmat": torch.from_numpy(who.matrices).float(),
        "pred_trans": torch.from_numpy(who.transl).float()[:, None],
        "frame": torch.arange(len(who.transl)),
    }
    np.save(path, content, allow_pickle=True)
    camera = {"img_focal": np.float64(CAMERA[0, 0]), "img_center": CAMERA[:2, 2], "pred_cam_R": np.eye(3)}
    np.save(path.parent.parent / "camera.npy", camera, allow_pickle=True)


def phalp(path: Path, who: Person, ghosts: tuple[int, ...] = ()) -> None:
    content = {}
    for k, (root, *pose) in enumerate(who.matrices.astype(np.float32)):
        smpl = {"global_orient": root[None], "body_pose": np.stack(pose), "betas": by_frame(who)[k]}
        content[f"out/img/{k + 1:06d}.jpg"] = {
            "time": k, "shot": 0, "tid": [3], "tracked_time": [int(k in ghosts)], "smpl": [smpl],
            "camera": [who.transl[k].astype(np.float32)], "size": [[64, 64]],
        }  # fmt: skip
    path.write_bytes(pickle.dumps(content))


def camerahmr(path: Path, who: Person, camera: np.ndarray = CAMERA) -> None:
    """As users save what its demo has in memory."""
    np.savez(
        path, global_orient=who.matrices[:, :1], body_pose=who.matrices[:, 1:], betas=by_frame(who),
        cam_trans=who.transl, cam_int=np.tile(camera, (len(who.transl), 1, 1)),
    )  # fmt: skip

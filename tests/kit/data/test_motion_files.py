"""AMASS files, and motions resampled, smoothed, mirrored and turned, beside scipy and the body's joints."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hmr_files import SMPLX_PELVIS
from scipy.spatial.transform import Rotation, Slerp

from kit.body import JOINT_NAMES, Body
from kit.data.hmr import read_motion_file
from kit.data.motion_files import (
    Motion,
    at_times,
    canonical,
    mirror,
    resample,
    save_amass,
    smooth,
)
from kit.puppet.skeleton import _body_data
from motion_tokens import axis_angle_to_matrix

FRAMES = 7
GOOD = {
    "poses": np.random.default_rng(0).normal(0, 0.4, (FRAMES, 156)),
    "trans": np.random.default_rng(1).normal(0, 1.0, (FRAMES, 3)),
    "betas": np.linspace(-1, 1, 16),
    "gender": np.array("female"),
    "mocap_framerate": np.array(120.0),
}


def load(path: Path, body: Body) -> Motion:
    return read_motion_file(path, body).motion


def random_motion(frames: int = FRAMES, fps: float = 20.0) -> Motion:
    """A motion as AMASS can hold it: the two hand joints are identity."""
    generator = torch.Generator().manual_seed(0)
    pose = torch.randn(frames, 24, 3, generator=generator) * 0.5
    pose[:, 22:] = 0
    betas = torch.randn(10, generator=generator)
    return Motion(pose[:, 0], pose[:, 1:], betas, torch.randn(frames, 3, generator=generator), fps, "female")


def joints(motion: Motion, body) -> torch.Tensor:
    return body.joints(motion.global_orient, motion.body_pose, motion.betas, motion.transl)


def test_amass_round_trip_and_same_bytes(tmp_path, body):
    motion = random_motion()
    save_amass(tmp_path / "a.npz", motion, body)
    back = load(tmp_path / "a.npz", body)
    for given, read in zip(motion[:4], back[:4], strict=True):
        torch.testing.assert_close(read, given, atol=1e-6, rtol=0)
    assert back[4:] == (20.0, "female")
    with np.load(tmp_path / "a.npz") as file:  # other programs expect AMASS's widths
        assert file["poses"].shape == (FRAMES, 156) and file["betas"].shape == (16,)
    save_amass(tmp_path / "b.npz", motion, body)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # the archive must not record when it was written
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with pytest.raises(ValueError, match=r"body_pose is \(7, 21, 3\)"):
        save_amass(tmp_path / "c.npz", motion._replace(body_pose=motion.body_pose[:, :21]), body)


@pytest.mark.parametrize("width, joints_kept", [(156, 21), (165, 21), (72, 23)])
def test_amass_variants(tmp_path, body, width, joints_kept):
    poses = np.random.default_rng(0).normal(0, 0.3, (FRAMES, width)).astype(np.float32)
    rate = {"mocap_frame_rate" if width == 165 else "mocap_framerate": np.array(120)}
    fields = {key: GOOD[key] for key in ("trans", "betas")}
    fields["betas"] = fields["betas"][: 16 if width == 156 else 10]
    fields["markers_latent_vids"] = np.array({"ARIEL": 1}, dtype=object)  # so in SMPL-X's release
    np.savez(tmp_path / "a.npz", poses=poses, gender=np.array(b"male"), **rate, **fields)
    motion, frames, _, notes = read_motion_file(tmp_path / "a.npz", body)
    assert (motion.fps, motion.gender, frames) == (120.0, "male", None)
    assert ("betas are SMPL-X's" in str(notes)) == (width == 165)
    expected = np.zeros((FRAMES, 23, 3), dtype=np.float32)
    expected[:, :joints_kept] = poses[:, 3 : 3 + 3 * joints_kept].reshape(FRAMES, joints_kept, 3)
    np.testing.assert_array_equal(motion.body_pose, expected)
    trans, betas = (torch.from_numpy(fields[key]).float() for key in ("trans", "betas"))
    if width == 165:  # SMPL-X counts trans from a pelvis of its own
        trans = trans + torch.tensor(SMPLX_PELVIS) - body.rest_joints(torch.zeros(10))[0]
    x, y, z = body.joints(torch.from_numpy(poses[:, :3]), motion.body_pose, betas[:10], trans).unbind(-1)
    torch.testing.assert_close(joints(motion, body), torch.stack([x, z, -y], dim=-1), atol=1e-5, rtol=0)


BAD = [
    ({"poses": None}, "no person with an SMPL pose"),
    ({"mocap_framerate": None}, "axes are not known"),
    ({"poses": GOOD["poses"][:, :100]}, r"poses is \(7, 100\)"),
    ({"poses": GOOD["poses"] * 57.3 * 10}, "degrees"),
    ({"trans": None}, "no transl"),
    ({"trans": GOOD["trans"][:3]}, "3 transl, expected 7"),
    ({"trans": GOOD["trans"] * np.nan}, "NaN"),
    ({"trans": GOOD["trans"] * 1e4}, "millimetres"),
    ({"betas": None}, "betas are None"),
    ({"mocap_framerate": np.array(0.0)}, "frames a second"),
    ({"mocap_framerate": np.array(np.nan)}, "frames a second"),
    ({"mocap_framerate": np.array("fast")}, "could not convert"),
    ({"gender": np.array("robot")}, "gender is 'robot'"),
    ({"gender": np.array("female", dtype=object)}, "Object arrays"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_amass(tmp_path, body, change, message):
    arrays = {key: value for key, value in (GOOD | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        load(tmp_path / "bad.npz", body)


UNEVEN = torch.tensor([0.0, 0.01, 0.1, 0.1001, 0.2, 0.25, 8 / 30], dtype=torch.float64)


@pytest.mark.parametrize("fps", [8.0, 29.97, 60.0, None], ids=str)
def test_between_frames_is_scipys_slerp(fps):
    motion, clock = random_motion(frames=21, fps=20.0), np.arange(21) / 20
    times = UNEVEN if fps is None else torch.arange(int(fps) + 1).double() / fps
    result = at_times(motion, times) if fps is None else resample(motion, fps)
    assert len(result.transl) == len(times) and result.fps == (fps or 20.0)
    for joint in (0, 5, 21):
        slerp = Slerp(clock, Rotation.from_rotvec(motion.body_pose[:, joint].numpy()))
        found = axis_angle_to_matrix(result.body_pose[:, joint])
        np.testing.assert_allclose(found, slerp(times.numpy()).as_matrix(), atol=1e-5)
    linear = np.stack([np.interp(times, clock, motion.transl[:, axis]) for axis in range(3)], axis=1)
    np.testing.assert_allclose(result.transl, linear, atol=1e-6)


def test_resample_edges():
    assert len(resample(random_motion(frames=1), 50.0).transl) == 1
    motion = random_motion(frames=61, fps=20.0)
    part = resample(motion, 10.0, 0.3, 0.3 + 7 * 0.1)  # rounding does not lose the last
    assert torch.equal(part.transl, motion.transl[6:21:2])
    assert torch.equal(resample(motion, 10.0, 0.0, 0.99).transl, motion.transl[:19:2])
    assert len(resample(motion, 10.0, 2.0, 2.0).transl) == 1


@pytest.mark.parametrize("fps", [20.0, 24000 / 1001, 59.9999885559082, 60.00001, 250.0])
def test_a_frame_at_its_own_time_is_itself(fps):
    motion = random_motion(frames=1001, fps=fps)
    same = at_times(motion, torch.arange(1001, dtype=torch.float64) / fps), resample(motion, fps)
    assert all(torch.equal(x, y) for result in same for x, y in zip(result[:4], motion[:4], strict=True))
    assert len(resample(motion, 20.0).transl) == int(1000 / fps * 20 + 1e-4) + 1


def test_smoothing_is_scipys_weighted_mean_of_rotations():
    """In the middle of a motion. Catches: axis-angle numbers averaged, torn at half a turn; another sigma."""
    random = np.random.default_rng(0)
    turning = Rotation.from_rotvec(np.linspace(0, 9, 61)[:, None] * [0.6, 0, 0.8])  # past half a turn twice
    shaken = turning * Rotation.from_rotvec(random.normal(0, 0.1, (61, 3)))
    orient, transl = (torch.tensor(x).float() for x in (shaken.as_rotvec(), random.normal(size=(61, 3))))
    motion = Motion(orient, torch.zeros(61, 23, 3), torch.zeros(10), transl, 30.0, "neutral")
    seconds, reach = 0.1, 12
    smoothed = smooth(motion, seconds)
    for frame in range(reach, 61 - reach):
        near = np.arange(frame - reach, frame + reach + 1)
        weights = np.exp(-(((near - frame) / (30 * seconds)) ** 2) / 2)
        found = Rotation.from_rotvec(smoothed.global_orient[frame].numpy())
        assert (shaken[near].mean(weights).inv() * found).magnitude() < 1e-3
        expected = np.average(transl[near], axis=0, weights=weights)
        np.testing.assert_allclose(smoothed.transl[frame], expected, atol=1e-5)


def test_smoothing_keeps_steady_movement_and_what_is_still():
    """Catches: ends drawn towards the middle, kernels that do not sum to one, reflections for rotations."""
    way = torch.linspace(0, 1, 40)[:, None] * torch.tensor([3.0, 0, 1])
    turn_ = torch.linspace(0, 8, 40)[:, None] * torch.tensor([0, 1.0, 0])
    pose = torch.rand(23, 3, generator=torch.Generator().manual_seed(0)) * 6 - 3
    motion = Motion(turn_, pose.expand(40, 23, 3), torch.zeros(10), way, 30.0, "neutral")
    smoothed = smooth(motion, 0.2)
    np.testing.assert_allclose(smoothed.transl, way, atol=1e-5)
    for found, given in ((smoothed.global_orient, turn_), (smoothed.body_pose, motion.body_pose)):
        apart = Rotation.from_rotvec(found.reshape(-1, 3)) * Rotation.from_rotvec(given.reshape(-1, 3)).inv()
        assert apart.magnitude().max() < 1e-3
    assert smooth(motion, 0.0) is motion


def test_mirror_reflects_the_joints():
    data = _body_data()  # its rest pelvis goes away from x = 0; its halves stay each other's mirror image
    body = Body(data | {"v_template": data["v_template"] + (0.3, 0, 0)})
    motion = random_motion()
    motion = motion._replace(body_pose=torch.randn(FRAMES, 23, 3, generator=torch.Generator().manual_seed(1)))
    expected = joints(motion, body)
    other = lambda name: name.replace("left", "x").replace("right", "left").replace("x", "right")
    swapped = [JOINT_NAMES.index(other(name)) for name in JOINT_NAMES]
    expected = expected[:, swapped] * torch.tensor((-1, 1, 1))
    torch.testing.assert_close(joints(mirror(motion, body), body), expected, atol=1e-5, rtol=0)
    twice = mirror(mirror(motion, body), body)
    for name in ("global_orient", "body_pose", "transl"):
        torch.testing.assert_close(getattr(twice, name), getattr(motion, name), atol=1e-6, rtol=0)


@pytest.mark.parametrize("degrees", [0, 77, 180, -130])
def test_canonical_stands_before_the_camera(body, degrees):
    upright = random_motion()
    turn = Rotation.from_euler("yxz", [degrees, 10, 5], degrees=True).as_rotvec()
    upright = upright._replace(global_orient=torch.from_numpy(turn).float().expand(FRAMES, 3))
    before, after = joints(upright, body), joints(canonical(upright, body), body)
    across = (after[0, 1] - after[0, 2]).numpy()
    assert abs(after[0, 0, 0]) < 1e-6 and abs(after[0, 0, 2]) < 1e-6
    assert across[0] > 0 and abs(across[2]) < 1e-6
    assert np.cross(across, after[0, 12] - after[0, 0])[2] > 0  # the chest faces +z
    old = (before[0, 1] - before[0, 2]).numpy()
    # the same motion seen from elsewhere: one turn about the vertical for all frames, heights as they were
    heading = Rotation.from_euler("y", np.arctan2(old[2], old[0])).as_matrix()
    expected = (before - before[0, 0] * torch.tensor((1, 0, 1))).numpy() @ heading.T
    np.testing.assert_allclose(after, expected, atol=1e-5)

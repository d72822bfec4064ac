import zipfile

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp

from kit import puppet
from kit.files import whole_file
from kit.motion_files import Motion, load_amass, resample, save_amass
from motion_tokens import axis_angle_to_matrix

FRAMES = 7
GOOD = {
    "poses": np.random.default_rng(0).normal(0, 0.4, (FRAMES, 156)),
    "trans": np.random.default_rng(1).normal(0, 1.0, (FRAMES, 3)),
    "betas": np.linspace(-1, 1, 16),
    "gender": np.array("female"),
    "mocap_framerate": np.array(120.0),
}


@pytest.fixture(scope="module")
def body():
    return puppet.body()


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
    back = load_amass(tmp_path / "a.npz", body)
    for given, read in zip(motion[:4], back[:4], strict=True):
        torch.testing.assert_close(read, given, atol=1e-6, rtol=0)
    assert back[4:] == (20.0, "female")
    save_amass(tmp_path / "b.npz", motion, body)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # the archive must not record when it was written
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_amass_layout_and_axes(tmp_path, body):
    """What another program sees, z up, is the same person: its joints are ours, turned."""
    motion = random_motion()
    save_amass(tmp_path / "a.npz", motion, body)
    with np.load(tmp_path / "a.npz") as file:
        assert file["poses"].shape == (FRAMES, 156) and file["betas"].shape == (16,)
        assert not file["poses"][:, 66:].any() and not file["betas"][10:].any()
        poses = torch.from_numpy(file["poses"])
        body_pose = torch.cat([poses[:, 3:66], torch.zeros(FRAMES, 6)], dim=1).unflatten(1, (23, 3))
        betas, trans = torch.from_numpy(file["betas"][:10]), torch.from_numpy(file["trans"])
    z_up = body.joints(poses[:, :3], body_pose, betas, trans)
    x, y, z = z_up.unbind(-1)
    torch.testing.assert_close(torch.stack([x, z, -y], dim=-1), joints(motion, body), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width, joints_kept", [(156, 21), (165, 21), (72, 23)])
def test_amass_variants(tmp_path, body, width, joints_kept):
    poses = np.random.default_rng(0).normal(0, 0.3, (FRAMES, width)).astype(np.float32)
    rate = {"mocap_frame_rate" if width == 165 else "mocap_framerate": np.array(120)}
    fields = {key: GOOD[key] for key in ("trans", "betas")}
    np.savez(tmp_path / "a.npz", poses=poses, gender=np.array(b"male"), **rate, **fields)
    motion = load_amass(tmp_path / "a.npz", body)
    assert (motion.fps, motion.gender) == (120.0, "male")
    expected = np.zeros((FRAMES, 23, 3), dtype=np.float32)
    expected[:, :joints_kept] = poses[:, 3 : 3 + 3 * joints_kept].reshape(FRAMES, joints_kept, 3)
    np.testing.assert_array_equal(motion.body_pose, expected)


BAD = [
    ({"poses": None}, "lacks poses"),
    ({"mocap_framerate": None}, "lacks mocap_frame_rate"),
    ({"poses": GOOD["poses"][:, :100]}, "expected one of"),
    ({"poses": GOOD["poses"][0]}, "expected one of"),
    ({"poses": GOOD["poses"][:0], "trans": GOOD["trans"][:0]}, "no frames"),
    ({"trans": GOOD["trans"][:3]}, "transl is"),
    ({"trans": GOOD["trans"] * np.nan}, "NaN"),
    ({"trans": GOOD["trans"] * 1e4}, "millimetres"),
    ({"betas": GOOD["betas"][:9]}, "betas is"),
    ({"betas": GOOD["betas"] * 100}, "betas reach"),
    ({"betas": np.array(["x"] * 16)}, "expected numbers"),
    ({"mocap_framerate": np.array(0.0)}, "frames a second"),
    ({"mocap_framerate": np.array(1e6)}, "frames a second"),
    ({"mocap_framerate": np.array(np.nan)}, "frames a second"),
    ({"mocap_framerate": np.array([30, 30])}, "one value"),
    ({"gender": np.array("robot")}, "gender"),
    ({"gender": np.array("female", dtype=object)}, "pickled"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_amass(tmp_path, body, change, message):
    arrays = {key: value for key, value in (GOOD | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_amass(tmp_path / "bad.npz", body)
    assert "bad.npz" in str(error.value)


def test_bad_files(tmp_path, body):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_amass(tmp_path / "none.npz", body)
    np.savez(tmp_path / "good.npz", **GOOD)
    whole = (tmp_path / "good.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[3000] ^= 255
    for content in (b"", b"not an archive", whole[:-100], bytes(damaged)):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz"):
            load_amass(tmp_path / "bad.npz", body)
    with pytest.raises(FileNotFoundError, match="create it first"):
        save_amass(tmp_path / "no_folder" / "a.npz", random_motion(), body)
    with pytest.raises(ValueError, match=r"end in \.npz"):
        save_amass(tmp_path / "a.txt", random_motion(), body)
    with pytest.raises(ValueError, match="body_pose"):
        save_amass(tmp_path / "a.npz", random_motion()._replace(body_pose=torch.zeros(FRAMES, 21, 3)), body)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("fps", [8.0, 16.0, 29.97, 60.0])
def test_resample_is_slerp(fps):
    motion = random_motion(frames=21, fps=20.0)  # one second
    result = resample(motion, fps)
    times = np.arange(int(fps) + 1) / fps
    assert result.fps == fps and len(result.transl) == len(times)
    slerp = Slerp(np.arange(21) / 20, Rotation.from_rotvec(motion.global_orient.numpy()))
    ours = axis_angle_to_matrix(result.global_orient)
    np.testing.assert_allclose(ours, slerp(times).as_matrix(), atol=1e-5)
    for axis in range(3):
        linear = np.interp(times, np.arange(21) / 20, motion.transl[:, axis])
        np.testing.assert_allclose(result.transl[:, axis], linear, atol=1e-6)


def test_resample_edges():
    motion = random_motion()
    assert resample(motion, 20.0) is motion
    assert len(resample(random_motion(frames=1), 50.0).transl) == 1
    with pytest.raises(ValueError, match="frames a second"):
        resample(motion, -1.0)

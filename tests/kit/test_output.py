"""kit/output.py: the files say what the body does, as another program would read them."""

import os

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from kit.body import JOINT_NAMES
from kit.data.motion_files import Motion
from kit.output import _euler_zxy, save_bvh, save_mesh, save_objs

FRAMES = 6


def random_motion(frames: int = FRAMES) -> Motion:
    generator = torch.Generator().manual_seed(0)
    pose = 0.7 * torch.randn(frames, 24, 3, generator=generator)
    pose[0, 1:5] = 0
    pose[1, :4] = torch.tensor((torch.pi / 2, 0, 0))  # the middle angle is a right angle: gimbal lock
    pose[2, :4] = torch.tensor((-torch.pi / 2, 0, 0))
    pose[3, :4] = torch.tensor((0, torch.pi, 0))
    betas, transl = torch.randn(10, generator=generator), torch.randn(frames, 3, generator=generator)
    return Motion(pose[:, 0], pose[:, 1:], betas, transl, 29.97, "female")


def read_bvh(path):
    """Joint positions (f 3) by name, the joints that end in an End Site, and seconds a frame."""
    words = iter(path.read_text().split())
    parents, offsets, channels, ends, stack = {}, {}, {}, [], []
    assert next(words) == "HIERARCHY"
    for word in words:
        if word in ("ROOT", "JOINT"):
            name = next(words)
            parents[name] = stack[-1] if stack else None
            stack.append(name)
        elif word == "End":
            assert next(words) == "Site"
            ends.append(stack[-1])
            stack.append(f"end of {stack[-1]}")
        elif word == "OFFSET":
            offsets[stack[-1]] = [float(next(words)) for _ in range(3)]
        elif word == "CHANNELS":
            channels[stack[-1]] = [next(words) for _ in range(int(next(words)))]
        elif word == "}":
            stack.pop()
        elif word == "MOTION":
            break
        else:
            assert word == "{"
    assert not stack and next(words) == "Frames:"
    frames = int(next(words))
    assert [next(words), next(words)] == ["Frame", "Time:"]
    seconds = float(next(words))
    columns = iter(np.array(list(words), dtype=float).reshape(frames, -1).T)
    positions, turns = {}, {}
    for name, listed in channels.items():
        place, turn = np.tile(offsets[name], (frames, 1)), Rotation.identity(frames)
        for channel in listed:
            numbers = next(columns)
            if channel.endswith("position"):
                place[:, "XYZ".index(channel[0])] += numbers
            else:
                turn = turn * Rotation.from_euler(channel[0].lower(), numbers[:, None], degrees=True)
        parent = parents[name]
        positions[name] = positions[parent] + turns[parent].apply(place) if parent else place
        turns[name] = turns[parent] * turn if parent else turn
    assert next(columns, None) is None
    return positions, ends, seconds


def test_bvh_moves_as_the_body(tmp_path, body):
    motion = random_motion()
    save_bvh(tmp_path / "a.bvh", motion, body)
    assert b"-0.000000 " not in (tmp_path / "a.bvh").read_bytes()
    positions, ends, seconds = read_bvh(tmp_path / "a.bvh")
    expected = body.joints(motion.global_orient, motion.body_pose, motion.betas, motion.transl)
    assert set(positions) == set(JOINT_NAMES) and seconds == pytest.approx(1 / 29.97, abs=1e-8)
    for joint, name in enumerate(JOINT_NAMES):
        np.testing.assert_allclose(positions[name], expected[:, joint], atol=1e-5, err_msg=name)
    assert sorted(ends) == ["head", "left_foot", "left_hand", "right_foot", "right_hand"]


@pytest.mark.parametrize("sine", [1.0, -1.0])
def test_euler_angles_at_gimbal_lock(sine):
    """Where the middle angle is a right angle to the last digit, the others cannot be told apart."""
    outer, inner = (Rotation.from_euler(axis, angle).as_matrix() for axis, angle in (("z", 0.7), ("y", 0.4)))
    matrix = outer @ np.array(((1, 0, 0), (0, 0, -sine), (0, sine, 0))) @ inner
    angles = _euler_zxy(torch.from_numpy(matrix))
    np.testing.assert_allclose(Rotation.from_euler("ZXY", angles).as_matrix(), matrix, atol=1e-7)


def test_mesh_arrays(tmp_path, body):
    motion = random_motion(frames=300)  # more than are skinned at once
    save_mesh(tmp_path / "a.npz", motion, body)
    save_mesh(tmp_path / "b.npz", motion, body)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as file:
        vertices, faces, fps = file["vertices"], file["faces"], file["fps"]
    assert vertices.dtype == np.float32 and faces.dtype == np.int32 and fps == 29.97
    np.testing.assert_array_equal(faces, body.faces)
    # the body's own smplx, called by its own names
    named = {"global_orient": motion.global_orient, "transl": motion.transl}
    out = body.smpl(**named, body_pose=motion.body_pose.flatten(1), betas=motion.betas.expand(300, 10))
    np.testing.assert_allclose(vertices, out.vertices, atol=1e-5)


def test_mesh_objects(tmp_path, body):
    motion = random_motion()
    save_objs(tmp_path / "v1.0", motion, body)  # a dot in a folder's name is no suffix
    files = sorted((tmp_path / "v1.0").iterdir())
    assert [file.name for file in files] == [f"frame_{number:06d}.obj" for number in range(FRAMES)]
    pose = (motion.global_orient, motion.body_pose, motion.betas, motion.transl)
    vertices, _ = body.mesh(*pose)
    for file, expected in zip(files, vertices, strict=True):
        rows = [line.split() for line in file.read_text().splitlines()]
        points = [[float(number) for number in row[1:]] for row in rows if row[0] == "v"]
        faces = [[int(number) - 1 for number in row[1:]] for row in rows if row[0] == "f"]
        np.testing.assert_allclose(points, expected, atol=1e-6)
        np.testing.assert_array_equal(faces, body.faces)
    with pytest.raises(FileExistsError, match="choose another"):
        save_objs(tmp_path / "v1.0", motion, body)
    assert os.listdir(tmp_path) == ["v1.0"]


def test_a_failed_export_leaves_nothing(tmp_path, body, monkeypatch):
    written = []

    def fail(folder, *_):
        written.extend(os.listdir(folder))
        raise OSError("disk full")

    monkeypatch.setattr("kit.output.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_objs(tmp_path / "mesh", random_motion(), body)
    assert len(written) == FRAMES and not os.listdir(tmp_path)

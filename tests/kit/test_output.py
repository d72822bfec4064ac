"""kit/output.py: the files say what the body does, as another program would read them."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from kit.body import JOINT_NAMES, Body
from kit.data.motion_files import Motion
from kit.output import save_bvh, save_mesh
from kit.puppet.skeleton import _body_data

FRAMES = 6


def random_motion() -> Motion:
    generator = torch.Generator().manual_seed(0)
    pose = 0.7 * torch.randn(FRAMES, 24, 3, generator=generator)
    pose[0, 1:5] = 0
    pose[1, :4] = torch.tensor((torch.pi / 2, 0, 0))  # the middle angle is nearly a right angle
    pose[2, :4] = torch.tensor((-torch.pi / 2, 0, 0))
    pose[3, :4] = torch.tensor((0, torch.pi, 0))
    betas, transl = torch.randn(10, generator=generator), torch.randn(FRAMES, 3, generator=generator)
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


def test_a_gendered_motion_has_that_genders_bones_and_skin(tmp_path, body):
    """Catches: the neutral model's, around parameters of another."""
    data = _body_data()
    for name, size in (("SMPL_NEUTRAL", 1.0), ("SMPL_FEMALE", 1.1)):
        np.savez(tmp_path / f"{name}.npz", **data | {"v_template": size * data["v_template"]})
    motion, bodies, female = random_motion(), Body.load(tmp_path), Body.load(tmp_path, "female")
    save_bvh(tmp_path / "a.bvh", motion, bodies)
    positions, *_ = read_bvh(tmp_path / "a.bvh")
    expected = female.joints(motion.global_orient, motion.body_pose, motion.betas, motion.transl)
    np.testing.assert_allclose(positions["head"], expected[:, JOINT_NAMES.index("head")], atol=1e-5)
    save_mesh(tmp_path / "a.npz", motion, bodies)
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(file["vertices"], female.mesh(*motion[:4])[0], atol=1e-5)


def test_mesh_arrays(tmp_path, body):
    motion = random_motion()
    save_mesh(tmp_path / "a.npz", motion, body)
    with np.load(tmp_path / "a.npz") as file:
        vertices, faces, fps = file["vertices"], file["faces"], file["fps"]
    assert vertices.dtype == np.float32 and faces.dtype == np.int32 and fps == 29.97
    np.testing.assert_array_equal(faces, body.smpl.faces_tensor)
    # the body's own smplx, called by its own names
    named = {"global_orient": motion.global_orient, "transl": motion.transl}
    out = body.smpl(**named, body_pose=motion.body_pose.flatten(1), betas=motion.betas.expand(FRAMES, 10))
    np.testing.assert_allclose(vertices, out.vertices, atol=1e-5)

"""The puppet's body: 24 joints, ten shape numbers and a mesh of capsules, as the arrays of an SMPL file.

Rest pose as SMPL's: arms spread, y up, facing +z, the left hand at +x; metres, feet on y = 0, 1.7 m tall.
"""

import functools

import numpy as np
import torch
from einops import rearrange

from kit.body import JOINT_NAMES, PARENTS, Body

# offset of each joint from its parent, metres: SMPL's proportions; right-hand joints mirror the left ones
OFFSETS = {
    "pelvis": (0, 0.93, 0), "left_hip": (0.08, -0.07, 0), "spine1": (0, 0.11, -0.02),
    "left_knee": (0.02, -0.39, 0), "spine2": (0, 0.13, 0.01), "left_ankle": (0, -0.40, -0.03),
    "spine3": (0, 0.06, 0.01), "left_foot": (0.02, -0.05, 0.12), "neck": (0, 0.21, -0.03),
    "left_collar": (0.07, 0.12, -0.02), "head": (0, 0.09, 0.04), "left_shoulder": (0.11, 0.03, -0.01),
    "left_elbow": (0.26, 0, -0.01), "left_wrist": (0.25, 0, 0), "left_hand": (0.09, 0, 0),
}  # fmt: skip
# relative growth of those offsets per unit of each shape number
SHAPE_SPACE = (
    {name: 0.03 for name in OFFSETS},  # height
    {"left_hip": 0.02, "left_shoulder": 0.02},  # girth; acts on the radii, see GIRTH
    {"left_knee": 0.05, "left_ankle": 0.05},  # leg length
    {"left_elbow": 0.05, "left_wrist": 0.05, "left_hand": 0.05},  # arm length
    {"left_collar": 0.08, "left_shoulder": 0.08},  # shoulder width
    {"left_hip": 0.10},  # hip width
    {"spine1": 0.05, "spine2": 0.05, "spine3": 0.05, "neck": 0.05},  # torso length
    {"neck": 0.03, "head": 0.15},  # neck length
    {"left_elbow": 0.05, "left_wrist": -0.05},  # upper arm against forearm
    {"left_knee": 0.05, "left_ankle": -0.05},  # thigh against shin
)
GIRTH = (0.03, 0.10, 0, 0, 0, 0, 0, 0, 0, 0)  # relative growth of every radius per unit of shape
# bones that end in no joint: crown, toes, fingertips
TIPS = {
    "head": (0, 0.17, 0.02), "left_foot": (0.01, -0.01, 0.08), "right_foot": (-0.01, -0.01, 0.08),
    "left_hand": (0.08, 0, 0), "right_hand": (-0.08, 0, 0),
}  # fmt: skip
RING = 6  # vertices around a bone


@functools.cache
def body(device: str | torch.device = "cpu") -> Body:
    """The puppet's body on a device. It is cached and shared: do not move it, ask for another device."""
    return Body(_body_data()).to(device)


def _rest() -> tuple[np.ndarray, np.ndarray]:
    """Rest joints (24 3) and their growth with shape (24 3 10), both summed along the tree."""
    joints, growth = np.zeros((24, 3)), np.zeros((24, 3, 10))
    for j, name in enumerate(JOINT_NAMES):
        left = name.replace("right", "left")
        offset = np.array(OFFSETS[left]) * ((1, 1, 1) if name == left else (-1, 1, 1))
        relative = np.array([effect.get(left, 0.0) for effect in SHAPE_SPACE])
        joints[j] = joints[PARENTS[j]] + offset if j else offset
        growth[j] = growth[PARENTS[j]] + offset[:, None] * relative
    # longer legs lift the pelvis instead of sinking the feet
    growth[:, 1] -= growth[JOINT_NAMES.index("left_foot"), 1]
    return joints, growth


def _body_data() -> dict[str, np.ndarray]:
    """SMPL's arrays for a mesh of capsules: around each bone a pole, three rings and a pole."""
    joints, growth = _rest()
    bones = [(PARENTS[j], j, joints[j] - joints[PARENTS[j]]) for j in range(1, 24)]
    bones += [(JOINT_NAMES.index(name), JOINT_NAMES.index(name), np.array(tip)) for name, tip in TIPS.items()]
    turns = 2 * np.pi * np.arange(RING) / RING
    along_bone = np.repeat((0, 0, 0.5, 1, 1), (1, RING, RING, RING, 1))
    first_ring, last_ring = slice(1, 1 + RING), slice(1 + 2 * RING, 1 + 3 * RING)
    per_bone = len(along_bone)
    vertices = np.zeros((len(bones), per_bone, 3))
    shapes = np.zeros((len(bones), per_bone, 3, 10))
    weights = np.zeros((len(bones), per_bone, 24))
    regressor = np.zeros((24, len(bones), per_bone))
    for k, (parent, child, bone) in enumerate(bones):
        axis = bone / np.linalg.norm(bone)
        radius = min(0.06, 0.4 * np.linalg.norm(bone))
        side = np.cross(axis, (0, 0, 1) if abs(axis[2]) < 0.9 else (0, 1, 0))
        side /= np.linalg.norm(side)
        ring = np.outer(np.cos(turns), side) + np.outer(np.sin(turns), np.cross(axis, side))
        radial = radius * np.concatenate((-axis[None], ring, ring, ring, axis[None]))
        t = along_bone[:, None]
        vertices[k] = joints[parent] + t * bone + radial
        centre_growth = (1 - t[..., None]) * growth[parent] + t[..., None] * growth[child]
        shapes[k] = centre_growth + radial[..., None] * np.array(GIRTH)
        weights[k, :, parent] = 1
        if child != parent:
            weights[k, last_ring] = np.eye(24)[[parent, child]].mean(0)  # a soft bend
            regressor[child, k, last_ring] = 1 / RING  # a joint is the centre of a ring
    regressor[0, 0, first_ring] = 1 / RING
    return {
        "v_template": rearrange(vertices, "k n xyz -> (k n) xyz"),
        "shapedirs": rearrange(shapes, "k n xyz s -> (k n) xyz s"),
        "posedirs": np.zeros((len(bones) * per_bone, 3, 207)),
        "J_regressor": rearrange(regressor, "j k n -> j (k n)"),
        "weights": rearrange(weights, "k n j -> (k n) j"),
        "kintree_table": np.array((PARENTS, range(24))),
        "f": _capsule_faces(len(bones), per_bone),
    }


def _capsule_faces(bones: int, per_bone: int) -> np.ndarray:
    """Triangles (F 3): pole fans at both ends, two triangles between neighbours of successive rings."""
    faces = []
    for n in range(RING):
        m = (n + 1) % RING
        faces += [(0, 1 + m, 1 + n), (per_bone - 1, per_bone - 1 - RING + n, per_bone - 1 - RING + m)]
        for low in (1, 1 + RING):
            faces += [(low + n, low + m, low + RING + n), (low + m, low + RING + m, low + RING + n)]
    return np.concatenate([np.array(faces) + k * per_bone for k in range(bones)])

"""Clips from seeds: how the puppet moves, what it wears, and the caption that says so."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from kit.body import JOINT_NAMES
from kit.devices import constant, upload
from kit.puppet.actions import STANCE, TABLE
from kit.puppet.drawing import SHIRTS
from kit.puppet.skeleton import body
from motion_tokens import axis_angle_to_matrix, matrix_to_axis_angle

FPS = 16
FRAMES = 17

ACTIONS = tuple(TABLE)
COLOURS = tuple(SHIRTS)
JOINT = {name: index for index, name in enumerate(JOINT_NAMES)}


class Clips(NamedTuple):
    """b clips of f frames: SMPL parameters (radians, metres), their joints, and what they show."""

    caption: list[str]
    action: Tensor  # (b,) index into ACTIONS
    shirt: Tensor  # (b,) index into COLOURS
    global_orient: Tensor  # (b f 3)
    body_pose: Tensor  # (b f 23 3)
    betas: Tensor  # (b 10)
    transl: Tensor  # (b f 3)
    joints: Tensor  # (b f 24 3)


# height of a joint above the floor when the body rests on it
CLEARANCE = {
    "left_knee": 0.06, "right_knee": 0.06, "left_ankle": 0.07, "right_ankle": 0.07, "left_foot": 0.02,
    "right_foot": 0.02,
}  # fmt: skip
ROOT = 24  # the motion table's row of the root's translation
HEADING = math.radians(65)
PACE = 0.9  # largest relative change; from 1 on, motions would run backwards


@functools.cache
def _motion_table(device: str | torch.device) -> Tensor:
    """(actions, 25, 3, 5): per joint and axis (bias, amp1, phase1, amp2, phase2), radians; row 24 metres."""
    table = torch.zeros(len(ACTIONS), 25, 3, 5)
    for row, track in zip(table, TABLE.values(), strict=True):
        for channel, numbers in (STANCE | track).items():
            joint, axis = channel.split(".")
            unit = 1.0 if joint == "root" else math.pi / 180
            scale = torch.tensor((unit, unit, 1.0, unit, 1.0))
            padded = torch.tensor(numbers + (0,) * (5 - len(numbers)))
            row[ROOT if joint == "root" else JOINT[joint], "xyz".index(axis)] = padded * scale
    return table.to(device)


def _euler_to_matrix(angles: Tensor) -> Tensor:
    """(... 3) radians -> Rx·Ry·Rz (... 3 3)."""
    # row k of the diagonal matrix is the axis-angle of the turn about axis k
    x, y, z = axis_angle_to_matrix(torch.diag_embed(angles)).unbind(-3)
    return x @ y @ z


def clips(seeds: Sequence[int], frames: int = FRAMES, device: str | torch.device = "cpu") -> Clips:
    """One clip per seed, each a function of its seed alone; fewer than 17 frames are a window of it."""
    draws = [torch.rand(22, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    drawn = torch.stack(draws, dim=1)  # (22 b)
    drawn[:2] = (drawn[:2] * torch.tensor([[len(ACTIONS)], [len(COLOURS)]])).floor()
    names = drawn[:2].int().T.tolist()  # before the upload: after it the host would wait for a GPU
    captions = [f"a person in a {COLOURS[worn]} shirt {ACTIONS[done]}" for done, worn in names]
    drawn = upload(drawn, torch.device(device))
    action, shirt, phase, speed, strength, turn, x, z, window, *more = drawn
    action, shirt, shape, pace = action.long(), shirt.long(), more[:10], more[10:]
    betas = (math.sqrt(2) * torch.erfinv(2 * torch.stack(shape, dim=1) - 1)).clamp(-2, 2)

    start = (window * (max(FRAMES - frames, 0) + 1)).floor()
    frame = rearrange(start, "b -> b 1") + torch.arange(frames, device=device)
    cycles = phase[:, None] + (1 + 0.6 * speed)[:, None] * _own_time(frame / FRAMES, *pace)
    pose, path = _move(action, cycles, amplitude=0.9 + 0.3 * strength)

    zero = torch.zeros_like(turn)
    facing = axis_angle_to_matrix(torch.stack((zero, HEADING * (2 * turn - 1), zero), dim=-1))
    global_orient = matrix_to_axis_angle(rearrange(facing, "b i k -> b 1 i k") @ pose[:, :, 0])
    body_pose = matrix_to_axis_angle(pose[:, :, 1:])
    lift = path[..., 1]
    place = torch.stack((0.35 * (2 * x - 1), zero, 0.15 * (2 * z - 1)), dim=-1)
    level = path * constant((1.0, 0.0, 1.0), path.device)
    transl = rearrange(place, "b i -> b 1 i") + einsum(facing, level, "b i k, b f k -> b f i")
    joints = body(device).joints(global_orient, body_pose, rearrange(betas, "b k -> b 1 k"), transl)
    # the lowest of knees, ankles and feet stands on the floor, unless the action lifts it
    clearance = constant(tuple(CLEARANCE.values()), joints.device)
    sole = (torch.stack([joints[:, :, JOINT[name], 1] for name in CLEARANCE], dim=-1) - clearance).amin(-1)
    up = F.pad(rearrange(lift - sole, "b f -> b f 1"), (1, 1))

    return Clips(
        caption=captions,
        action=action,
        shirt=shirt,
        global_orient=global_orient,
        body_pose=body_pose,
        betas=betas,
        transl=transl + up,
        joints=joints + rearrange(up, "b f i -> b f 1 i"),
    )


def _own_time(time: Tensor, swing: Tensor, rate: Tensor, onset: Tensor) -> Tensor:
    """Time (b f), in clips, at a pace that changes: ahead of an even clock or behind it, never backwards.

    At an even pace any one frame would determine all others, and attention need not find the right one.
    """
    swing, rate, onset = (x[:, None] for x in (swing, rate, onset))
    angular = 2 * math.pi * (1 + rate)  # one to two swings of the pace a clip
    return time + PACE * swing * torch.sin(angular * time + 2 * math.pi * onset) / angular


def _move(action: Tensor, cycles: Tensor, amplitude: Tensor) -> tuple[Tensor, Tensor]:
    """Actions (b,) at these cycles (b f) -> rotations (b f 24 3 3) and the root's path (b f 3), metres."""
    table = _motion_table(cycles.device)[action]
    bias, amp1, phase1, amp2, phase2 = rearrange(table, "b j xyz n -> n b 1 j xyz")
    cycles = rearrange(cycles, "b f -> b f 1 1")
    once, twice = (torch.sin(2 * math.pi * c) for c in (cycles + phase1, 2 * cycles + phase2))
    tracks = bias + rearrange(amplitude, "b -> b 1 1 1") * (amp1 * once + amp2 * twice)
    return _euler_to_matrix(tracks[:, :, :ROOT]), tracks[:, :, ROOT]

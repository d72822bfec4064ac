"""Find motion that no person can do, and name the likely cause: the file's axes, units or rate."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kit.body import JOINT_NAMES, Body
from kit.data.motion_files import Motion, smooth

RATES = (4.0, 250.0)  # frames a second; AMASS has recordings of 250
SPEED, JUMP = 12.0, 1.0  # of the pelvis: metres a second, a sprinter's; metres in a frame, at any rate
FASTEST = 25.0  # metres a second, in most frames: nobody is as fast for long
LYING = 0.2  # metres: the head of a person who lies is at most this far above the feet
RISEN = 0.5  # metres: the head of a person who gets up is once at least this far above the feet
PELVIS = (0.2, 3.0)  # metres above the lowest foot of the whole motion
FAR = 10.0  # metres: in most frames a pelvis is not as far from the floor
FEET = [JOINT_NAMES.index(name) for name in ("left_foot", "right_foot")]
HEAD = JOINT_NAMES.index("head")


@dataclass(frozen=True)
class Reading:
    """How the motions of a data set are read, and the notes about them."""

    axes: str = ""  # of all files, one of AXES; empty: as each file tells
    smooth: float = 0.0  # seconds, the standard deviation of a Gaussian; 0: no smoothing
    force: bool = False  # also accept motion that no person can do
    said: dict[str, list[str]] = field(default_factory=dict)  # notes, each with the names it is about
    refused: list[str] = field(default_factory=list)  # names of what `force` would accept
    smoothed: list[Tensor] = field(default_factory=list)  # smoothing_effect of each motion

    def say(self, name: str, notes: list[str]) -> None:
        for note in notes:
            self.said.setdefault(note, []).append(name)

    def lines(self) -> list[str]:
        """The notes to print, each once."""
        lines = []
        for note, (name, *others) in self.said.items():
            more = f" and {len(others)} more" if others else ""
            lines.append(f"{name}{more}: {note}")
        return lines

    def refuse(self, faults: list[str], name: str) -> None:
        """Raise ValueError if there are faults; with `force` only note them."""
        if faults and not self.force:
            self.refused.append(name)
            raise ValueError(f"{name}: {'; '.join(faults)}")
        self.say(name, faults)


def checked(
    motion: Motion, body: Body, name: str, reading: Reading, floor: bool = False, depth: float = 1.0
) -> Motion:
    """The motion, smoothed if asked for; ValueError if no person can do it, unless that is forced."""
    reading.refuse(faults(motion, body, floor, depth), name)
    if not reading.smooth:
        return motion
    smoothed = smooth(motion, reading.smooth)
    if len(motion.transl) > 3:  # jerk needs four frames
        reading.smoothed.append(smoothing_effect(motion, smoothed, body))
    return smoothed


def smoothing_effect(before: Motion, after: Motion, body: Body) -> Tensor:
    """(4,): the joints' mean jerk before and after, m/s³; how far they moved, m, on average and at most."""
    body = body.of(before.gender)
    joints = [body.joints(*m[:4]) for m in (before, after)]
    jerk = [x.diff(n=3, dim=0).norm(dim=-1).mean() * before.fps**3 for x in joints]
    moved = (joints[1] - joints[0]).norm(dim=-1)
    return torch.stack([*jerk, moved.mean(), moved.max()])


def faults(motion: Motion, body: Body, floor: bool = False, depth: float = 1.0) -> list[str]:
    """What is impossible about a motion, each with frame and likely cause; empty for a possible one.

    `floor`: heights count from a floor, as in AMASS. `depth` weights movement along z: below 1 where distance
    was estimated from apparent size through a long lens.
    """
    if not RATES[0] <= round(motion.fps, 1) <= RATES[1]:
        cause = "is it seconds a frame, or a count of frames?"
        return [f"{motion.fps:g} frames a second, expected {RATES[0]:g} to {RATES[1]:g}: {cause}"]
    body = body.of(motion.gender)
    joints = body.joints(*motion[:4])
    pelvis, feet, found = joints[:, 0], joints[:, FEET], []
    step = (pelvis.diff(dim=0) * pelvis.new_tensor((1, 1, depth))).norm(dim=-1)
    fast = step > max(JUMP, SPEED / motion.fps)
    speed, height = step.median() * motion.fps if len(step) else 0.0, pelvis[:, 1].median().abs()
    if speed > FASTEST or (floor and height > FAR):
        seen = f"the pelvis moves {speed:.0f} m a second, {height:.0f} m from the floor"
        found.append(f"{seen}: is trans in centimetres, inches or millimetres? expected metres")
    elif fast.any():
        at = _first(fast)
        cause = "is there a cut in the video, another person in the track, or another unit in trans?"
        found.append(f"the pelvis moves {step[at]:.1f} m from frame {at} to {at + 1}: {cause}")
    head = joints[:, HEAD, 1] - feet[..., 1].mean(1)
    low = head < (0 if head.max() > RISEN else LYING)
    if low.float().mean() > 0.5:
        what = "the head is below the feet" if head.median() < -LYING else "the person lies"
        where = f"in {low.float().mean():.0%} of frames, first in {_first(low)}"
        found.append(f"{what} {where}: are the axes right? name them, such as @axes=opencv or @axes=yup")
    above_feet = pelvis[:, 1] - feet[..., 1].min()
    outside = (above_feet < PELVIS[0]) | (above_feet > PELVIS[1])
    if not found and outside.float().mean() > 0.5:
        where = f"{above_feet[outside][0]:.1f} m above the lowest foot in frame {_first(outside)}"
        expected = f"expected {PELVIS[0]:g} to {PELVIS[1]:g}"
        found.append(f"the pelvis is {where}, {expected}: are axes and units right?")
    return found


def _first(where: Tensor) -> int:
    return int(where.nonzero()[0])

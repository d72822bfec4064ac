"""What the puppet can do: one periodic motion per action, as a table.

An entry reads `"joint.axis": (bias, amp1, phase1, amp2, phase2)`, trailing zeros left out, and means
    bias + amp1·sin(2π(φ + phase1)) + amp2·sin(2π(2φ + phase2)),   φ in cycles,
an Euler angle in degrees; a joint turns by Rx·Ry·Rz in its parent's frame. `pelvis` turns the whole
body, and "root.x|y|z" moves it, in metres (y: above the floor, on which the lower foot stands).

The right-hand variants are written, the left-hand ones are their mirror image. Signs, right side:
shoulder.z +75 hangs the arm down, -80 raises it; shoulder.x < 0 then swings it forward; elbow.y > 0 bends;
hip.x < 0 lifts the thigh forward; hip.z < 0 spreads the leg; knee.x > 0 bends; spine.x > 0 bows.
"""

Track = dict[str, tuple[float, ...]]

STANCE: Track = {
    "right_shoulder.z": (68,), "left_shoulder.z": (-68,),
    "right_elbow.y": (18,), "left_elbow.y": (-18,),
    "right_hip.z": (-5,), "left_hip.z": (5,),
    # small movements of the rest of the body, added to every action
    "neck.x": (0, 6, 0.1), "head.x": (0, 8, 0.2), "right_ankle.x": (0, 7, 0.3), "left_ankle.x": (0, 7, 0.3),
    "right_collar.z": (0, 5, 0.1), "left_collar.z": (0, -5, 0.1),
    "right_wrist.z": (0, 14, 0.3), "left_wrist.z": (0, -14, 0.3),
    "right_hand.z": (0, 12, 0.4), "left_hand.z": (0, -12, 0.4),
    "right_foot.x": (0, 8, 0.1), "left_foot.x": (0, 8, 0.1),
}  # fmt: skip

# "{}" becomes "right" or "left"
SIDED: dict[str, Track] = {
    "waves the {} hand": {
        "right_shoulder.z": (-25, 20, 0.1), "right_elbow.z": (-50, 55), "right_elbow.y": (0,),
        "spine1.z": (0, 7), "spine2.z": (0, 7), "left_elbow.y": (-95,), "left_shoulder.z": (-45,),
    },
    "raises the {} arm": {
        "right_shoulder.z": (-5, 78), "right_elbow.y": (5,), "spine1.z": (-3, 7), "spine2.z": (-3, 7),
    },
    "swings the {} arm forward": {
        "right_shoulder.x": (-60, 100), "right_elbow.y": (10,), "spine1.y": (0, 12), "spine2.y": (0, 12),
        "left_hip.x": (-18,), "right_hip.x": (14,), "left_knee.x": (10,),
    },
    "punches with the {} hand": {
        "right_shoulder.z": (60,), "right_shoulder.x": (-42, 58), "right_elbow.y": (70, 65),
        "left_shoulder.x": (-35,), "left_elbow.y": (-110,),
        "spine1.y": (0, 18, 0.5), "spine3.y": (0, 18, 0.5), "right_hip.x": (20,), "left_hip.x": (-22,),
        "left_knee.x": (12,),
    },
    "kicks with the {} leg": {
        "right_hip.x": (-35, 60), "right_knee.x": (30, 35, 0.15), "left_shoulder.x": (-15, 35),
        "right_shoulder.x": (5, 30, 0.5), "spine1.x": (-5, 8, 0.5),
    },
    "lifts the {} knee": {
        "right_hip.x": (-52, 62), "right_knee.x": (58, 58, 0.5), "left_elbow.y": (-70,),
        "right_elbow.y": (70,), "left_shoulder.x": (0, 40), "right_shoulder.x": (0, 40, 0.5),
        "spine1.x": (6, 10, 0.5),
    },
    "lifts the {} leg sideways": {
        "right_hip.z": (-38, 34), "left_shoulder.z": (-30, 22, 0.5), "right_shoulder.z": (45, 10, 0.5),
        "spine1.z": (-6, 8, 0.5),
    },
    "bends to the {}": {
        "spine1.z": (12, 16), "spine2.z": (12, 16), "spine3.z": (10, 12), "neck.z": (5, 8),
        "left_shoulder.z": (20, 65), "right_shoulder.z": (75,),
    },
    "turns to the {}": {
        "pelvis.y": (-16, 20), "spine1.y": (-10, 14), "spine2.y": (-10, 14), "spine3.y": (-8, 12),
        "right_shoulder.z": (20,), "left_shoulder.z": (-20,), "right_elbow.y": (30,),
        "left_elbow.y": (-30,),
    },
    "lunges with the {} leg": {
        "right_hip.x": (-40, 38), "right_knee.x": (45, 42, 0.5), "left_hip.x": (14, 15, 0.5),
        "left_knee.x": (34, 30, 0.5), "left_shoulder.x": (-20, 25), "right_shoulder.x": (15, 20, 0.5),
        "spine1.x": (6, 6), "left_elbow.y": (-60,), "right_elbow.y": (60,), "root.z": (0, 0.08),
    },
    "steps to the {}": {
        "root.x": (0, 0.26, 0.5), "right_hip.z": (-28, 24), "left_hip.z": (10, 8, 0.5),
        "right_knee.x": (20, 20, 0.5), "right_hip.x": (-12, 12), "right_shoulder.z": (20, 50, 0.5),
        "left_shoulder.z": (-50, 18, 0.25), "spine1.z": (0, 8),
    },
    "circles the {} arm": {
        "right_shoulder.z": (-5, 80), "right_shoulder.x": (-20, 70, 0.25), "right_elbow.y": (0,),
        "spine1.y": (0, 14, 0.25), "spine2.y": (0, 14, 0.25), "left_elbow.y": (-60,),
    },
    "hops on the {} foot": {
        "root.y": (0.09, 0.09), "left_hip.x": (-40, 18, 0.5), "left_knee.x": (90, 16),
        "right_knee.x": (30, 28, 0.5), "right_hip.x": (-18, 16), "right_shoulder.z": (30, 38, 0.5),
        "left_shoulder.z": (-30, 38), "spine1.x": (8, 8, 0.5),
    },
    "reaches for the {} foot": {
        "spine1.x": (28, 26), "spine2.x": (22, 22), "spine3.x": (12, 10), "spine1.y": (-10, 12),
        "right_shoulder.x": (-40, 35, 0.5), "right_elbow.y": (5,), "left_shoulder.x": (25, 30),
        "right_hip.x": (-18, 16, 0.5), "left_knee.x": (18, 16),
    },
}  # fmt: skip

SYMMETRIC: dict[str, Track] = {
    "squats": {
        "right_hip.x": (-45, 44), "left_hip.x": (-45, 44), "right_knee.x": (58, 56, 0.5),
        "left_knee.x": (58, 56, 0.5), "right_ankle.x": (-10, 10, 0.5), "left_ankle.x": (-10, 10, 0.5),
        "spine1.x": (16, 15, 0.5), "right_shoulder.x": (-45, 42), "left_shoulder.x": (-45, 42),
    },
    "jumps": {
        "root.y": (0.10, 0.13), "right_hip.x": (-22, 20), "left_hip.x": (-22, 20),
        "right_knee.x": (32, 30, 0.5), "left_knee.x": (32, 30, 0.5),
        "right_shoulder.x": (-60, 75, 0.5), "left_shoulder.x": (-60, 75, 0.5),
    },
    "does jumping jacks": {
        "right_shoulder.z": (0, 72), "left_shoulder.z": (0, 72, 0.5), "right_hip.z": (-18, 15),
        "left_hip.z": (18, 15, 0.5), "root.y": (0.04, 0, 0, 0.05, 0),
    },
    "bows": {
        "spine1.x": (28, 28), "spine2.x": (18, 18), "spine3.x": (12, 12), "neck.x": (8, 8),
        "right_hip.x": (-8, 8, 0.5), "left_hip.x": (-8, 8, 0.5),
        "right_shoulder.x": (-10, 12, 0.5), "left_shoulder.x": (-10, 12, 0.5),
    },
    "marches": {
        "right_hip.x": (-32, 42), "left_hip.x": (-32, 42, 0.5), "right_knee.x": (42, 42, 0.5),
        "left_knee.x": (42, 42), "right_shoulder.x": (0, 45, 0.5), "left_shoulder.x": (0, 45),
        "right_elbow.y": (45,), "left_elbow.y": (-45,), "spine2.y": (0, 8),
    },
    "claps overhead": {
        "right_shoulder.z": (-38, 42), "left_shoulder.z": (38, 42, 0.5), "right_elbow.z": (-15, 10),
        "left_elbow.z": (15, 10, 0.5), "right_elbow.y": (10,), "left_elbow.y": (-10,),
        "right_hip.z": (-22,), "left_hip.z": (22,), "right_knee.x": (12, 10), "left_knee.x": (12, 10),
        "right_hip.x": (-7, 6, 0.5), "left_hip.x": (-7, 6, 0.5),
    },
    "swims with both arms": {
        "right_shoulder.z": (0,), "left_shoulder.z": (0,), "right_shoulder.y": (40, 48),
        "left_shoulder.y": (-40, 48, 0.5), "right_elbow.y": (35, 30, 0.15), "left_elbow.y": (-35, 30, 0.65),
        "spine1.x": (12, 6, 0.5), "right_knee.x": (12, 10), "left_knee.x": (12, 10),
        "right_hip.x": (-10, 6, 0.5), "left_hip.x": (-10, 6, 0.5),
    },
    "twists from side to side": {
        "pelvis.y": (0, 14), "spine1.y": (0, 22), "spine2.y": (0, 22), "spine3.y": (0, 18),
        "right_shoulder.z": (5,), "left_shoulder.z": (-5,), "right_elbow.y": (5,), "left_elbow.y": (-5,),
    },
}  # fmt: skip


def mirror(track: Track) -> Track:
    """The same motion by the other side: swap left and right; reflecting x flips turns about y and z."""
    mirrored = {}
    for channel, (bias, *waves) in track.items():
        joint, axis = channel.split(".")
        side, _, part = joint.partition("_")
        joint = {"left": f"right_{part}", "right": f"left_{part}"}.get(side, joint)
        sign = -1 if axis in ("x" if joint == "root" else "yz") else 1
        amplitudes_and_phases = [number * sign if k % 2 == 0 else number for k, number in enumerate(waves)]
        mirrored[f"{joint}.{axis}"] = (sign * bias, *amplitudes_and_phases)
    return mirrored


TABLE: dict[str, Track] = {
    **{name.format("right"): track for name, track in SIDED.items()},
    **{name.format("left"): mirror(track) for name, track in SIDED.items()},
    **SYMMETRIC,
}

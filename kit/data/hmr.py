"""Read results of human mesh recovery, and AMASS and similar files, as one person's `Motion`.

    GVHMR              .pt            smpl_params_incam, K_fullimg; the betas are SMPL-X's
    WHAM               .pkl, joblib   by track: pose, trans, betas, frame_ids
    TRAM               .npy           a track: pred_rotmat, pred_trans, pred_shape, frame; ../camera.npy
    4D-Humans (PHALP)  .pkl, joblib   by frame, lists over persons: tid, smpl, camera, size, time
    CameraHMR, others  any of these   arrays under names in smpl_fields.py; a track, by track, or by image
    HY-Motion          .npz           poses, trans, Rh, betas; y up, 30 frames a second
    AMASS              .npz           poses, trans, betas, a rate; SMPL, SMPL+H or SMPL-X; z up

Recovered motion is in its camera's frame with OpenCV's axes, and its rows belong to frames of the video.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kit.body import Body
from kit.data.motion_files import AXES, Motion, at_frames, check_motion, turn
from kit.data.smpl_fields import NAMES, NO_POSE, READ, Size, axes_of, intrinsics_of, pick, pose_of, transl_of
from kit.untrusted import read_arrays, read_object

GAP = 0.5  # seconds without the person that are filled
HY_MOTION_FPS = 30.0
# SMPL-X's pelvis at rest, metres: where its transl counts from (J_regressor[0] @ v_template, neutral)
SMPLX_PELVIS = (0.00312326, -0.35140744, 0.01203655)
PHALP = ("camera", "size", "camera_bbox", "center", "scale")  # what is read of a person, besides smpl
NOT_SMPL = (
    "HumanML3D's vectors (263 numbers a frame) are no SMPL pose: their rotations are refitted to another "
    "skeleton; read the AMASS files that its index.csv names (kit/data/humanml3d.py)"
)


class Recovered(NamedTuple):
    """A motion in our axes, one row for each frame in which the person was found."""

    motion: Motion  # fps: the file's, or NaN where it has none
    frames: Tensor | None  # (f,) ascending numbers of the video's frames; None: the motion has its own clock
    intrinsics: Tensor | None  # (3 3) pixels
    notes: list[str]  # what was assumed


class Stretch(NamedTuple):
    """Part of a clip in which the person is seen without a long gap."""

    motion: Motion  # a row for each of `times`
    times: Tensor  # (f,) seconds of the rows


def read_motion_file(
    path: Path, body: Body, track: str = "", axes: str = "", size: Size | None = None
) -> Recovered:
    """Read any of the files above.

    `track` is needed if two tracks are the longest; `axes`, one of AXES, if the file does not tell. `size` is
    the (height, width) of the video. Ten betas are kept, and the rotations of root and body; SMPL's two hand
    joints are identity unless the file is plain SMPL. `body` gives the rest pelvis, about which SMPL turns.
    Raises FileNotFoundError, or ValueError naming the file and the reason.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a motion")
    if axes and axes not in AXES:
        raise ValueError(f"{path}: axes {axes!r}, expected one of {', '.join(AXES)}")
    # other arrays of AMASS's SMPL-X release may be objects
    content = read_arrays(path, READ) if path.suffix == ".npz" else read_object(path, "motion")
    try:
        if isinstance(content, np.ndarray):
            raise ValueError(NOT_SMPL if content.shape[-1:] == (263,) else NO_POSE)
        found = _recovered(*_choose(_tracks(content), track), path, body, axes, size)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = error if isinstance(error, ValueError) else f"{NO_POSE} ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {reason}") from error
    gender = found.motion.gender
    if gender not in ("neutral", *body.genders()):
        where = body.folder or "--body"
        found.notes.append(f"it is {gender}, and {where} has no {gender} model: another is used")
    return found


# ---------------------------------------------------------------- who is in it


def _tracks(content: object) -> dict[str, dict]:
    """The persons in a file, by name, each with its arrays under the file's own names."""
    if isinstance(content, dict) and "smpl_params_incam" in content:
        return {"": content | content["smpl_params_incam"] | {"surface_model_type": "smplx"}}
    if _has_pose(content):
        return {"": content}
    records = content if isinstance(content, dict) else dict(enumerate(content or []))
    records = {str(name): record for name, record in records.items() if isinstance(record, dict)}
    if any("tid" in record for record in records.values()):
        return _phalp(records)
    records = {name: record for name, record in records.items() if _has_pose(record)}
    if records and all(re.search(r"\d\D*\.\w+$", name) for name in records):  # named like images
        numbers = [int(re.findall(r"\d+", Path(name).stem)[-1]) for name in records]
        first = 0 if 0 in numbers else 1
        people = zip(records.values(), numbers, strict=True)
        return {"": _stacked([{"frame": number - first} | record for record, number in people])}
    return records


def _has_pose(record: object) -> bool:
    return isinstance(record, dict) and any(name in record for name in NAMES["pose"] + NAMES["body"])


def _phalp(frames: dict[str, dict]) -> dict[str, dict]:
    """PHALP's dictionaries by frame -> by track, without frames in which a person was only predicted."""
    tracks: dict[str, list[dict]] = {}
    for order, frame in enumerate(frames.values()):
        ages = frame.get("tracked_time", [0] * len(frame["tid"]))
        for k, (name, age) in enumerate(zip(frame["tid"], ages, strict=True)):
            if age == 0:
                person = {key: frame[key][k] for key in PHALP if key in frame}
                person |= frame["smpl"][k] | {"frame": frame.get("time", order)}
                tracks.setdefault(str(name), []).append(person)
    return {name: _stacked(persons) for name, persons in tracks.items()}


def _stacked(persons: list[dict]) -> dict[str, np.ndarray]:
    names = [name for name in persons[0] if all(name in person for person in persons)]
    return {name: np.stack([np.asarray(person[name]) for person in persons]) for name in names}


def _choose(tracks: dict[str, dict], wanted: str) -> tuple[str, dict]:
    """The track of this name, else the longest."""
    if not tracks:
        raise ValueError(NO_POSE)
    if wanted:
        if wanted not in tracks:
            known = ", ".join(name or "one without a name" for name in tracks)
            raise ValueError(f"it has no track {wanted!r}, expected one of: {known}")
        return wanted, tracks[wanted]
    lengths = {name: len(pick(record, "body", "pose")) for name, record in tracks.items()}
    longest = [name for name, length in lengths.items() if length == max(lengths.values())]
    if len(longest) > 1:
        names = ", ".join(longest[:5]) + (" and more" if len(longest) > 5 else "")
        hint = "name one, column track or @track=; if each is a frame of one person, stack them into one .npz"
        raise ValueError(f"its tracks {names} are equally long: {hint}")
    return longest[0], tracks[longest[0]]


# ---------------------------------------------------------------- what they do


def _recovered(name: str, record: dict, path: Path, body: Body, axes: str, size: Size | None) -> Recovered:
    record, notes = dict(record), []
    model = str(np.asarray(record.get("surface_model_type", "")))
    smplx = "smplx" in model or "expression" in record or np.shape(record.get("poses"))[-1:] == (165,)
    if smplx:
        notes.append("its betas are SMPL-X's, the body is SMPL's: the shape is not quite the same")
    # PHALP's `camera` is a translation; a `camera` next to AMASS's `trans` holds intrinsics
    if "camera" in record and ("trans" in record or np.shape(record["camera"])[-2:] == (3, 3)):
        record["intrinsics"] = record.pop("camera")
    if size is None and "size" in record:
        size = tuple(np.reshape(record["size"], (-1, 2))[0].tolist())
    pose, rate, frames = pose_of(record), pick(record, "rate"), pick(record, "frames")
    if rate is None and frames is None and "Rh" in record:
        rate = np.array(HY_MOTION_FPS)
    own_clock = frames is None and rate is not None
    if len(pose) < 2 and not own_clock:
        hint = "if the tool writes a file for each frame, stack them into one .npz"
        raise ValueError(f"its track{name and ' '}{name} has one frame, expected a motion: {hint}")
    rows = np.arange(len(pose)) if frames is None else frames.reshape(-1)
    parts = transl_of(record, size, notes), _betas(record, len(pose))
    transl, betas = (x.astype(np.float64) for x in parts)
    for what, part in (("transl", transl), ("betas", betas), ("frame numbers", rows)):
        if len(part) != len(pose):
            raise ValueError(f"{len(part)} {what}, expected {len(pose)} as of the pose")
    kept, lost = _usable(rows, np.concatenate([pose.flatten(1), transl, betas], axis=1))
    if lost and (own_clock or len(kept) < 2):
        raise ValueError(f"{lost}; cut or repair those frames")
    notes += [f"{lost}: as if nobody was seen there"] if lost else []
    pose, transl, betas = pose[kept], torch.from_numpy(transl[kept]), torch.from_numpy(betas[kept])
    fps = HY_MOTION_FPS if rate is None else float(rate.reshape(-1)[0])
    motion = Motion(pose[:, 0], pose[:, 1:], betas.mean(0), transl, fps, _gender(record))
    check_motion(motion, "its motion")
    if smplx:  # the pelvis stays where SMPL-X has it
        pelvis = body.of(motion.gender).rest_joints(torch.zeros(10))[0]
        motion = motion._replace(transl=motion.transl + torch.tensor(SMPLX_PELVIS) - pelvis)
    motion = turn(motion, AXES[axes or axes_of(record)], body)
    motion = motion if rate is not None else motion._replace(fps=float("nan"))
    frames = None if own_clock else torch.from_numpy(rows[kept].astype(np.int64))
    return Recovered(motion, frames, intrinsics_of(record, path, size, notes), notes)


def _betas(record: dict, frames: int) -> np.ndarray:
    """The first ten betas (f 10), from one shape for each frame or one for all."""
    betas = pick(record, "betas")
    if betas is None or betas.ndim == 0 or betas.shape[-1] < 10:
        raise ValueError(f"betas are {None if betas is None else betas.shape}, expected 10 or more numbers")
    betas = betas.reshape(-1, betas.shape[-1])[:, :10]
    return np.broadcast_to(betas, (frames, 10)) if len(betas) == 1 else betas


def _usable(frames: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, str]:
    """Rows without NaN in the order of their frames, and what is wrong with the others."""
    if (frames != np.round(frames)).any() or frames.min() < 0:
        raise ValueError(f"frame numbers {frames.min()} to {frames.max()}, expected whole ones from 0 on")
    order = np.argsort(frames, kind="stable")
    if (same := np.diff(frames[order]) == 0).any():
        at = frames[order][1:][same][0]
        raise ValueError(f"frame {at} is there twice: are there two persons in the track?")
    whole = np.isfinite(numbers[order]).all(axis=1)
    lost = frames[order][~whole]
    return order[whole], f"frame {lost[0]} and {len(lost) - 1} more hold NaN or infinity" if len(lost) else ""


def _gender(record: dict) -> str:
    gender = np.reshape(record.get("gender", "neutral"), -1)[0]
    gender = (gender.decode("latin1") if isinstance(gender, bytes) else str(gender)).lower()
    return {"f": "female", "m": "male", "n": "neutral"}.get(gender, gender)


# ---------------------------------------------------------------- the clock


def stretches(found: Recovered, times: Tensor | None) -> tuple[list[Stretch], list[str]]:
    """The motion on its video's clock, whose frames are shown at `times` (n,), seconds; and what was changed.

    Gaps of up to half a second are interpolated; longer ones split the motion. A motion with its own clock is
    one stretch.
    """
    motion, frames = found.motion, found.frames
    if frames is None:
        clock = torch.arange(len(motion.transl), dtype=torch.float64) / motion.fps
        return [Stretch(motion, clock)], []
    fps = (len(times) - 1) / float(times[-1] - times[0])
    missing = frames.diff() - 1
    long = missing / fps > GAP + 1e-6
    parts, seen = [], []
    for rows in torch.arange(len(frames)).tensor_split(long.nonzero().flatten() + 1):
        numbers = torch.arange(int(frames[rows[0]]), int(frames[rows[-1]]) + 1)
        position = torch.from_numpy(np.interp(numbers, frames[rows], rows))
        parts.append(Stretch(at_frames(motion._replace(fps=fps), position), times[numbers]))
        seen.append(f"{numbers[0]} to {numbers[-1]}")
    said = []
    if sum(len(part.times) for part in parts) < len(times):
        said.append(f"the person is in frames {', '.join(seen)} of 0 to {len(times) - 1}; the others are cut")
    if filled := int(missing[~long].sum()):
        said.append(f"{filled} frames without the person are filled")
    return parts, said


def at_video_times(part: Stretch, times: Tensor) -> Motion:
    """The stretch's motion at `times` (n,), seconds of its video, which must lie within the stretch."""
    position = np.interp(times, part.times, np.arange(len(part.times)))
    return at_frames(part.motion, torch.from_numpy(position))

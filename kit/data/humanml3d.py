"""HumanML3D (Guo et al., CVPR 2022): captions for AMASS motions, as an index over a folder of AMASS files.

    FOLDER/index.csv                   source_path,start_frame,end_frame,new_name: which frames of which file
    FOLDER/texts/NAME.txt              lines of caption#tokens#start#end, in seconds; 0 0 is the whole clip
    FOLDER/train.txt, val.txt, ...     names, one a line; a name with M before it is the mirrored clip

index.csv is at the root of https://github.com/EricGuo5513/HumanML3D, whose raw_pose_processing.ipynb says
what its frames mean. Of AMASS, the SMPL+H G release is expected, in folders named as in index.csv or as AMASS
names them today.
"""

import csv
import math
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from kit.body import Body
from kit.data.hmr import NOT_SMPL, read_motion_file
from kit.data.motion_files import Motion, mirror, resample
from kit.data.plausible import Reading

FPS = 20  # of the frame numbers in index.csv
COLUMNS = ("source_path", "start_frame", "end_frame", "new_name")
# frames before index.csv's frame 0: these captures begin with a calibration pose
SKIPPED = {
    "Eyes_Japan_Dataset": 60, "MPI_HDM05": 60, "TotalCapture": 20, "MPI_Limits": 20, "Transitions_mocap": 10,
}  # fmt: skip
# index.csv's names of AMASS's folders -> the names of its downloads today, as HumanML3D's README pairs them
TODAY = {
    "BioMotionLab_NTroje": "BMLrub", "DFaust_67": "DFaust", "MPI_HDM05": "HDM05", "MPI_Limits": "PosePrior",
    "MPI_mosh": "MoSh", "SSM_synced": "SSM", "TCD_handMocap": "TCDHands", "Transitions_mocap": "Transitions",
}  # fmt: skip
NO_AMASS = "humanact12"  # its clips are joint positions, without SMPL parameters
LINE = "caption#tokens#start#end"
SLACK = 1.0  # seconds that a caption may reach beyond its clip; annotators wrote round numbers


class Entry(NamedTuple):
    """A stretch of an AMASS file and what it shows; times are on HumanML3D's clock, see `read_entry`."""

    name: str  # as in train.txt
    source: Path
    start: float  # seconds from the file's beginning
    end: float  # seconds: the time of the first frame after it
    mirrored: bool
    captions: tuple[str, ...]  # those of mirrored clips are mirrored already


def entries(folder: Path, amass: Path) -> tuple[list[Entry], list[str]]:
    """List the training split -> its entries, and for each clip left out a line that says why.

    No motion is opened. A clip with captions for parts of it gives an entry for each part. FileNotFoundError
    or ValueError for a missing or malformed index or split; a clip with a bad span or text is left out.
    """
    index = folder / "index.csv"
    if any(folder.glob("*[0-9].npy")) and not index.is_file():
        raise ValueError(f"{folder}: {NOT_SMPL}")
    if not amass.is_dir():
        where = f"humanml3d:{folder}+AMASS"
        raise FileNotFoundError(f"no folder {amass}: expected AMASS there; name another folder as {where}")
    clips = _read_index(index, amass)
    names = _read_text(folder / "train.txt").split()
    if not names:
        raise ValueError(f"{folder}/train.txt is empty, expected names such as 000004")
    if unknown := [name for name in names if name.removeprefix("M") not in clips]:
        count = len(unknown)
        raise ValueError(f"{folder}/train.txt has {count} names that index.csv lacks, as {unknown[0]}")
    known = [name for name in names if clips[name.removeprefix("M")][0]]
    found, problems = [], []
    if len(known) < len(names):
        problems.append(f"{len(names) - len(known)} clips of HumanAct12 left out: no AMASS source")
    for name in known:
        source, start, end = clips[name.removeprefix("M")]
        try:
            if not 0 <= start < end:
                raise ValueError(f"{name}: frames {start} to {end} in index.csv are no span")
            parts = read_captions(folder / "texts" / f"{name}.txt", end - start)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for (first, after), captions in parts.items():
            seconds = (start + first) / FPS, (start + after) / FPS
            found.append(Entry(name, source, *seconds, name.startswith("M"), captions))
    return found, problems


def read_entry(entry: Entry, body: Body, fps: float, reading: Reading) -> Motion:
    """The motion of an entry at `fps`, mirrored if the entry is. FileNotFoundError or ValueError, naming it.

    HumanML3D counts every int(rate / 20)-th frame of a file as 1/20 s. That is right at 60, 100 and 120 Hz;
    at other rates (59.94, 150, 250 Hz) its seconds are not true seconds, and are converted here.
    """
    other = entry.source.with_name(entry.source.name.replace("_poses.npz", "_stageii.npz"))
    if other.is_file() and not entry.source.is_file():
        raise ValueError(f"{other} is of AMASS's SMPL-X release; HumanML3D's frames are those of SMPL+H G")
    found = read_motion_file(entry.source, body, axes=reading.axes)
    reading.say(entry.name, found.notes)
    motion = found.motion
    if found.frames is not None or motion.fps < FPS:
        raise ValueError(f"{entry.source} has {motion.fps:g} frames a second, expected at least {FPS}")
    second = FPS * int(motion.fps / FPS) / motion.fps  # one of HumanML3D's, in seconds
    start, last = entry.start * second, (entry.end - 1 / FPS) * second
    duration = (len(motion.transl) - 1) / motion.fps
    if last > duration + 1e-6:  # a margin for rounding
        ends = f"{entry.name} ends at {last:.2f} s of {entry.source}, which lasts {duration:.2f} s"
        raise ValueError(f"{ends}; is that file of the SMPL+H G release?")
    cut = resample(motion, fps, start, last)
    return mirror(cut, body) if entry.mirrored else cut


def read_captions(path: Path, frames: int) -> dict[tuple[int, int], tuple[str, ...]]:
    """Captions of a clip of `frames` frames at 20 a second, by the part they describe: (start, end) frames.

    `end` is the first frame after the part. ValueError names a malformed line. Parts that end up to a second
    after the clip are cut.
    """
    duration = frames / FPS
    parts: dict[tuple[int, int], tuple[str, ...]] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            caption, _, *times = line.rsplit("#", 3)
            start, end = (0.0 if math.isnan(float(time)) else float(time) for time in times)
            end = duration if start == end == 0 else end
            part = int(start * FPS), min(int(end * FPS), frames)  # rounded as HumanML3D's own loader does
            if not (caption.strip() and 0 <= start <= end <= duration + SLACK and part[0] < part[1]):
                raise ValueError
        except (ValueError, OverflowError):
            expected = f"{LINE}, with frames in a clip of {duration:g} s"
            raise ValueError(f"{path} line {number} is {line!r}, expected {expected}") from None
        parts[part] = (*parts.get(part, ()), caption.strip())
    if not parts:
        raise ValueError(f"{path} holds no caption, expected lines of {LINE}")
    return parts


def _read_index(path: Path, amass: Path) -> dict[str, tuple[Path | None, int, int]]:
    """index.csv -> by name: file (None: not in AMASS), first frame, and frame after the last, at 20 a second.

    ValueError for lines that are malformed or lead out of the AMASS folder.
    """
    reader = csv.DictReader(_read_text(path).splitlines())
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} has {reader.fieldnames}, expected the columns {', '.join(COLUMNS)}")
    clips = {}
    there = {place.name.casefold(): place.name for place in amass.iterdir()}  # MoSh is Mosh on some disks
    for row in reader:
        source, start, end, name = (row[column] or "" for column in COLUMNS)
        line = f"{path} line {reader.line_num}"
        if not re.fullmatch(r"\w+\.npy", name) or name.removesuffix(".npy") in clips:
            raise ValueError(f"{line}: new_name is {name!r}, expected a new one such as 000004.npy")
        if not re.fullmatch(r"-?\d+ -?\d+", f"{start} {end}"):
            raise ValueError(f"{line}: frames {start!r} to {end!r}, expected whole numbers")
        top, *place = PurePosixPath(source).parts or [""]
        if top != "pose_data" or not source.endswith(".npy") or ".." in place or "\\" in source:
            raise ValueError(f"{line}: source_path is {source!r}, expected ./pose_data/DATASET/.../NAME.npy")
        dataset = place[0]
        names = [there[n.casefold()] for n in (dataset, TODAY.get(dataset, "")) if n.casefold() in there]
        folder = amass / next(iter(names), dataset)
        file = None if dataset == NO_AMASS else folder.joinpath(*place[1:]).with_suffix(".npz")
        skipped = SKIPPED.get(dataset, 0)
        clips[name.removesuffix(".npy")] = file, skipped + int(start), skipped + int(end)
    if not clips:
        raise ValueError(f"{path} has no lines, expected one for each clip")
    return clips


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: HumanML3D has index.csv, texts/NAME.txt and train.txt")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error

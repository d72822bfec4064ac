"""Data sets by name, read item by item: which clips there are, and what is wrong with them.

    puppet:COUNT          clips of the embedded world, from their own range of seeds
    amass:DIR             every AMASS .npz below DIR; motion only, no captions
    humanml3d:DIR+AMASS   HumanML3D's training split in DIR, over AMASS files (default: in DIR/amass)
    clips:DIR             videos with prompts and motions, see kit/data/clips.py
    puppet                the embedded world without end, for training only (kit/data/sources.py)
    cache:DIR             what `python -m kit.data cache` wrote (kit/data/cache.py)

@WEIGHT after a name is its share when training mixes several. @axes=zup, yup or opencv are the axes of its
files; @smooth=SECONDS smooths its motion in time. Motion that no person can do is rejected (plausible.py).
Motion without video is cut into windows that start at the origin; paired data keeps its camera's frame.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor
from tqdm import tqdm

from kit import puppet
from kit.body import Body
from kit.data import humanml3d
from kit.data.clips import Sample, inside, motion_vector, read_clip, read_metadata
from kit.data.hmr import read_motion_file
from kit.data.motion_files import AXES, Motion, canonical, resample
from kit.data.plausible import Reading, checked
from kit.data.smpl_fields import tram_camera
from kit.geometry import PUPPET, Geometry
from kit.pictures import to_frames
from motion_tokens import encode_smpl

T = TypeVar("T")
NUMBER = r"\d+\.?\d*|\.\d+"
LONGEST_SMOOTH = 2.0  # seconds
PUPPET_SEED = 1 << 21  # of the first clip of puppet:COUNT


class DataSet(NamedTuple):
    """Items (a clip, a motion file), each of which yields samples or raises ValueError or OSError."""

    names: list[str]  # of the items
    read: Callable[[int], Iterator[Sample]]  # by the item's number
    paired: bool  # whether samples have video
    problems: list[str]  # of entries that could not even become items
    # what an item is made of, by the item's number: texts and files
    sources: Callable[[int], dict[str, str | Path]] = lambda item: {}
    reading: Reading = Reading()  # how motion is read, and the notes on it


def parse(spec: str) -> tuple[str, str, float | None]:
    """KIND:WHERE@WEIGHT -> (kind, where, weight); without @WEIGHT the weight is None."""
    rest, _ = split_options(spec, "axes", "smooth")
    if unknown := re.search(r"@\w+=[^@]*", rest):
        raise ValueError(f"data set {spec!r}: no option {unknown[0]}, expected @axes=, @smooth= or @WEIGHT")
    match = re.fullmatch(rf"(\w+)(?::(.+?))?(?:@({NUMBER}))?", rest)
    if not match:
        raise ValueError(f"data set {spec!r}: expected KIND:WHERE or KIND:WHERE@WEIGHT, such as puppet:100")
    kind, where, weight = match.groups()
    if kind in ("puppet", "cache") and rest != spec:
        raise ValueError(f"data set {spec!r}: @axes= and @smooth= are for amass, humanml3d and clips")
    if weight is not None and float(weight) == 0:
        raise ValueError(f"data set {spec!r}: its weight must be above 0; leave it out instead")
    return kind, where or "", None if weight is None else float(weight)


def split_options(name: str, *known: str) -> tuple[str, dict[str, str]]:
    """The name of a data set or file without its options, and these, such as @axes=opencv@smooth=0.1."""
    option = rf"@({'|'.join(known)})=([^@]*)"
    found = re.findall(option, name)
    options = dict(found)
    if len(options) < len(found):
        raise ValueError(f"{name!r} has an option twice, expected each at most once")
    if (axes := options.get("axes")) is not None and axes not in AXES:
        raise ValueError(f"{name!r}: axes {axes!r}, expected one of {', '.join(AXES)}")
    smooth = options.get("smooth", "0")
    if not re.fullmatch(NUMBER, smooth) or float(smooth) > LONGEST_SMOOTH:
        expected = f"expected seconds, 0 to {LONGEST_SMOOTH:g}, such as @smooth=0.1"
        raise ValueError(f"{name!r}: smooth is {smooth!r}, {expected}")
    return re.sub(option, "", name), options


def open_dataset(spec: str, geometry: Geometry, body: Body, force: bool = False) -> DataSet:
    """List a data set's items; no motion or video is read yet. ValueError or OSError if it is no data set.

    `force` also accepts motion that no person can do.
    """
    kind, where, _ = parse(spec)
    if kind not in KINDS:
        raise ValueError(f"data set {spec!r}: expected one of {', '.join(f'{kind}:...' for kind in KINDS)}")
    _, options = split_options(spec, "axes", "smooth")
    reading = Reading(options.get("axes", ""), float(options.get("smooth", 0)), force)
    return KINDS[kind](where, geometry, body, reading)._replace(reading=reading)


def read_item(
    data: DataSet, item: int, use: Callable[[Sample], T], rejected: list[str], most: int | None = None
) -> list[T]:
    """What `use` makes of each sample of an item, or of the first `most`; they are read one by one.

    If a sample cannot be read or used: an empty list, and the reason in `rejected`.
    """
    try:
        return [use(sample) for sample in islice(data.read(item), most)]
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        rejected.append(reason.encode(errors="backslashreplace").decode())  # names on disk may be any bytes
        return []


def read_all(data: DataSet, use: Callable[[Sample], T], title: str = "") -> tuple[list[T], list[str]]:
    """What `use` makes of each sample of a data set, and what is wrong with it; a title shows progress."""
    made, rejected = [], list(data.problems)
    for item in tqdm(range(len(data.names)), desc=title, unit="item", disable=not title):
        made += read_item(data, item, use, rejected)
    return made, rejected


# ---------------------------------------------------------------- the kinds


def puppet_motion(clips: puppet.Clips) -> Tensor:
    """Motion vectors (b f 235) of puppet clips, in their camera's frame, not normalised."""
    body = puppet.body(clips.transl.device)
    return encode_smpl(clips.global_orient, clips.body_pose, clips.betas, clips.transl, body)


def puppet_count(where: str) -> int:
    if not where.isdecimal() or int(where) < 1:
        raise ValueError(f"puppet:{where}: expected a number of clips, such as puppet:100")
    return int(where)


def _puppets(where: str, geometry: Geometry, body: Body, reading: Reading) -> DataSet:
    """COUNT clips at the puppet's own rate and size, of its own body whatever `body`."""
    names = [f"puppet {item}" for item in range(puppet_count(where))]
    if geometry._replace(frames=PUPPET.frames, stride=PUPPET.stride) != PUPPET:
        fps, size = puppet.FPS, f"{puppet.SIZE}x{puppet.SIZE}"
        raise ValueError(f"puppet clips have {fps} frames a second of {size}: add --fps {fps} --size {size}")

    def read(item: int) -> Iterator[Sample]:
        clip = puppet.clips([PUPPET_SEED + item], geometry.frames)
        video = to_frames(puppet.render(clip.joints, clip.betas, clip.shirt)[0][0])
        yield Sample(names[item], tuple(clip.caption), puppet_motion(clip)[0], video, puppet.project)

    return DataSet(names, read, paired=True, problems=[])


def _amass(where: str, geometry: Geometry, body: Body, reading: Reading) -> DataSet:
    folder = _folder(where)
    files, problems = _npz_below(folder)
    # AMASS keeps a subject's shape and calibration beside the motions
    files = [file for file in files if file.name != "shape.npz" and not file.stem.endswith("_stagei")]
    if not files:
        problems.append(f"{folder} holds no .npz, at any depth: unpack AMASS there")

    def read(item: int) -> Iterator[Sample]:
        name = str(files[item])
        found = read_motion_file(folder / name, body, axes=reading.axes)
        if found.frames is not None:
            raise ValueError(f"{name} has a video's frame numbers and no rate: pair it, with clips:DIR")
        reading.say(name, found.notes)
        motion = resample(checked(found.motion, body, name, reading, floor=True), geometry.fps)
        yield from _windows(name, (), motion, geometry, body)

    names = [str(file) for file in files]
    return DataSet(names, read, False, problems, lambda item: {"motion": folder / files[item]})


def _humanml3d(where: str, geometry: Geometry, body: Body, reading: Reading) -> DataSet:
    folder, _, amass = where.partition("+")
    texts, amass = _folder(folder), Path(amass or Path(folder) / "amass")
    entries, problems = humanml3d.entries(texts, amass)

    def read(item: int) -> Iterator[Sample]:
        entry = entries[item]
        motion = humanml3d.read_entry(entry, body, geometry.fps, reading)
        motion = checked(motion, body, entry.name, reading, floor=True)
        yield from _windows(entry.name, entry.captions, motion, geometry, body)

    def sources(item: int) -> dict[str, str | Path]:
        entry = entries[item]
        span = f"{entry.start} {entry.end}"
        return {"captions": "\n".join(entry.captions), "span": span, "motion": entry.source}

    return DataSet([entry.name for entry in entries], read, False, problems, sources)


def _windows(
    name: str, captions: tuple[str, ...], motion: Motion, geometry: Geometry, body: Body
) -> Iterator[Sample]:
    """Consecutive samples of a motion at the geometry's rate; ValueError if it is too short for one."""
    frames, count = geometry.frames, len(motion.transl)
    if count < frames:
        has = f"{name} has {count} frames at {geometry.fps:g} fps"
        raise ValueError(f"{has}, fewer than {frames}: ask for fewer --frames")
    for start in range(0, count - frames + 1, frames):
        rows = slice(start, start + frames)
        orient, pose, transl = motion.global_orient[rows], motion.body_pose[rows], motion.transl[rows]
        part = motion._replace(global_orient=orient, body_pose=pose, transl=transl)
        yield Sample(name, captions, motion_vector(canonical(part, body), body), None, None)


def _clips(where: str, geometry: Geometry, body: Body, reading: Reading) -> DataSet:
    folder = _folder(where)
    clips, problems = read_metadata(folder)
    if not clips and not problems:
        problems = ["metadata.csv has no rows"]

    def read(item: int) -> Iterator[Sample]:
        yield from read_clip(folder, clips[item], geometry, body, reading)

    def sources(item: int) -> dict[str, str | Path]:
        clip, found = clips[item], {"row in metadata.csv": json.dumps(clips[item])}
        with suppress(ValueError):  # files outside the folder are not opened
            found |= {"video": inside(folder, clip.video), "motion": inside(folder, clip.motion)}
            if camera := tram_camera(found["motion"]):
                found["camera"] = camera
        return found

    return DataSet([clip.video for clip in clips], read, True, problems, sources)


def _folder(where: str) -> Path:
    if not where or not Path(where).is_dir():
        raise FileNotFoundError(f"no folder {where or 'named'}: expected KIND:DIR with an existing folder")
    return Path(where)


def _npz_below(folder: Path) -> tuple[list[Path], list[str]]:
    """The .npz below a folder, also through links, relative to it; and what could not be read.

    Each folder is visited once, however many links lead to it, so a link to a parent is no endless loop.
    """
    files, problems, visited = [], [], set()
    unreadable = lambda error: problems.append(f"{error.filename} cannot be read: {error.strerror}")
    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        for path in (Path(place, name) for name in sorted(names)):
            if not path.exists():
                problems.append(f"{path} is a broken link")
            elif path.suffix == ".npz":
                files.append(path.relative_to(folder))
    return sorted(files), problems


KINDS: dict[str, Callable[[str, Geometry, Body, Reading], DataSet]] = {
    "puppet": _puppets,
    "amass": _amass,
    "humanml3d": _humanml3d,
    "clips": _clips,
}

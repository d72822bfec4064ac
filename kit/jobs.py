"""What a call of sample.py has to make: samples with their names, prompts, seeds and conditions."""

import itertools
import json
import unicodedata
from collections import defaultdict
from pathlib import Path

from torch import Tensor

from flow import Task
from kit import puppet
from kit.backbone import Backbone
from kit.conditions import read_motion, read_video
from kit.data.datasets import puppet_motion
from kit.files import recorded
from kit.output import Job, latents_file, load_latents

TASKS = {
    "joint": Task.JOINT, "m2v": Task.MOTION_TO_VIDEO, "v2m": Task.VIDEO_TO_MOTION, "video": Task.VIDEO_ONLY,
}  # fmt: skip
DEFAULT_TASKS = ("joint", "m2v", "v2m")  # what a call without --task makes
PROMPT = "a person in a red shirt waves the left hand"
CONDITION_CLIP = 7  # the puppet clip that is the condition if no file is given
FREE = ("prompts", "count", "out", "mesh", "decode", "device")  # may change when a file of prompts is resumed
WITH_TEXT, WITH_MOTION = ("joint", "m2v", "video"), ("joint", "m2v", "v2m")
USED_BY = {  # the tasks that use an option
    "prompt": WITH_TEXT, "prompts": WITH_TEXT, "guidance_text": WITH_TEXT, "mesh": WITH_MOTION,
    "motion": ("m2v",), "video": ("v2m",), "redraw": ("joint",), "guidance_condition": WITH_MOTION,
}  # fmt: skip
DECODING = {"decode", "out", "mesh", "weights", "wan", "body", "device"}  # what --decode uses
LONGEST = 200  # bytes of a prompt that names files, of the 255 that a name may have


def check_used(name: str | None, given: set[str], redraw: bool) -> None:
    """ValueError for options, `given` by name, that contradict each other or do nothing in this call.

    `name` is the task's; `redraw`: whether the video of a joint sample is made once more. --decode may
    be added to the call that failed: what it does not use is printed.
    """
    if {"prompt", "prompts"} <= given:
        raise ValueError("--prompt and --prompts both say what is made: give one of the two")
    for option, tasks in USED_BY.items():
        if option in given and (name or "joint") not in tasks:
            what = f"--{option.replace('_', '-')}"
            raise ValueError(f"{what} is for --task {' or '.join(tasks)}: add that, or leave it out")
    if "guidance_condition" in given and name == "joint" and not redraw:
        raise ValueError("a joint sample has no condition: add --redraw, or leave --guidance-condition out")
    if "start" in given and not given & {"motion", "video"}:
        raise ValueError("--start is where in --video or --motion to begin: add one of them, with its --task")
    if "loop" in given and "motion" not in given:
        raise ValueError("--loop says how --motion is read: add that, with --task m2v, or leave --loop out")
    unused = sorted(f"--{option.replace('_', '-')}" for option in given - DECODING)
    if "decode" in given and unused:
        print(f"--decode only decodes, without {', '.join(unused)}: the latents are as they were sampled")


def jobs(
    name: str | None, prompt: str | None, prompts: Path | None, count: int, seed: int, own_motion: bool
) -> list[Job]:
    """The samples that sample.py's options ask for; `own_motion`: the motion of m2v is the user's."""
    if prompts:
        task, seeds, made = TASKS[name], defaultdict(lambda: itertools.count(seed)), []
        for file, text in read_prompts(prompts):  # a repeated prompt gets the next seeds
            for i in range(count):
                made.append(Job(f"{file}-{i}", task, text, next(seeds[text]), pictures=False))
        return made
    made = []
    for short in [name] if name else DEFAULT_TASKS:
        task, text = TASKS[short], prompt
        if task is Task.VIDEO_TO_MOTION:
            text = ""
        elif text is None and task is Task.MOTION_TO_VIDEO:  # the caption of the puppet's own condition
            text = "" if own_motion else puppet.clips([CONDITION_CLIP]).caption[0]
        elif text is None:
            text = PROMPT
        for i in range(count):
            made.append(Job(f"{short}-{i}" if count > 1 else short, task, text, seed + i, pictures=True))
    return made


def read_prompts(file: Path) -> list[tuple[str, str]]:
    """A prompt a line (UTF-8) -> for each, a unique name for its files, and the prompt."""
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: expected a text file with one prompt a line")
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = len((error.object[: error.start] + b".").splitlines())
        reason = f"{file} line {line} is not UTF-8 ({error.reason})"
        raise ValueError(f"{reason}: save the file as UTF-8") from error
    named, taken = [], set()
    for number, prompt in enumerate(map(str.strip, lines), start=1):
        if not prompt:
            continue
        name = prompt.replace("/", "_")
        if len(name.encode()) > LONGEST or "\0" in name:
            raise ValueError(
                f"{file} line {number}: a prompt names its files: at most {LONGEST} bytes, no NUL, "
                f"got {name!r}"
            )
        others = (f"{name} {copy}" for copy in itertools.count(2))
        name = next(other for other in itertools.chain([name], others) if _on_any_disk(other) not in taken)
        taken.add(_on_any_disk(name))
        named.append((name, prompt))
    if not named:
        raise ValueError(f"{file} has no prompt: expected one a line")
    return named


def _on_any_disk(name: str) -> str:
    """Equal for names that some file system takes for one: by case, or on macOS by Unicode normal form."""
    return unicodedata.normalize("NFC", name).casefold()


def missing(out: Path, jobs: list[Job]) -> tuple[list[Job], list[Path]]:
    """What is left: samples to make, and latents to decode, of a file of prompts that was stopped."""
    left = [job for job in jobs if job.pictures or not (out / f"{job.name}.mp4").exists()]
    if len(left) < len(jobs):
        print(f"{out} has {len(jobs) - len(left)} of {len(jobs)} samples already: they are kept")
    saved = [job for job in left if not job.pictures and _has_latents(out, job)]
    if saved:
        print(f"{out}/latents has {len(saved)} more: they are only decoded")
    return [job for job in left if job not in saved], [latents_file(out, job) for job in saved]


def _has_latents(out: Path, job: Job) -> bool:
    """Whether the latents of this sample are there; its gender is read with its condition."""
    file = latents_file(out, job)
    return file.exists() and load_latents(file).job._replace(gender=job.gender) == job


def check_options(out: Path, options: dict[str, object]) -> None:
    """ValueError if `out` has samples of a file of prompts that were made with other options."""
    record = out / "run.json"
    before = json.loads(record.read_text())["options"] if record.is_file() else {}
    if not before.get("prompts"):
        return
    now = json.loads(json.dumps(recorded(options)))
    changed = [name for name in now if name not in FREE and before.get(name) != now[name]]
    if changes := "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in changed):
        raise ValueError(f"{out} was made with other options ({changes}): use the same, or another --out")


def condition_video(file: Path | None, backbone: Backbone, start: float) -> Tensor:
    """Pixels (1 3 f h w): the file's from `start` seconds on, or the puppet's own."""
    if file:
        return read_video(file, backbone.geometry, start)
    if backbone.project is None:
        raise ValueError("--video FILE is needed: it is the condition of this task")
    own = puppet.clips([CONDITION_CLIP], backbone.geometry.frames)
    return puppet.render(own.joints, own.betas, own.shirt)[0]


def condition_motion(file: Path | None, backbone: Backbone, start: float, loop: bool) -> tuple[Tensor, str]:
    """Motion (1 f 235), the file's from `start` seconds on or the puppet's own; the gender of its body."""
    if file:
        return read_motion(file, backbone, start, loop)
    if backbone.project is None:
        raise ValueError("--motion FILE is needed: it is the condition of this task")
    return puppet_motion(puppet.clips([CONDITION_CLIP], backbone.geometry.frames)), "neutral"

"""Malformed data: each file is rejected by its name and with a reason, or used rightly, and nothing else."""

import contextlib
import shutil
from pathlib import Path

import av
import clip_folder
import numpy as np
import pytest
import torch
from clip_folder import CAMERA, edit, write_metadata
from conftest import contents
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cache import made_up, write

from kit.data import __main__ as commands

# ---------------------------------------------------------------- paired clips; clip 0 stays good


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def smudge(path: Path) -> None:
    """Damage that the decoder covers up: it fails at nothing, and marks a frame."""
    good, generator = path.read_bytes(), np.random.default_rng(0)
    for start in generator.integers(good.index(b"mdat") + 4, len(good) - 3000, 100):
        path.write_bytes(good[:start] + generator.bytes(50) + good[start + 50 :])
        with contextlib.suppress(av.error.FFmpegError), av.open(str(path)) as container:
            if any(frame.is_corrupt for frame in container.decode(video=0)):
                return
    raise AssertionError("no such damage found")


def rows(folder: Path, *second: str) -> None:
    """metadata.csv with the good row and this one."""
    write_metadata(folder, [("0.mp4", "good", "motions/0.npz"), second])


def raw(folder: Path, second: bytes) -> None:
    (folder / "metadata.csv").write_bytes(b"video,prompt,motion\n0.mp4,good,motions/0.npz\n" + second)


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def change(folder: Path, name: str, to) -> None:
    """Replace an array of clip 1's motion."""
    with np.load(folder / M) as file:
        array = file[name]
    edit(folder / M, **{name: to(array)})


def shorter(folder: Path, frames: int) -> None:
    for name in ("poses", "trans"):
        change(folder, name, lambda x: x[:frames])


def lens(folder: Path, row: int, column: int, value: float) -> None:
    camera = CAMERA.copy()
    camera[row, column] = value
    edit(folder / M, camera=camera)


V, M, TABLE = "1.mp4", "motions/1.npz", "metadata.csv"
CLIPS = {  # what is done to clip 1, and what is then said
    "half a video": (lambda f: cut(f / V), "1.mp4 is damaged"),
    "a smudge in a video": (lambda f: smudge(f / V), "1.mp4: frame"),
    # FFmpeg takes it for a video where it may guess, and opens the other
    "a playlist": (lambda f: (f / V).write_text("ffconcat version 1.0\nfile 0.mp4\n"), "no .mp4"),
    "only sound": (lambda f: sound_only(f / V), "1.mp4 has no video stream"),
    "no video": (lambda f: (f / V).unlink(), "1.mp4: no such file"),
    "no motion": (lambda f: (f / M).unlink(), "1.npz: no such file"),
    "another suffix": (lambda f: rows(f, M, "text", M), "expected a video ending"),
    "a path upwards": (lambda f: rows(f, V, "text", "../outside/motions/1.npz"), "leads out of"),
    "a link out": (lambda f: link(f / V, f / "../outside/1.mp4"), "1.mp4 leads out of"),
    "a link to itself": (lambda f: link(f / V, f / V), "1.mp4: no such file"),
    "a name with a zero": (lambda f: raw(f, b"1\0.mp4,text,motions/1.npz\n"), "null byte"),
    "not UTF-8": (lambda f: raw(f, b"1.mp4,caf\xe9,motions/1.npz\n"), "metadata.csv line 3: not UTF-8"),
    "no caption": (lambda f: rows(f, V, " ", M), "csv line 3: one of video, prompt, motion is empty"),
    "a value too few": (lambda f: rows(f, V, "text"), "line 3: expected 3 values"),
    "a value too many": (lambda f: rows(f, V, "a, b", "c", "d"), "line 3: expected 3 values"),
    "a motion too short": (lambda f: shorter(f, 14), "1.mp4 ends after 1.25 s, motions/1.npz after 0.81 s"),
    "half a motion": (lambda f: cut(f / M), "1.npz cannot be read"),
    "a camera of words": (lambda f: edit(f / M, camera=np.full((3, 3), "f")), "1.npz: camera is <U1"),
    "a camera of four": (lambda f: edit(f / M, camera=np.ones(4)), "1.npz: camera is float64 (4,)"),
    "no focal length": (lambda f: lens(f, 0, 0, 0), "expected [[fx"),
    "a camera that is NaN": (lambda f: lens(f, 0, 2, np.nan), "expected [[fx"),
    "a camera with skew": (lambda f: lens(f, 0, 1, 3), "expected [[fx"),
    "a camera of larger pictures": (lambda f: lens(f, 0, 2, 64), "of pictures of about 128x64, the video is"),
    "beside the camera": (lambda f: change(f, "trans", lambda x: x - (9, 0, 0)), "no joint is ever in the"),
    "behind the camera": (lambda f: change(f, "trans", lambda x: x - (0, 9, 0)), "m behind the camera"),
}
TABLES = {
    "no table": (lambda f: (f / TABLE).unlink(), "metadata.csv: expected a table"),
    "an empty table": (lambda f: (f / TABLE).write_bytes(b""), "metadata.csv lacks"),
    "no motions": (lambda f: (f / TABLE).write_text("video,prompt\n0.mp4,x\n"), "lacks the columns motion"),
    "elsewhere": (lambda f: link(f / TABLE, f / "../outside" / TABLE), "metadata.csv leads out of"),
    "a field too long": (lambda f: raw(f, b'1.mp4,"' + b"x" * 200_000), "larger than field limit"),
}
USED = {
    "a motion a little shorter": (lambda f: shorter(f, 18), "0 rejected"),
    "a link within": (lambda f: link(f / V, f / "0.mp4"), "0 rejected"),
}

# ---------------------------------------------------------------- caches, of 60 samples


def spoil_shard(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Replace a tensor of shard 1."""
    with safe_open(folder / ONE, "pt") as file:
        record = file.metadata()
    save_file(load_file(folder / ONE) | {name: tensor}, folder / ONE, record)


SETTINGS, ONE = "settings.json", "shard-00001.safetensors"
CACHES = {
    "half a shard": (lambda f: cut(f / ONE), f"{ONE} is damaged"),
    "no shard": (lambda f: (f / ONE).unlink(), f"is not finished, it has no {ONE}"),
    "no record": (lambda f: save_file({"x": torch.ones(1)}, f / ONE), f"{ONE} is damaged"),
    "another version": (lambda f: (f / SETTINGS).write_text('{"version": 9}'), "version 9, expected 3"),
    "half its settings": (lambda f: cut(f / SETTINGS), "settings.json is damaged"),
    "no settings": (lambda f: (f / SETTINGS).unlink(), "settings.json: expected what"),
}
NAN, WRONG = torch.full((9, 235), torch.nan), torch.ones(2, 3, 8, 4)
SAMPLES = {
    "NaN": (lambda f: spoil_shard(f, "2.motion", NAN), f"{ONE}: sample 2, clip"),
    "another size": (lambda f: spoil_shard(f, "2.latents", WRONG), "latents (c, 3, 8, 8)"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """clips/ and cache/, which are in order, and outside/, where no path may lead."""
    folder = tmp_path_factory.mktemp("good")
    clip_folder.write(folder / "clips", (3, 4))
    shutil.copytree(folder / "clips", folder / "outside")
    write(folder / "cache", made_up())
    return folder


def table(kind: str, cases: dict, code: int, accepted: int) -> list:
    return [pytest.param(kind, *case, code, accepted, id=f"{kind}: {name}") for name, case in cases.items()]


@pytest.mark.parametrize(
    "kind, spoil, says, code, accepted",
    [
        *table("clips", CLIPS, 0, 1),
        *table("clips", TABLES, 2, 0),
        *table("clips", USED, 0, 2),
        *table("cache", CACHES, 2, 0),
        *table("cache", SAMPLES, 0, 59),
    ],
)
def test_malformed_data(kind, spoil, says, code, accepted, good, tmp_path, verb):
    shutil.copytree(good, tmp_path / "a")
    folder = tmp_path / "a" / kind
    spoil(folder)
    before = contents(tmp_path / "a")
    ended = verb(commands, "check", f"{kind}:{folder}")
    assert ended.code == code and says in ended.out + ended.err
    assert code == 2 or f": {accepted} samples accepted" in ended.out
    assert contents(tmp_path / "a") == before

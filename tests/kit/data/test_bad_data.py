"""Malformed data: each file is rejected by its name and with a reason, or used rightly, and nothing else."""

import contextlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import clip_folder
import numpy as np
import pytest
import torch
from clip_folder import CAMERA, FPS, FRAMES, edit
from conftest import contents
from safetensors.torch import load_file, save_file
from test_cache import made_up, write

from kit import files, puppet
from kit.data import __main__ as commands
from kit.data import cache
from kit.data.datasets import open_dataset
from kit.geometry import PUPPET

OPENED: list[str] = []  # files that python opens in a folder named outside


def note(event: str, given: tuple) -> None:
    if event == "open" and "/outside/" in str(given[0]):
        OPENED.append(str(given[0]))


sys.addaudithook(note)


class Case(NamedTuple):
    """What is done to a folder whose clip 1 and whose shard 1 are to suffer, and what is then said."""

    spoil: Callable[[Path], object]
    says: str  # " ... " stands for anything
    code: int = 0  # of `check`: 0 means that clip 0 is still accepted
    accepted: int = 1


# ---------------------------------------------------------------- paired clips; clip 0 stays good


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def cut_after_the_index(path: Path) -> None:
    """As a download that broke off, of a file whose index comes first."""
    with (
        av.open(str(path)) as given,
        av.open(str(path) + ".mp4", "w", options={"movflags": "faststart"}) as made,
    ):
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    os.replace(str(path) + ".mp4", path)
    cut(path, 0.5)


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path: Path) -> None:
    """A whole file whose index (ISO 14496-12's stsz) says that there are none."""
    content = bytearray(path.read_bytes())
    for box in (b"stsz", b"stts", b"stsc", b"stco"):
        where = content.index(box) + (12 if box == b"stsz" else 8)
        content[where : where + 4] = struct.pack(">I", 0)
    path.write_bytes(content)


def noise_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 3000
    content[start : start + 4000] = np.random.default_rng(0).bytes(4000)
    path.write_bytes(content)


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
    clip_folder.write_metadata(folder, [("0.mp4", "good", "motions/0.npz"), second])


def raw(folder: Path, second: bytes) -> None:
    (folder / "metadata.csv").write_bytes(b"video,prompt,motion\n0.mp4,good,motions/0.npz\n" + second)


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def outside(folder: Path) -> Path:
    return folder.parent / "outside"


def link_folder(folder: Path) -> None:
    (folder / "linked").symlink_to(outside(folder))
    rows(folder, "linked/1.mp4", "text", "motions/1.npz")


def playlist(folder: Path) -> None:
    """FFmpeg takes it for a video where it may guess, and follows the link."""
    (folder / "linked").symlink_to(outside(folder))
    (folder / "1.mp4").write_text("ffconcat version 1.0\nfile linked/1.mp4\n")


def hls(folder: Path) -> None:
    lines = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n"
    (folder / "1.mp4").write_text(lines.format(outside(folder) / "1.mp4"))


def shorter(folder: Path, frames: int) -> None:
    motion = folder / "motions/1.npz"
    with np.load(motion) as file:
        edit(motion, poses=file["poses"][:frames], trans=file["trans"][:frames])


def moved(folder: Path, metres: tuple[float, float, float]) -> None:
    motion = folder / "motions/1.npz"
    with np.load(motion) as file:
        edit(motion, trans=file["trans"] + metres)


def not_a_number(folder: Path) -> None:
    motion = folder / "motions/1.npz"
    with np.load(motion) as file:
        poses = file["poses"]
    poses[3, 5] = np.nan
    edit(motion, poses=poses)


def video_of(folder: Path, frames: int, size: tuple[int, int] = (64, 64)) -> None:
    images = [np.full((*size, 3), 9, np.uint8)] * frames
    clip_folder.write_video(folder / "1.mp4", images, [Fraction(k, FPS) for k in range(frames)])


def camera(array: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "motions/1.npz", camera=np.asarray(array))


def other(camera: np.ndarray, row: int, column: int, value: float) -> np.ndarray:
    camera = camera.copy()
    camera[row, column] = value
    return camera


V, M = "1.mp4", "motions/1.npz"
CLIPS = {
    "empty video": Case(lambda f: (f / V).write_bytes(b""), "1.mp4 is damaged"),
    "half a video": Case(lambda f: cut(f / V, 0.5), "1.mp4 is damaged"),
    "half a video behind its index": Case(lambda f: cut_after_the_index(f / V), "1.mp4"),
    "noise in a video": Case(lambda f: noise_inside(f / V), "1.mp4"),
    "a smudge in a video": Case(lambda f: smudge(f / V), "1.mp4: frame ... is damaged"),
    "text as a video": Case(lambda f: (f / V).write_text("no\n" * 999), "1.mp4 is damaged or no .mp4"),
    "only sound": Case(lambda f: sound_only(f / V), "1.mp4 has no video stream"),
    "a video without frames": Case(lambda f: no_frames(f / V), "1.mp4 has no frames"),
    "a folder as a video": Case(lambda f: ((f / V).unlink(), (f / V).mkdir()), "1.mp4: no such file"),
    "no video": Case(lambda f: (f / V).unlink(), "1.mp4: no such file"),
    "no motion": Case(lambda f: (f / M).unlink(), "1.npz: no such file"),
    "another suffix": Case(lambda f: rows(f, M, "text", M), "expected a video ending"),
    "an absolute path": Case(lambda f: rows(f, f"{outside(f)}/1.mp4", "t", M), "leads out of"),
    "a path upwards": Case(lambda f: rows(f, V, "text", "../outside/motions/1.npz"), "leads out of"),
    "a link out": Case(lambda f: link(f / V, outside(f) / "1.mp4"), "1.mp4 leads out of"),
    "a link to a folder": Case(link_folder, "linked/1.mp4 leads out of"),
    "a link to itself": Case(lambda f: link(f / V, f / V), "1.mp4: no such file"),
    "a playlist": Case(playlist, "1.mp4 is damaged or no .mp4"),
    "a list of segments": Case(hls, "1.mp4 is damaged or no .mp4"),
    "a name with a zero": Case(lambda f: raw(f, b"1\0.mp4,text,motions/1.npz\n"), "null byte"),
    "a name too long": Case(lambda f: rows(f, "1" * 5000 + ".mp4", "text", M), "too long"),
    "not UTF-8": Case(lambda f: raw(f, b"1.mp4,caf\xe9,motions/1.npz\n"), "metadata.csv line 3: not UTF-8"),
    "no caption": Case(lambda f: rows(f, V, " ", M), "metadata.csv line 3: prompt empty"),
    "a value too few": Case(lambda f: rows(f, V, "text"), "line 3: expected 3 values"),
    "a value too many": Case(lambda f: rows(f, V, "a, b", "c", "d"), "line 3: expected 3 values"),
    "a motion too short": Case(lambda f: shorter(f, 14), "1.mp4 ends after 1.25 s ... 1.npz after 0.81 s"),
    "a motion of one frame": Case(lambda f: shorter(f, 1), "motions/1.npz after 0.00 s"),
    "a video too short": Case(lambda f: (video_of(f, 9), shorter(f, 9)), "9 frames at 16 fps, fewer than 17"),
    "a motion at another rate": Case(
        lambda f: edit(f / M, mocap_frame_rate=np.array(30.0)), "motions/1.npz after 0.67 s"
    ),
    "no frame rate": Case(lambda f: edit(f / M, mocap_frame_rate=np.array(0.0)), "1.npz: 0.0 frames"),
    "NaN": Case(not_a_number, "1.npz: body_pose holds NaN"),
    "poses of another kind": Case(
        lambda f: edit(f / M, poses=np.zeros((FRAMES, 99))), "1.npz: poses is (21, 99)"
    ),
    "half a motion": Case(lambda f: cut(f / M, 0.5), "1.npz cannot be read"),
    "a motion with objects": Case(
        lambda f: edit(f / M, trans=np.array([object()] * FRAMES)), "1.npz cannot be read"
    ),
    "a camera with objects": Case(camera([[object()] * 3] * 3), "1.npz cannot be read"),
    "a camera of words": Case(camera([["f"] * 3] * 3), "1.npz: camera is <U1"),
    "a camera of four": Case(camera(np.ones(4)), "1.npz: camera is float64 (4,)"),
    "no focal length": Case(camera(other(CAMERA, 0, 0, 0)), "1.npz: camera is ... expected [[fx"),
    "a camera that is NaN": Case(camera(other(CAMERA, 0, 2, np.nan)), "1.npz: camera is ... expected [[fx"),
    "a camera with skew": Case(camera(other(CAMERA, 0, 1, 3)), "1.npz: camera is ... expected [[fx"),
    "a camera elsewhere": Case(camera(other(CAMERA, 0, 2, 4000)), "1.npz: no joint is ever in the picture"),
    "behind the camera": Case(lambda f: moved(f, (0, -9, 0)), "1.npz: the person is ... m behind the camera"),
    "millimetres": Case(lambda f: moved(f, (0, 4500, 0)), "1.npz ... is it in millimetres?"),
    "no table": Case(lambda f: (f / "metadata.csv").unlink(), "metadata.csv: expected a table", 2, 0),
    "an empty table": Case(lambda f: (f / "metadata.csv").write_bytes(b""), "metadata.csv lacks", 2, 0),
    "a table in UTF-16": Case(
        lambda f: (f / "metadata.csv").write_text("video,prompt,motion\n", "utf-16"), "csv lacks", 2, 0
    ),
    "a table without motions": Case(
        lambda f: (f / "metadata.csv").write_text("video,prompt\n0.mp4,x\n"), "lacks the columns motion", 2, 0
    ),
    "a table without rows": Case(lambda f: clip_folder.write_metadata(f, []), "0 samples accepted", 1, 0),
    "a table elsewhere": Case(
        lambda f: link(f / "metadata.csv", outside(f) / "metadata.csv"), "metadata.csv leads out of", 2, 0
    ),
    "a field too long": Case(lambda f: raw(f, b'1.mp4,"' + b"x" * 200_000), "csv line ... larger", 2, 0),
    # used rightly
    "no camera": Case(lambda f: shutil.copy(outside(f) / "plain.npz", f / M), "0 rejected", 0, 2),
    "a motion a little shorter": Case(lambda f: shorter(f, 18), "0 rejected", 0, 2),
    "a video of another size": Case(lambda f: video_of(f, FRAMES, (90, 160)), "0 rejected", 0, 2),
    "both twice": Case(lambda f: rows(f, "0.mp4", "again", "motions/0.npz"), "0 rejected", 0, 2),
    "a link within": Case(lambda f: link(f / V, f / "0.mp4"), "0 rejected", 0, 2),
}  # fmt: skip

# ---------------------------------------------------------------- caches


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard(number: int) -> str:
    return f"shard-0000{number}.safetensors"


def drop(folder: Path, name: str) -> None:
    with cache._opened(folder / shard(1)) as file:
        record = file.metadata()
    tensors = load_file(folder / shard(1))
    del tensors[name]
    save_file(tensors, folder / shard(1), record)


def replace(folder: Path, name: str, tensor: torch.Tensor) -> None:
    with cache._opened(folder / shard(1)) as file:
        record = file.metadata()
    save_file(load_file(folder / shard(1)) | {name: tensor}, folder / shard(1), record)


INDEX, SETTINGS, ONE = "index.json", "settings.json", shard(1)
NO_SAMPLES = '{"samples": [], "rejected": []}'
DAMAGED = f"{ONE} is missing or damaged ... delete it and index.json"
CACHES = {
    "half a shard": Case(lambda f: cut(f / ONE, 0.5), DAMAGED, 2),
    "an empty shard": Case(lambda f: (f / ONE).write_bytes(b""), DAMAGED, 2),
    "a shard of noise": Case(lambda f: (f / ONE).write_bytes(bytes(range(256)) * 99), DAMAGED, 2),
    "no shard": Case(lambda f: (f / ONE).unlink(), DAMAGED, 2),
    "a shard without record": Case(lambda f: save_file({"x": torch.ones(1)}, f / ONE), DAMAGED, 2),
    "a shard without a motion": Case(lambda f: drop(f, "2.motion"), DAMAGED, 2),
    "a shard without latents": Case(lambda f: drop(f, "2.latents"), DAMAGED, 2),
    "no null text": Case(
        lambda f: save_file({"x": torch.ones(1)}, f / shard(0), {"record": NO_SAMPLES}),
        f"{shard(0)} is missing or damaged ... null_text", 2,
    ),
    "NaN in a shard": Case(
        lambda f: replace(f, "2.motion", torch.full((9, 235), torch.nan)),
        f"{ONE}: sample 2 ... holds NaN", 0, 59,
    ),
    "latents of another size": Case(
        lambda f: replace(f, "2.latents", torch.ones(2, 3, 8, 4)),
        f"{ONE}: sample 2 ... expected (c, 3, 8, 8)", 0, 59,
    ),
    "no index": Case(lambda f: (f / INDEX).unlink(), "is not finished", 2),
    "an index of another version": Case(lambda f: change(f / INDEX, version=9), "json is of version 9", 2),
    "settings of another version": Case(lambda f: change(f / SETTINGS, version=None), "of version None", 2),
    "an index of more shards": Case(lambda f: change(f / INDEX, shards=9), f"{shard(3)} is missing", 2),
    "half an index": Case(lambda f: cut(f / INDEX, 0.5), "index.json is damaged", 2),
    "a list as index": Case(lambda f: (f / INDEX).write_text("[1]"), "index.json is no record", 2),
    "an index without counts": Case(
        lambda f: (f / INDEX).write_text('{"version": 1}'), "index.json lacks shards, rejected", 2
    ),
    "an index of words": Case(lambda f: change(f / INDEX, shards="many"), "index.json", 2),
    "no settings": Case(lambda f: (f / SETTINGS).unlink(), "settings.json: expected what", 2),
    "an empty folder": Case(lambda f: [file.unlink() for file in f.iterdir()], "json: expected what", 2),
}  # fmt: skip


# ---------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """clips/ and cache/, which are in order, and outside/, which nobody may look at."""
    folder = tmp_path_factory.mktemp("good")
    clip_folder.write(folder / "clips", (3, 4))
    shutil.copytree(folder / "clips", folder / "outside")
    shutil.copy(folder / "clips/motions/1.npz", folder / "outside/plain.npz")
    with np.load(folder / "outside/plain.npz") as file:
        np.savez(
            folder / "outside/plain.npz", **{name: file[name] for name in file.files if name != "camera"}
        )
    write(folder / "cache", made_up())
    return folder


def run_check(spec: str, monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["kit.data", "check", spec])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        files.run(commands.main)
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if "error" in line]
    return ended.value.code, "\n".join([printed.out, *errors])


@pytest.mark.parametrize(
    "kind, name", [("clips", name) for name in CLIPS] + [("cache", name) for name in CACHES]
)
def test_malformed_data(kind, name, good, tmp_path, monkeypatch, capsys):
    case: Case = {"clips": CLIPS, "cache": CACHES}[kind][name]
    shutil.copytree(good, tmp_path / "a")
    folder = tmp_path / "a" / kind
    case.spoil(folder)
    before, start = contents(tmp_path / "a"), len(OPENED)

    code, text = run_check(f"{kind}:{folder}", monkeypatch, capsys)
    assert code == case.code, text
    for words in case.says.split(" ... "):
        assert words in text, text
    if code < 2:
        assert f": {case.accepted} samples accepted" in text
    if kind == "clips" and code == 0:  # and the cache has what was accepted, no more
        found = open_dataset(f"clips:{folder}", PUPPET, puppet.body())
        write(tmp_path / "made", found)
        made = cache.open_cache(tmp_path / "made")
        assert (len(made.samples), len(made.rejected)) == (case.accepted, 2 - case.accepted)
        assert (
            len(load_file(tmp_path / "made" / shard(0)))
            == sum(
                2 + captions + 2 * (name != "no camera" or number == 0)
                for number, (*_, captions) in enumerate(made.samples)
            )
            + 1
        )
    assert OPENED[start:] == []
    assert contents(tmp_path / "a") == before

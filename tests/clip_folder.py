"""Folders as a user has them: puppet clips as MP4, AMASS .npz with camera, metadata.csv; HumanML3D's index.

write(folder, seeds)            one clip a seed
write_humanml3d(folder, ...)    index.csv, texts/ and train.txt, over AMASS files
motion_of(seed, frames)         what the puppet of this seed does
write_video(path, frames, ...)  frames at any times, written with av alone
ramp(path, times)               frame k is grey of level 12·k
"""

import csv
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from kit import puppet
from kit.data.motion_files import Motion, save_amass

FPS, FRAMES = 16, 21  # the last four frames are too few for another sample of 17
# the puppet's camera, written out: OpenCV's intrinsics and its place, metres, y up
CAMERA = np.array([[132.0, 0, 32], [0, 132.0, 32], [0, 0, 1]])
PLACE = torch.tensor([0.0, 1.0, 4.5])
STEP = 12  # levels of grey between one frame of a ramp and the next


def write_video(path: Path, frames: Sequence[np.ndarray], times: Sequence[Fraction | int]) -> None:
    """Frames (h w 3) uint8 shown at `times`, in seconds, almost without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "1", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv444p"
        stream.codec_context.time_base = Fraction(1, 90000)
        for image, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ramp(path: Path, times: Sequence[Fraction], size: tuple[int, int] = (32, 32)) -> Path:
    """A video whose frame k is grey of level 12·k."""
    write_video(path, [np.full((*size, 3), STEP * k, np.uint8) for k in range(len(times))], times)
    return path


def levels(images) -> list[int]:
    """Which frames of a ramp these are."""
    return [round(float(np.asarray(image).mean()) / STEP) for image in images]


def at_rate(fps: Fraction | int, count: int = 20) -> list[Fraction]:
    return [Fraction(k) / fps for k in range(count)]


def motion_of(seed: int, frames: int, fps: float = FPS) -> Motion:
    clip = puppet.clips([seed], frames)
    pose = clip.global_orient[0], clip.body_pose[0], clip.betas[0], clip.transl[0]
    return Motion(*pose, fps, "neutral")


def write_motion(path: Path, motion: Motion, camera: np.ndarray | None = CAMERA) -> None:
    """An AMASS file, with a camera unless that is None."""
    save_amass(path, motion, puppet.body())
    if camera is not None:
        edit(path, camera=camera)


def edit(path: Path, **arrays: np.ndarray) -> None:
    """Replace arrays of an .npz, or add them."""
    with np.load(path) as file:
        arrays = dict(file) | arrays
    np.savez(path, **arrays)


def write_metadata(folder: Path, rows: Sequence[Sequence[str]]) -> None:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "prompt", "motion"), *rows])


def write_humanml3d(
    folder: Path, rows: Sequence[str], texts: dict[str, str], names: Sequence[str] | None = None
) -> None:
    """Lines of index.csv, texts by name, and the training split: by default all that have a text."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / "texts" / f"{name}.txt").write_text(text)
    (folder / "index.csv").write_text("\n".join(["source_path,start_frame,end_frame,new_name", *rows]))
    (folder / "train.txt").write_text("\n".join(names or texts))


def write(folder: Path, seeds: Sequence[int], frames: int = FRAMES) -> Path:
    """Clips 0.mp4 with motions/0.npz, ... of these seeds, each seen by the camera at the origin."""
    (folder / "motions").mkdir(parents=True)
    clips = puppet.clips(seeds, frames)
    videos = puppet.render(clips.joints, clips.betas, clips.shirt)[0]
    rows = []
    for k, (seed, video) in enumerate(zip(seeds, videos, strict=True)):
        levels = ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        write_video(folder / f"{k}.mp4", list(levels), at_rate(FPS, frames))
        motion = motion_of(seed, frames)
        write_motion(folder / "motions" / f"{k}.npz", motion._replace(transl=motion.transl - PLACE))
        rows.append((f"{k}.mp4", clips.caption[k], f"motions/{k}.npz"))
    write_metadata(folder, rows)
    return folder

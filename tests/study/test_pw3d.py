"""study/pw3d.py, on a small folder of 3DPW's format: puppets seen by cameras that move."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_folder
from clip_folder import CAMERA, PLACE
from PIL import Image
from scipy.spatial.transform import Rotation

from kit import puppet, wan, weights
from kit.pictures import to_frames
from study import evaluate, pw3d

FRAMES = 41
FLIP = np.array([1.0, -1.0, -1.0])  # to OpenCV's axes


def seen(seed: int, away: float = 0.0) -> np.ndarray:
    """A puppet's joints (n 24 3) in its camera's frame, y up."""
    return (puppet.clips([seed], FRAMES).joints[0] - PLACE - torch.tensor([0, 0, away])).double().numpy()


def write_sequence(folder: Path, name: str, people: list[np.ndarray], valid: np.ndarray, seed: int) -> None:
    """people (n 24 3) as one camera sees them, written in a world in which that camera moves."""
    random = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(random.normal(size=3) + random.normal(0, 0.05, (FRAMES, 3)).cumsum(0))
    poses = np.tile(np.eye(4), (FRAMES, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = turns.as_matrix(), random.normal(size=(FRAMES, 3))
    world = [  # the inverse of x -> turn x + place
        np.einsum("nrc,njr->njc", poses[:, :3, :3], who * FLIP - poses[:, None, :3, 3]) for who in people
    ]
    content = {
        "sequence": name, "genders": ["m"] * len(people), "cam_poses": poses, "cam_intrinsics": CAMERA,
        "jointPositions": [who.reshape(FRAMES, 72) for who in world], "campose_valid": [valid] * len(people),
        "betas": [np.zeros(300)] * len(people), "img_frame_ids": np.arange(FRAMES),
    }  # fmt: skip
    (folder / "sequenceFiles" / "test").mkdir(parents=True, exist_ok=True)
    (folder / "sequenceFiles" / "test" / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
    (folder / "imageFiles" / name).mkdir(parents=True)
    clip = puppet.clips([seed], FRAMES)
    video = to_frames(puppet.render(clip.joints, clip.betas, clip.shirt)[0][0])
    for k, image in enumerate(video):
        Image.fromarray(image[:, 8:56].numpy()).save(folder / "imageFiles" / name / f"image_{k:05d}.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("3DPW")
    valid = np.ones(FRAMES, dtype=np.uint8)
    write_sequence(folder, "alone_00", [seen(3)], valid, 3)
    write_sequence(folder, "two_00", [seen(4, away=3.0), seen(5)], np.where(np.arange(FRAMES) == 20, 0, 1), 5)
    return folder


def test_joints_come_back_into_the_cameras_frame(folder):
    """Catches: the inverse of cam_poses, y or z left as OpenCV has them, the person who is farther away."""
    for name, seed in (("alone_00", 3), ("two_00", 5)):
        joints, valid = pw3d.read_sequence(folder / "sequenceFiles" / "test" / f"{name}.pkl")
        np.testing.assert_allclose(joints, seen(seed), atol=1e-5)
        assert valid.dtype == bool and valid.sum() == FRAMES - (name == "two_00")


def test_windows_take_the_pictures_of_their_moments(folder):
    """Catches: rates mixed up, a window over a frame whose camera is not known, fewer than asked unsaid."""
    found = pw3d.windows(folder, fps=15, frames=9, count=200)
    names = [[int(picture.stem[-5:]) for picture in window.pictures] for window in found]
    first, second = list(range(0, 17, 2)), list(range(17, 34, 2))
    assert names == [first, second, first, second]  # these step over frame 20
    np.testing.assert_allclose(found[1].joints, seen(3)[17:34:2], atol=1e-5)
    assert len(pw3d.windows(folder, 15, 9, 2)) == 2
    thirty = pw3d.windows(folder, 30, 17, 200)
    assert [window.pictures[0].parent.name for window in thirty] == ["alone_00"] * 2 + ["two_00"]
    with pytest.raises(ValueError, match=r"no sequence has 81 valid frames: ask for fewer --frames"):
        pw3d.windows(folder, 15, 81, 200)


def test_errors_of_known_size():
    """Catches: millimetres for metres, hips that are not aligned, a Procrustes without scale or turn."""
    real = torch.from_numpy(seen(3)).float()
    moved = real + torch.tensor([0.3, 0.1, 5.0])
    assert max(pw3d.errors(moved, real)) < 1e-2
    turned = 1.2 * moved @ torch.from_numpy(Rotation.from_rotvec([0.1, 0.5, 0.2]).as_matrix()).float()
    aligned, plain = pw3d.errors(turned, real)
    assert aligned < 1e-2 and plain > 50
    off = real.clone()
    off[:, pw3d.FOURTEEN[:2]] += torch.tensor([0.07, 0, 0])  # two of fourteen joints, neither a hip
    assert pw3d.errors(off, real)[1] == pytest.approx(70 * 2 / 14, abs=1e-2)


def test_the_table_from_pictures_to_millimetres(folder, verb, tmp_path_factory, monkeypatch):
    """Through a tiny Wan; the second motion is then taken from the clip itself, which has to give no error.
    Catches: windows and joints that are not of the same person or moment, an upright picture on its side."""
    place = tmp_path_factory.mktemp("wan")
    model = wan.load_transformer(wan_folder.write(place / "wan", "2.1"))
    weights.save_weights(place / "w.safetensors", model.config, model.state_dict(), {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    size = ("--frames", 9, "--size", "32x48", "--fps", 15, "--steps", 1, "--device", "cpu", "--clips", 2)
    call = ("pw3d", folder, "--wan", place / "wan", "--weights", place / "w.safetensors", *size)
    known, found, made, errors = iter(pw3d.windows(folder, 15, 9, 2)), [], pw3d.to_motion, pw3d.errors

    def motion(model, latents, *rest):
        assert latents.shape[2:] == (3, 6, 4)  # 48 by 64 pixels stand upright, so 48x32 and not 32x48
        joints, real = made(model, latents, *rest), next(known).joints
        assert joints.shape == real.shape
        return joints if not found else real

    monkeypatch.setattr(pw3d, "to_motion", motion)
    monkeypatch.setattr(pw3d, "errors", lambda *a: found.append(errors(*a)) or found[-1])
    assert verb(evaluate, *call, "--json", place / "r.json").code == 0
    result = json.loads((place / "r.json").read_text())
    assert result["windows"] == 2 and 0 < found[0][0] <= found[0][1] and max(found[1]) < 1e-3
    assert result["mpjpe_mm"] == pytest.approx((found[0][1] + found[1][1]) / 2)


def test_what_is_not_3dpw(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="unpack 3DPW's sequenceFiles there"):
        pw3d.windows(tmp_path, 15, 9, 1)
    write_sequence(tmp_path, "a", [seen(3)], np.ones(FRAMES), 3)
    next((tmp_path / "imageFiles" / "a").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"a\.pkl: 41 frames, but 40 pictures"):
        pw3d.windows(tmp_path, 15, 9, 1)
    file = tmp_path / "sequenceFiles" / "test" / "a.pkl"
    file.write_bytes(pickle.dumps({"poses": 1}))
    with pytest.raises(ValueError, match=r"a\.pkl is no sequence of 3DPW"):
        pw3d.windows(tmp_path, 15, 9, 1)
    file.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"a\.pkl cannot be read: it names posix\.system"):
        pw3d.windows(tmp_path, 15, 9, 1)

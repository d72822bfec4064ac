"""What no person does is told with file, frame and cause; smoothing says what it changes."""

import re

import clip_folder
import hmr_files
import numpy as np
import pytest
import torch

from kit import puppet
from kit.body import Body
from kit.data import __main__ as commands
from kit.data.datasets import open_dataset
from kit.data.hmr import read_motion_file
from kit.data.motion_files import AXES, Motion, save_amass, smooth, turn
from kit.data.plausible import faults, smoothing_effect
from kit.data.sources import open_sources
from kit.geometry import PUPPET
from kit.puppet.skeleton import _body_data


def puppet_motion(seed: int = 3, frames: int = 65, fps: float = 16) -> Motion:
    return clip_folder.motion_of(seed, frames, fps)


def moved(x: float = 0.0, y: float = 0.0) -> Motion:
    """The puppet, carried this far in all, evenly."""
    motion, way = puppet_motion(), torch.linspace(0, 1, 65)[:, None]
    return motion._replace(transl=motion.transl + way * torch.tensor([x, y, 0]))


def jumping(metres: float) -> Motion:
    motion, after = puppet_motion(), (torch.arange(65) >= 20)[:, None]
    return motion._replace(transl=motion.transl + torch.tensor([metres, 0, 0]) * after)


def turned(axes: str) -> Motion:
    return turn(puppet_motion(), AXES[axes], puppet.body())


FAULTS = {
    "upside down": (lambda: turned("opencv"), "head is below the feet in 100%"),
    "lies": (lambda: turned("zup"), "the person lies in .* frames, first in"),
    "jumps": (lambda: jumping(2.5), r"the pelvis moves 2\.\d m from frame 19 to 20: is there a cut"),
    "a step": (lambda: jumping(0.9), None),
    "walks in inches": (lambda: moved(3 * 39.37), "inches"),
    "climbs a tower": (lambda: moved(y=12), "m above the lowest foot in frame .*expected 0.2 to 3"),
    "three frames a second": (lambda: puppet_motion(fps=3), "3 frames a second, expected 4 to 250"),
    "five frames a second": (lambda: puppet_motion(fps=5), None),
    "250 frames a second, rounded": (lambda: puppet_motion(fps=250.00001), None),
    "480 frames a second": (lambda: puppet_motion(fps=480), "480 frames a second, expected 4 to 250"),
}


@pytest.mark.parametrize("make, reason", FAULTS.values(), ids=FAULTS)
def test_what_no_person_does(make, reason):
    """Catches: each kind passed over, and what people do taken for it."""
    found = faults(make(), puppet.body())
    assert (not found) if reason is None else re.search(reason, found[0])


def test_every_action_of_the_puppet_is_possible():
    """Catches: limits that reject bending, kneeling, lying down for a while or jumping."""
    for seed in range(72):
        assert not faults(puppet_motion(seed, 33), puppet.body(), floor=True), seed


def test_distance_measured_through_a_long_lens_counts_less():
    """Catches: a person rejected whose distance, from the size of a box 50 m away, is uncertain by 2 m."""
    motion = puppet_motion()
    sway = torch.tensor([0, 0, 2.0]) * (torch.arange(65) % 2)[:, None]
    swaying = motion._replace(transl=motion.transl + sway)
    assert faults(swaying, puppet.body()) and not faults(swaying, puppet.body(), depth=0.05)


def check(spec: str, capsys, force: bool = False) -> tuple[int, str]:
    count = commands.check(spec, PUPPET, puppet.body(), force)
    return count, capsys.readouterr().out


def test_axes_named_in_the_spec(tmp_path, capsys):
    """Catches: a file with y up accepted as AMASS's, @axes that is not read, or read as the weight."""
    spec, yup = f"amass:{tmp_path}", turn(puppet_motion(), AXES["zup"], puppet.body())
    save_amass(tmp_path / "yup.npz", yup, puppet.body())  # turns it back
    count, said = check(spec, capsys)
    assert count == 0 and "yup.npz: the person lies in 100% of frames" in said and "1 rejected" in said
    assert "--force would accept 1 of those rejected: motion that no person does" in said
    with pytest.raises(ValueError, match="the person lies") as training:  # which has no --force
        open_sources([spec], PUPPET, puppet.body())
    assert "--force" not in str(training.value)
    capsys.readouterr()
    count, said = check(spec, capsys, force=True)
    assert count == 3 and "yup.npz: the person lies" in said and "0 rejected" in said
    count, said = check(f"{spec}@axes=yup", capsys)
    assert count == 3 and "yup: the" not in said


def test_humanml3d_is_read_and_checked_as_amass_is(tmp_path, capsys):
    """Catches: @axes passed over, and metres that are centimetres, of someone who hardly moves."""
    body, motion = puppet.body(), puppet_motion(fps=20)
    far = motion._replace(transl=motion.transl + torch.tensor((0, 90.0, 0)))
    motions = {"yup": turn(motion, AXES["zup"], body), "far": far}
    (tmp_path / "amass/CMU").mkdir(parents=True)
    for name, moves in motions.items():
        save_amass(tmp_path / f"amass/CMU/{name}.npz", moves, body)
    rows = [f"./pose_data/CMU/{name}.npy,0,40,{name}.npy" for name in motions]
    clip_folder.write_humanml3d(tmp_path, rows, dict.fromkeys(motions, "a man walks#a/DET#0#0"))
    spec = f"humanml3d:{tmp_path}"
    count, said = check(spec, capsys)
    assert count == 0 and "yup: the person lies" in said and "from the floor: is trans in centim" in said
    count, said = check(f"{spec}@axes=yup", capsys)
    assert count == 1 and "yup: the" not in said


def test_check_says_what_smoothing_did(tmp_path, capsys):
    """Catches: smoothing that is not done, done unasked, or whose effect is not said."""
    shaky, generator = puppet_motion(), torch.Generator().manual_seed(0)
    shaky = shaky._replace(transl=shaky.transl + 0.01 * torch.randn(65, 3, generator=generator))
    spec = f"amass:{tmp_path}"
    save_amass(tmp_path / "shaky.npz", shaky, puppet.body())
    save_amass(tmp_path / "short.npz", puppet_motion(frames=3), puppet.body())  # has no jerk
    assert "smoothed" not in check(spec, capsys)[1]
    said = check(f"{spec}@smooth=0.1", capsys)[1]
    before, then, mean, _ = smoothing_effect(shaky, smooth(shaky, 0.1), puppet.body()).tolist()
    assert then < before / 2
    assert f"over 0.1 s: jerk {before:.0f} to {then:.0f} m/s³; joints moved {1000 * mean:.1f} mm" in said
    (sample, *_) = open_dataset(f"{spec}@smooth=0.1", PUPPET, puppet.body()).read(0)
    (as_it_is, *_) = open_dataset(spec, PUPPET, puppet.body()).read(0)
    assert not torch.allclose(sample.motion, as_it_is.motion, atol=1e-3)


def test_the_effect_of_a_known_smoothing():
    """A shake of 1 cm from frame to frame along x: jerk of 8 times that, 16 times a second, cubed."""
    one = puppet_motion(frames=17)
    orient, pose, transl = (x[:1].expand_as(x) for x in (one.global_orient, one.body_pose, one.transl))
    still = one._replace(global_orient=orient, body_pose=pose, transl=transl)
    shake = 0.005 * torch.tensor([1.0, 0, 0]) * (-1) ** torch.arange(17)[:, None]
    shaken = still._replace(transl=still.transl + shake)
    before, after, mean, most = smoothing_effect(shaken, still, puppet.body()).tolist()
    assert before == pytest.approx(0.04 * 16**3, rel=1e-3) and after == pytest.approx(0, abs=0.5)
    assert mean == pytest.approx(0.005, rel=1e-3) and most == pytest.approx(0.005, rel=1e-3)


def test_a_gendered_file_has_that_genders_body(tmp_path):
    """Catches: the neutral body for everyone, or for the turn about the pelvis, or a missing one unsaid."""
    folder, data = tmp_path / "bodies", _body_data()
    folder.mkdir()
    for name, size in (("SMPL_NEUTRAL", 1.0), ("SMPL_MALE", 1.1)):
        np.savez(folder / f"{name}.npz", **data | {"v_template": size * data["v_template"]})
    body = Body.load(folder)
    (tmp_path / "a").mkdir()
    for gender in ("male", "female"):
        motion = moved(2)._replace(gender=gender, betas=torch.zeros(10))
        save_amass(tmp_path / "a" / f"{gender}.npz", motion, body)
    lengths = {}
    data = open_dataset(f"amass:{tmp_path / 'a'}", PUPPET, body)
    for k, name in enumerate(data.names):
        joints = next(data.read(k)).motion[:, 3:75].reshape(-1, 24, 3)
        lengths[name] = (joints[0, 15] - joints[0, 12]).norm().item()  # neck to head
    assert lengths["male.npz"] == pytest.approx(1.1 * lengths["female.npz"], rel=1e-3)
    assert data.reading.lines() == [
        f"female.npz: it is female, and {folder} has no female model: another is used"
    ]
    pelvis = Body.load(folder, "male").rest_joints(torch.zeros(10))[0].numpy()
    with np.load(tmp_path / "a" / "male.npz") as file:
        expected = (pelvis + file["trans"]) @ AXES["zup"].T.numpy() - pelvis
    found = read_motion_file(tmp_path / "a" / "male.npz", body).motion
    np.testing.assert_allclose(found.transl, expected, atol=1e-5)


def test_clips_in_other_axes_and_other_units(tmp_path, capsys):
    """Catches: a clip in OpenCV's axes or in centimetres accepted; the column axes not read."""
    folder = clip_folder.write(tmp_path / "a", [5])
    who = hmr_files.person(5, clip_folder.FRAMES)
    fields = {"betas": who.betas, "mocap_frame_rate": 16.0, "camera": clip_folder.CAMERA}

    def write(person: hmr_files.Person, unit: float) -> None:
        poses, trans = person.full.reshape(-1, 72), person.transl * unit
        np.savez(folder / "motions" / "0.npz", poses=poses, trans=trans, **fields)

    write(who, 1)
    count, said = check(f"clips:{folder}", capsys)
    assert count == 0 and "are the axes right?" in said
    (folder / "metadata.csv").write_text("video,prompt,motion,axes\n0.mp4,a,motions/0.npz,opencv\n")
    assert check(f"clips:{folder}", capsys)[0] == 1
    write(who.rows([0] * clip_folder.FRAMES), 100)  # far away, but at rest
    count, said = check(f"clips:{folder}", capsys)
    assert count == 0 and "of the picture tall: is trans in centimetres?" in said


def test_preview_shows_recovered_motion_or_says_why_not(tmp_path, capsys):
    """Catches: a picture without a skeleton and without a word."""
    folder = clip_folder.write(tmp_path / "a", [5])
    hmr_files.gvhmr(folder / "r.pt", hmr_files.person(5, clip_folder.FRAMES))
    (folder / "metadata.csv").write_text("video,prompt,motion\n0.mp4,a,r.pt\n")
    assert commands.picture(f"clips:{folder}", PUPPET, puppet.body(), tmp_path / "drawn.png") == 1
    assert "r.pt: its betas are SMPL-X's" in capsys.readouterr().out
    wrong = f"clips:{folder}@axes=zup"
    assert commands.picture(wrong, PUPPET, puppet.body(), tmp_path / "none.png") == 0
    assert "r.pt: the " in capsys.readouterr().out and not (tmp_path / "none.png").exists()
    assert commands.picture(wrong, PUPPET, puppet.body(), tmp_path / "b.png", force=True) == 1
    assert "r.pt: the person is" in capsys.readouterr().out

"""--motion of sample.py takes what kit/data/hmr.py reads; what it assumes is said."""

import pickle

import hmr_files
import numpy as np
import pytest
import torch
from clip_folder import PLACE, at_rate, levels, ramp

from kit import puppet
from kit.backbone import SHIPPED, Backbone, puppet_backbone
from kit.conditions import in_view, open_motion, read_motion, read_video
from kit.data.motion_files import Motion
from motion_tokens import decode_smpl

FRAMES = 41


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return puppet_backbone(SHIPPED, "cpu")


@pytest.fixture(scope="module")
def who() -> hmr_files.Person:
    return hmr_files.person(3, FRAMES)


def test_recovered_motion_is_played_at_thirty_frames_a_second_or_as_named(tmp_path, backbone, who, capsys):
    """Catches: a rate taken from nowhere without a word, @fps= that is not read."""
    hmr_files.wham(tmp_path / "w.pkl", who)
    _, motion = open_motion(tmp_path / "w.pkl", backbone.body)
    assert motion.fps == 30
    assert "30 frames a second are assumed; name another with @fps=25" in capsys.readouterr().out
    file, motion = open_motion(tmp_path / "w.pkl@fps=16", backbone.body)
    assert motion.fps == 16 and file == tmp_path / "w.pkl"
    said = capsys.readouterr().out
    assert "assumed" not in said and "cut" not in said
    np.testing.assert_allclose(motion.transl, puppet.clips([3], FRAMES).transl[0] - PLACE, atol=1e-4)
    read = decode_smpl(read_motion(tmp_path / "w.pkl@fps=16", backbone)[0])
    assert hmr_files.apart(read["body_pose"][0], who.pose[:17]) < 1e-2


def test_axes_tracks_gaps_and_smoothing(tmp_path, backbone, who, capsys):
    """Catches: options that are not read, and a motion that nobody makes taken without a word."""
    fields = {"trans": who.transl, "betas": who.betas, "fps": 30.0}
    np.savez(tmp_path / "a.npz", poses=who.full.reshape(-1, 72), **fields)
    open_motion(tmp_path / "a.npz", backbone.body)
    assert "a.npz: the " in capsys.readouterr().out
    _, motion = open_motion(tmp_path / "a.npz@axes=opencv", backbone.body)
    assert hmr_files.apart(motion.body_pose, who.pose) < 1e-3 and not capsys.readouterr().out
    other, rows = hmr_files.person(5, FRAMES), np.arange(FRAMES)
    tracks = {4: hmr_files.wham_track(who, rows), 7: hmr_files.wham_track(other, rows)}
    (tmp_path / "two.pkl").write_bytes(pickle.dumps(tracks))
    for options, smoothed in (("@track=7", False), ("@track=7@smooth=0.1", True)):
        _, motion = open_motion(tmp_path / f"two.pkl{options}", backbone.body)
        assert (hmr_files.apart(motion.body_pose, other.pose) > 0.01) == smoothed
    rows = np.r_[0:8, 30:41]
    (tmp_path / "gap.pkl").write_bytes(pickle.dumps({1: hmr_files.wham_track(who.rows(rows), rows)}))
    capsys.readouterr()
    _, motion = open_motion(tmp_path / "gap.pkl", backbone.body)
    assert len(motion.transl) == 11 and hmr_files.apart(motion.body_pose, who.pose[30:]) < 1e-3
    said = capsys.readouterr().out
    assert "frames 0 to 7, 30 to 40" in said and "the longest part is used" in said
    rows = np.r_[0:8, 12:41]
    (tmp_path / "short.pkl").write_bytes(pickle.dumps({1: hmr_files.wham_track(who.rows(rows), rows)}))
    open_motion(tmp_path / "short.pkl", backbone.body)
    assert "4 frames without the person are filled" in capsys.readouterr().out


def test_a_person_out_of_view_is_moved_into_it_and_one_close_to_the_camera_is_not(backbone, capsys):
    """A camera of unknown lens. Catches: a person at or beside the lens taken as seen, one whose head is cut
    off after the move, and a close-up that is moved."""
    wide = backbone._replace(project=None, geometry=backbone.geometry._replace(height=480, width=832))
    focal, pelvis = 832.0, backbone.body.rest_joints(torch.zeros(10))[0]

    def seen(*place: float, move: bool = True) -> int:
        """How many joints of a standing person are in the picture; pelvis at `place`."""
        transl = (torch.tensor(place) - pelvis).expand(2, 3)
        still = torch.zeros(2, 3), torch.zeros(2, 23, 3), torch.zeros(10), transl
        motion = Motion(*still, 16.0, "neutral")
        if move:
            motion = in_view(motion, wide, "m.npz")
        x, y, z = backbone.body.joints(*motion[:4])[0].double().unbind(-1)
        return int(((z < 0) & (abs(x / z) * focal < 416) & (abs(y / z) * focal < 240)).sum())

    for place in ((0, 0, -0.05), (0, 0, -0.4), (6, 0, -2), (0, 1, 4), (0, 0, 0)):
        assert seen(*place, move=False) < 6 and seen(*place) == 24
        assert "moved to the middle of it" in capsys.readouterr().out
    head_and_shoulders = 0, -0.55, -0.8
    assert 6 <= seen(*head_and_shoulders) == seen(*head_and_shoulders, move=False) < 15
    assert not capsys.readouterr().out


def test_a_video_begins_at_its_start(tmp_path, backbone):
    """0.28·25 is a little more than 7. Catches: the frame after."""
    path = ramp(tmp_path / "a.mp4", at_rate(25), size=(64, 64))
    pixels = read_video(path, backbone.geometry._replace(fps=25.0, frames=5), start=0.28)
    assert levels((pixels[0].movedim(0, -1) + 1) * 127.5) == [7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    "named, reason",
    [
        ("w.pkl@fps=-1", "fps is '-1', expected a number above 0"),
        ("w.pkl@fps=0", "fps is '0', expected a number above 0"),
        ("w.pkl@smooth=60", "smooth is '60', expected seconds, 0 to 2"),
        ("own.npz@fps=25", r"own\.npz has a rate of its own, 16: leave @fps= out"),
    ],
)
def test_options_that_mean_nothing(tmp_path, backbone, who, named, reason):
    hmr_files.wham(tmp_path / "w.pkl", who)
    poses = who.full.reshape(-1, 72)
    np.savez(tmp_path / "own.npz", poses=poses, trans=who.transl, betas=who.betas, mocap_frame_rate=16.0)
    with pytest.raises(ValueError, match=reason):
        open_motion(tmp_path / named, backbone.body)

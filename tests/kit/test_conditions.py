"""--motion of sample.py takes what kit/data/hmr.py reads; what it assumes is said."""

import pickle

import hmr_files
import numpy as np
import pytest
import torch
from clip_folder import PLACE

from kit import puppet
from kit.backbone import SHIPPED, Backbone, puppet_backbone
from kit.conditions import open_motion, read_motion
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
    assert (
        motion.fps == 30
        and "30 frames a second are assumed, or name another, @fps=25" in capsys.readouterr().out
    )
    file, motion = open_motion(tmp_path / "w.pkl@fps=16", backbone.body)
    assert motion.fps == 16 and file == tmp_path / "w.pkl" and "assumed" not in capsys.readouterr().out
    np.testing.assert_allclose(motion.transl, puppet.clips([3], FRAMES).transl[0] - PLACE, atol=1e-4)
    read = decode_smpl(read_motion(tmp_path / "w.pkl@fps=16", backbone))
    assert hmr_files.apart(read["body_pose"][0], who.pose[:17]) < 1e-2


def test_hy_motion_and_axes_that_are_named(tmp_path, backbone, capsys):
    """From text to motion elsewhere, from motion to video here. Catches: a person who lies down."""
    clip, poses = puppet.clips([3], FRAMES), np.zeros((FRAMES, 156))
    poses[:, :66] = torch.cat([clip.global_orient[0], clip.body_pose[0, :, :21].flatten(1)], dim=1)
    fields = {"poses": poses, "trans": clip.transl[0].numpy(), "betas": np.zeros((1, 16))}
    np.savez(tmp_path / "hy.npz", Rh=poses[:, :3], **fields)
    _, motion = open_motion(tmp_path / "hy.npz", backbone.body)
    assert motion.fps == 30 and not capsys.readouterr().out
    assert hmr_files.apart(motion.global_orient, clip.global_orient[0]) < 1e-3
    np.savez(tmp_path / "yup.npz", mocap_frame_rate=30.0, **fields)
    open_motion(tmp_path / "yup.npz", backbone.body)
    assert "yup.npz: the person lies in" in capsys.readouterr().out
    _, motion = open_motion(tmp_path / "yup.npz@axes=yup", backbone.body)
    assert hmr_files.apart(motion.global_orient, clip.global_orient[0]) < 1e-3 and not capsys.readouterr().out


def test_tracks_gaps_and_smoothing(tmp_path, backbone, who, capsys):
    other = hmr_files.person(5, FRAMES)
    tracks = {
        4: hmr_files.wham_track(who, np.arange(FRAMES)),
        7: hmr_files.wham_track(other, np.arange(FRAMES)),
    }
    (tmp_path / "two.pkl").write_bytes(pickle.dumps(tracks))
    with pytest.raises(ValueError, match=r"two\.pkl: its tracks 4 and 7 have 41 frames each"):
        open_motion(tmp_path / "two.pkl", backbone.body)
    _, motion = open_motion(tmp_path / "two.pkl@track=7", backbone.body)
    assert hmr_files.apart(motion.body_pose, other.pose) < 1e-3
    _, smooth = open_motion(tmp_path / "two.pkl@track=7@smooth=0.1", backbone.body)
    assert hmr_files.apart(smooth.body_pose, other.pose) > 0.01
    rows = np.r_[0:8, 30:41]
    (tmp_path / "gap.pkl").write_bytes(pickle.dumps({1: hmr_files.wham_track(who.rows(rows), rows)}))
    capsys.readouterr()
    _, motion = open_motion(tmp_path / "gap.pkl", backbone.body)
    assert len(motion.transl) == 11 and hmr_files.apart(motion.body_pose, who.pose[30:]) < 1e-3
    assert (
        "frames 0 to 7, 30 to 40" in (said := capsys.readouterr().out) and "the longest part is used" in said
    )


@pytest.mark.parametrize(
    "named, reason",
    [
        ("w.pkl@fps=x", "expected a number above 0"),
        ("w.pkl@fps=-1", "expected a number above 0"),
        ("w.pkl@fps=0", "fps is '0', expected a number above 0"),
        ("w.pkl@smooth=inf", "expected a number from 0 on"),
        ("own.npz@fps=25", r"own\.npz has a rate of its own, 16: leave @fps= out"),
    ],
)
def test_options_that_mean_nothing(tmp_path, backbone, who, named, reason):
    hmr_files.wham(tmp_path / "w.pkl", who)
    poses = who.full.reshape(-1, 72)
    np.savez(tmp_path / "own.npz", poses=poses, trans=who.transl, betas=who.betas, mocap_frame_rate=16.0)
    with pytest.raises(ValueError, match=reason):
        open_motion(tmp_path / named, backbone.body)


def test_every_tool_conditions_a_sample(tmp_path, backbone, who):
    for tool, name in (("gvhmr", "g.pt"), ("tram", "hps/t.npy"), ("phalp", "p.pkl"), ("camerahmr", "c.npz")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        getattr(hmr_files, tool)(tmp_path / name, who)
        assert read_motion(tmp_path / name, backbone).shape == (1, 17, 235)

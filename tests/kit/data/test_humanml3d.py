"""kit/data/humanml3d.py against HumanML3D's own slicing of frame lists, done here by hand."""

import numpy as np
import pytest
import torch
from clip_folder import write_humanml3d

from kit.data.hmr import read_motion_file
from kit.data.humanml3d import entries, read_entry
from kit.data.motion_files import mirror
from kit.data.plausible import Reading
from motion_tokens import axis_angle_to_matrix

HEADER = "source_path,start_frame,end_frame,new_name\n"
CAPTION = "a person waves the left hand.#a/DET person/NOUN wave/VERB#0.0#0.0\n"
KICK = "./pose_data/KIT/3/kick high_left02_poses.npy"


def write_amass(path, frames, fps):
    """A motion that is different in every frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    poses = np.cumsum(generator.normal(0, 0.03, (frames, 156)), axis=0)
    trans = np.cumsum(generator.normal(0, 0.01, (frames, 3)), axis=0)
    np.savez(path, poses=poses, trans=trans, betas=np.zeros(16), gender="male", mocap_framerate=fps)


def index(*rows):
    return HEADER + "".join(f"{row}\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """A clip of 83 frames, its mirrored twin, one with captions of parts, and one of HumanAct12."""
    rows = [
        f"{KICK},2,85,000000.npy",
        "./pose_data/humanact12/humanact12/P11G01R02F1812T1847A0402.npy,0,-1,000001.npy",
        "./pose_data/CMU/80/80_63_poses.npy,116,216,000004.npy",
    ]
    other = "someone kicks # high, twice#kick/VERB#nan#nan\n"
    parts = "first#x/NOUN#0.0#2.3\nlast#x/NOUN#2.0#5.4\n\n also first #x/NOUN#0.0#2.3\r\nall#x/NOUN#0#0"
    mirrored = CAPTION.replace("left", "right")
    texts = {"000000": CAPTION + other, "M000000": mirrored, "000004": parts}
    write_humanml3d(tmp_path, rows, texts, ["000000", "M000000", "000001", "000004"])
    (tmp_path / "amass").mkdir()
    return tmp_path


def test_entries_without_any_motion(folder):
    found, problems = entries(folder, folder / "amass")
    kick, mirrored, first, last, whole = found
    assert kick.captions == ("a person waves the left hand.", "someone kicks # high, twice")
    assert kick.source == folder / "amass/KIT/3/kick high_left02_poses.npz"
    assert (kick.name, kick.start, kick.end, kick.mirrored) == ("000000", 0.1, 4.25, False)
    other_hand = ("a person waves the right hand.",)
    assert mirrored == kick._replace(name="M000000", mirrored=True, captions=other_hand)
    assert [entry.name for entry in (first, last, whole)] == ["000004"] * 3
    assert (first.start, first.end, first.captions) == (5.8, 8.1, ("first", "also first"))
    # a caption may reach a little beyond its clip, which ends at 10.8 s
    assert (last.start, last.end, last.captions) == (7.8, 10.8, ("last",))
    assert (whole.start, whole.end, whole.captions) == (5.8, 10.8, ("all",))
    assert problems == ["1 clips of HumanAct12 left out: no AMASS source"]


def write_clip(folder, dataset, fps, text=CAPTION, place=None):
    """Frames 7 to 50 of one file of this data set, in the folder `place` -> the file."""
    file = folder / "amass" / (place or dataset) / "s1/run_poses.npz"
    write_amass(file, frames=1500, fps=fps)
    rows = [f"./pose_data/{dataset}/s1/run_poses.npy,7,50,000009.npy"]
    write_humanml3d(folder, rows, {"000009": text})
    return file


@pytest.mark.parametrize("fps", [100.0, 120.0, 59.9999885559082, 250.0])
def test_frames_are_those_of_humanml3d(tmp_path, body, fps):
    """Its notebook: every int(fps / 20)-th frame, then the trim, then [start:end]."""
    file = write_clip(tmp_path, "MPI_HDM05", fps, "all#x#0#0\npart#x#0.5#1.3\n")
    step = int(fps / 20)
    kept = np.arange(1500)[::step][60:][7:50]
    original = read_motion_file(file, body).motion
    (whole, part), _ = entries(tmp_path, tmp_path / "amass")
    for entry, frames in ((whole, kept), (part, kept[10:26])):
        # at the rate that HumanML3D's 20 frames a second really are, its frames come out untouched
        motion = read_entry(entry, body, fps / step, Reading())
        assert torch.equal(motion.transl, original.transl[frames])
        assert torch.equal(motion.body_pose, original.body_pose[frames])
        assert torch.equal(motion.global_orient, original.global_orient[frames])
        assert motion.fps == fps / step and motion.gender == "male"


DATASETS = [  # as index.csv names them, their folders in AMASS today, seconds of a calibration pose
    ("BioMotionLab_NTroje", "BMLrub", 0), ("MPI_HDM05", "HDM05", 3), ("TCD_handMocap", "TCDHands", 0),
    ("MPI_Limits", "PosePrior", 1), ("MPI_mosh", "Mosh", 0), ("SSM_synced", "SSM", 0), ("KIT", "kit", 0),
    ("Transitions_mocap", "Transitions", 0.5), ("Eyes_Japan_Dataset", "Eyes_Japan_Dataset", 3),
    ("TotalCapture", "TotalCapture", 1), ("DFaust_67", "DFaust", 0),
]  # fmt: skip


@pytest.mark.parametrize("old, new, trimmed", DATASETS)
def test_amass_may_have_its_folders_of_today(tmp_path, old, new, trimmed):
    # catches half of HumanML3D lost, and a calibration pose kept because its folder has another name
    file = write_clip(tmp_path, old, 100.0, place=new)
    ((entry,), problems) = entries(tmp_path, tmp_path / "amass")
    assert entry.source == file and not problems
    assert entry.start == trimmed + 7 / 20


def test_other_rates_and_the_mirror(folder, body):
    write_amass(folder / "amass/KIT/3/kick high_left02_poses.npz", frames=600, fps=100.0)
    (kick, mirrored, *_), _ = entries(folder, folder / "amass")
    original, motion = read_motion_file(kick.source, body).motion, read_entry(kick, body, 16.0, Reading())
    times = 0.1 + np.arange(66) / 16  # to the 83rd frame, at 0.1 + 82/20 s
    assert len(motion.transl) == 66 and len(read_entry(kick, body, 20, Reading()).transl) == 83
    for axis in range(3):
        expected = np.interp(times, np.arange(600) / 100, original.transl[:, axis])
        np.testing.assert_allclose(motion.transl[:, axis], expected, atol=1e-6)
    reflected, expected = read_entry(mirrored, body, 16.0, Reading()), mirror(motion, body)
    matrices = (axis_angle_to_matrix(x.body_pose) for x in (reflected, expected))
    torch.testing.assert_close(*matrices, atol=1e-5, rtol=0)
    torch.testing.assert_close(reflected.transl, expected.transl, atol=1e-6, rtol=0)


def test_a_motion_that_does_not_fit_its_entry(folder, body):
    file = folder / "amass/KIT/3/kick high_left02_poses.npz"
    kick = entries(folder, folder / "amass")[0][0]
    with pytest.raises(FileNotFoundError, match=r"kick high_left02_poses\.npz"):
        read_entry(kick, body, 20, Reading())
    # whoever has AMASS's SMPL-X release has them all, but with other frames
    write_amass(file.with_name("kick high_left02_stageii.npz"), frames=900, fps=100.0)
    with pytest.raises(ValueError, match=r"kick high_left02_stageii\.npz is of AMASS's SMPL-X release"):
        read_entry(kick, body, 20, Reading())
    # the 85th of HumanML3D's frames is missing, by one of AMASS's
    write_amass(file, frames=5 * 84, fps=100.0)
    with pytest.raises(ValueError, match=r"000000 ends at 4\.20 s of .*which lasts 4\.19 s"):
        read_entry(kick, body, 20, Reading())
    write_amass(file, frames=5 * 84 + 1, fps=100.0)
    assert len(read_entry(kick, body, 20, Reading()).transl) == 83
    write_amass(file, frames=100, fps=15.0)
    with pytest.raises(ValueError, match="at least 20"):
        read_entry(kick, body, 20, Reading())


GOOD = f"{KICK},2,85,000000.npy"
BAD_INDEX = [
    ("index.csv", None, "HumanML3D has"),
    ("index.csv", "", "expected the columns source_path"),
    ("index.csv", HEADER, "no lines"),
    ("index.csv", index(f"{KICK},2,85"), "line 2: new_name is ''"),
    ("index.csv", index(GOOD, f"{KICK},2.5,85,000001.npy"), "line 3: frames '2.5'"),
    ("index.csv", index(f"{KICK},2,85,../../000000.npy"), "line 2: new_name"),
    ("index.csv", index(GOOD, GOOD), "line 3: new_name"),
    ("index.csv", index("./pose_data/KIT/../../../secret.npy,2,85,000000.npy"), "source_path"),
    ("index.csv", index("/etc/a.npy,2,85,000000.npy"), "source_path"),
    ("index.csv", index(r"./pose_data/..\..\secret.npy,2,85,000000.npy"), "source_path"),
    ("index.csv", index(",2,85,000000.npy"), "source_path"),
    ("train.txt", " \n", "is empty"),
    ("train.txt", "000000\n000077\nM000078\n", "has 2 names .* 000077"),
]


@pytest.mark.parametrize("name, content, message", BAD_INDEX)
def test_an_index_that_cannot_be_trusted(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}.*{message}"):
        entries(folder, folder / "amass")


BAD_TEXTS = [
    (b"\n\n", "holds no caption"),
    (b"a person walks\n", "line 1 is 'a person walks', expected caption#tokens#start#end"),
    (b"walks#walk/VERB#0.0#0.0\nwalks#walk/VERB#zero#0.0\n", "line 2"),
    (b"walks#walk/VERB#3.0#1.0\n", "in a clip of 4.15 s"),
    (b"walks#walk/VERB#-1.0#1.0\n", "line 1"),
    (b"walks#walk/VERB#1.0#99.0\n", "line 1"),
    (b"walks#walk/VERB#4.5#5.0\n", "line 1"),
    (b"walks#walk/VERB#0#inf\n", "line 1"),
    (b" #walk/VERB#0.0#0.0\n", "line 1"),
    (b"caf\xe9#x/NOUN#0.0#0.0\n", "not UTF-8"),
    (None, "HumanML3D has"),
]


@pytest.mark.parametrize("content, message", BAD_TEXTS)
def test_a_bad_text_leaves_its_clip_out(folder, content, message):
    file = folder / "texts/000000.txt"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    found, (_, problem) = entries(folder, folder / "amass")
    assert "000000.txt" in problem and message in problem
    assert {entry.name for entry in found} == {"M000000", "000004"}


@pytest.mark.parametrize("span", ["85,2", "2,2", "-3,85"])
def test_a_span_that_is_none_leaves_its_clip_out(folder, span):
    (folder / "index.csv").write_text(index(f"{KICK},{span},000000.npy"))
    (folder / "train.txt").write_text("000000")
    found, (problem,) = entries(folder, folder / "amass")
    assert not found and problem.startswith("000000: frames") and "no span" in problem


def test_vectors_are_refused_with_the_reason(tmp_path):
    np.save(tmp_path / "M000004.npy", np.zeros((60, 263)))
    with pytest.raises(ValueError, match="refitted to another skeleton"):
        entries(tmp_path, tmp_path)

"""kit/data/datasets.py and kit/data/sources.py: data sets by name, and what training makes of them."""

import clip_folder
import numpy as np
import pytest
import torch
from conftest import small_codec

from kit import puppet
from kit.data import __main__ as commands
from kit.data import batch as batches
from kit.data.datasets import open_dataset, parse, puppet_motion, read_all, split_options
from kit.data.hmr import read_motion_file
from kit.data.motion_files import save_amass
from kit.data.sources import open_sources
from kit.geometry import PUPPET, Geometry, geometry_of
from motion_tokens import decode_smpl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def amass(tmp_path_factory):
    """Two puppets' motions somewhere in the room, at 20 frames a second, and what else lies in AMASS."""
    folder = tmp_path_factory.mktemp("amass")
    for name, frames in (("CMU/01/walk_poses.npz", 44), ("BMLrub/turn_poses.npz", 80)):
        motion = clip_folder.motion_of(frames, frames, 20.0)
        motion = motion._replace(transl=motion.transl + torch.tensor((3.0, 0.1, -7.0)))
        (folder / name).parent.mkdir(parents=True)
        save_amass(folder / name, motion, puppet.body())
    np.savez(folder / "CMU" / "01" / "shape.npz", betas=np.zeros(16))
    np.savez(folder / "BMLrub" / "neutral_stagei.npz", betas=np.zeros(16))
    return folder


@pytest.fixture(scope="module")
def humanml3d(amass):
    folder = amass / "humanml3d"
    text = "a man walks#a/DET#0.0#0.0\n{}#a/DET#0.0#0.0\nhe starts#a/DET#0.0#1.0\n"
    texts = {"000001": text.format("someone, walking left"), "M000001": text.format("walking right")}
    clip_folder.write_humanml3d(folder, ["./pose_data/CMU/01/walk_poses.npy,0,40,000001.npy"], texts)
    return folder


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("puppet", ("puppet", "", None)),
        ("puppet@2", ("puppet", "", 2.0)),
        ("amass:/x:y@0.25", ("amass", "/x:y", 0.25)),
        ("clips:a/b c@d@axes=opencv@smooth=0.2@3", ("clips", "a/b c@d", 3.0)),
        ("clips:a/b c@d@3@axes=opencv@smooth=.2", ("clips", "a/b c@d", 3.0)),
    ],
)
def test_a_name_its_weight_and_its_options(spec, expected):
    assert parse(spec) == expected
    rest, options = split_options(spec, "axes", "smooth")
    found = options.get("axes", ""), float(options.get("smooth", 0))
    assert "axes" not in rest and found == (("opencv", 0.2) if "axes" in spec else ("", 0))


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("", "expected KIND:WHERE"),
        ("clips:x@0", "weight must be above 0"),
        ("clips:.@axes=up", "axes 'up', expected one of"),
        ("clips:.@smooth=x", "expected seconds"),
        ("clips:.@smooth=60", "expected seconds"),
        ("clips:.@axes=zup@smooth=0.1@axes=opencv", "an option twice"),
        ("cache:.@smooth=0.1", "are for amass, humanml3d and clips"),
        ("puppet:3@fps=0", "no option @fps=0, expected @axes=, @smooth= or @WEIGHT"),
        ("movies:x", r"expected one of puppet:\.\.\., amass"),
        ("puppet:many", "expected a number of clips"),
        ("puppet:3", "16 frames a second of 64x64: add --fps 16 --size 64x64"),
        ("clips:", "expected KIND:WHERE"),
        ("amass:nowhere", "no folder nowhere"),
        ("humanml3d:.", r"expected AMASS there; name another folder as humanml3d:\.\+AMASS"),
    ],
)
def test_names_that_mean_nothing(spec, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        open_dataset(spec, Geometry(24, 17, 64, 64, 8), puppet.body())


# ---------------------------------------------------------------- motion alone


def test_amass_is_cut_into_canonical_windows(amass):
    found = open_dataset(f"amass:{amass}", Geometry(10, 17, 64, 64, 8), puppet.body())
    assert found.names == ["BMLrub/turn_poses.npz", "CMU/01/walk_poses.npz"]  # not the shapes beside them
    cut, _ = read_all(found, lambda sample: sample)
    assert [sample.name for sample in cut] == [found.names[0]] * 2 + [found.names[1]]
    for sample in cut:
        assert (sample.video, sample.captions, tuple(sample.motion.shape)) == (None, (), (17, 235))
        np.testing.assert_allclose(sample.motion[0, [3, 5]], 0, atol=1e-5)  # the pelvis: see canonical
    # the second window goes on where the first ended: the same poses as frames 34 to 66 of the file
    motion = read_motion_file(amass / "BMLrub/turn_poses.npz", puppet.body()).motion
    pose = decode_smpl(cut[1].motion[None])["body_pose"][0]
    torch.testing.assert_close(pose, motion.body_pose[34:68:2], atol=1e-3, rtol=0)


def test_humanml3d_has_a_sample_for_each_part_with_its_captions(humanml3d, amass):
    found = open_dataset(f"humanml3d:{humanml3d}+{amass}", Geometry(16, 13, 64, 64, 8), puppet.body())
    cut, _ = read_all(found, lambda sample: sample)
    both = ("a man walks", "someone, walking left")
    other, part = ("a man walks", "walking right"), ("he starts",)
    assert [sample.captions for sample in cut] == [both, both, part, other, other, part]
    assert {sample.name for sample in cut} == {"000001", "M000001"}


def test_links_in_the_folder_are_followed_once(amass, tmp_path):
    # catches linked subsets left out in silence, a link to a folder above that has no end, and doubled files
    (tmp_path / "CMU").symlink_to(amass / "CMU")
    (tmp_path / "CMU again").symlink_to(amass / "CMU")
    (tmp_path / "KIT").mkdir()
    (tmp_path / "KIT" / "one.npz").symlink_to(amass / "BMLrub" / "turn_poses.npz")
    (tmp_path / "KIT" / "up").symlink_to(tmp_path)
    (tmp_path / "KIT" / "self").symlink_to(tmp_path / "KIT" / "self")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    data = open_dataset(f"amass:{tmp_path}", PUPPET, puppet.body())
    assert data.names == ["CMU/01/walk_poses.npz", "KIT/one.npz"]
    assert data.problems == [f"{tmp_path / x} is a broken link" for x in ("gone", "KIT/self")]


def test_verbs_end_with_1_where_nothing_is_usable(verb, amass, tmp_path, capsys):
    assert commands.check(f"amass:{amass}", Geometry(20, 49, 64, 64, 8), puppet.body()) == 1
    text = capsys.readouterr().out
    assert "CMU/01/walk_poses.npz has 44 frames at 20 fps, fewer than 49" in text
    assert text.endswith("1 samples accepted, 1 rejected\n")
    assert verb(commands, "check", f"amass:{amass}").code == 0
    assert verb(commands, "check", f"amass:{amass}", "--frames", 401).code == 1
    assert verb(commands, "preview", f"amass:{amass}", "--out", tmp_path / "a.png").code == 0
    assert verb(commands, "preview", f"amass:{amass}", "--frames", 401, "--out", tmp_path / "b.png").code == 1
    ended = verb(commands, "preview", f"amass:{amass}", "--out", tmp_path / "b")
    assert ended.code == 2 and "expected the name of a .png" in ended.err
    ended = verb(commands, "cache", "puppet:3", "--out", tmp_path / "c")
    assert ended.code == 2 and "cache needs --wan FOLDER" in ended.err
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert commands.check(f"amass:{tmp_path}", PUPPET, puppet.body()) == 0
    assert "holds no .npz, at any depth: unpack AMASS there" in capsys.readouterr().out


# ---------------------------------------------------------------- for training


def test_every_kind_of_data_trains_the_puppet(tmp_path, amass, humanml3d, monkeypatch):
    monkeypatch.setattr(batches, "STATISTICS_CLIPS", 16)
    clip_folder.write(tmp_path / "clips", range(3))
    kinds = ["puppet@1", "puppet:5@1", f"amass:{amass}@1", f"humanml3d:{humanml3d}+{amass}@1"]
    sources = open_sources([*kinds, f"clips:{tmp_path / 'clips'}@1"], PUPPET, puppet.body())
    assert [source.count for source in sources] == [None, 5, 5, 2, 3]
    mean, std = batches.statistics([sources[1]], 0, 2048)
    where = {"seed": 0, "batch": 24, "device": CPU, "codec": small_codec()}
    first, second = (
        batches.read(sources, mean, std, [batches.Wanted(stage, 0, 9, range(24))], **where)[0]
        for stage in (1, 2)
    )
    assert first.video is None and first.motion.shape == (24, 9, 235) and first.text.shape == (24, 16, 64)
    assert second.video.shape == (24, 48, 3, 8, 8) and second.motion.isfinite().all()


def test_a_clip_is_read_as_it_was_written(tmp_path):
    # catches another camera frame, and pixels in another range or order
    folder, codec = clip_folder.write(tmp_path / "clips", [7]), small_codec()
    source = open_sources([f"clips:{folder}"], PUPPET, puppet.body())[0]
    read = source.read([0], 17, True, codec, CPU)
    clip = puppet.clips([7], clip_folder.FRAMES)
    moved = clip._replace(transl=clip.transl - clip_folder.PLACE)
    expected = puppet_motion(moved)[:, :17]
    torch.testing.assert_close(read.motion[..., :75], expected[..., :75], atol=1e-4, rtol=0)
    video = puppet.render(clip.joints, clip.betas, clip.shirt)[0][:, :, :17]
    error = (codec.decode(read.latents) - codec.decode(codec.encode(video))).abs().mean()
    assert error < 0.01
    torch.testing.assert_close(read.texts[0][0], puppet.encode_text(clip.caption)[0], atol=0, rtol=0)

    # a caption that is longer than the puppet reads is cut
    clip_folder.write_metadata(folder, [("0.mp4", 20 * "walking, ", "motions/0.npz")])
    source = open_sources([f"clips:{folder}"], PUPPET, puppet.body())[0]
    expected = puppet.encode_text([" ".join(puppet.TEXT_LEN * ["walking"])])[0]
    torch.testing.assert_close(source.read([0], 17, False, None, CPU).texts[0][0], expected, atol=0, rtol=0)


def test_bad_files_are_told_of_before_training(tmp_path, capsys):
    folder = clip_folder.write(tmp_path / "clips", range(2))
    (folder / "1.mp4").write_bytes(b"")
    open_sources([f"clips:{folder}"], PUPPET, puppet.body())
    assert f"clips:{folder}: 1 samples, 1 rejected\n{folder / '1.mp4'} is damaged" in capsys.readouterr().out
    open_sources([f"clips:{folder}"], PUPPET, puppet.body(), rank=1)
    assert capsys.readouterr().out == ""
    (folder / "0.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing usable, 2 rejected: .*0\.mp4 is damaged"):
        open_sources([f"clips:{folder}"], PUPPET, puppet.body())


@pytest.mark.parametrize(
    "specs, wan, reason",
    [
        (["amass:x"], True, "python -m kit.data cache amass:x --wan FOLDER --body SMPL --out DIR"),
        (["cache:x"], False, "holds Wan's latents"),
        (["cache:x"], True, "expected what `python -m kit.data cache` wrote"),
        (["puppet", "puppet:3"], False, "state the weight of every data set, such as puppet@1"),
        (["puppet:3@2", "puppet:9"], False, "state the weight of every data set, such as puppet:9@1"),
    ],
)
def test_what_cannot_be_trained_on(specs, wan, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        open_sources(specs, PUPPET, puppet.body(), wan=wan)


def test_geometry_of_the_published_wans_and_what_they_cannot_make(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text('{"z_dim": 16}')
    assert geometry_of(tmp_path) == (16, 81, 480, 832, 8)
    (tmp_path / "vae/config.json").write_text('{"scale_factor_spatial": 16}')
    assert geometry_of(tmp_path) == (24, 121, 704, 1280, 16)
    assert geometry_of(tmp_path, 5, (32, 64), 12.5) == (12.5, 5, 32, 64, 16)
    assert geometry_of(None) == PUPPET
    for asked, reason in (({"size": (48, 70)}, "nearest is 64x64"), ({"fps": 0.5}, "expected 1 to 240")):
        with pytest.raises(ValueError, match=reason):
            geometry_of(tmp_path, **asked)

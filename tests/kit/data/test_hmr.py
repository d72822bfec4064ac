"""Results of human mesh recovery: what each tool's own camera sees is where ours puts it."""

import pickle
from pathlib import Path

import clip_folder
import hmr_files
import numpy as np
import pytest
import torch
from hmr_files import FLIP, Person
from scipy.spatial.transform import Rotation, Slerp

from kit import puppet
from kit.data import clips
from kit.data.clips import Sample, read_clip, read_metadata
from kit.data.hmr import at_video_times, read_motion_file, stretches
from kit.data.plausible import Reading
from kit.data.sources import open_sources
from kit.geometry import PUPPET
from motion_tokens import decode_smpl

FRAMES = 21


TOOLS = {  # what they write, and the focal length of their camera, in pixels of 64x64
    "gvhmr": ("hmr4d_results.pt", 132),
    "wham": ("wham_output.pkl", np.hypot(64, 64)),
    "tram": ("hps/hps_track_0.npy", 132),
    "phalp": ("demo_clip.pkl", 5000 / 256 * 64),  # 5000 for a square of 256, padded around its middle
    "camerahmr": ("camerahmr.npz", 132),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return clip_folder.write(tmp_path_factory.mktemp("clips") / "a", [5])


@pytest.fixture(scope="module")
def who() -> Person:
    return hmr_files.person(5, FRAMES)


def paired(folder: Path, motion: str, columns: str = "", values: str = "") -> None:
    head = f"video,prompt,motion{columns}\n"
    (folder / "metadata.csv").write_text(f"{head}0.mp4,a person moves,{motion}{values}\n")


def sample_of(folder: Path) -> tuple[Sample, list[str]]:
    """The clip's only sample, and what is said of it."""
    (clip,), _ = read_metadata(folder)
    reading = Reading()
    (sample,) = read_clip(folder, clip, PUPPET, puppet.body(), reading)
    return sample, reading.lines()


def read(path: Path, **options):
    return read_motion_file(path, puppet.body(), **{"size": (64, 64)} | options)


def write_wham(path: Path, *tracks: tuple[str | int, Person, object]) -> Path:
    return pickled(path, {name: hmr_files.wham_track(who, np.asarray(rows)) for name, who, rows in tracks})


def pickled(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def angles(found) -> np.ndarray:
    """(f 24 3) of what was read."""
    motion = found.motion
    return torch.cat([motion.global_orient[:, None], motion.body_pose], dim=1).numpy()


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("tool", TOOLS)
def test_joints_are_on_the_pixels_where_the_tool_sees_them(folder, who, tool):
    """And in our axes the puppet's own parameters are read: depth and mirrored limbs hide in a projection.

    Catches: the person turned about the origin instead of the pelvis, rotations transposed or not turned,
    translation not turned, the world's parameters instead of the camera's, another lens than the tool's."""
    name, focal = TOOLS[tool]
    (folder / name).parent.mkdir(exist_ok=True)
    getattr(hmr_files, tool)(folder / name, who)
    paired(folder, name)
    sample, said = sample_of(folder)
    found, depth = sample.project(sample.motion[:, 3:75].reshape(17, 24, 3))
    x, y, z = np.moveaxis(who.joints()[:17], -1, 0)
    expected = np.stack([32 + focal * x / z, 32 + focal * y / z], axis=-1)
    kept = slice(0, 22 if tool == "gvhmr" else 24)  # SMPL-X has no hand joints of SMPL's
    np.testing.assert_allclose(found[:, kept], expected[:, kept], atol=0.02)
    assert (depth > 0).all()
    assert ("WHAM's file has no camera" in str(said)) == (tool == "wham")
    assert ("betas are SMPL-X's" in str(said)) == (tool == "gvhmr")

    motion, clip = read(folder / name).motion, puppet.clips([5], FRAMES)
    assert hmr_files.apart(motion.global_orient, clip.global_orient[0]) < 1e-3
    assert hmr_files.apart(motion.body_pose[:, :21], clip.body_pose[0, :, :21]) < 1e-3
    np.testing.assert_allclose(motion.betas, clip.betas[0], atol=1e-5)
    np.testing.assert_allclose(motion.transl, clip.transl[0] - clip_folder.PLACE, atol=1e-4)


def test_a_weak_perspective_camera_becomes_a_translation(tmp_path, who):
    """4D-Humans: in its box the person is at (s, tx, ty), seen from 2 f / (s b). Checked by projection: the
    pelvis has to be where the box' camera puts it. Catches: a box' centre counted from the corner, b for b/2,
    a size given as width first, by the video or, where there is none, by the file."""
    height, width, b, focal = 90, 160, 40.0, 500.0
    centre = np.stack([np.linspace(50, 90, FRAMES), np.linspace(40, 45, FRAMES)], axis=1)
    s, tx, ty = 0.9, 0.1, -0.2
    fields = {
        "global_orient": who.orient, "body_pose": who.pose.reshape(-1, 69), "betas": who.betas,
        "pred_cam": np.tile([s, tx, ty], (FRAMES, 1)), "box_center": centre, "focal_length": np.array(focal),
    }  # fmt: skip
    for box in (np.full(FRAMES, b), np.full(FRAMES, b / 200)):  # in pixels, or in units of 200
        np.savez(tmp_path / "a.npz", box_size=box, **fields)
        found = read(tmp_path / "a.npz", size=(height, width))
        assert ("taken for units of 200 pixels" in "".join(found.notes)) == (box[0] < 1)
        pelvis = puppet.body().rest_joints(found.motion.betas)[0].numpy()
        origin = (found.motion.transl.numpy() + pelvis) @ FLIP - pelvis  # where SMPL's origin is, in OpenCV's
        lens = found.intrinsics.numpy()
        assert (lens == [[focal, 0, 80], [0, focal, 45], [0, 0, 1]]).all()
        seen = origin @ lens.T
        # in the box: -1 to 1 is tx times s, so b/2 pixels for 1
        expected = centre + b / 2 * s * np.array([tx, ty])
        np.testing.assert_allclose(seen[:, :2] / seen[:, 2:], expected, atol=1e-3)
        np.testing.assert_allclose(seen[:, 2], 2 * focal / (s * b), rtol=1e-5)
    with pytest.raises(ValueError, match="needs the size of the picture"):
        read(tmp_path / "a.npz", size=None)
    np.savez(tmp_path / "b.npz", box_size=box, size=np.array([height, width]), **fields)
    stated = read(tmp_path / "b.npz", size=None)
    assert torch.equal(stated.motion.transl, found.motion.transl)
    assert torch.equal(stated.intrinsics, found.intrinsics)
    # 4D-Humans' own lens: catches the shorter side of the picture, which in a square is as long
    del fields["focal_length"]
    np.savez(tmp_path / "c.npz", box_size=box, **fields)
    assert read(tmp_path / "c.npz", size=(height, width)).intrinsics[0, 0] == 5000 / 256 * width


FORMS = {  # beside those of the tools and of AMASS
    "66 numbers": lambda p: {"poses": p.full[:, :22].reshape(-1, 66)},
    "6D, column by column": lambda p: {"poses": p.matrices[..., :2].swapaxes(-1, -2).reshape(-1, 144)},
    "6D, 3 by 2": lambda p: {"poses": p.matrices[..., :2]},
    "parts, with 30 joints of fingers": lambda p: {
        "root_orient": p.orient,
        "pose_body": np.pad(p.pose[:, :21].reshape(-1, 63), ((0, 0), (0, 90)), constant_values=0.5),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_rotations_in_any_form(tmp_path, who, form):
    """Catches: rows taken for columns, a root left in the body, hands of SMPL+H taken for SMPL's."""
    fields = {"trans": who.transl[:, None], "betas": hmr_files.by_frame(who), "fps": 25}
    np.savez(tmp_path / "a.npz", **FORMS[form](who), **fields)
    found = read(tmp_path / "a.npz", axes="opencv")
    assert found.frames is None and found.motion.fps == 25
    expected = who.full.copy()
    expected[:, 0] = (Rotation.from_matrix(FLIP) * Rotation.from_rotvec(who.orient)).as_rotvec()
    assert hmr_files.apart(angles(found)[:, :22], expected[:, :22]) < 1e-3
    if "fingers" in form:
        assert not angles(found)[:, 22:].any()


def test_a_translation_of_another_shape_is_refused(tmp_path, who):
    """Catches: coordinates of several frames read as one place."""
    np.savez(tmp_path / "a.npz", poses=who.full.reshape(-1, 72), trans=who.transl.T, betas=who.betas, fps=25)
    with pytest.raises(ValueError, match=rf"its transl is \(3, {FRAMES}\), expected \(frames, 3\)"):
        read(tmp_path / "a.npz", axes="opencv")


# ---------------------------------------------------------------- axes


def test_axes_are_as_named_or_asked_for(tmp_path, who):
    """One person in three files. Catches: axes ignored, guessed where nothing tells of them, or misspelt."""
    zup = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]])  # OpenCV's to AMASS's
    pelvis = puppet.body().rest_joints(torch.from_numpy(who.betas).float())[0].numpy()
    wanted = read(write_wham(tmp_path / "a.pkl", (0, who, range(FRAMES)))).motion
    for axes, turn in (("opencv", np.eye(3)), ("yup", FLIP), ("zup", zup)):
        orient = (Rotation.from_matrix(turn) * Rotation.from_rotvec(who.orient)).as_rotvec()
        fields = {"global_orient": orient, "transl": (who.transl + pelvis) @ turn.T - pelvis, "fps": 25}
        np.savez(tmp_path / "a.npz", body_pose=who.pose.reshape(-1, 69), betas=who.betas, **fields)
        found = read(tmp_path / "a.npz", axes=axes).motion
        assert hmr_files.apart(found.global_orient, wanted.global_orient) < 1e-3
        np.testing.assert_allclose(found.transl, wanted.transl, atol=1e-4)
    with pytest.raises(ValueError, match=r"a\.npz: its axes are not known: name them, zup, yup, opencv"):
        read(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"axes 'up', expected one of zup, yup, opencv"):
        read(tmp_path / "a.npz", axes="up")


@pytest.mark.parametrize("root_in_poses", (True, False))
def test_hy_motion_has_y_up_and_thirty_frames_a_second(tmp_path, root_in_poses):
    """Catches: AMASS's axes for it, no rate, the root left out where it stands in Rh alone."""
    clip = puppet.clips([5], FRAMES)
    orient, poses = clip.global_orient[0].numpy(), np.zeros((FRAMES, 156))
    poses[:, :3], poses[:, 3:66] = root_in_poses * orient, clip.body_pose[0, :, :21].flatten(1)
    fields = {"poses": poses, "trans": clip.transl[0].numpy(), "Rh": orient, "betas": np.zeros((1, 16))}
    np.savez(tmp_path / "a.npz", gender="neutral", num_frames=FRAMES, **fields)
    found = read(tmp_path / "a.npz")
    assert found.frames is None and found.motion.fps == 30 and not found.notes
    assert hmr_files.apart(found.motion.global_orient, orient) < 1e-3
    assert hmr_files.apart(found.motion.body_pose[:, :21], clip.body_pose[0, :, :21]) < 1e-3
    np.testing.assert_allclose(found.motion.transl, clip.transl[0], atol=1e-6)


# ---------------------------------------------------------------- tracks and frames


def test_the_longest_track_or_the_one_that_is_named(folder, who, tmp_path):
    """Catches: the first track instead of the longest, a name compared with a number, a tie decided alone."""
    other = hmr_files.person(8, FRAMES)
    file = write_wham(folder / "two.pkl", (4, other.rows(range(9)), range(9)), (11, who, range(FRAMES)))
    assert hmr_files.apart(read(file).motion.body_pose, who.pose) < 1e-3
    assert hmr_files.apart(read(file, track="4").motion.body_pose, other.pose[:9]) < 1e-3
    with pytest.raises(ValueError, match=r"two\.pkl: it has no track '5', expected one of: 4, 11"):
        read(file, track="5")
    write_wham(file, (4, other, range(FRAMES)), (11, who, range(FRAMES)))
    with pytest.raises(ValueError, match="tracks 4, 11 are equally long: name one"):
        read(file)
    paired(folder, "two.pkl", ",track,axes", ",4,opencv")
    pose = decode_smpl(sample_of(folder)[0].motion[None])["body_pose"][0]
    assert hmr_files.apart(pose, other.pose[:17]) < 1e-2


def test_rows_belong_to_frames_of_the_video(folder, who, capsys):
    """A track of frames 3 to 20, in any order. Catches: rows taken from the video's beginning on, cut frames
    that are not said, also in training, a window that begins before the person is there."""
    rows = np.arange(3, FRAMES)
    mixed = np.random.default_rng(0).permutation(rows)
    write_wham(folder / "part.pkl", (0, who.rows(mixed), mixed))
    paired(folder, "part.pkl")
    sample, said = sample_of(folder)
    assert hmr_files.apart(decode_smpl(sample.motion[None])["body_pose"][0], who.pose[3:20]) < 1e-2
    cut = "0.mp4: the person is in frames 3 to 20 of 0 to 20; the others are cut"
    open_sources([f"clips:{folder}"], PUPPET, puppet.body())
    assert cut in said and cut in capsys.readouterr().out
    paired(folder, "motions/0.npz")
    whole, _ = sample_of(folder)
    assert torch.equal(sample.video[:14], whole.video[3:])


def test_short_gaps_are_filled_and_long_ones_part_the_clip(folder, who):
    """Catches: a gap closed up, so that later motion is early; a long one walked over."""
    rows = np.r_[0:6, 14:21]  # 8 frames at 16 a second: half a second
    found = read(write_wham(folder / "gap.pkl", (0, who.rows(rows), rows)))
    ((part,), said) = stretches(found, torch.arange(FRAMES).double() / 16)
    assert len(part.times) == FRAMES and part.motion.fps == 16
    assert said == ["8 frames without the person are filled"]
    line = [np.interp(np.arange(FRAMES), rows, found.motion.transl[:, i]) for i in range(3)]
    np.testing.assert_allclose(part.motion.transl, np.stack(line, 1), atol=1e-5)

    rows = np.r_[0:6, 15:21]
    found = read(write_wham(folder / "gap.pkl", (0, who.rows(rows), rows)))
    parts, said = stretches(found, torch.arange(FRAMES).double() / 16)
    assert [len(part.times) for part in parts] == [6, 6] and parts[1].times[0] == 15 / 16
    assert said == ["the person is in frames 0 to 5, 15 to 20 of 0 to 20; the others are cut"]
    paired(folder, "gap.pkl")
    with pytest.raises(ValueError, match=r"0\.mp4 has 6 frames .* with the person in them, fewer than 17"):
        sample_of(folder)


def test_a_glimpse_of_somebody_else_does_not_cost_the_clip(folder, who):
    """Catches: a clip refused for two frames that are in no sample, and a fault whose part is not said."""
    rows, turned = np.r_[0:17, 28:30], Rotation.from_euler("x", 180, degrees=True)
    long = hmr_files.person(5, 30)
    upside_down = [*long.orient[:28], *(turned * Rotation.from_rotvec(long.orient[28:])).as_rotvec()]
    strange = long._replace(orient=np.array(upside_down)).rows(rows)
    video = [np.zeros((64, 64, 3), np.uint8)] * 30
    clip_folder.write_video(folder / "long.mp4", video, clip_folder.at_rate(16, 30))
    write_wham(folder / "glimpse.pkl", (0, strange, rows))
    (folder / "metadata.csv").write_text("video,prompt,motion\nlong.mp4,a person moves,glimpse.pkl\n")
    sample, _ = sample_of(folder)
    assert hmr_files.apart(decode_smpl(sample.motion[None])["body_pose"][0], who.pose[:17]) < 1e-2
    (clip,), _ = read_metadata(folder)
    with pytest.raises(
        ValueError, match=r"glimpse\.pkl from 1\.75 s on: the head is below the feet .* first in 0"
    ):
        list(read_clip(folder, clip, PUPPET._replace(frames=1), puppet.body(), Reading()))


def test_a_clip_that_is_one_frame_short_is_said(tmp_path):
    """Seen from 1/30 to 31/30 s: 16 times of 1/16 s. Catches: a clip left out without a word."""
    black = [np.zeros((64, 64, 3), np.uint8)] * 33
    clip_folder.write_video(tmp_path / "0.mp4", black, clip_folder.at_rate(30, 33))
    write_wham(tmp_path / "a.pkl", (0, hmr_files.person(5, 31), range(1, 32)))
    paired(tmp_path, "a.pkl")
    with pytest.raises(ValueError, match=r"0\.mp4 has 16 frames .* with the person in them, fewer than 17"):
        sample_of(tmp_path)


def test_a_video_of_uneven_frames(folder, who):
    """Rows stand at the times of their frames. Catches: rows read at a mean rate."""
    found = read(write_wham(folder / "a.pkl", (0, who, range(FRAMES))))
    steps = torch.rand(FRAMES - 1, generator=torch.Generator().manual_seed(0)).double() + 0.2
    times = torch.cat([torch.zeros(1).double(), steps.cumsum(0) / 16])
    (part,), _ = stretches(found, times)
    moments = torch.linspace(0, 1, 9).double() * times[-1]
    slerp = Slerp(times.numpy(), Rotation.from_rotvec(angles(found)[:, 17]))
    between = at_video_times(part, moments).body_pose[:, 16]
    assert hmr_files.apart(between, slerp(moments.numpy()).as_rotvec()) < 1e-3


def test_phalps_frames_are_those_that_it_names_and_in_which_it_saw_the_person(tmp_path, who):
    """Catches: frames numbered as they come, where the file begins later; a ghost's pose, which repeats the
    last one seen, taken for the person's."""
    hmr_files.phalp(tmp_path / "a.pkl", who, ghosts=(5, 6))
    later = dict(list(pickle.loads((tmp_path / "a.pkl").read_bytes()).items())[3:])
    assert read(pickled(tmp_path / "a.pkl", later)).frames.tolist() == [3, 4, *range(7, FRAMES)]


def test_a_dictionary_by_image(tmp_path, who):
    """As users of CameraHMR keep them. Images are counted from 1, unless there is one of number 0."""
    for first in (0, 1):
        content = {
            f"img_{k + first:05d}.png": {
                "global_orient": who.matrices[k, :1], "body_pose": who.matrices[k, 1:], "betas": who.betas,
                "cam_trans": who.transl[k], "cam_int": clip_folder.CAMERA,
            }
            for k in range(FRAMES)
        }  # fmt: skip
        np.save(tmp_path / "a.npy", content, allow_pickle=True)
        found = read(tmp_path / "a.npy")
        assert found.frames.tolist() == list(range(FRAMES)) and found.intrinsics[0, 0] == 132
        assert hmr_files.apart(found.motion.body_pose, who.pose) < 1e-3


# ---------------------------------------------------------------- bad input


def lines_of(path: Path, **options) -> str:
    with pytest.raises(ValueError) as error:
        read(path, **options)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


def test_files_without_a_motion(tmp_path, who):
    """Each a line with the file's name and the reason."""
    one = write_wham(tmp_path / "one.pkl", (3, who.rows(range(1)), [7]))
    said = lines_of(one)
    assert "its track 3 has one frame, expected a motion" in said and "stack them into one .npz" in said
    for empty in ({}, [], {"000001.jpg": {"time": 0, "tid": [], "smpl": [], "camera": []}}):
        assert "it holds no person" in lines_of(pickled(tmp_path / "none.pkl", empty))
    for thing in (5, "text", [1, 2], {"tid": 3}, {0: {"pose": None}}, {0: {"pose": "x"}}, {"poses": [[]]}):
        lines_of(pickled(tmp_path / "strange.pkl", thing))
    for poses in (np.zeros((0, 72)), np.full((21, 72), "a"), np.zeros((21, 72), complex)):
        np.savez(tmp_path / "p.npz", poses=poses, trans=np.zeros((len(poses), 3)), mocap_frame_rate=16.0)
        assert "expected numbers, a row for each frame" in lines_of(tmp_path / "p.npz")
    np.save(tmp_path / "h.npy", np.zeros((50, 263)))
    assert "HumanML3D's vectors" in lines_of(tmp_path / "h.npy")


def test_numbers_that_are_not_there(folder, who):
    """NaN in the middle is a gap."""
    track = hmr_files.wham_track(who, np.arange(FRAMES))
    track["pose"][8:10, 5] = np.nan
    track["trans"][10] = np.inf
    pickled(folder / "nan.pkl", {0: track})
    paired(folder, "nan.pkl")
    sample, said = sample_of(folder)
    assert sample.motion.isfinite().all()
    assert "frame 8 and 2 more hold NaN or infinity" in str(said)
    assert "3 frames without the person are filled" in str(said)


def test_betas_of_any_count(tmp_path, who):
    """SMPL-X's full shape space is cut to ten; betas a frame are averaged."""
    track = hmr_files.wham_track(who, np.arange(FRAMES))
    many = np.pad(np.random.default_rng(0).normal(size=(FRAMES, 10)), ((0, 0), (0, 290)))
    for betas, expected in ((many, many[:, :10].mean(0)), (many[0], many[0, :10]), (many[:1], many[0, :10])):
        file = pickled(tmp_path / "a.pkl", {0: track | {"betas": betas}})
        np.testing.assert_allclose(read(file).motion.betas, expected, atol=1e-6)


def test_tracks_that_cannot_be(folder, who, monkeypatch):
    """Catches: numbers beyond the video clipped to it, a frame that is there twice taken once, scaled or
    mirrored matrices taken for rotations."""
    write_wham(folder / "a.pkl", (0, who, np.arange(FRAMES) + 5))
    paired(folder, "a.pkl")
    with pytest.raises(ValueError, match=r"a\.pkl: it names frame 25, the video has 0 to 20: is it"):
        sample_of(folder)
    with monkeypatch.context() as patch:
        frame = next(clips.shown_frames(folder / "0.mp4"))
        patch.setattr(clips, "shown_frames", lambda _: [frame] * FRAMES)
        with pytest.raises(ValueError, match="all its frames are shown at one time"):
            sample_of(folder)
    track = hmr_files.wham_track(who, np.arange(FRAMES))
    for name, value, reason in (
        ("frame_ids", np.r_[3, 0:20], "frame 3 is there twice"),
        ("frame_ids", np.arange(FRAMES) / 2, "expected whole ones"),
        ("frame_ids", np.arange(FRAMES) - 2, "from 0 on"),
        ("frame_ids", np.arange(9), "9 frame numbers, expected 21"),
        ("betas", np.full(10, np.nan), "hold NaN or infinity; cut or repair"),
        ("betas", np.full(10, 300.0), "betas up to 300, expected at most 20"),
        ("betas", np.ones(8), "betas are (8,), expected 10 or more"),
        ("pose", who.matrices * 1.1, "the matrices of its pose are no rotations"),
        ("pose", who.matrices * np.array([1, 1, -1.0]), "the matrices of its pose are no rotations"),
    ):
        assert reason in lines_of(pickled(folder / "a.pkl", {0: track | {name: value}}))


def test_a_distance_from_a_long_lens_may_sway(folder, who, tmp_path):
    """Seen from 450 m: catches a lens that is not asked, so that good clips are left out as impossible."""
    found = who.transl * [1, 1, 1] + np.array([0, 0, 445.5])
    found[:, 2] += 2 * (np.arange(FRAMES) % 2)
    camera = clip_folder.CAMERA * np.array([[100, 1, 1], [1, 100, 1], [1, 1, 1]])
    hmr_files.camerahmr(folder / "far.npz", who._replace(transl=found), camera)
    paired(folder, "far.npz")
    sample, _ = sample_of(folder)
    assert sample.motion[:, 5].diff().abs().min() > 1


def test_a_video_that_does_not_begin_at_zero(tmp_path, who):
    """Catches: moments counted from the file's zero, so that the motion is late or not there at all."""
    black = [np.zeros((64, 64, 3), np.uint8)] * FRAMES
    clip_folder.write_video(tmp_path / "0.mkv", black, [2 + t for t in clip_folder.at_rate(16, FRAMES)])
    write_wham(tmp_path / "a.pkl", (0, who, range(FRAMES)))
    (tmp_path / "metadata.csv").write_text("video,prompt,motion\n0.mkv,a person moves,a.pkl\n")
    sample, _ = sample_of(tmp_path)
    assert hmr_files.apart(decode_smpl(sample.motion[None])["body_pose"][0], who.pose[:17]) < 1e-2


def test_gender_in_one_letter(tmp_path, who):
    """Catches: letters exchanged or not known, so that another gender's body is put on the motion."""
    track = hmr_files.wham_track(who, np.arange(FRAMES))
    for given, meant in (("f", "female"), ("M", "male"), (b"n", "neutral"), (np.array(["f"]), "female")):
        file = pickled(tmp_path / "a.pkl", {0: track | {"gender": given}})
        assert read(file).motion.gender == meant

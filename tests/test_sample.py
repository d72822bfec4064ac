"""sample.py: the files it makes, that a seed means a sample, conditions, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, contents, tiny_model

import sample
from kit import backbone, puppet, render, weights
from kit.motion_files import Motion, load_amass, save_amass

PLAIN = ("--device", "cpu", "--steps", 2)
NAMES = ("joint", "m2v", "v2m")
SEED = 3


def run_sample(weights_file: Path, out: Path, *arguments: object) -> Path:
    """Sample in this process -> the folder with its files."""
    with pytest.MonkeyPatch.context() as patch:
        call = ("sample.py", *PLAIN, "--weights", weights_file, "--out", out, "--seed", SEED, *arguments)
        patch.setattr(sys, "argv", list(map(str, call)))
        sample.main()
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_weights) -> Path:
    """The folder of a run that names no task: one sample of each."""
    return run_sample(tiny_weights, tmp_path_factory.mktemp("sample") / "a" / "b")


def amass(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def frames(path: Path) -> torch.Tensor:
    return render.read_video(path)[0].float()


# ---------------------------------------------------------------- what is written


def test_without_a_task_each_has_its_four_files_and_there_is_one_record(made):
    expected = {f"{name}.{suffix}" for name in NAMES for suffix in ("mp4", "gif", "png", "npz")}
    latents = {f"latents/{name}.safetensors" for name in NAMES}
    assert contents(made).keys() == expected | latents | {"run.json"}


@pytest.mark.parametrize("name", NAMES)
def test_video_and_motion_have_the_presets_size_and_rate(made, name):
    pixels, fps = render.read_video(made / f"{name}.mp4")
    assert (tuple(pixels.shape), fps) == ((17, 64, 64, 3), 16)
    motion = amass(made / f"{name}.npz")
    shapes = {"poses": (17, 156), "trans": (17, 3), "betas": (16,), "gender": (), "mocap_frame_rate": ()}
    assert {key: value.shape for key, value in motion.items()} == shapes
    assert (motion["mocap_frame_rate"], motion["gender"]) == (16, "neutral")


def test_record_holds_options_prompts_command_and_versions(made, tiny_weights):
    record = json.loads((made / "run.json").read_text())
    options = {"task": None, "seed": SEED, "steps": 2, "solver": "ab2", "out": str(made), "motion": None}
    options |= {"weights": str(tiny_weights), "guidance_text": 1.5, "guidance_condition": 1.5}
    assert {key: record[key] for key in options} == options
    shown = puppet.clips([sample.CONDITION_CLIP]).caption[0]
    assert record["prompts"] == {"joint": sample.PROMPT, "m2v": shown, "v2m": shown}
    assert "--seed" in record["command"]
    assert record["versions"]["torch"] == torch.__version__


# ---------------------------------------------------------------- a seed means a sample


def test_the_same_call_gives_the_same_bytes(made, tiny_weights, tmp_path):
    again = contents(run_sample(tiny_weights, tmp_path / "again"))
    first = contents(made)
    records = [json.loads(files.pop("run.json")) for files in (first, again)]
    assert [name for name in first if first[name] != again[name]] == []
    # the record says where the files went: nothing else may differ, such as a date
    assert {key for key in records[0] if records[0][key] != records[1][key]} == {"out", "command"}


@pytest.mark.parametrize("other", (("--seed", 4), ("--prompt", "")), ids=("seed", "no text"))
def test_another_seed_or_text_is_another_sample(made, tiny_weights, tmp_path, other):
    out = run_sample(tiny_weights, tmp_path, "--task", "joint", *other)
    pictures = {f"joint.{suffix}" for suffix in ("mp4", "gif", "png", "npz")}
    assert contents(out).keys() == pictures | {"latents/joint.safetensors", "run.json"}
    for suffix in ("mp4", "npz"):
        assert (out / f"joint.{suffix}").read_bytes() != (made / f"joint.{suffix}").read_bytes()


# ---------------------------------------------------------------- conditions


def test_shown_conditions_are_the_puppet_clips(made):
    clip = puppet.clips([sample.CONDITION_CLIP])
    motion = load_amass(made / "m2v.npz", puppet.body())
    torch.testing.assert_close(motion.transl, clip.transl[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(motion.betas, clip.betas[0], atol=1e-4, rtol=0)
    video = puppet.render(clip.joints, clip.betas, clip.shirt)[0]
    written = render.from_frames(render.read_video(made / "v2m.mp4")[0])
    assert (written - video[0]).abs().mean() < 0.03  # of 2, mp4 is lossy


def test_motion_that_a_sample_wrote_conditions_the_next_and_comes_back(made, tiny_weights, tmp_path):
    # catches frames, axes or the root's place changed on the way in or out
    out = run_sample(tiny_weights, tmp_path, "--task", "m2v", "--motion", made / "joint.npz")
    given, back = amass(made / "joint.npz"), amass(out / "m2v.npz")
    for key in ("poses", "trans", "betas"):
        np.testing.assert_allclose(back[key], given[key], atol=1e-4, err_msg=key)
    assert json.loads((out / "run.json").read_text())["prompts"] == {"m2v": ""}


def test_video_that_a_sample_wrote_conditions_the_next_and_comes_back(made, tiny_weights, tmp_path):
    out = run_sample(tiny_weights, tmp_path, "--task", "v2m", "--video", made / "joint.mp4")
    difference = (frames(out / "v2m.mp4") - frames(made / "joint.mp4")).abs().mean()
    assert difference < 6  # of 255, mp4 is lossy
    assert (out / "v2m.npz").read_bytes() != (made / "v2m.npz").read_bytes()  # of the puppet's own video


def test_motion_out_of_view_is_moved_before_the_camera_and_a_long_one_cut(tiny_weights, tmp_path, capsys):
    body, clip = puppet.body(), puppet.clips([0], frames=21)
    far = Motion(clip.global_orient[0], clip.body_pose[0], clip.betas[0], clip.transl[0] + 50, 16.0, "male")
    save_amass(tmp_path / "far.npz", far, body)
    motion = sample.read_motion(tmp_path / "far.npz", backbone.puppet_backbone(tiny_weights, "cpu"))
    assert motion.shape == (1, 17, 235)
    assert motion[0, 0, [0, 2]].abs().max() == 0
    joints, real = sample.decode_smpl(motion)["joints"], clip.joints[:, :17]
    torch.testing.assert_close(joints - joints[:, :1, :1], real - real[:, :1, :1], atol=1e-4, rtol=0)
    said = capsys.readouterr().out
    assert "first 17 of 21 frames" in said and "outside the camera's view" in said


# ---------------------------------------------------------------- what is refused


def video_of(path: Path, count: int, size: int) -> Path:
    render.write_video(path, torch.full((count, size, size, 3), 128, dtype=torch.uint8), puppet.FPS)
    return path


def motion_of(path: Path, count: int = 17, **changed: np.ndarray) -> Path:
    clip = puppet.clips([0])
    parts = (x[0, :count] for x in (clip.global_orient, clip.body_pose, clip.transl))
    orient, pose, transl = parts
    save_amass(path, Motion(orient, pose, clip.betas[0], transl, puppet.FPS, "neutral"), puppet.body())
    np.savez(path, **amass(path) | changed)
    return path


def text_in(path: Path) -> Path:
    path.write_text("these are words, neither motion nor video nor weights\n" * 20)
    return path


def cut_in_half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def weights_of(path: Path, extra: dict) -> Path:
    weights.save_weights(path, TINY, tiny_model().state_dict(), extra)
    return path


def foreign_weights(path: Path) -> Path:
    weights.save_file({"layer.weight": torch.ones(2)}, path)
    return path


REFUSED = {  # arguments, made in a folder of their own, and what the message must say
    "12 frames": (lambda d: ("--task", "v2m", "--video", video_of(d / "v.mp4", 12, 64)), "nearest is 13"),
    "32x32 pixels": (lambda d: ("--task", "v2m", "--video", video_of(d / "v.mp4", 17, 32)), "32x32.*64x64"),
    "no such video": (lambda d: ("--task", "v2m", "--video", d / "v.mp4"), r"v\.mp4.*no such file"),
    "text as video": (
        lambda d: ("--task", "v2m", "--video", text_in(d / "v.mp4")),
        r"v\.mp4 is damaged or no",
    ),
    "no such motion": (lambda d: ("--task", "m2v", "--motion", d / "m.npz"), r"m\.npz.*no such file"),
    "text as motion": (lambda d: ("--task", "m2v", "--motion", text_in(d / "m.npz")), "not an .npz archive"),
    "truncated motion": (
        lambda d: ("--task", "m2v", "--motion", cut_in_half(motion_of(d / "m.npz"))),
        "cut short",
    ),
    "NaN in motion": (
        lambda d: ("--task", "m2v", "--motion", motion_of(d / "m.npz", trans=np.full((17, 3), np.nan))),
        "transl holds NaN",
    ),
    "16 frames of motion": (
        lambda d: ("--task", "m2v", "--motion", motion_of(d / "m.npz", 16)),
        "16 frames long.*at least 17",
    ),
    "motion without m2v": (lambda d: ("--motion", motion_of(d / "m.npz")), "condition of --task m2v"),
    "motion with v2m": (
        lambda d: ("--task", "v2m", "--motion", motion_of(d / "m.npz")),
        "condition of --task m2v",
    ),
    "video without v2m": (lambda d: ("--video", video_of(d / "v.mp4", 17, 64)), "condition of --task v2m"),
    "unknown task": (lambda d: ("--task", "t2v"), "invalid choice.*joint.*m2v.*v2m"),
    "17 words": (lambda d: ("--prompt", "word " * 17), "16 words, got 17"),
    "no steps": (lambda d: ("--steps", 0), "steps must be at least 1"),
    "no such weights": (lambda d: ("--weights", d / "w.safetensors"), r"no weights at .*w\.safetensors"),
    "text as weights": (lambda d: ("--weights", text_in(d / "w")), "not a safetensors file"),
    "foreign weights": (lambda d: ("--weights", foreign_weights(d / "w")), "carries no configuration"),
    "no codec in weights": (lambda d: ("--weights", weights_of(d / "w", {})), "codec"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(verb, tiny_weights, tmp_path, arguments, words):
    (tmp_path / "in").mkdir()
    call = (*PLAIN, "--weights", tiny_weights, "--out", tmp_path / "out", *arguments(tmp_path / "in"))
    ended = verb(sample, *call)
    assert ended.code == 2
    assert re.search(f"^sample.py: error: .*{words}", ended.err.splitlines()[-1])
    if not ended.err.startswith("usage:"):  # argparse's own, before its line
        assert ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()

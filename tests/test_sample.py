"""sample.py: the files it makes, that a seed means a sample, conditions, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, contents, tiny_model
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation, Slerp

import dual_dit
import sample
from kit import backbone, devices, jobs, output, pictures, puppet, weights
from kit.attention import attention_to_latents
from kit.conditions import read_motion, read_video
from kit.data.hmr import read_motion_file
from kit.data.motion_files import Motion, save_amass
from motion_tokens import decode_smpl

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
    return pictures.read_video(path)[0].float()


# ---------------------------------------------------------------- what is written


SUFFIXES = ("mp4", "gif", "png", "npz", "bvh")


def test_without_a_task_each_has_its_files_and_there_is_one_page_and_one_record(made):
    expected = {f"{name}.{suffix}" for name in NAMES for suffix in SUFFIXES}
    latents = {f"latents/{name}.safetensors" for name in NAMES}
    assert contents(made).keys() == expected | latents | {"index.html", "run.json"}


def page(folder: Path) -> list[dict]:
    """The samples in the data that a page's script reads."""
    html = (folder / "index.html").read_text()
    start = html.index('{"total":')
    return json.JSONDecoder().raw_decode(html[start:])[0]["samples"]


def test_the_page_has_every_sample_with_the_attention_of_its_own_latents(made, tiny_weights):
    # catches attention of another task, text or sample, or of motion that is normalised twice
    model, _ = weights.load_weights(tiny_weights)
    shown = page(made)
    assert [one["name"] for one in shown] == list(NAMES)
    for one in shown:
        assert one["frames"] == 17 and one["video"] and len(one["joints"]) == 17
        file = made / "latents" / f"{one['name']}.safetensors"
        job, latents, motion, attention = output.load_latents(file)
        expected = attention_to_latents(model, latents, motion, puppet.encode_text([job.prompt]), job.task)
        assert expected.shape == (TINY.layers, 17, 5)
        torch.testing.assert_close(attention, expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(np.array(one["attention"]) / 1000, expected, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_video_and_motion_have_the_presets_size_and_rate(made, name):
    pixels, fps = pictures.read_video(made / f"{name}.mp4")
    assert (tuple(pixels.shape), fps) == ((17, 64, 64, 3), 16)
    motion = amass(made / f"{name}.npz")
    shapes = {"poses": (17, 156), "trans": (17, 3), "betas": (16,), "gender": (), "mocap_frame_rate": ()}
    assert {key: value.shape for key, value in motion.items()} == shapes
    assert (motion["mocap_frame_rate"], motion["gender"]) == (16, "neutral")


def test_record_holds_options_prompts_command_and_versions(made, tiny_weights):
    record = json.loads((made / "run.json").read_text())
    options = {"task": None, "seed": SEED, "steps": 2, "solver": "ab2", "out": str(made), "motion": None}
    options |= {"weights": str(tiny_weights), "guidance_text": None, "lead": None}
    assert {key: record["options"][key] for key in options} == options
    shown = puppet.clips([jobs.CONDITION_CLIP]).caption[0]
    assert record["prompts"] == {"joint": jobs.PROMPT, "m2v": shown, "v2m": ""}
    assert "--seed" in record["command"]
    assert record["versions"]["torch"] == torch.__version__


# ---------------------------------------------------------------- a seed means a sample


def test_the_same_call_gives_the_same_bytes(made, tiny_weights, tmp_path):
    again = contents(run_sample(tiny_weights, tmp_path / "again"))
    first = contents(made)
    records = [json.loads(files.pop("run.json")) for files in (first, again)]
    assert [name for name in first if first[name] != again[name]] == []
    # the record says where the files went: nothing else may differ, such as a date
    for record in records:
        record["options"].pop("out")
    assert {key for key in records[0] if records[0][key] != records[1][key]} == {"command"}


@pytest.mark.parametrize("other", (("--seed", 4), ("--prompt", "")), ids=("seed", "no text"))
def test_another_seed_or_text_is_another_sample(made, tiny_weights, tmp_path, other):
    out = run_sample(tiny_weights, tmp_path, "--task", "joint", *other)
    pictures = {f"joint.{suffix}" for suffix in SUFFIXES}
    assert contents(out).keys() == pictures | {"latents/joint.safetensors", "index.html", "run.json"}
    for suffix in ("mp4", "npz"):
        assert (out / f"joint.{suffix}").read_bytes() != (made / f"joint.{suffix}").read_bytes()


@pytest.mark.parametrize("bf16", (False, True))
def test_the_puppet_computes_in_what_the_processor_has_units_for(tiny_weights, tmp_path, monkeypatch, bf16):
    # as it was trained and is measured; what is written stays fp32
    monkeypatch.setattr(devices, "has_bf16_units", lambda device: bf16)
    monkeypatch.setattr(dual_dit, "attention", dual_dit.attention)  # it may be exchanged
    dtypes = set()
    note = lambda module, inputs, output: dtypes.add(getattr(output, "dtype", None))
    with torch.nn.modules.module.register_module_forward_hook(note):
        out = run_sample(tiny_weights, tmp_path, "--task", "v2m")
    assert (torch.bfloat16 in dtypes) == bf16
    assert {x.dtype for x in load_file(out / "latents" / "v2m.safetensors").values()} == {torch.float32}


CALLS = {  # what each option makes of flow.sample's arguments; first what none of them does
    (): {
        "steps": 6,
        "guidance_text": 1.5,
        "guidance_condition": 1.5,
        "shift": 1.0,
        "lead": 0.5,
        "solver": "ab2",
    },
    ("--steps", 3): {"steps": 3},
    ("--guidance-text", 0): {"guidance_text": 0.0},
    ("--guidance-condition", 4): {"guidance_condition": 4.0},
    ("--lead", 0): {"lead": 0.0},
    ("--solver", "euler"): {"solver": "euler"},
}


def test_options_reach_the_sampler_and_the_rest_is_the_puppets(tiny_weights, tmp_path, monkeypatch):
    # catches a 0 that is taken for nothing given
    asked = []
    monkeypatch.setattr(sample.flow, "sample", lambda *given, **how: asked.append(how) or given[1:3])
    for name in ("looks", "write_all"):
        monkeypatch.setattr(output, name, lambda *_, **__: None)
    for options in CALLS:
        call = (*options, "--steps", 6) if "--steps" not in options else options
        run_sample(tiny_weights, tmp_path, "--task", "joint", *call)
    for changed, how in zip(CALLS.values(), asked, strict=True):
        how.pop("progress")
        assert how == CALLS[()] | changed


def test_sampling_imports_nothing_slow_that_it_does_not_use(tiny_weights, tmp_path):
    # torch draws on its meta device, and broadcasts shapes, by way of its compiler: three seconds of a call
    call = ["sample.py", *PLAIN, "--task", "v2m", "--weights", tiny_weights, "--out", tmp_path]
    code = f"import sys, sample; sys.argv = {[*map(str, call)]}; sample.main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch._dynamo", "sympy", "matplotlib"} & set(done.stdout.split())


# ---------------------------------------------------------------- conditions


def test_shown_conditions_are_the_puppet_clips(made):
    clip = puppet.clips([jobs.CONDITION_CLIP])
    motion = read_motion_file(made / "m2v.npz", puppet.body()).motion
    torch.testing.assert_close(motion.transl, clip.transl[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(motion.betas, clip.betas[0], atol=1e-4, rtol=0)
    video = puppet.render(clip.joints, clip.betas, clip.shirt)[0]
    written = pictures.from_frames(pictures.read_video(made / "v2m.mp4")[0])
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


def saved(path: Path, frames: int, fps: float = 16.0, far: float = 0.0) -> Motion:
    clip = puppet.clips([0], frames=frames)
    fields = (clip.global_orient[0], clip.body_pose[0], clip.betas[0], clip.transl[0] + far)
    save_amass(path, Motion(*fields, fps, "male"), puppet.body())
    return Motion(*fields, fps, "male")


@pytest.fixture
def world(tiny_weights) -> backbone.Backbone:
    return backbone.puppet_backbone(tiny_weights, "cpu")


def test_motion_out_of_view_is_moved_before_the_camera_and_a_long_one_cut(world, tmp_path, capsys):
    saved(tmp_path / "far.npz", 21, far=50.0)
    motion = read_motion(tmp_path / "far.npz", world)
    assert motion.shape == (1, 17, 235)
    joints, real = decode_smpl(motion)["joints"], puppet.clips([0]).joints[:, :17]
    assert joints[0, 0, 0, [0, 2]].abs().max() < 1e-5
    torch.testing.assert_close(joints - joints[:, :1, :1], real - real[:, :1, :1], atol=1e-4, rtol=0)
    said = capsys.readouterr().out
    assert "0.00 to 1.00 s of 1.25 s" in said and "outside the camera's view" in said


def test_motion_from_a_start_at_another_rate_is_scipys_slerp(world, tmp_path, capsys):
    made = saved(tmp_path / "m.npz", 61, fps=40.0)
    motion = decode_smpl(read_motion(tmp_path / "m.npz", world, start=0.3))
    times = 0.3 + np.arange(17) / 16
    slerp = Slerp(np.arange(61) / 40, Rotation.from_rotvec(made.body_pose[:, 15].numpy()))
    difference = slerp(times).inv() * Rotation.from_rotvec(motion["body_pose"][0, :, 15].numpy())
    assert difference.magnitude().max() < 1e-4
    assert "40 fps is resampled to 16 fps" in capsys.readouterr().out


def test_short_motion_is_played_there_and_back(world, tmp_path, capsys):
    saved(tmp_path / "m.npz", 9)
    joints = decode_smpl(read_motion(tmp_path / "m.npz", world, loop=True))["joints"][0]
    order = [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(joints, joints[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(joints[:9], puppet.clips([0], frames=9).joints[0], atol=1e-4, rtol=0)
    assert "there and back" in capsys.readouterr().out


def test_video_of_any_rate_and_size_is_resampled_and_its_middle_cut_out(world, tmp_path, capsys):
    # 48 fps, 96x160: every third frame, each with a grey of its own; the sides, in another colour, go
    count = 3 * 19
    frames = torch.full((count, 96, 160, 3), 255, dtype=torch.uint8)
    frames[:, :, 32:128] = (4 * torch.arange(count, dtype=torch.uint8))[:, None, None, None]
    pictures.write_video(tmp_path / "v.mp4", frames, 48)
    pixels = read_video(tmp_path / "v.mp4", world.geometry, start=1 / 16)
    assert pixels.shape == (1, 3, 17, 64, 64)
    grey = (pixels[0, :, :, :, 8:56].mean(dim=(0, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(grey, 12.0 * torch.arange(1, 18), atol=3, rtol=0)
    printed = capsys.readouterr().out
    assert "96x160 is cut and resized to 64x64" in printed
    assert "0.06 to 1.06 s are used, 17 frames at 16 fps" in printed


def test_mesh_and_bvh_are_of_the_sampled_motion(made, tiny_weights, tmp_path):
    out = run_sample(tiny_weights, tmp_path, "--task", "joint", "--mesh", "npz")
    body = puppet.body()
    motion = read_motion_file(out / "joint.npz", body).motion
    vertices = body.mesh(motion.global_orient, motion.body_pose, motion.betas, motion.transl)[0]
    with np.load(out / "joint-mesh.npz") as file:
        # AMASS files have no hand joints
        np.testing.assert_allclose(file["vertices"].mean(1), vertices.mean(1), atol=0.02)
    assert (out / "joint.bvh").read_bytes() == (made / "joint.bvh").read_bytes()


def test_objects_that_are_there_are_kept_and_nothing_is_sampled(verb, tiny_weights, tmp_path):
    call = (*PLAIN, "--weights", tiny_weights, "--task", "joint", "--mesh", "obj", "--out", tmp_path)
    assert verb(sample, *call).code == 0
    before = contents(tmp_path)
    assert len([name for name in before if name.startswith("joint-mesh/frame_")]) == puppet.FRAMES
    ended = verb(sample, *call, "--seed", 5)
    assert ended.code == 2 and "joint-mesh exists: choose another --out" in ended.err
    assert contents(tmp_path) == before


def test_latents_are_decoded_to_where_they_came_from(verb, tiny_weights, tmp_path):
    out = run_sample(tiny_weights, tmp_path / "there", "--task", "joint")
    before = contents(out)
    for name in ("joint.mp4", "index.html"):  # the page shows attention again
        (out / name).unlink()
    call = (*PLAIN, "--weights", tiny_weights, "--decode")
    assert verb(sample, *call, out / "latents" / "joint.safetensors").code == 0
    assert contents(out) == before
    (tmp_path / "moved").mkdir()
    moved = (out / "latents" / "joint.safetensors").rename(tmp_path / "moved" / "joint.safetensors")
    assert verb(sample, *call, moved).code == 0
    assert (tmp_path / "moved" / "joint.mp4").read_bytes() == before["joint.mp4"]


# ---------------------------------------------------------------- what is refused


def video_of(path: Path, count: int, size: int) -> Path:
    pictures.write_video(path, torch.full((count, size, size, 3), 128, dtype=torch.uint8), puppet.FPS)
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


def prompts_of(path: Path, *prompts: str) -> Path:
    path.write_text("\n".join(prompts))
    return path


def cut_in_half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def weights_of(path: Path, extra: dict) -> Path:
    weights.save_weights(path, TINY, tiny_model().state_dict(), extra)
    return path


def foreign_weights(path: Path) -> Path:
    save_file({"layer.weight": torch.ones(2)}, path)
    return path


REFUSED = {  # arguments, made in a folder of their own, and what the message must say
    "12 frames": (lambda d: ("--task", "v2m", "--video", video_of(d / "v.mp4", 12, 64)), "12 frames.*17 are"),
    "video over too soon": (
        lambda d: ("--task", "v2m", "--video", video_of(d / "v.mp4", 20, 64), "--start", 0.5),
        "12 frames.*17 are needed",
    ),
    "no such video": (lambda d: ("--task", "v2m", "--video", d / "v.mp4"), r"v\.mp4.*no such file"),
    "text as video": (
        lambda d: ("--task", "v2m", "--video", text_in(d / "v.mp4")),
        r"v\.mp4 is damaged or no",
    ),
    "no such motion": (lambda d: ("--task", "m2v", "--motion", d / "m.npz"), r"m\.npz.*no such file"),
    "text as motion": (lambda d: ("--task", "m2v", "--motion", text_in(d / "m.npz")), "no archive"),
    "truncated motion": (
        lambda d: ("--task", "m2v", "--motion", cut_in_half(motion_of(d / "m.npz"))),
        "cut short",
    ),
    "NaN in motion": (
        lambda d: ("--task", "m2v", "--motion", motion_of(d / "m.npz", trans=np.full((17, 3), np.nan))),
        "hold NaN",
    ),
    "16 frames of motion": (
        lambda d: ("--task", "m2v", "--motion", motion_of(d / "m.npz", 16)),
        "0.94 s.*1.00 s: add --loop",
    ),
    "start after the end": (
        lambda d: ("--task", "m2v", "--motion", motion_of(d / "m.npz", 40), "--start", 9),
        "--start 9 is not in it",
    ),
    "motion without m2v": (lambda d: ("--motion", motion_of(d / "m.npz")), "condition of --task m2v"),
    "motion with v2m": (
        lambda d: ("--task", "v2m", "--motion", motion_of(d / "m.npz")),
        "condition of --task m2v",
    ),
    "video without v2m": (lambda d: ("--video", video_of(d / "v.mp4", 17, 64)), "condition of --task v2m"),
    "video to motion with text": (
        lambda d: ("--task", "v2m", "--prompt", "a person walks"),
        "video to motion takes no text",
    ),
    "video to motion with texts": (
        lambda d: ("--task", "v2m", "--prompts", prompts_of(d / "p.txt", "a person walks")),
        "video to motion takes no text",
    ),
    "unknown task": (lambda d: ("--task", "t2v"), "invalid choice.*joint.*m2v.*v2m"),
    "17 words": (lambda d: ("--prompt", "word " * 17), "16 words, got 17"),
    "a prompt too long for a name": (
        lambda d: ("--prompts", prompts_of(d / "p.txt", "word " * 60)),
        "a prompt names its files: at most 200 bytes",
    ),
    "no samples": (lambda d: ("--count", 0), "--count: expected a number of at least 1, got '0'"),
    "a start before the video": (
        lambda d: ("--task", "v2m", "--video", video_of(d / "v.mp4", 17, 64), "--start", -1),
        "--start is a number of seconds from 0 on",
    ),
    "no steps": (lambda d: ("--steps", 0), "--steps: expected a number of at least 1, got '0'"),
    "6 frames": (lambda d: ("--frames", 6), "--frames: expected 4n.1, got 6; the nearest is 5"),
    "a size of one number": (lambda d: ("--size", "64"), "--size: expected HEIGHTxWIDTH"),
    "no rate": (lambda d: ("--fps", 0), "--fps: expected a number above 0"),
    "a rate for the puppet": (lambda d: ("--fps", 30), "--fps is for --wan; the puppet has one"),
    "a lead too long": (lambda d: ("--lead", 0.6), "lead must be from 0"),
    "an option that is none": (lambda d: ("--step", 2, "--seeds", 3), "unrecognized arguments|ambiguous"),
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
    assert ended.err.count("\n") == 1 or words.startswith("lead")  # the bar of the sample comes first
    assert not (tmp_path / "out").exists()

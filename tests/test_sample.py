"""sample.py: the files it makes, that a seed means a sample, conditions, and what it refuses."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import clip_folder
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, all_frames, contents, run_main, tiny_model
from safetensors.torch import load_file

import flow
import sample
from flow import Task
from kit import devices, jobs, output, pictures, puppet, weights
from kit.attention import attention_to_latents
from kit.backbone import Backbone, open_backbone, puppet_backbone
from kit.body import Body
from kit.conditions import read_motion, read_video
from kit.data.batch import rng
from kit.data.motion_files import save_amass
from kit.puppet.skeleton import _body_data
from motion_tokens import MOTION_DIM, decode_smpl

PLAIN = ("--device", "cpu", "--steps", 2)
NAMES = ("joint", "m2v", "v2m")
SEED = 3


def run_sample(weights_file: Path, out: Path, *arguments: object) -> Path:
    """Sample in this process -> the folder with its files."""
    run_main(sample, *PLAIN, "--weights", weights_file, "--out", out, "--seed", SEED, *arguments)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_weights) -> Path:
    """The folder of a run that names no task: one sample of each."""
    return run_sample(tiny_weights, tmp_path_factory.mktemp("sample") / "a" / "b", "--mesh")


def amass(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


# ---------------------------------------------------------------- what is written


ENDINGS = (".mp4", ".gif", ".png", ".npz", ".bvh", "-mesh.npz")


def test_without_a_task_each_has_its_files_and_there_is_one_page_and_one_record(made):
    expected = {f"{name}{ending}" for name in NAMES for ending in ENDINGS}
    latents = {f"latents/{name}.safetensors" for name in NAMES}
    assert contents(made).keys() == expected | latents | {"index.html", "run.json"}
    for name in NAMES:
        pixels, fps = all_frames(made / f"{name}.mp4")
        assert (tuple(pixels.shape), fps) == ((17, 64, 64, 3), 16)
        motion = amass(made / f"{name}.npz")
        assert motion["poses"].shape == (17, 156) and motion["mocap_frame_rate"] == 16


def test_the_page_has_every_sample_with_the_attention_of_its_own_latents(made, tiny_weights):
    # catches attention of another task, text or sample
    model, _ = weights.load_weights(tiny_weights)
    html = (made / "index.html").read_text()
    shown, _ = json.JSONDecoder().raw_decode(html[html.index('{"total":') :])
    assert [one["name"] for one in shown["samples"]] == list(NAMES)
    for one in shown["samples"]:
        saved = output.load_latents(made / "latents" / f"{one['name']}.safetensors")
        job, *_, latents, motion, attention = saved
        expected = attention_to_latents(model, latents, motion, puppet.encode_text([job.prompt]), job.task)
        torch.testing.assert_close(attention, expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(np.array(one["attention"]) / 1000, expected, atol=1e-3)


def test_record_holds_options_prompts_command_and_versions(made, tiny_weights):
    record = json.loads((made / "run.json").read_text())
    options = {"task": None, "seed": SEED, "steps": 2, "out": str(made), "weights": str(tiny_weights)}
    assert options.items() <= record["options"].items()
    shown = puppet.clips([jobs.CONDITION_CLIP]).caption[0]
    assert record["prompts"] == {"joint": jobs.PROMPT, "m2v": shown, "v2m": ""}
    assert "--seed" in record["command"] and record["versions"]["torch"] == torch.__version__


# ---------------------------------------------------------------- a seed means a sample


def test_the_same_call_gives_the_same_bytes(made, tiny_weights, tmp_path):
    again = contents(run_sample(tiny_weights, tmp_path / "again", "--mesh"))
    first = contents(made)
    records = [json.loads(files.pop("run.json")) for files in (first, again)]
    assert [name for name in first if first[name] != again[name]] == []
    # the record says where the files went: nothing else may differ, such as a date
    for record in records:
        record["options"].pop("out")
    assert {key for key in records[0] if records[0][key] != records[1][key]} == {"command"}


@pytest.mark.parametrize("bf16", (False, True))
def test_the_puppet_computes_in_what_the_processor_has_units_for(tiny_weights, tmp_path, monkeypatch, bf16):
    # as it was trained and is measured; what is written stays fp32
    monkeypatch.setattr(devices, "has_bf16_units", lambda device: bf16)
    dtypes = set()
    note = lambda module, inputs, output: dtypes.add(getattr(output, "dtype", None))
    with torch.nn.modules.module.register_module_forward_hook(note):
        out = run_sample(tiny_weights, tmp_path, "--task", "v2m")
    assert (torch.bfloat16 in dtypes) == bf16
    assert {x.dtype for x in load_file(out / "latents" / "v2m.safetensors").values()} == {torch.float32}


DEFAULTS = {"steps": 6, "guidance_text": 1.5, "guidance_condition": 1.5, "shift": 1.0}
CHANGED = {"steps": 3, "guidance_text": 0.0, "guidance_condition": 4.0, "solver": "euler"}


def test_options_reach_the_sampler_and_the_rest_is_the_puppets(verb, tiny_weights, tmp_path, monkeypatch):
    # catches a 0 or a no that is taken for nothing given; and the prompt as its own null text: guidance would
    # do nothing, and every sample still look right
    asked, texts = [], []

    def listen(model, video, motion, text, null_text, task, progress, **how):
        asked.append((task, how))
        texts.append((text, null_text))
        return video, motion

    monkeypatch.setattr(sample.flow, "sample", listen)
    for module, name in ((sample, "attention_to_latents"), (output, "write_all")):
        monkeypatch.setattr(module, name, lambda *_: None)
    call = ("--device", "cpu", "--weights", tiny_weights, "--out", tmp_path, "--task", "joint")
    call += ("--prompt", "a person jumps")
    changed = [f"--{name.replace('_', '-')}={value}" for name, value in CHANGED.items()]
    for options in ((), changed, ("--no-redraw",)):
        assert verb(sample, *call, *options).code == 0
    usual, joint, redrawn = DEFAULTS | {"solver": "ab2"}, Task.JOINT, Task.MOTION_TO_VIDEO
    expected = [(task, how) for how in (usual, DEFAULTS | CHANGED) for task in (joint, redrawn)]
    assert asked == [*expected, (joint, usual)]
    expected = puppet.encode_text(["a person jumps", ""]).split(1)
    assert all(torch.equal(x, y) for found in texts for x, y in zip(found, expected, strict=True))


def test_length_and_shift_are_those_of_training(tiny_weights, tmp_path):
    # catches a network trained on short clips that is sampled, or given conditions, of 17 frames
    model, codec = weights.load_weights(tiny_weights)
    settings = {"frames": 5, "recipe": {"stage": 2, "shift": 3.0, "ablate": None}}
    weights.save_weights(tmp_path / "short", TINY, model.state_dict(), codec, settings=settings)
    opened = open_backbone(None, tmp_path / "short", None, None, None, None, None, "cpu")
    assert opened.defaults._asdict() == DEFAULTS | {"shift": 3.0, "redraw": True}
    out = run_sample(tmp_path / "short", tmp_path / "out")
    for name in NAMES:
        assert len(all_frames(out / f"{name}.mp4")[0]) == len(amass(out / f"{name}.npz")["poses"]) == 5


def test_redraw_makes_the_video_again_from_the_motion_and_leaves_the_motion():
    # catches the same noise used twice, a motion whose units are not the network's, guidance that is lost
    model = tiny_model()
    model.motion_mean.fill_(0.5)
    model.motion_std.fill_(2.0)
    text, null_text = puppet.encode_text(["a person jumps", ""]).split(1)
    how = {"steps": 2, "guidance_text": 1.5, "guidance_condition": 4.0, "shift": 1.0}
    generator, latents = rng("sample", SEED), (1, TINY.channels, 2, 8, 8)
    noise, noise_motion, more_noise = (
        torch.randn(shape, generator=generator) for shape in (latents, (1, 5, MOTION_DIM), latents)
    )
    video, motion = flow.sample(model, noise, noise_motion, text, null_text, Task.JOINT, **how)
    again, _ = flow.sample(model, more_noise, motion, text, null_text, Task.MOTION_TO_VIDEO, **how)
    for redraw, expected in ((False, video), (True, again)):
        given = (model, Task.JOINT, text, null_text, SEED, latents[2:])
        made, moved = sample.denoise(*given, redraw=redraw, **how)
        assert torch.equal(made, expected) and torch.equal(moved, 2.0 * motion + 0.5)
    assert not torch.equal(video, again)


def test_sampling_imports_nothing_slow_that_it_does_not_use(tiny_weights, tmp_path):
    # torch draws on its meta device, and broadcasts shapes, by way of its compiler: three seconds of a call
    call = ["sample.py", *PLAIN, "--task", "v2m", "--weights", tiny_weights, "--out", tmp_path]
    code = f"import sys, sample; sys.argv = {[*map(str, call)]}; sample.main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch._dynamo", "sympy", "matplotlib"} & set(done.stdout.split())


# ---------------------------------------------------------------- conditions


def test_motion_that_a_sample_wrote_conditions_the_next_and_comes_back(made, tiny_weights, tmp_path):
    # catches frames, axes or the root's place changed on the way in or out
    out = run_sample(tiny_weights, tmp_path, "--task", "m2v", "--motion", made / "joint.npz")
    given, back = amass(made / "joint.npz"), amass(out / "m2v.npz")
    for key in ("poses", "trans", "betas"):
        np.testing.assert_allclose(back[key], given[key], atol=1e-4, err_msg=key)
    assert json.loads((out / "run.json").read_text())["prompts"] == {"m2v": ""}


def test_the_gender_of_a_motion_comes_back(tiny_weights, tmp_path):
    saved(tmp_path / "m.npz", 17)
    out = run_sample(tiny_weights, tmp_path / "out", "--task", "m2v", "--motion", tmp_path / "m.npz")
    assert amass(tmp_path / "m.npz")["gender"] == amass(out / "m2v.npz")["gender"] == "male"


def test_video_that_a_sample_wrote_conditions_the_next_and_comes_back(made, tiny_weights, tmp_path, backbone):
    # catches a condition that is shown as it was given, and is another one to the network
    out = run_sample(tiny_weights, tmp_path, "--task", "v2m", "--video", made / "joint.mp4")
    shown, given = (all_frames(path)[0].float() for path in (out / "v2m.mp4", made / "joint.mp4"))
    difference = (shown - given).abs().mean()
    assert difference < 6  # of 255, mp4 is lossy
    latents = output.load_latents(out / "latents" / "v2m.safetensors").latents
    expected = backbone.codec().encode(read_video(made / "joint.mp4", backbone.geometry))
    torch.testing.assert_close(latents, expected)
    assert (out / "v2m.npz").read_bytes() != (made / "v2m.npz").read_bytes()  # of the puppet's own video


def saved(path: Path, frames: int, fps: float = 16.0, far: float = 0.0) -> None:
    motion = clip_folder.motion_of(0, frames, fps)
    save_amass(path, motion._replace(transl=motion.transl + far, gender="male"), puppet.body())


@pytest.fixture
def backbone(tiny_weights) -> Backbone:
    return puppet_backbone(tiny_weights, "cpu")


def test_the_body_of_training_is_asked_for(tiny_weights, tmp_path, capsys):
    # catches motion of one's own SMPL model written with the puppet's bones
    data = _body_data()
    np.savez(tmp_path / "body.npz", **data | {"v_template": 1.1 * data["v_template"]})
    digest = Body.load(tmp_path / "body.npz").digest
    model, extra = weights.load_weights(tiny_weights)
    weights.save_weights(tmp_path / "w", model.config, model.state_dict(), extra, settings={"body": digest})
    given = None, None, None, None, "cpu"
    assert open_backbone(None, tmp_path / "w", None, *given).body.digest != digest
    assert "w was trained on another body than that of the puppet" in capsys.readouterr().out
    assert open_backbone(None, tmp_path / "w", tmp_path / "body.npz", *given).body.digest == digest
    assert capsys.readouterr().out == ""
    open_backbone(None, None, tmp_path / "body.npz", *given)
    assert "puppet.safetensors was trained on another body than" in capsys.readouterr().out


def test_motion_out_of_view_is_moved_before_the_camera_and_a_long_one_cut(backbone, tmp_path, capsys):
    saved(tmp_path / "far.npz", 21, far=50.0)  # and as high: catches legs below the picture, or all of it
    motion, _ = read_motion(tmp_path / "far.npz", backbone)
    assert motion.shape == (1, 17, 235)
    joints, real = decode_smpl(motion)["joints"], puppet.clips([0]).joints[:, :17]
    assert joints[0, 0, 0, [0, 2]].abs().max() < 1e-5 and abs(joints[0, 0, :, 1].min()) < 1e-5
    torch.testing.assert_close(joints - joints[:, :1, :1], real - real[:, :1, :1], atol=1e-4, rtol=0)
    pixels, _ = puppet.project(joints[0])
    assert ((pixels >= 0) & (pixels <= puppet.SIZE)).all()
    said = capsys.readouterr().out
    assert "0.00 to 1.00 s of 1.25 s" in said and "outside the camera's view" in said


def test_motion_from_a_start_at_another_rate(backbone, tmp_path, capsys):
    saved(tmp_path / "m.npz", 61, fps=32.0)
    joints = decode_smpl(read_motion(tmp_path / "m.npz", backbone, start=0.5)[0])["joints"]
    torch.testing.assert_close(joints, puppet.clips([0], frames=61).joints[:, 16:49:2], atol=1e-4, rtol=0)
    assert "32 fps is resampled to 16 fps" in capsys.readouterr().out


def test_short_motion_is_played_there_and_back(backbone, tmp_path, capsys):
    saved(tmp_path / "m.npz", 9)
    joints = decode_smpl(read_motion(tmp_path / "m.npz", backbone, loop=True)[0])["joints"][0]
    order = [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(joints, joints[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(joints[:9], puppet.clips([0], frames=9).joints[0], atol=1e-4, rtol=0)
    assert "forwards and backwards" in capsys.readouterr().out


def test_video_of_any_rate_and_size_is_resampled_and_its_middle_cut_out(backbone, tmp_path, capsys):
    # 48 fps, 96x160: every third frame, each with a grey of its own; the sides, in another colour, go
    count = 3 * 19
    frames = torch.full((count, 96, 160, 3), 255, dtype=torch.uint8)
    frames[:, :, 32:128] = (4 * torch.arange(count, dtype=torch.uint8))[:, None, None, None]
    pictures.write_video(tmp_path / "v.mp4", frames, 48)
    pixels = read_video(tmp_path / "v.mp4", backbone.geometry, start=1 / 16)
    assert pixels.shape == (1, 3, 17, 64, 64)
    grey = (pixels[0, :, :, :, 8:56].mean(dim=(0, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(grey, 12.0 * torch.arange(1, 18), atol=3, rtol=0)
    printed = capsys.readouterr().out
    assert "96x160 is cut and resized to 64x64" in printed
    assert "0.06 to 1.06 s are used, 17 frames at 16 fps" in printed


def test_latents_are_decoded_to_where_they_came_from(verb, tiny_weights, tmp_path, monkeypatch):
    out = run_sample(tiny_weights, tmp_path / "there", "--task", "joint")
    before = contents(out)
    for name in ("joint.mp4", "index.html"):  # the page shows attention again
        (out / name).unlink()
    monkeypatch.chdir(out / "latents")
    failed = ("--task", "joint", "--seed", 3, "--guidance-text", 2.0)  # of the call that --decode is added to
    ended = verb(sample, *PLAIN, *failed, "--weights", tiny_weights, "--decode", "joint.safetensors")
    assert ended.code == 0 and contents(out) == before
    assert "without --guidance-text, --seed, --steps, --task:" in ended.out


def test_latents_that_a_user_has_renamed_or_moved_replace_no_other_sample(made, verb, tiny_weights, tmp_path):
    # catches files named by what the latents were called, in a folder two levels up
    latents = made / "latents"
    for copy in (tmp_path / "a" / "latents" / "best.safetensors", tmp_path / "b" / "best.safetensors"):
        copy.parent.mkdir(parents=True)
        copy.write_bytes((latents / "joint.safetensors").read_bytes())
        assert verb(sample, *PLAIN, "--weights", tiny_weights, "--decode", copy).code == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.pop("latents/best.safetensors") == b.pop("best.safetensors")
    files = {f"best.{suffix}" for suffix in ("mp4", "npz", "bvh", "gif", "png")}
    assert a == b and a.keys() == files | {"index.html"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_latents_of_another_codec_are_refused(made, backbone, tmp_path):
    # catches noise written over a video: Wan2.2's latents have as many channels as the puppet's
    other = backbone._replace(geometry=backbone.geometry._replace(stride=16))
    latents = made / "latents" / "joint.safetensors"
    with pytest.raises(ValueError, match=r"joint\.safetensors was sampled with another video codec"):
        output.write_all(tmp_path / "out", [latents], None, other, "cpu", False)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- a file of prompts


def test_prompts_that_were_stopped_go_on_from_their_latents(verb, tiny_weights, tmp_path, monkeypatch):
    # catches hours of sampling done again because no video was decoded yet
    (tmp_path / "p.txt").write_text("a person jumps\na person squats\n")
    call = (*PLAIN, "--weights", tiny_weights, "--prompts", tmp_path / "p.txt", "--out")
    assert verb(sample, *call, tmp_path / "whole").code == 0
    denoise, asked = sample.denoise, []

    def stopped(model, task, *given, **how):
        asked.append(task)
        if len(asked) == 2:
            raise OSError("the power went")
        return denoise(model, task, *given, **how)

    monkeypatch.setattr(sample, "denoise", stopped)
    assert verb(sample, *call, tmp_path / "out").code == 2 and not list((tmp_path / "out").glob("*.mp4"))
    assert "steps was 2, now 3" in verb(sample, *call, tmp_path / "out", "--steps", 3).err
    ended = verb(sample, *call, tmp_path / "out")
    assert ended.code == 0 and "out/latents has 1 more: they are only decoded" in ended.out
    assert len(asked) == 3  # one made, one stopped, one made now
    whole, made = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert whole.pop("run.json") and made.pop("run.json") and whole == made


def test_more_prompts_are_made_with_the_options_of_those_that_are_there(verb, tiny_weights, tmp_path):
    # catches a record that says of kept videos what was asked for new ones
    (tmp_path / "p.txt").write_text("a person jumps\n")
    call = (*PLAIN, "--weights", tiny_weights, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out")
    assert verb(sample, *call).code == 0
    before = contents(tmp_path / "out")
    (tmp_path / "p.txt").write_text("a person jumps\na person squats\n")
    for changed in (("--steps", 3), ("--seed", 7), ("--no-redraw",), ("--task", "video")):
        ended = verb(sample, *call, *changed)
        name = changed[0].removeprefix("--").removeprefix("no-")
        assert ended.code == 2 and f"was made with other options ({name} was" in ended.err
    assert contents(tmp_path / "out") == before
    assert verb(sample, *call, "--count", 2).code == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With files that are good, and others that are not."""
    folder = tmp_path_factory.mktemp("given")
    for name, count in (("good.mp4", 17), ("short.mp4", 12)):
        frames = torch.full((count, 64, 64, 3), 128, dtype=torch.uint8)
        pictures.write_video(folder / name, frames, puppet.FPS)
    for name, count in (("good.npz", 17), ("short.npz", 13)):
        saved(folder / name, count)
    weights.save_weights(folder / "no-codec", TINY, tiny_model().state_dict(), {})
    return folder


REFUSED = (  # options, and what the message must say
    ("--task v2m --video short.mp4", "12 frames.*17 are"),
    ("--task v2m --video good.mp4 --start -1", "--start is a number of seconds from 0 on"),
    ("--task m2v --motion short.npz", "0.75 s.*1.00 s: add --loop"),
    ("--task m2v --motion good.npz --start 9", "--start 9 is not in it"),
    ("--task m2v --motion good.npz --start 1 --loop", "has one frame from --start on"),
    ("--out good.npz/a", "good.npz"),
    ("--motion good.npz", "--motion is for --task m2v"),
    ("--video good.mp4", "--video is for --task v2m"),
    ("--task v2m --start 1", "--start is where in --video or --motion"),
    ("--task m2v --loop", "--loop says how --motion is read"),
    ("--task v2m --video good.mp4 --loop", "--loop says how --motion is read"),
    ("--task m2v --redraw", "--redraw is for --task joint"),
    ("--task video --mesh", "--mesh is for --task joint or m2v or v2m: add that"),
    ("--task v2m --prompt walks", "--prompt is for --task joint or m2v or video"),
    ("--task v2m --prompts p.txt", "--prompts is for --task joint or m2v or video"),
    ("--task v2m --guidance-text 2", "--guidance-text is for --task joint or m2v or video"),
    ("--task video --guidance-condition 2", "--guidance-condition is for --task joint or m2v or v2m"),
    ("--task joint --no-redraw --guidance-condition 2", "a joint sample has no condition: add --redraw"),
    ("--prompt '' --prompts p.txt", "give one of the two"),
    (f"--prompt '{'word ' * 17}'", "16 words, got 17"),
    ("--frames 6", "--frames: expected 4n.1, got 6; the nearest is 5"),
    ("--size 64", "--size: expected HEIGHTxWIDTH"),
    ("--fps 30", "--fps is for --wan"),
    ("--guidance-text nan", "--guidance-text: expected a finite number"),
    ("--device cuda:99", "--device: this machine has cpu.*, got 'cuda:99'"),
    ("--weights missing.safetensors", r"no weights at .*missing\.safetensors"),
    ("--weights no-codec", "codec"),
)


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(
    verb, tiny_weights, folder, tmp_path, monkeypatch, given, words
):
    monkeypatch.chdir(folder)
    call = (*PLAIN, "--weights", tiny_weights, "--out", tmp_path / "out", *shlex.split(given))
    ended = verb(sample, *call)
    assert ended.code == 2
    assert re.search(f"^sample.py: error: .*{words}", ended.err.splitlines()[-1])
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()

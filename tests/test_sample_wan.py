"""sample.py on a real Wan folder: the three tasks, its files, and that its networks take turns in memory."""

import contextlib
import dataclasses
import gc
import json
import re
import weakref
from pathlib import Path

import clip_folder
import numpy as np
import pytest
import torch
import wan_folder
from conftest import all_frames, contents, metrics, run_main

import sample
import train
from dual_dit import DualDiT
from kit import output, pictures, puppet, wan, weights
from kit.backbone import open_backbone
from kit.data import __main__ as commands
from kit.data.motion_files import save_amass
from kit.geometry import geometry_of

FRAMES, HEIGHT, WIDTH = 9, 64, 96
SHAPE = ("--frames", FRAMES, "--size", f"{HEIGHT}x{WIDTH}")


@pytest.fixture(scope="module", params=("2.1",))
def folder(request, tmp_path_factory) -> Path:
    return wan_folder.write(tmp_path_factory.mktemp("wan"), request.param)


both_versions = pytest.mark.parametrize("folder", ("2.1", "2.2"), indirect=True)


def run(folder: Path, out: Path, *arguments: object, shape: tuple = SHAPE) -> dict[str, bytes]:
    """Sample in this process -> the files, by name."""
    run_main(sample, "--wan", folder, "--out", out, "--steps", 2, *shape, "--device", "cpu", *arguments)
    return contents(out)


@pytest.fixture
def motion_file(tmp_path, folder) -> Path:
    motion = clip_folder.motion_of(0, 17, geometry_of(folder).fps)
    save_amass(tmp_path / "motion.npz", motion, puppet.body())
    return tmp_path / "motion.npz"


@pytest.fixture
def video_file(tmp_path, folder) -> Path:
    pixels = torch.randint(255, (FRAMES, HEIGHT // 8, WIDTH // 8, 3), dtype=torch.uint8)
    pictures.write_video(tmp_path / "video.mp4", pictures.resized(pixels, HEIGHT), geometry_of(folder).fps)
    return tmp_path / "video.mp4"


@both_versions
def test_three_tasks_end_to_end(folder, motion_file, video_file, tmp_path):
    given = {"joint": (), "m2v": ("--motion", motion_file), "v2m": ("--video", video_file)}
    for task, condition in given.items():
        text = () if task == "v2m" else ("--prompt", "a person  walks")
        files = run(folder, tmp_path / task, "--task", task, *condition, *text)
        expected = {f"{task}.{suffix}" for suffix in ("mp4", "gif", "png", "npz", "bvh")}
        assert files.keys() == expected | {f"latents/{task}.safetensors", "index.html", "run.json"}
        pixels, fps = all_frames(tmp_path / task / f"{task}.mp4")
        assert tuple(pixels.shape) == (FRAMES, HEIGHT, WIDTH, 3)
        with np.load(tmp_path / task / f"{task}.npz") as motion:
            assert motion["poses"].shape == (FRAMES, 156) and motion["mocap_frame_rate"] == fps
            if task == "m2v":  # the condition comes back
                with np.load(motion_file) as asked:
                    np.testing.assert_allclose(motion["poses"], asked["poses"][:FRAMES], atol=1e-4)


def test_without_a_task_a_wan_makes_a_joint_sample(folder, tmp_path):
    # catches the puppet's three tasks, whose conditions a Wan lacks
    assert {"joint.mp4", "joint.npz"} <= run(folder, tmp_path, "--prompt", "a person walks").keys()


def test_prompt_seed_and_weights_reach_the_sample(folder, tmp_path):
    model = wan.load_transformer(folder)
    with torch.no_grad():
        model.motion.head.head.mlps["position"][-1].bias.fill_(3.0)
    weights.save_weights(tmp_path / "trained", model.config, model.state_dict(), {})
    files = run(folder, tmp_path / "a", "--task", "joint", "--prompt", "walks")
    for other in (("--prompt", "kicks"), ("--seed", 1), ("--weights", tmp_path / "trained")):
        changed = run(folder, tmp_path / "b", "--task", "joint", "--prompt", "walks", *other)
        assert changed["joint.mp4"] != files["joint.mp4"], other


@both_versions
def test_defaults_are_the_papers(folder, capsys):
    # A.9: 50 steps, shift 8, guidance 6; and the sizes and rates that Wan's makers state
    opened = open_backbone(folder, None, None, None, None, None, None, "cpu")
    assert opened.geometry[:4] == {8: (16, 81, 480, 832), 16: (24, 121, 704, 1280)}[opened.geometry.stride]
    assert opened.defaults == (50, 6.0, 6.0, 8.0, 0.0)
    opened.transformer()
    assert "the motion expert is untrained" in capsys.readouterr().out


def test_prompts_file_makes_what_vbench_reads_and_keeps_what_is_there(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat/dog sits\n\na person waves\n")
    call = ("--prompts", tmp_path / "prompts.txt", "--count", 2)
    files = run(folder, tmp_path / "out", *call)
    assert f"{tmp_path / 'out' / 'motion' / 'a person waves-1.npz'}  .bvh" in capsys.readouterr().out
    names = {f"{prompt}-{i}" for prompt in ("a cat_dog sits", "a person waves") for i in (0, 1)}
    assert {name for name in files if "/" not in name} == {f"{name}.mp4" for name in names} | {"run.json"}
    assert {name for name in files if name.startswith("motion/")} == {
        f"motion/{name}.{suffix}" for name in names for suffix in ("npz", "bvh")
    }
    # a seed of --prompts means what it means alone
    alone = run(folder, tmp_path / "alone", "--task", "joint", "--prompt", "a person waves", "--seed", 1)
    assert alone["joint.npz"] == files["motion/a person waves-1.npz"]
    assert alone["joint.mp4"] == files["a person waves-1.mp4"]
    (tmp_path / "out" / "a person waves-1.mp4").write_bytes(b"mine")
    again = run(folder, tmp_path / "out", *call)
    assert again["a person waves-1.mp4"] == b"mine" and again["run.json"] == files["run.json"]
    assert "4 of 4 samples already" in capsys.readouterr().out
    (tmp_path / "out" / "a person waves-1.mp4").unlink()
    again = run(folder, tmp_path / "out", *call)
    assert json.loads(again["run.json"])["prompts"].keys() == names  # of all, not of the one made now
    # decoded again it is what it was, and no pictures
    (tmp_path / "out" / "a person waves-1.mp4").unlink()
    capsys.readouterr()
    latents = tmp_path / "out" / "latents" / "a person waves-1.safetensors"
    assert run(folder, tmp_path / "out", "--decode", latents) == again
    assert "untrained" not in capsys.readouterr().out


def test_a_sample_whose_motion_could_not_be_written_is_made_again(folder, tmp_path, monkeypatch):
    # catches the video written first: it says that the sample is there
    (tmp_path / "prompts.txt").write_text("a person waves\n")
    call = (folder, tmp_path / "out", "--prompts", tmp_path / "prompts.txt")

    def full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output, "save_amass", full_disk)
        with pytest.raises(OSError, match="no space"):
            run(*call)
    assert {"a person waves-0.mp4", "motion/a person waves-0.npz"} <= run(*call).keys()


def test_a_failed_decode_is_redone_from_the_latents(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / "whole", "--task", "joint", "--prompt", "waves")

    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(wan.VideoVAE, "decode", fails)
        with pytest.raises(MemoryError):
            run(folder, tmp_path / "failed", "--task", "joint", "--prompt", "waves")
    latents = tmp_path / "failed" / "latents" / "joint.safetensors"
    again = run(folder, tmp_path / "again", "--decode", latents)
    for suffix in ("mp4", "gif", "png", "npz"):
        assert again[f"joint.{suffix}"] == whole[f"joint.{suffix}"], suffix


def test_only_one_network_is_resident_at_a_time(folder, video_file, tmp_path, monkeypatch):
    alive, most = [], []

    def watched(load):
        def loading(*args, **kwargs):
            made = load(*args, **kwargs)
            parts = getattr(made, "vae", None), getattr(made, "model", None), made
            alive.append(weakref.ref(next(x for x in parts if isinstance(x, torch.nn.Module))))
            most.append(sum(ref() is not None for ref in alive))
            return made

        return loading

    for name in ("TextEncoder", "VideoVAE", "load_transformer"):
        monkeypatch.setattr(wan, name, watched(getattr(wan, name)))
    run(folder, tmp_path, "--task", "joint")
    gc.collect()
    run(folder, tmp_path, "--task", "v2m", "--video", video_file)
    assert most == 6 * [1]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """A run on a cache of another rate, length and size than Wan's."""
    tmp = tmp_path_factory.mktemp("trained")
    shape = ("--frames", FRAMES, "--size", "64x64", "--fps", 30, "--dtype", "fp32")
    clips = f"clips:{clip_folder.write(tmp / 'clips', (1, 2), frames=17)}"
    cache = ("cache", clips, "--wan", folder, "--out", tmp / "cache", *shape)
    plan = ("--wan", folder, "--data", f"cache:{tmp / 'cache'}", "--steps", 9, "--batch", 2)
    plan += ("--device", "cpu", "--validate-every", 0, "--out", tmp / "run")
    with contextlib.suppress(SystemExit):  # kit.data ends with one
        run_main(commands, *cache)
    run_main(train, *plan)
    return tmp / "run"


def test_wan_is_trained_by_the_papers_settings(folder, trained):
    # A.9: AdamW, 8e-6, decay 1e-3, shift 8, 15,000 and 12,000 steps
    assert train.stage_steps("wan", None, None, one_stage=False) == {1: 15_000, 2: 12_000}
    lines = metrics(trained)
    assert [line["stage"] for line in lines] == [1] * 5 + [2] * 4
    # as long as the cache's clips, not as the puppet's
    assert {line["frames"] for line in lines} == {FRAMES}
    first = train.Step(1, train.WARMUP, 15_000, FRAMES)
    assert train.learning_rate(train.LEARNING_RATE["wan"], first) == pytest.approx(8e-6, rel=1e-4)
    (optimizer,) = train.optimizers(wan.load_transformer(folder).requires_grad_(True), "wan")
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] == 1e-3
    torch.manual_seed(0)  # as train.py: what is new is drawn
    made, start = weights.load_weights(trained / "weights.safetensors")[0], wan.load_transformer(folder)
    assert made.config == start.config
    moved = {n for n, p in made.named_parameters() if not torch.equal(p, start.state_dict()[n])}
    assert any("video" in n for n in moved) and any("motion" in n for n in moved)


def test_what_was_trained_on_is_what_is_sampled(folder, trained, tmp_path, capsys):
    # catches a rate that is lost on the way: files would play in slow motion, in silence
    file = trained / "weights.safetensors"
    assert weights.read_header(file)[1] == {
        "fps": 30, "frames": FRAMES, "height": 64, "width": 64, "text_tokens": 512,
        "recipe": {"stage": 2, "shift": 8.0, "ablate": None}, "body": puppet.body().digest,
    }  # fmt: skip
    plain = (folder, tmp_path / "a", "--task", "joint", "--weights", file)
    made = run(*plain, shape=())
    pixels, fps = all_frames(tmp_path / "a" / "joint.mp4")
    assert (tuple(pixels.shape), fps) == ((FRAMES, 64, 64, 3), 30)
    assert b"Frame Time: 0.0333" in made["joint.bvh"]
    assert "was trained on" not in capsys.readouterr().out
    run(*plain, shape=("--fps", 16, "--frames", 5, "--size", "64x96"))
    pixels, fps = all_frames(tmp_path / "a" / "joint.mp4")
    assert (tuple(pixels.shape), fps) == ((5, 64, 96, 3), 16)
    assert f"{file} was trained on 30 frames a second, 16 are asked for" in capsys.readouterr().out


def test_latents_know_their_rate_and_their_body(folder, trained, tmp_path, verb, monkeypatch):
    # catches --decode without --weights and --body that writes motion in slow motion, or with other bones
    made = run(
        folder, tmp_path / "a", "--task", "joint", "--weights", trained / "weights.safetensors", shape=()
    )
    call = (sample, "--wan", folder, "--decode", tmp_path / "a" / "latents" / "joint.safetensors")
    again = (*call, "--device", "cpu", "--out", tmp_path / "b")
    assert verb(*again).code == 0
    found = contents(tmp_path / "b")
    assert all(found[f"joint.{suffix}"] == made[f"joint.{suffix}"] for suffix in ("mp4", "npz", "bvh"))
    monkeypatch.setattr(puppet.body(), "digest", "another")
    ended = verb(*again)
    assert ended.code == 2 and "joint.safetensors was sampled with another body" in ended.err
    assert contents(tmp_path / "b") == found


def test_a_cache_of_another_wan_is_refused(trained, tmp_path, verb):
    # catches stage 1, which uses no latents, trained on data that stage 2 cannot take
    other = wan_folder.write(tmp_path / "other", "2.2")
    data = ("--data", f"cache:{trained.parent / 'cache'}", "--device", "cpu", "--batch", 1)
    ended = verb(train, "--wan", other, *data, "--stage", 1, "--out", tmp_path / "out")
    assert ended.code == 2 and f"--data has latents of 16 channels, {other} has 48: cache" in ended.err


@pytest.mark.parametrize(
    ("text", "words"),
    (('{"scale', "is no JSON object"), ('{"scale_factor_spatial": 32}', "its stride is 32")),
)
def test_a_damaged_or_foreign_vae_is_named(folder, tmp_path, text, words):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"vae/config\.json.* {words}"):
        geometry_of(tmp_path)


def test_weights_of_another_layout_are_refused(folder, trained, tmp_path, verb):
    # such as weights of a 5B whose blocks are all dual
    data = ("--data", f"cache:{trained.parent / 'cache'}", "--batch", 1)
    for name, value in {"dual": (0,), "ffn": 7}.items():
        config = dataclasses.replace(wan.transformer_config(folder), **{name: value})
        weights.save_weights(tmp_path / name, config, DualDiT(config).state_dict(), {})
        for call in ((sample, "--weights", tmp_path / name), (train, "--init", tmp_path / name, *data)):
            ended = verb(*call, "--wan", folder, "--device", "cpu", "--out", tmp_path / "out")
            assert ended.code == 2
            assert re.search(f"error: .*has {name} .*: name the Wan of these weights", ended.err)
    assert not (tmp_path / "out").exists()


def test_video_tuning_of_a_wan_is_stage_0(folder, trained, tmp_path, verb):
    # the paper's baseline
    data = ("--data", f"cache:{trained.parent / 'cache'}", "--device", "cpu", "--batch", 1)
    plan = ("--wan", folder, *data, "--stage", 0, "--lr", 1e-3, "--out", tmp_path / "out")
    assert "say for how many --steps" in verb(train, *plan).err
    assert verb(train, *plan, "--steps", 1).code == 0
    torch.manual_seed(0)
    tuned, start = weights.load_weights(tmp_path / "out/weights.safetensors")[0], wan.load_transformer(folder)
    moved = {n for n, p in tuned.named_parameters() if not torch.equal(p, start.state_dict()[n])}
    assert moved and all("video" in name.split(".") for name in moved)


def test_a_missing_condition_is_said_before_anything_is_written(folder, tmp_path):
    for task, option in (("m2v", "--motion"), ("v2m", "--video")):
        with pytest.raises(ValueError, match=f"{option} FILE is needed"):
            run(folder, tmp_path / "out", "--task", task)
    assert not contents(tmp_path / "out")

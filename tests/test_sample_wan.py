"""sample.py on a real Wan folder: the three tasks, its files, and that its networks take turns in memory."""

import gc
import json
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_folder
from conftest import contents

import sample
import train
from kit import backbone, pictures, puppet, wan, weights
from kit.data import __main__ as commands
from kit.data.motion_files import Motion, save_amass
from kit.geometry import geometry

FRAMES, HEIGHT, WIDTH = 9, 64, 96


@pytest.fixture(scope="module", params=("2.1",))
def folder(request, tmp_path_factory) -> Path:
    return wan_folder.write(tmp_path_factory.mktemp("wan"), request.param)


both_versions = pytest.mark.parametrize("folder", ("2.1", "2.2"), indirect=True)


def run(folder: Path, out: Path, *arguments: object, size: str = f"{HEIGHT}x{WIDTH}") -> dict[str, bytes]:
    """Sample in this process -> the files, by name."""
    call = ["sample.py", "--wan", folder, "--out", out, "--frames", FRAMES, "--size", size, "--steps", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out / "cache"))
        patch.setattr(sys, "argv", [str(x) for x in (*call, "--device", "cpu", *arguments)])
        sample.main()
    return {name: data for name, data in contents(out).items() if not name.startswith("cache")}


@pytest.fixture
def motion_file(tmp_path, folder) -> Path:
    clip, fps = puppet.clips([0], frames=17), geometry(folder).fps
    motion = Motion(clip.global_orient[0], clip.body_pose[0], clip.betas[0], clip.transl[0], fps, "neutral")
    save_amass(tmp_path / "motion.npz", motion, puppet.body())
    return tmp_path / "motion.npz"


@pytest.fixture
def video_file(tmp_path, folder) -> Path:
    pixels = torch.randint(255, (FRAMES, HEIGHT // 8, WIDTH // 8, 3), dtype=torch.uint8)
    pictures.write_video(tmp_path / "video.mp4", pictures.resized(pixels, HEIGHT), geometry(folder).fps)
    return tmp_path / "video.mp4"


@both_versions
def test_three_tasks_end_to_end(folder, motion_file, video_file, tmp_path):
    given = {"joint": (), "m2v": ("--motion", motion_file), "v2m": ("--video", video_file)}
    for task, condition in given.items():
        files = run(folder, tmp_path / task, "--task", task, *condition, "--prompt", "a person  walks")
        expected = {f"{task}.{suffix}" for suffix in ("mp4", "gif", "png", "npz", "bvh")}
        assert files.keys() == expected | {f"latents/{task}.safetensors", "run.json"}
        pixels, fps = pictures.read_video(tmp_path / task / f"{task}.mp4")
        assert tuple(pixels.shape) == (FRAMES, HEIGHT, WIDTH, 3)
        with np.load(tmp_path / task / f"{task}.npz") as motion:
            assert motion["poses"].shape == (FRAMES, 156) and motion["mocap_frame_rate"] == fps
            if task == "m2v":  # the condition comes back
                with np.load(motion_file) as asked:
                    np.testing.assert_allclose(motion["poses"], asked["poses"][:FRAMES], atol=1e-4)


def test_text_reaches_the_video_and_a_seed_means_a_sample(folder, tmp_path):
    task = ("--task", "video", "--prompt")
    walk = run(folder, tmp_path / "a", *task, "walks")
    assert walk["video.mp4"] == run(folder, tmp_path / "b", *task, "walks")["video.mp4"]
    for other in (("kicks",), ("walks", "--seed", 1), ("walks", "--guidance-text", 1)):
        files = run(folder, tmp_path / other[-1].__str__(), *task, *other)
        assert files["latents/video.safetensors"] != walk["latents/video.safetensors"], other
    assert "video.npz" not in walk  # nothing was asked about motion


@both_versions
def test_defaults_are_the_published_ones(folder):
    shape = geometry(folder)
    published = {8: (16, 81, 480, 832), 16: (24, 121, 704, 1280)}[shape.stride]
    assert shape[:4] == published
    world = backbone.wan_backbone(folder, None, "cpu", torch.float32, puppet.body(), shape)
    assert world.defaults.shift == 5.0


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
            gc.collect()
            made = load(*args, **kwargs)
            network = (
                made
                if isinstance(made, torch.nn.Module)
                else made.vae
                if hasattr(made, "vae")
                else made.model
            )
            alive.append(weakref.ref(network))
            most.append(sum(ref() is not None for ref in alive))
            return made

        return loading

    for name in ("TextEncoder", "VideoVAE", "load_transformer"):
        monkeypatch.setattr(wan, name, watched(getattr(wan, name)))
    run(folder, tmp_path, "--task", "joint")
    run(folder, tmp_path, "--task", "v2m", "--video", video_file)
    assert len(most) == 3 + 3 and max(most) == 1


def test_trained_weights_are_used_and_must_fit(folder, tmp_path):
    model = wan.load_transformer(folder)
    with torch.no_grad():
        model.motion.head.head.mlps["position"][-1].bias.fill_(3.0)
    weights.save_weights(tmp_path / "trained.safetensors", model.config, model.state_dict(), {})
    trained = run(folder, tmp_path / "a", "--task", "joint", "--weights", tmp_path / "trained.safetensors")
    assert trained["joint.npz"] != run(folder, tmp_path / "b", "--task", "joint")["joint.npz"]


def verb(module, monkeypatch, *arguments: object) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        try:
            module.main()
        except SystemExit as end:
            assert not end.code


@both_versions
def test_what_is_trained_from_a_cache_is_sampled(folder, tmp_path, monkeypatch):
    rate, cached, out = geometry(folder).fps, tmp_path / "cache", tmp_path / "run"
    shape = ("--frames", FRAMES, "--size", "64x64", "--fps", puppet.FPS)
    verb(commands, monkeypatch, "cache", "puppet:4", "--wan", folder, "--out", cached, *shape)
    call = ("--wan", folder, "--data", f"cache:{cached}", "--steps", 10, "--batch", 2, "--device", "cpu")
    verb(train, monkeypatch, *call, "--lr", 1e-3, "--out", out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {1, 2} and {line["frames"] for line in lines} == {FRAMES}
    trained, _ = weights.load_weights(out / "weights.safetensors")
    start = wan.load_transformer(folder)
    assert trained.config == start.config
    moved = [n for n, p in trained.named_parameters() if not torch.equal(p, start.state_dict()[n])]
    assert any("video" in n for n in moved) and any("motion" in n for n in moved)
    made = ("--task", "joint", "--weights", out / "weights.safetensors")
    config = folder / "transformer" / "config.json"
    published = config.read_text()
    config.write_text(json.dumps(json.loads(published) | {"ffn_dim": 7}))
    with pytest.raises(ValueError, match=r"has ffn .* 7: give the Wan that these weights are of"):
        run(folder, tmp_path / "other", *made, size="64x64")
    config.write_text(published)
    run(folder, tmp_path / "made", *made, size="64x64")
    pixels, fps = pictures.read_video(tmp_path / "made" / "joint.mp4")
    assert (tuple(pixels.shape), fps) == ((FRAMES, 64, 64, 3), rate)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "m2v"), "--motion FILE is needed"),
        (("--task", "v2m"), "--video FILE is needed"),
        (("--frames", 10), "10 frames are not 4n\\+1; the nearest is 9"),
        (("--size", "64x100"), "64x100 is no multiple of .*; the nearest is 64x"),
        (("--prompts", "none.txt"), "no none.txt"),
        (("--decode", "none.safetensors"), "no none.safetensors"),
        (("--wan", "nowhere"), "nowhere"),
        (("--body", "nowhere.pkl"), "nowhere.pkl"),
        (("--weights", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, tmp_path, arguments, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run(folder, tmp_path / "out", *arguments)
    assert not contents(tmp_path / "out")

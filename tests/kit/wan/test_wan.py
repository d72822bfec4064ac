"""kit/wan/ against what defines Wan: diffusers' and transformers' models, and the published layouts."""

import dataclasses
import json
import math
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flow
from dual_dit import PRESETS, DualDiT
from flow import Task
from kit import wan
from kit.wan.load import clean_prompt
from kit.wan.names import config_of, diffusers_name, own_names

NEEDS = "pip install -r requirements-wan.txt"
diffusers = pytest.importorskip("diffusers", reason=NEEDS)
pipeline_wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan", reason=NEEDS)
tokenizers = pytest.importorskip("tokenizers", reason=NEEDS)
wan_folder = pytest.importorskip("wan_folder", reason=NEEDS)

VERSIONS = ("2.1", "2.2")
STEM = wan_folder.STEM
TIMES = torch.tensor([0, 0.001, 0.3, 0.999, 1])


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, Path]:
    """One tiny folder a version, not to be changed."""
    return {v: wan_folder.write(tmp_path_factory.mktemp("wan") / v, v) for v in VERSIONS}


@pytest.fixture(params=VERSIONS)
def folder(request, published) -> Path:
    return published[request.param]


@pytest.fixture
def small(tmp_path, published) -> Path:
    """A folder that a test may change."""
    return shutil.copytree(published["2.2"], tmp_path / "wan")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Fails a test in which anything looks up a host."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.append(args) or [])
    yield
    assert not asked


@pytest.fixture
def nan_memory():
    """Memory that nobody has written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


def theirs(folder: Path):
    return diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer").eval()


def latents(folder: Path, b: int, t: int, h: int, w: int) -> Tensor:
    channels = json.loads((folder / "vae" / "config.json").read_text())["z_dim"]
    return torch.randn(b, channels, t, h, w, generator=torch.Generator().manual_seed(b * t * h * w))


def text_features(b: int) -> Tensor:
    return torch.randn(b, 9, wan_folder.TEXT_DIM, generator=torch.Generator().manual_seed(b))


@torch.no_grad()
def velocity(model: DualDiT, video: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(video, None, t, None, text, Task.VIDEO_ONLY)[0]


def file_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a transformer's files, by their names there."""
    return {k: v for file in net(folder).glob("*.safetensors") for k, v in load_file(file).items()}


def in_dual_dit(name: str) -> str:
    """A Diffusers name -> ours, by the renaming that wan_folder knows."""
    name = wan_folder.original_name(name)
    return re.sub(r"^(blocks\.\d+)", r"\1.video", name) if name.startswith("blocks.") else f"video.{name}"


# ---------------------------------------------------------------- names and shapes


@pytest.mark.parametrize(
    ("preset", "heads", "ffn", "channels"), [("wan2.1-1.3b", 12, 8960, 16), ("wan2.2-5b", 24, 14336, 48)]
)
def test_presets_have_the_tensors_of_the_published_models(preset, heads, ffn, channels):
    with torch.device("meta"):
        reference = diffusers.WanTransformer3DModel(
            num_attention_heads=heads, in_channels=channels, out_channels=channels, ffn_dim=ffn, num_layers=30
        )
        model = DualDiT(PRESETS[preset])
    ours, expected = model.state_dict(), reference.state_dict()
    names = own_names(model)
    exported = {diffusers_name(own): ours[name].shape for name, own in names.items()}
    assert exported == {name: tensor.shape for name, tensor in expected.items()}
    assert {in_dual_dit(name): wan_folder.original_name(name) for name in expected} == names
    assert (model.config.heads, model.config.eps) == (heads, reference.config.eps)


def test_renaming_of_these_tests_is_diffusers_own(published):
    names = file_tensors(published["2.1"]).keys()
    convert = diffusers.loaders.single_file_utils.convert_wan_transformer_to_diffusers
    assert convert({wan_folder.original_name(name): name for name in names}) == {name: name for name in names}


# ---------------------------------------------------------------- loading

LAYOUTS = {
    "diffusers": lambda folder: folder,
    "diffusers shards": wan_folder.shard,
    "wan": wan_folder.original,
    "wan shards": lambda folder: wan_folder.original(folder, shards=3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_lands(folder, tmp_path, layout):
    tensors, heads = file_tensors(folder), theirs(folder).config.num_attention_heads
    changed = LAYOUTS[layout](shutil.copytree(folder, tmp_path / "wan"))
    assert len(list((changed / "transformer").glob("*.safetensors"))) == 1 or "shards" in layout
    model = wan.load_transformer(changed, torch.bfloat16)
    state = model.state_dict()
    assert {in_dual_dit(name) for name in tensors} == {k for k in state if "video" in k.split(".")}
    for name, tensor in tensors.items():
        exact = re.search("time_embed|time_proj|norm|scale_shift", name)  # fp32 in Wan
        expected = tensor if exact else tensor.bfloat16()
        found = state[in_dual_dit(name)]
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config.heads == heads
    assert wan.transformer_config(changed / "transformer") == model.config


def in_blocks(word: str):
    return lambda name: re.sub(r"^(blocks\.\d+\.)", rf"\1{word}", name)


PREFIXES = {
    "ComfyUI": "model.diffusion_model.{}".format,
    "DDP, compiled": "module._orig_mod.{}".format,
    "compiled blocks": in_blocks("_orig_mod."),
    "FSDP, checkpointed": in_blocks("_fsdp_wrapped_module._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_may_have_one_prefix(small, prefix):
    # catches files of ComfyUI, DDP, torch.compile and FSDP taken for no Wan
    expected = video_expert(wan_folder.shard(small))
    for file in (small / "transformer").glob("*.safetensors"):
        save_file({PREFIXES[prefix](name): tensor for name, tensor in load_file(file).items()}, file)
    found = video_expert(small)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def video_expert(folder: Path) -> dict[str, Tensor]:
    state = wan.load_transformer(folder).state_dict()
    return {name: tensor for name, tensor in state.items() if "video" in name.split(".")}


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_precisions_are_read_and_fp8_is_said(small, stored, capsys):
    # catches a network that stays in fp8, and coarse weights that nobody is told of
    edit(small, lambda tensors: tensors.update({name: x.to(stored) for name, x in tensors.items()}))
    (small / "transformer" / f"{STEM}.safetensors").rename(small / "transformer" / "wan_fp8.safetensors")
    state = wan.load_transformer(small, torch.bfloat16).state_dict()
    for name, tensor in file_tensors(small).items():
        found = state[in_dual_dit(name)]
        assert found.dtype in (torch.bfloat16, torch.float32), name
        assert torch.equal(found, tensor.to(found.dtype)), name
    assert ("fp8 weights are computed in torch.bfloat16" in capsys.readouterr().out) == (stored.itemsize == 1)


@pytest.mark.parametrize("layout", ("diffusers", "wan shards"))
def test_without_config_json_heads_are_128_wide(published, tmp_path, layout):
    folder = LAYOUTS[layout](shutil.copytree(published["2.1"], tmp_path / "wan"))
    expected = wan.transformer_config(folder)
    (folder / "transformer" / "config.json").unlink()
    assert wan.transformer_config(folder) == expected
    assert expected.heads == 2


HYBRIDS = [(1, (0,)), (2, (1,)), (3, (0, 2)), (30, tuple(range(1, 30, 2)))]


@pytest.mark.parametrize(
    ("name", "layers", "dual"), [("wan2.1-1.3b", 2, None), *(("wan2.2-5b", *each) for each in HYBRIDS)]
)
def test_a_hybrid_has_a_motion_expert_in_every_second_block_and_in_the_last(name, layers, dual):
    preset = dataclasses.replace(PRESETS[name], layers=layers, dual=dual)
    with torch.device("meta"):
        model = DualDiT(preset)
    state = model.state_dict()
    shapes = {own: tuple(state[name].shape) for name, own in own_names(model).items()}
    assert config_of(shapes, {}) == preset


def test_the_motion_expert_is_a_copy_of_the_video_expert_but_for_its_ends(folder, nan_memory):
    model = wan.load_transformer(folder, torch.bfloat16)
    state, fresh = model.state_dict(), DualDiT(model.config).state_dict()
    copied = r"blocks\.\d+\.motion\.|motion\.head\.modulation"
    for name in state:
        found, expected = state[name].float(), fresh[name]
        if re.match(copied, name):
            assert torch.equal(found, state[name.replace("motion", "video")].float()), name
        elif "video" not in name.split("."):
            assert name.startswith(("motion.encoder.", "motion.head.head.", "task_hint.", "motion_")), name
            if expected.unique().numel() == 1:  # zeros or ones
                assert torch.equal(found, expected), name
            else:
                assert 0.7 < found.std() / expected.std() < 1.4, name


GRIDS = [(1, 2, 2), (3, 4, 6), (5, 10, 4)]


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_video_only_is_diffusers(folder, grid):
    model, reference = wan.load_transformer(folder), theirs(folder)
    video, text = latents(folder, len(TIMES), *grid), text_features(len(TIMES))
    found, expected = velocity(model, video, TIMES, text), reference(video, 1000 * TIMES, text).sample
    assert expected.std() > 0.1
    assert max(map(relative, found, expected)) < 1e-5
    # Wan2.2-TI2V gives each token a time of its own, for text to video all the same
    each = (1000 * TIMES)[:, None].expand(-1, math.prod(grid) // 4)
    assert max(map(relative, found, reference(video, each, text).sample)) < 1e-5
    coarse = velocity(wan.load_transformer(folder, torch.bfloat16), video, TIMES, text)
    assert max(map(relative, coarse, expected)) < 2e-2


class ShiftedEuler(diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler on evenly spaced sigmas; its own spacing ends at its smallest sigma, not at 0."""

    def set_timesteps(self, num_inference_steps, device=None):
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(sigmas=sigmas, device=device)


def test_guided_sampling_is_diffusers_pipeline(folder):
    pipeline = diffusers.WanPipeline.from_pretrained(folder)
    pipeline.scheduler = ShiftedEuler(shift=5.0)
    pipeline.set_progress_bar_config(disable=True)
    noise, prompts = latents(folder, 2, 2, 4, 6), ["a person waves", "the dancer turns"]
    stride = pipeline.vae_scale_factor_spatial
    options = {
        "negative_prompt": "jumps", "height": 4 * stride, "width": 6 * stride, "num_frames": 5,
        "num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise,
    }  # fmt: skip
    expected = pipeline(prompts, **options, output_type="latent").frames
    pixels = pipeline(prompts, **options, output_type="pt").frames  # (b f 3 h w) in [0, 1]

    encode = wan.TextEncoder(folder)
    text = encode(prompts), encode(["jumps"]).expand(2, -1, -1)
    how = {"steps": 4, "guidance_text": 3.0, "shift": 5.0, "solver": "euler"}
    model = wan.load_transformer(folder)
    sampled = flow.sample(model, noise, None, *text, Task.VIDEO_ONLY, **how)[0]
    assert relative(sampled, expected) < 1e-4
    assert relative(sampled, noise) > 0.1
    found = (wan.VideoVAE(folder).decode(sampled) + 1) / 2
    assert relative(found.transpose(1, 2), pixels) < 1e-4


# ---------------------------------------------------------------- pixels <-> latents


@pytest.fixture
def vae(folder) -> wan.VideoVAE:
    return wan.VideoVAE(folder)


@pytest.fixture
def reference_vae(folder):
    return diffusers.AutoencoderKLWan.from_pretrained(folder / "vae").eval()


def clip(f: int, h: int, w: int, b: int = 1) -> Tensor:
    return 2 * torch.rand(b, 3, f, h, w, generator=torch.Generator().manual_seed(f * h * w)) - 1


@torch.no_grad()
def test_latents_are_diffusers_normalised(vae, reference_vae):
    video = clip(9, 32, 64, b=2)
    mode = reference_vae.encode(video).latent_dist.mode()
    config = reference_vae.config
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    found = vae.encode(video)
    assert relative(found, (mode - mean) / std) < 1e-6
    assert found.shape == (2, vae.channels, 3, 32 // vae.stride, 64 // vae.stride)
    assert (vae.channels, vae.stride) in ((16, 8), (48, 16))
    assert relative(vae.decode(found), reference_vae.decode(mode).sample) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("height", [256, 288])
def test_large_frames_are_decoded_in_tiles_and_encoded_whole(folder, vae, reference_vae, height):
    stride = vae.stride
    noise = latents(folder, 1, 1, height // stride, 64 // stride)
    given = []
    vae.vae.decoder.register_forward_pre_hook(lambda _, inputs: given.append(tuple(inputs[0].shape[2:])))
    found = vae.decode(noise)
    assert given[0] == (1, 256 // stride, 64 // stride)
    assert len(given) == (1 if height == 256 else 2)
    whole = reference_vae.decode(noise * vae.std + vae.mean).sample
    assert relative(found, whole) < (1e-6 if height == 256 else 0.2)
    video = clip(1, height, 32)  # after decoding: tiles were on
    mode = reference_vae.encode(video).latent_dist.mode()
    assert relative(vae.encode(video), (mode - vae.mean) / vae.std) < 1e-6


@pytest.mark.parametrize("f, h, w", [(8, 32, 32), (5, 36, 32), (5, 32, 36)])
def test_videos_that_do_not_fit_are_refused(vae, f, h, w):
    with pytest.raises(ValueError, match=rf"{f} frames, {h}x{w}: expected 4n.1 frames, sizes a multiple of"):
        vae.encode(torch.zeros(1, 3, f, h, w))
    with pytest.raises(ValueError, match=rf"expected \(b, {vae.channels}, T, h, w\), got \(1, 8, 1, 2, 2\)"):
        vae.decode(torch.zeros(1, 8, 1, 2, 2))


# ---------------------------------------------------------------- prompts -> features

PROMPTS = [
    "a person walks forward",
    "",
    "  the left&amp;nbsp;arm\n\n\twaves &lt;quickly&gt; ",
    300 * "the dancer turns and jumps ",
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_diffusers_prompt_embeddings(folder, dtype):
    pipeline = diffusers.WanPipeline.from_pretrained(folder, transformer=None)
    expected = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=512)
    found = wan.TextEncoder(folder, dtype)(PROMPTS)
    assert found.shape == (len(PROMPTS), 512, wan_folder.TEXT_DIM) and found.dtype == dtype
    assert max(map(relative, found, expected)) < (1e-5 if dtype == torch.float32 else 2e-2)
    lengths = [len(pipeline.tokenizer(clean_prompt(prompt)).input_ids) for prompt in PROMPTS]
    assert lengths[1] == 1 and lengths[3] > 512
    for row, length in zip(found, lengths, strict=True):
        assert row[:length].any(dim=1).all() and not row[length:].any()


@pytest.mark.parametrize("prompt", [*PROMPTS, "a cafÃ© dancer’s “left”\u3000arm"])
def test_prompts_are_cleaned_as_diffusers_cleans_them(prompt):
    # catches curly quotes, as writing programs set them, that become other tokens than in Wan's training
    assert clean_prompt(prompt) == pipeline_wan.prompt_clean(prompt)


def test_tokens_are_those_of_tokenizer_json(folder):
    encode, given = wan.TextEncoder(folder), []
    encode.model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0].tolist()))
    prompts = ["a person waves", "a person ☃ waves", ""]  # the snowman is unknown
    encode(prompts)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    assert given == [file.encode(prompt).ids for prompt in prompts]
    assert file.token_to_id("<unk>") in given[1] and given[2] == [1]


# ---------------------------------------------------------------- export


@torch.no_grad()
def test_diffusers_reads_what_is_exported(folder, tmp_path):
    model = wan.load_transformer(folder)
    wan.save_transformer(model, tmp_path / "transformer")
    ours, published = ({k: v for k, v in theirs(x).config.items() if k[0] != "_"} for x in (tmp_path, folder))
    assert ours == published
    assert_same_tensors(tmp_path, folder)
    model = wan.load_transformer(folder, torch.bfloat16)
    wan.save_transformer(model, tmp_path / "coarse")
    back = wan.load_transformer(tmp_path / "coarse", torch.bfloat16)
    assert all(torch.equal(back.state_dict()[name], model.state_dict()[name]) for name in own_names(model))


@torch.no_grad()
def test_a_trained_network_makes_the_same_video_once_exported(folder, tmp_path):
    # catches the task hint left behind, which a Wan does not have
    model = wan.load_transformer(folder)
    torch.nn.init.normal_(model.task_hint[-1].weight, std=0.1)
    wan.save_transformer(model, tmp_path / "transformer")
    back, t = wan.load_transformer(tmp_path), torch.tensor([0.5])
    video, text = torch.randn(1, model.config.channels, 2, 4, 6), torch.randn(1, 5, model.config.text_dim)
    before, after = (x(video, None, t, None, text, Task.VIDEO_ONLY)[0] for x in (model, back))
    assert relative(after, before) < 1e-5
    silent = model(video, None, t, None, text, Task.JOINT)[0]  # the hint is heard
    assert relative(silent, before) > 1e-3


def test_wans_own_layout_is_exported_as_published(folder, tmp_path):
    wan.save_transformer(wan.load_transformer(folder), tmp_path / "transformer", "wan")
    expected = wan_folder.original(shutil.copytree(folder, tmp_path / "published"))
    assert_same_tensors(tmp_path, expected)
    ours, published = (json.loads((net(path) / "config.json").read_text()) for path in (tmp_path, expected))
    for field in published.keys() - {"_diffusers_version"}:
        assert ours[field] == published[field], field


def assert_same_tensors(folder: Path, expected: Path) -> None:
    written, read = file_tensors(folder), file_tensors(expected)
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)


def test_export_refuses_what_it_would_spoil(small):
    model = wan.load_transformer(small)
    for folder in (small / "transformer", wan_folder.shard(small) / "transformer"):
        with pytest.raises(ValueError, match="holds a transformer: name another folder"):
            wan.save_transformer(model, folder)


# ---------------------------------------------------------------- what is refused


def edit(folder: Path, change) -> None:
    """Rewrite the transformer's one file after change(tensors)."""
    file = net(folder) / f"{STEM}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def put(name: str, *shape: int, dtype=torch.float32):
    """Damage: a tensor more, or another one of this name."""
    return lambda folder: edit(folder, lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)}))


def without(name: str):
    return lambda folder: edit(folder, lambda tensors: tensors.pop(name))


def renamed(prefix: str, but: str = "none", letters: int = 99):
    """Damage: the first letters of names behind `prefix`, except of those that contain `but`."""
    change = lambda ts: [ts.update({prefix + k[:letters]: ts.pop(k)}) for k in [*ts] if but not in k]
    return lambda folder: edit(folder, change)


def net(folder: Path) -> Path:
    return folder / "transformer"


def config(**fields: object):
    return lambda folder: wan_folder.edit_json(net(folder) / "config.json", **fields)


def shard_of(folder: Path) -> Path:
    return sorted(net(wan_folder.shard(folder)).glob("*.safetensors"))[1]


def file_named(name: str):
    return lambda folder: (net(folder) / f"{STEM}.safetensors").rename(net(folder) / name)


def two_files(folder: Path) -> None:
    file_named("a.safetensors")(folder)
    (net(folder) / "b.safetensors").write_bytes(b"")


REFUSED = {
    "no folder": (shutil.rmtree, "no folder .*supported are Wan2.1-T2V-1.3B and Wan2.2-TI2V-5B"),
    "another name": (file_named("wan.gguf"), "neither .*nor an index .it has config.json, wan.gguf"),
    "two files": (two_files, "nor an index .it has a.safetensors, b.safetensors, config.json."),
    # its width is enough to tell
    "14B": (put("patch_embedding.weight", 5120, 16, 1, 2, 2), "width 5120, as Wan 14B has"),
    "two, Diffusers": (lambda f: shutil.copytree(net(f), f / "transformer_2"), "as Wan2.2-A14B has"),
    "two, Wan": (lambda f: net(f).rename(f / "low_noise_model"), "as Wan2.2-A14B has"),
    "image keys": (put("blocks.0.attn2.add_k_proj.weight", 2, 2), "add_k_proj.weight: an image-to-video"),
    "another model": (
        config(_class_name="WanVACEModel"),
        "describes a WanVACEModel, expected .* or WanModel",
    ),
    "a prefix before some": (
        renamed("model.", but="proj_out"),
        "'model.', except proj_out.*: more than one",
    ),
    "a tensor twice": (put("_orig_mod.proj_out.bias", 192), "there twice, under two names"),
    "no transformer": (renamed("vae.", letters=9), "no Wan transformer: found keys such as 'vae.*"),
    "fp8 of ComfyUI": (put("scaled_fp8", 2), "found .*: fp8 with scales; fetch the same model in fp16"),
    "fp8 of others": (put("model.blocks.0.ffn.0.weight_scale", 1), "weight_scale: fp8 with scales"),
    "whole numbers": (put("proj_out.bias", 192, dtype=torch.int8), "holds I8 numbers, expected one of F64"),
    "a missing shard": (lambda f: shard_of(f).unlink(), "the index names .*-00002-of-.*, not there"),
    "a shard cut short": (lambda f: os.truncate(shard_of(f), 5000), "is cut short .*: fetch it again"),
    "no map": (lambda f: (net(f) / f"{STEM}.safetensors.index.json").write_text("[]"), "no index of shards"),
    "no JSON": (
        lambda f: (net(f) / "config.json").write_text("<html>"),
        "no JSON object .*: fetch it again",
    ),
    "another width": (config(num_attention_heads=12), "config.json says width is 480, the tensors say 120"),
    "odd heads": (lambda f: (net(f) / "config.json").unlink(), "120 does not divide into heads of 128"),
    "one too many": (
        put("blocks.1.attn1.gate.weight", 3),
        r"1 tensors .*gate.weight: found \(3,\), expected none",
    ),
    "one too few": (
        without("blocks.1.attn1.to_q.weight"),
        r"self_attn.q.weight: .* none, expected \(120, 120\)",
    ),
    "one that tells sizes": (without("blocks.0.ffn.net.0.proj.weight"), "it lacks 'blocks.0.ffn.0.weight'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_transformer_that_is_not_whole_or_not_supported_is_refused(small, case):
    damage, message = REFUSED[case]
    damage(small)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        wan.load_transformer(small)


FILES = {"vae": f"{STEM}.safetensors", "text_encoder": "model.safetensors", "tokenizer": "tokenizer.json"}


@pytest.mark.parametrize("part", FILES)
def test_a_part_that_is_damaged_or_missing_is_named(small, part):
    load = wan.VideoVAE if part == "vae" else wan.TextEncoder
    file = small / part / FILES[part]
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        name = min(tensors)
        save_file({k: v for k, v in tensors.items() if k != name}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{part} lacks 1 tensors such as {name}: fetch it again"):
            load(small)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{part} cannot be read \(.+\): fetch that folder again"):
        load(small)
    shutil.rmtree(small / part)
    with pytest.raises(FileNotFoundError, match=f"no .*{part}: expected the Diffusers layout's {part}/"):
        load(small)

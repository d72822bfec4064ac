"""kit/wan/ against what defines Wan: diffusers' and transformers' models, and the published layouts."""

import json
import math
import os
import re
import shutil
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
from kit.wan.names import config_of, diffusers_name, expert_name, own_names, wan_name

NEEDS = "pip install -r requirements-wan.txt"
diffusers = pytest.importorskip("diffusers", reason=NEEDS)
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


def file_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a transformer's files, by their names there."""
    return {k: v for file in net(folder).glob("*.safetensors") for k, v in load_file(file).items()}


def in_dual_dit(name: str) -> str:
    """A Diffusers name -> ours."""
    return expert_name(wan_name(name))


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
    convert = diffusers.loaders.single_file_utils.convert_wan_transformer_to_diffusers
    assert convert({wan_name(name): name for name in expected}) == {name: name for name in expected}
    assert {in_dual_dit(name): wan_name(name) for name in expected} == names
    assert config_of({own: tuple(ours[name].shape) for name, own in names.items()}) == PRESETS[preset]
    assert (model.config.heads, model.config.eps) == (heads, reference.config.eps)


# ---------------------------------------------------------------- loading

LAYOUTS = {
    "diffusers": lambda folder: folder,
    "diffusers shards": wan_folder.shard,
    "wan": wan_folder.original,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_lands(folder, tmp_path, layout):
    tensors, heads = file_tensors(folder), theirs(folder).config.num_attention_heads
    changed = LAYOUTS[layout](shutil.copytree(folder, tmp_path / "wan"))
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


READ = {  # how names are written, and numbers; whether fp8 is said
    "ComfyUI": ("model.diffusion_model.{}".format, torch.float16, False),
    "DDP, compiled": ("module._orig_mod.{}".format, torch.bfloat16, False),
    "compiled blocks": (in_blocks("_orig_mod."), torch.float32, False),
    "FSDP": (in_blocks("_fsdp_wrapped_module._checkpoint_wrapped_module."), torch.float32, False),
    "fp8": ("{}".format, torch.float8_e4m3fn, True),
}


@pytest.mark.parametrize("renamed, stored, said", READ.values(), ids=READ)
def test_other_tools_names_and_precisions_are_read(small, capsys, renamed, stored, said):
    # catches a network that stays in fp8 or does not say so, names of other tools taken for no Wan, a file
    # that is called otherwise
    tensors = {name: tensor.to(stored) for name, tensor in file_tensors(small).items()}
    (net(small) / f"{STEM}.safetensors").unlink()
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, net(small) / "wan.safetensors")
    state = wan.load_transformer(small, torch.bfloat16).state_dict()
    for name, tensor in tensors.items():
        found = state[in_dual_dit(name)]
        assert found.dtype in (torch.bfloat16, torch.float32), name
        assert torch.equal(found, tensor.to(found.dtype)), name
    assert ("fp8 weights are computed in torch.bfloat16" in capsys.readouterr().out) == said


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


@torch.no_grad()
def test_video_only_is_diffusers(folder):
    reference, grid = theirs(folder), (3, 4, 6)
    video, text = latents(folder, len(TIMES), *grid), torch.randn(len(TIMES), 9, wan_folder.TEXT_DIM)
    found, coarse = (
        wan.load_transformer(folder, dtype)(video, None, TIMES, None, text, Task.VIDEO_ONLY)[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    expected = reference(video, 1000 * TIMES, text).sample
    assert expected.std() > 0.1
    assert max(map(relative, found, expected)) < 1e-5
    assert max(map(relative, coarse, expected)) < 2e-2
    # Wan2.2-TI2V gives each token a time of its own, for text to video all the same
    each = (1000 * TIMES)[:, None].expand(-1, math.prod(grid) // 4)
    assert max(map(relative, found, reference(video, each, text).sample)) < 1e-5


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


@torch.no_grad()
def test_latents_are_normalised_and_large_frames_are_decoded_in_tiles_but_encoded_whole(folder):
    vae, reference = wan.VideoVAE(folder), diffusers.AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    stride = reference.config.scale_factor_spatial
    noise = latents(folder, 1, 1, 288 // stride, 64 // stride)
    given = []
    vae.vae.decoder.register_forward_pre_hook(lambda _, inputs: given.append(tuple(inputs[0].shape[2:])))
    found = vae.decode(noise)
    assert given[0] == (1, 256 // stride, 64 // stride) and len(given) == 2
    mean, std = (
        torch.tensor(x).view(-1, 1, 1, 1)
        for x in (reference.config.latents_mean, reference.config.latents_std)
    )
    assert relative(found, reference.decode(noise * std + mean).sample) < 0.2
    video = 2 * torch.rand(1, 3, 5, 288, 32) - 1  # after decoding: tiles were on
    mode = reference.encode(video).latent_dist.mode()
    assert relative(vae.encode(video), (mode - mean) / std) < 1e-6
    with pytest.raises(ValueError, match=rf"expected \(b, {vae.channels}, t, h, w\), got \(1, 8, 1, 2, 2\)"):
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
    assert found.shape == (4, 512, wan_folder.TEXT_DIM) and found.dtype == dtype
    assert max(map(relative, found, expected)) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(found.any(dim=-1), expected.any(dim=-1))
    lengths = found.any(dim=-1).sum(dim=1)
    assert lengths[1] == 1 and lengths[3] == 512


def test_tokens_are_those_of_tokenizer_json(folder):
    encode, given = wan.TextEncoder(folder), []
    encode.model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0].tolist()))
    prompts = ["a person waves", "a person ☃ waves", ""]  # the snowman is unknown
    encode(prompts)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    assert given == [file.encode(prompt).ids for prompt in prompts]
    assert file.token_to_id("<unk>") in given[1] and given[2] == [1]


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_what_is_exported_is_what_was_published(folder, tmp_path, layout):
    published = LAYOUTS[layout](shutil.copytree(folder, tmp_path / "published"))
    model = wan.load_transformer(published)
    wan.save_transformer(model, net(tmp_path), layout)
    written, read = file_tensors(tmp_path), file_tensors(published)
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)
    if layout == "diffusers":  # a field that is left out has its default
        ours, expected = theirs(tmp_path).config, theirs(published).config
    else:
        ours, expected = (json.loads((net(f) / "config.json").read_text()) for f in (tmp_path, published))
    for field in expected.keys() - {"_diffusers_version", "_name_or_path"}:
        assert ours[field] == expected[field], field
    with pytest.raises(ValueError, match="holds a transformer: name another folder"):
        wan.save_transformer(model, net(tmp_path), layout)


# ---------------------------------------------------------------- what is refused


def net(folder: Path) -> Path:
    return folder / "transformer"


def put(name: str, *shape: int):
    """Damage: a tensor more, or another one of this name."""
    return lambda folder: save_file(
        file_tensors(folder) | {name: torch.ones(shape)}, net(folder) / f"{STEM}.safetensors"
    )


def last_shard(folder: Path) -> Path:
    return max(net(wan_folder.shard(folder)).glob("*.safetensors"))


REFUSED = {
    "no folder": (shutil.rmtree, "no folder .*supported are Wan2.1-T2V-1.3B and Wan2.2-TI2V-5B"),
    "no safetensors": (
        lambda f: (net(f) / f"{STEM}.safetensors").rename(net(f) / "wan.gguf"),
        "has no .*.safetensors .it has config.json, wan.gguf",
    ),
    "14B": (put("patch_embedding.weight", 5120, 16, 1, 2, 2), "width 5120; supported are"),
    "two files": (
        lambda f: shutil.copy(net(f) / f"{STEM}.safetensors", net(f) / f"{STEM}.fp16.safetensors"),
        "as another file beside it: more than one model",
    ),
    "a missing shard": (lambda f: last_shard(f).unlink(), r"do not fit, .*found none, expected \("),
    "a shard cut short": (lambda f: os.truncate(last_shard(f), 5000), "is cut short .*: fetch it again"),
    "one too many": (
        put("blocks.1.attn1.gate.weight", 3),
        r"1 tensors .*gate.weight: found \(3,\), expected none",
    ),
    "another model": (
        lambda f: save_file({"encoder.weight": torch.ones(1)}, net(f) / f"{STEM}.safetensors"),
        "it lacks 'patch_embedding.weight'; supported are",
    ),
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

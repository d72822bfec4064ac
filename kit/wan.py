"""Real backbones from a local folder: Wan's transformer, VAE and text encoder.

    load_transformer(folder)    the transformer becomes the video expert; the motion expert is new
    save_transformer(...)       the video expert back in either of Wan's two layouts
    VideoVAE(folder)            pixels <-> latents, through diffusers' AutoencoderKLWan
    TextEncoder(folder)         prompts -> features, through transformers' umT5

A folder holds the Diffusers layout (transformer/, vae/, text_encoder/, tokenizer/), or the transformer
alone, in Wan's own layout or in Diffusers'. Nothing is fetched from a network.
"""

import hashlib
import html
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dual_dit import PRESETS, DualDiT, DualDiTConfig
from kit.files import whole_file
from kit.weights import stored_dtype

SUPPORTED = "supported are Wan2.1-T2V-1.3B and Wan2.2-TI2V-5B, in Wan's own or in the Diffusers layout"
STEM = "diffusion_pytorch_model"  # of the transformer's files, in both layouts
WAN_HEAD_DIM = 128  # of every published Wan
TEXT_TOKENS = 512

# ---------------------------------------------------------------- names

# Diffusers' names -> Wan's own, which are ours: a prefix of the whole name, or a part within a block
DIFFUSERS_PREFIXES = {
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "proj_out.": "head.head.",
    "scale_shift_table": "head.modulation",
}
DIFFUSERS_BLOCK_PARTS = {
    "attn1.to_out.0.": "self_attn.o.",
    "attn1.to_": "self_attn.",
    "attn1.": "self_attn.",
    "attn2.to_out.0.": "cross_attn.o.",
    "attn2.to_": "cross_attn.",
    "attn2.": "cross_attn.",
    "norm2.": "norm3.",
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
    "scale_shift_table": "modulation",
}


def _replace_prefix(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def wan_name(name: str) -> str:
    """A tensor's name in the Diffusers layout -> in Wan's own; Wan's own names come back unchanged."""
    if match := re.fullmatch(r"(blocks\.\d+\.)(.*)", name):
        return match[1] + _replace_prefix(match[2], DIFFUSERS_BLOCK_PARTS)
    return _replace_prefix(name, DIFFUSERS_PREFIXES)


def expert_name(name: str, expert: str = "video") -> str:
    """Wan's own name -> DualDiT's: "blocks.3.ffn.0.bias" -> "blocks.3.video.ffn.0.bias"."""
    if name.startswith("blocks."):
        return re.sub(r"^(blocks\.\d+\.)", rf"\1{expert}.", name)
    return f"{expert}.{name}"


def own_names(model: DualDiT) -> dict[str, str]:
    """Name in DualDiT -> Wan's own name, of every tensor of the video expert."""
    names = [name for name in model.state_dict() if "video" in name.split(".")]
    return {name: ".".join(part for part in name.split(".") if part != "video") for name in names}


# ---------------------------------------------------------------- configuration


def read_config(folder: Path) -> dict | None:
    """config.json in our words (the fields of DualDiTConfig), or None where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text())
        kind = raw.get("_class_name", "nothing")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}): fetch it again") from error
    if kind == "WanTransformer3DModel":
        if raw.get("image_dim") or raw.get("added_kv_proj_dim"):
            raise ValueError(f"{folder} is an image-to-video model (it has image keys); {SUPPORTED}")
        if not raw.get("cross_attn_norm", True) or raw.get("qk_norm") != "rms_norm_across_heads":
            raise ValueError(
                f"{path}: expected cross_attn_norm and qk_norm rms_norm_across_heads; {SUPPORTED}"
            )
        names = {
            "layers": "num_layers", "heads": "num_attention_heads", "ffn": "ffn_dim",
            "channels": "in_channels", "text_dim": "text_dim", "patch": "patch_size", "freq_dim": "freq_dim",
            "eps": "eps",
        }  # fmt: skip
        width = {"width": raw.get("num_attention_heads", 0) * raw.get("attention_head_dim", 0)}
    elif kind == "WanModel":
        if raw.get("model_type") not in ("t2v", "ti2v"):
            raise ValueError(f"{folder} is a {raw.get('model_type')!r} model, expected 't2v'; {SUPPORTED}")
        names = {
            "layers": "num_layers", "heads": "num_heads", "ffn": "ffn_dim", "channels": "in_dim",
            "width": "dim", "text_dim": "text_dim", "patch": "patch_size", "freq_dim": "freq_dim",
            "eps": "eps",
        }  # fmt: skip
        width = {}
    else:
        raise ValueError(
            f"{path} describes a {kind}, expected WanModel or WanTransformer3DModel; {SUPPORTED}"
        )
    # Wan's own files leave out what is the same for every model
    return {ours: raw[theirs] for ours, theirs in names.items() if theirs in raw} | width


def config_of(shapes: dict[str, tuple[int, ...]], given: dict | None) -> DualDiTConfig:
    """The configuration that tensors of these shapes (by Wan's own names) have, checked against `given`."""
    image = [name for name in shapes if re.search(r"img_emb|k_img|v_img|image_embedder|add_[kv]_proj", name)]
    if image:
        raise ValueError(f"found image keys such as {image[0]}: an image-to-video model; {SUPPORTED}")
    if "patch_embedding.weight" not in shapes:
        raise ValueError(
            f"no Wan transformer: found keys such as {next(iter(shapes), 'none')!r}; {SUPPORTED}"
        )
    width, channels, *patch = shapes["patch_embedding.weight"]
    if width > max(preset.width for preset in PRESETS.values()):
        raise ValueError(f"found a transformer of width {width}, as Wan 14B has; {SUPPORTED}")
    try:
        found = {
            "layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
            "width": width, "ffn": shapes["blocks.0.ffn.0.weight"][0], "channels": channels,
            "patch": tuple(patch),
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
        }  # fmt: skip
    except (KeyError, ValueError) as error:
        raise ValueError(f"no whole Wan transformer: it lacks {error}; {SUPPORTED}") from error
    given = {k: tuple(v) if k == "patch" else v for k, v in (given or {}).items()}
    for name, value in found.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"config.json says {name} is {given[name]}, the tensors say {value}: files of two models"
            )
    if "heads" not in given and width % WAN_HEAD_DIM:
        raise ValueError(f"no config.json, and width {width} does not divide into heads of {WAN_HEAD_DIM}")
    return DualDiTConfig(**{"heads": width // WAN_HEAD_DIM} | given | found)


# ---------------------------------------------------------------- the transformer


def transformer_folder(folder: Path) -> Path:
    """Where the transformer's files are: in transformer/, or in the folder itself."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected a downloaded Wan; {SUPPORTED}")
    if (folder / "transformer_2").is_dir() or (folder / "low_noise_model").is_dir():
        raise ValueError(f"{folder} has two transformers, as Wan2.2-A14B has; {SUPPORTED}")
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def shard_files(folder: Path) -> list[Path]:
    """The transformer's safetensors files: the index's shards, or the one file there is."""
    index = folder / f"{STEM}.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of shards ({error!r}): fetch it again") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{folder}: the index names {', '.join(missing)}, not there: fetch them")
        return files
    file = folder / f"{STEM}.safetensors"
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"{folder} has neither {file.name} nor an index (it has {found}); {SUPPORTED}"
        )
    return [file]


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or no safetensors file ({error}): fetch it again") from error


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    init_motion: str = "copy",
) -> DualDiT:
    """A Wan transformer as the video expert of a DualDiT, in evaluation mode; the motion expert is new.

    `init_motion`: "copy" starts it from the video expert where shapes agree, "fresh" from scratch. Timestep
    layers, modulation and norms stay fp32 whatever `dtype`. Strict: FileNotFoundError or ValueError unless
    every tensor of the files, and no other, makes up the video expert.
    """
    if init_motion not in ("copy", "fresh"):
        raise ValueError(f"init_motion is 'copy' or 'fresh', got {init_motion!r}")
    folder = transformer_folder(Path(folder))
    files = shard_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with opened(file) as tensors:
            shapes |= {wan_name(name): tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    config = config_of(shapes, read_config(folder))
    with torch.device("meta"):
        model = DualDiT(config)
    expected = {own: tuple(model.state_dict()[name].shape) for name, own in own_names(model).items()}
    if wrong := sorted(expected.items() ^ shapes.items()):
        name = wrong[0][0]
        raise ValueError(
            f"{folder}: {len({name for name, _ in wrong})} tensors do not fit, first {name}: "
            f"found {shapes.get(name, 'none')}, expected {expected.get(name, 'none')}; {SUPPORTED}"
        )
    # what is new gets memory and Wan's initialisation, which skips the video expert: it has no memory yet
    video = set(own_names(model))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in video:
            _replace(model, name, torch.empty_like(tensor, dtype=stored_dtype(name, dtype), device=device))
    model.init_weights()
    for module in model.modules():  # a norm is born initialised, so init_weights leaves it
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.reset_parameters()
    model.motion_mean.zero_()
    model.motion_std.fill_(1)
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                ours = expert_name(wan_name(name))
                _replace(model, ours, tensors.get_tensor(name).to(device, stored_dtype(ours, dtype)))
    if init_motion == "copy":
        copy_video_to_motion(model)
    return model.eval().requires_grad_(False)


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the parameter or buffer of this name is."""
    *path, leaf = name.split(".")
    module = model.get_submodule(".".join(path))
    setattr(module, leaf, nn.Parameter(tensor) if leaf in module._parameters else tensor)


@torch.no_grad()
def copy_video_to_motion(model: DualDiT) -> None:
    """Start the motion expert from the video expert's weights, where names and shapes agree.

    Its head stays zero, and what only motion has (the MLPs of 51 tokens) stays as it is.
    """
    state = model.state_dict()
    for name, own in own_names(model).items():
        twin = state.get(expert_name(own, "motion"))
        if twin is not None and twin.shape == state[name].shape:
            twin.copy_(state[name])


def save_transformer(
    model: DualDiT, folder: str | Path, layout: str = "diffusers", dtype=torch.float32
) -> None:
    """Write the video expert as a Wan transformer, layout "diffusers" or "wan": a file and config.json."""
    if layout not in ("diffusers", "wan"):
        raise ValueError(f"layout is 'diffusers' or 'wan', got {layout!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / f"{STEM}.safetensors.index.json").exists():  # it would be read in place of the new file
        raise ValueError(f"{folder} holds a transformer in shards: name another folder")
    c, state = model.config, model.state_dict()
    names = own_names(model)
    if layout == "diffusers":
        names = {ours: diffusers_name(own) for ours, own in names.items()}
        config = {
            "_class_name": "WanTransformer3DModel", "num_layers": c.layers, "num_attention_heads": c.heads,
            "attention_head_dim": c.width // c.heads, "ffn_dim": c.ffn, "in_channels": c.channels,
            "out_channels": c.channels, "text_dim": c.text_dim, "patch_size": list(c.patch),
            "freq_dim": c.freq_dim, "eps": c.eps, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        }  # fmt: skip
    else:
        config = {
            "_class_name": "WanModel", "model_type": "t2v", "num_layers": c.layers, "num_heads": c.heads,
            "dim": c.width, "ffn_dim": c.ffn, "in_dim": c.channels, "out_dim": c.channels,
            "text_dim": c.text_dim, "patch_size": list(c.patch), "freq_dim": c.freq_dim,
            "eps": c.eps, "text_len": TEXT_TOKENS,
        }  # fmt: skip
    tensors = {
        name: state[ours].to("cpu", stored_dtype(ours, dtype)).contiguous() for ours, name in names.items()
    }
    with whole_file(folder / f"{STEM}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with whole_file(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def diffusers_name(own: str) -> str:
    """Wan's own name of a tensor -> its name in the Diffusers layout."""
    if not own.startswith("blocks."):
        return _replace_prefix(own, {new: old for old, new in DIFFUSERS_PREFIXES.items()})
    block, part = re.fullmatch(r"(blocks\.\d+\.)(.*)", own).groups()
    attention = {}
    for theirs, ours in (("attn1.", "self_attn."), ("attn2.", "cross_attn.")):
        attention |= {f"{ours}norm": f"{theirs}norm", f"{ours}o.": f"{theirs}to_out.0.", ours: f"{theirs}to_"}
    others = {new: old for old, new in DIFFUSERS_BLOCK_PARTS.items() if "attn" not in old}
    return block + _replace_prefix(part, attention | others)


# ---------------------------------------------------------------- pixels <-> latents


class VideoVAE:
    """Wan's video autoencoder: 4 x 8 x 8 with 16 channels (2.1), or 4 x 16 x 16 with 48 (2.2).

    Latents are normalised by the mean and deviation that the file states, as the transformer expects them.
    Time is worked through latent by latent, and large frames are decoded in tiles: memory stays bounded.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        from diffusers import AutoencoderKLWan

        self.vae = _model(AutoencoderKLWan, Path(folder), "vae", dtype).to(device)
        config = self.vae.config
        self.channels: int = config.z_dim
        self.stride = (config.scale_factor_temporal, config.scale_factor_spatial, config.scale_factor_spatial)
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels (b 3 f h w) in [-1, 1] -> latents (b c t h w) float32, the posterior's mode."""
        stride_t, stride_h, stride_w = self.stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video: expected (b, 3, f, h, w), got {tuple(video.shape)}")
        f, h, w = video.shape[2:]
        if f % stride_t != 1 or h % stride_h or w % stride_w:
            raise ValueError(
                f"video of {f} frames, {h}x{w}: expected {stride_t}n+1 frames, sizes a multiple of {stride_h}"
            )
        self.vae.disable_tiling()  # seams between tiles would be trained on
        latents = self.vae.encode(video.to(self.mean.device, self.vae.dtype)).latent_dist.mode().float()
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b c t h w) -> pixels (b 3 f h w) in [-1, 1], float32 on the CPU."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents: expected (b, {self.channels}, t, h, w), got {tuple(latents.shape)}")
        raw = latents.to(self.mean.device).float() * self.std + self.mean
        self.vae.enable_tiling()  # takes effect above 256 pixels a side only
        return self.vae.decode(raw.to(self.vae.dtype)).sample.float().cpu()


def _pretrained(cls, folder: Path, part: str, **options):
    """cls.from_pretrained(folder/part), offline, with an error that says what is missing."""
    path = folder / part
    if not path.is_dir():
        raise FileNotFoundError(f"no {path}: expected the Diffusers layout's {part}/ there; {SUPPORTED}")
    try:
        return cls.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read ({first}): fetch that folder again") from error


def _model(cls, folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
    """A whole model of diffusers or transformers: both only warn where a tensor is missing, and draw it."""
    model, info = _pretrained(cls, folder, part, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder / part} lacks {len(missing)} tensors such as {missing[0]}: fetch it again")
    return model.eval()


# ---------------------------------------------------------------- prompts -> features


class TextEncoder:
    """umT5: prompts -> features (b 512 text_dim), zeros after each prompt's last token, as Wan was trained.

    `cache` names a folder that keeps features by a hash of tokens, model and precision.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        cache: Path | None = None,
    ):
        from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

        folder = Path(folder)
        # tokenizer.json as it stands: AutoTokenizer would rebuild it as T5's, with another <unk>
        self.tokenizer = _pretrained(PreTrainedTokenizerFast, folder, "tokenizer")
        self.model = _model(UMT5EncoderModel, folder, "text_encoder", dtype).to(device)
        self.cache = cache
        self.key = f"{dtype} {fingerprint(folder / 'text_encoder')}"

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """-> (b 512 text_dim), on the CPU in the encoder's dtype."""
        return torch.stack([self._features(clean_prompt(prompt)) for prompt in prompts])

    def _features(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(prompt, max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        name = hashlib.blake2b(f"{self.key} {tokens.input_ids.tolist()}".encode(), digest_size=16).hexdigest()
        file = self.cache / f"{name}.safetensors" if self.cache else None
        known = None
        if file and file.is_file():
            with suppress(SafetensorError, KeyError):  # a damaged file is made again
                known = load_file(file)["features"]
        if known is None:
            tokens = tokens.to(self.model.device)
            known = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].cpu()
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as temporary:
                    save_file({"features": known.contiguous()}, temporary)
        return torch.cat((known, known.new_zeros(TEXT_TOKENS - len(known), known.shape[1])))


def fingerprint(folder: Path) -> str:
    """Tells models apart without reading all of them: a hash of every file's name, size and last 64 kB."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        with file.open("rb") as content:
            content.seek(max(0, size - 65536))
            found.update(f"{file.name} {size} ".encode() + content.read())
    return found.hexdigest()


def clean_prompt(prompt: str) -> str:
    """HTML entities resolved and white space collapsed, as in Wan's own pipeline."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()

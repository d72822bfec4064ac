"""Real backbones from a local folder: Wan's transformer, VAE and text encoder.

    load_transformer(folder)    the transformer becomes the video expert, and the motion expert its copy
    save_transformer(...)       the video expert back in either of Wan's two layouts
    VideoVAE(folder)            pixels <-> latents, through diffusers' AutoencoderKLWan
    TextEncoder(folder)         prompts -> features, through transformers' umT5

A folder holds the Diffusers layout (transformer/, vae/, text_encoder/, tokenizer/), or the transformer
alone, in Wan's own layout or in Diffusers'. Nothing is fetched from a network.
"""

import hashlib
import html
import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dual_dit import DualDiT, DualDiTConfig
from flow import Task
from kit.files import whole_file
from kit.wan.names import (
    FIELDS,
    STEM,
    SUPPORTED,
    TEXT_TOKENS,
    config_of,
    diffusers_name,
    expert_name,
    opened,
    own_names,
    read_config,
    read_shapes,
    shard_files,
    transformer_folder,
)
from kit.weights import empty, stored_dtype

# ---------------------------------------------------------------- the transformer


def load_transformer(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DualDiT:
    """A Wan transformer as the video expert of a DualDiT, in evaluation mode; the motion expert is its copy.

    Timestep layers, modulation and norms stay fp32 whatever `dtype`. Strict: FileNotFoundError or ValueError
    unless every tensor of the files, and no other, makes up the video expert.
    """
    folder = transformer_folder(Path(folder))
    files = shard_files(folder)
    shapes, own_name, fp8 = read_shapes(files)
    model = empty(config_of(shapes, read_config(folder)))
    video, state = own_names(model), model.state_dict()
    expected = {own: tuple(state[name].shape) for name, own in video.items()}
    if wrong := sorted(expected.items() ^ shapes.items()):
        name = wrong[0][0]
        raise ValueError(
            f"{folder}: {len({name for name, _ in wrong})} tensors do not fit, first {name}: "
            f"found {shapes.get(name, 'none')}, expected {expected.get(name, 'none')}; {SUPPORTED}"
        )
    # allocate and initialise what Wan lacks; the video expert stays on the meta device until it is read
    for name in state:
        if name not in video:
            state[name] = torch.empty_like(state[name], dtype=stored_dtype(name, dtype), device=device)
    model.load_state_dict(state, assign=True)
    model.init_weights()
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                ours = expert_name(own_name[name])
                state[ours] = tensors.get_tensor(name).to(device, stored_dtype(ours, dtype))
    model.load_state_dict(state, assign=True)
    if fp8:
        print(f"{folder}: its fp8 weights are computed in {dtype}, but keep fp8's precision")
    # paper is silent: what the motion expert starts from
    copy_video_to_motion(model)
    return model.eval().requires_grad_(False)


def transformer_config(folder: str | Path) -> DualDiTConfig:
    """The configuration that load_transformer(folder) has, without reading weights."""
    folder = transformer_folder(Path(folder))
    return config_of(read_shapes(shard_files(folder))[0], read_config(folder))


@torch.no_grad()
def copy_video_to_motion(model: DualDiT) -> None:
    """Start the motion expert from the video expert's weights, where names and shapes agree.

    Its head's last layers stay zero, and what only motion has (the MLPs of 51 tokens) stays as it is.
    """
    state = model.state_dict()
    for name, own in own_names(model).items():
        twin = state.get(expert_name(own, "motion"))
        if twin is not None and twin.shape == state[name].shape:
            twin.copy_(state[name])


def save_transformer(model: DualDiT, folder: str | Path, layout: str = "diffusers") -> None:
    """Write the video expert as a Wan transformer, layout "diffusers" or "wan": a file and config.json.

    The task hint of video alone, which a Wan does not have, is added to the bias of the patch embedding.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / f"{STEM}.safetensors{end}").exists() for end in ("", ".index.json")):
        raise ValueError(f"{folder} holds a transformer: name another folder")
    c, state = model.config, model.state_dict()
    names, bias = own_names(model), "video.patch_embedding.bias"
    task = torch.tensor(Task.VIDEO_ONLY, device=state[bias].device)
    state[bias] = (state[bias] + model.task_hint(task).detach()).type_as(state[bias])
    if layout == "diffusers":
        names = {ours: diffusers_name(own) for ours, own in names.items()}
        kind = "WanTransformer3DModel"
        more = {
            "attention_head_dim": c.width // c.heads, "out_channels": c.channels, "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        }  # fmt: skip
    elif layout == "wan":
        kind = "WanModel"
        model_type = "ti2v" if c.channels == 48 else "t2v"
        more = {"model_type": model_type, "out_dim": c.channels, "text_len": TEXT_TOKENS}
    else:
        raise ValueError(f"layout is 'diffusers' or 'wan', got {layout!r}")
    config = {"_class_name": kind} | {theirs: getattr(c, ours) for ours, theirs in FIELDS[kind].items()}
    tensors = {name: state[ours].cpu().contiguous() for ours, name in names.items()}
    with whole_file(folder / f"{STEM}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with whole_file(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config | more, indent=2) + "\n")


# ---------------------------------------------------------------- pixels <-> latents


class VideoVAE:
    """Wan's video autoencoder: 4 x 8 x 8 with 16 channels (2.1), or 4 x 16 x 16 with 48 (2.2).

    Latents are normalised by the mean and deviation that the file states, as the transformer expects them.
    They are processed one by one in time, and large frames are decoded in tiles: memory stays bounded.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        vae = _model("diffusers", "AutoencoderKLWan", Path(folder) / "vae", torch.float32)
        self.vae = vae.to(device)
        config = self.vae.config
        self.channels: int = config.z_dim
        self.stride = config.scale_factor_spatial
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels (b 3 f h w) in [-1, 1] -> latents (b c T h w) float32, the posterior's mode."""
        f, h, w = video.shape[2:]
        if f % 4 != 1 or h % self.stride or w % self.stride:
            expected = f"4n+1 frames, sizes a multiple of {self.stride}"
            raise ValueError(f"video of {f} frames, {h}x{w}: expected {expected}")
        self.vae.disable_tiling()  # seams between tiles would be trained on
        latents = self.vae.encode(video.to(self.mean)).latent_dist.mode()
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b c T h w) -> pixels (b 3 f h w) in [-1, 1], float32 on the CPU."""
        if latents.shape[1] != self.channels:
            raise ValueError(f"latents: expected (b, {self.channels}, T, h, w), got {tuple(latents.shape)}")
        self.vae.enable_tiling()  # takes effect above 256 pixels a side only
        return self.vae.decode(latents.to(self.mean) * self.std + self.mean).sample.cpu()


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"a real Wan needs {name}: pip install -r requirements-wan.txt") from error


def _pretrained(library: str, cls: str, path: Path, **options):
    """library.cls.from_pretrained(path), offline, with an error that says what is missing."""
    kind = getattr(_library(library), cls)
    if not path.is_dir():
        raise FileNotFoundError(f"no {path}: expected the Diffusers layout's {path.name}/ there; {SUPPORTED}")
    try:
        return kind.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read ({first}): fetch that folder again") from error


def _model(library: str, cls: str, path: Path, dtype: torch.dtype) -> nn.Module:
    """A whole model of diffusers or transformers: both only warn of missing tensors, and make them random."""
    model, info = _pretrained(library, cls, path, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path} lacks {len(missing)} tensors such as {missing[0]}: fetch it again")
    return model.eval()


# ---------------------------------------------------------------- prompts -> features


class TextEncoder:
    """umT5: prompts -> features (b 512 text_dim), zeros after a prompt's last token, as Wan was trained."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        # tokenizer.json as it stands: AutoTokenizer would rebuild it as T5's, with another <unk>
        self.tokenizer = _pretrained("transformers", "PreTrainedTokenizerFast", Path(folder) / "tokenizer")
        model = _model("transformers", "UMT5EncoderModel", Path(folder) / "text_encoder", dtype)
        self.model = model.to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """-> (b 512 text_dim), on the CPU in the encoder's dtype."""
        return torch.stack([self._features(clean_prompt(prompt)) for prompt in prompts])

    def _features(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(prompt, max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        known = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].cpu()
        return torch.cat((known, known.new_zeros(TEXT_TOKENS - len(known), known.shape[1])))


def fingerprint(folder: Path) -> str:
    """Identifies a model without reading all of it: a hash of every file's name, size and last 64 kB."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in folder.glob("[!.]*") if path.is_file()):
        size = file.stat().st_size
        with file.open("rb") as content:
            content.seek(max(0, size - 65536))
            found.update(f"{file.name} {size} ".encode() + content.read())
    return found.hexdigest()


def clean_prompt(prompt: str) -> str:
    """Broken Unicode mended, curly quotes made straight, HTML entities resolved and white space collapsed, as
    in Wan's own pipeline."""
    fixed = _library("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fixed))).strip()

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
import importlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dual_dit import DualDiT, DualDiTConfig
from kit.files import whole_file
from kit.wan.names import (
    STEM,
    SUPPORTED,
    TEXT_TOKENS,
    config_of,
    diffusers_name,
    expert_name,
    opened,
    own_names,
    read_header,
    shard_files,
    transformer_folder,
)
from kit.weights import stored_dtype

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
    shapes, own_name, fp8 = read_header(files)
    with torch.device("meta"):
        model = DualDiT(config_of(shapes))
    video, state = own_names(model), model.state_dict()
    expected = {own: tuple(state[name].shape) for name, own in video.items()}
    if wrong := sorted(expected.items() ^ shapes.items()):
        name = wrong[0][0]
        raise ValueError(
            f"{folder}: {len({name for name, _ in wrong})} tensors do not fit, first {name}: "
            f"found {shapes.get(name, 'none')}, expected {expected.get(name, 'none')}; {SUPPORTED}"
        )
    # what Wan lacks is allocated and initialised; the video expert stays on the meta device until it is read
    for name in state.keys() - video.keys():
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
        print(f"{folder}: its fp8 weights are computed in {dtype}, no finer for that")
    # paper is silent: what the motion expert starts from
    copy_video_to_motion(model)
    return model.eval().requires_grad_(False)


def transformer_config(folder: str | Path) -> DualDiTConfig:
    """The configuration that load_transformer(folder) has, without reading weights."""
    return config_of(read_header(shard_files(transformer_folder(Path(folder))))[0])


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


def save_transformer(model: DualDiT, folder: str | Path, layout: str = "diffusers") -> None:
    """Write the video expert as a Wan transformer, layout "diffusers" or "wan": a file and config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors*")):
        raise ValueError(f"{folder} holds a transformer: name another folder")
    c, state, names = model.config, model.state_dict(), own_names(model)
    if layout == "diffusers":
        names = {ours: diffusers_name(own) for ours, own in names.items()}
        config = {
            "_class_name": "WanTransformer3DModel", "num_attention_heads": c.heads,
            "attention_head_dim": c.width // c.heads, "in_channels": c.channels, "out_channels": c.channels,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        }  # fmt: skip
    else:
        config = {
            "_class_name": "WanModel", "model_type": "ti2v" if c.channels == 48 else "t2v",
            "num_heads": c.heads, "dim": c.width, "in_dim": c.channels, "out_dim": c.channels,
            "text_len": TEXT_TOKENS,
        }  # fmt: skip
    config |= {
        "num_layers": c.layers, "ffn_dim": c.ffn, "text_dim": c.text_dim, "patch_size": c.patch,
        "freq_dim": c.freq_dim, "eps": c.eps,
    }  # fmt: skip
    tensors = {name: state[ours].cpu().contiguous() for ours, name in names.items()}
    with whole_file(folder / f"{STEM}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------- pixels <-> latents


class VideoVAE:
    """Wan's video autoencoder: 4 x 8 x 8 with 16 channels (2.1), or 4 x 16 x 16 with 48 (2.2).

    Latents are normalised by the mean and deviation that the file states, as the transformer expects them.
    Time is worked through latent by latent, and large frames are decoded in tiles: memory stays bounded.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        vae = _model("diffusers", "AutoencoderKLWan", Path(folder) / "vae", torch.float32)
        self.vae = vae.to(device)
        config = self.vae.config
        self.channels: int = config.z_dim
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels (b 3 f h w) in [-1, 1] -> latents (b c t h w) float32, the posterior's mode."""
        self.vae.disable_tiling()  # seams between tiles would be trained on
        latents = self.vae.encode(video.to(self.mean)).latent_dist.mode()
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b c t h w) -> pixels (b 3 f h w) in [-1, 1], float32 on the CPU."""
        if latents.shape[1] != self.channels:
            raise ValueError(f"latents: expected (b, {self.channels}, t, h, w), got {tuple(latents.shape)}")
        self.vae.enable_tiling()  # takes effect above 256 pixels a side only
        return self.vae.decode(latents.to(self.mean) * self.std + self.mean).sample.cpu()


def _pretrained(library: str, cls: str, path: Path, **options):
    """library.cls.from_pretrained(path), offline, with an error that says what is missing."""
    try:
        kind = getattr(importlib.import_module(library), cls)
    except ImportError as error:
        raise ValueError(f"a real Wan needs {library}: pip install -r requirements-wan.txt") from error
    if not path.is_dir():
        raise FileNotFoundError(f"no {path}: expected the Diffusers layout's {path.name}/ there; {SUPPORTED}")
    try:
        return kind.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read ({first}): fetch that folder again") from error


def _model(library: str, cls: str, path: Path, dtype: torch.dtype) -> nn.Module:
    """A whole model of diffusers or transformers: both only warn of a missing tensor, and make it random."""
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
        return torch.stack([self._features(prompt) for prompt in prompts])

    def _features(self, prompt: str) -> Tensor:
        # as Wan's own pipeline does: HTML entities resolved, white space collapsed
        clean = re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
        tokens = self.tokenizer(clean, max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        known = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].cpu()
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

"""The files of a Wan transformer: what its tensors are called, which configuration they have, where they lie.

DualDiT's names of tensors are Wan's own with the expert's name put in; the Diffusers layout has other names.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dual_dit import PRESETS, DualDiT, DualDiTConfig

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

# what torch.compile, activation checkpointing and FSDP put before a name, also in the middle of one
WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
FIRST = "patch_embedding.weight"  # in both layouts: what stands before it stands before every name
SCALES = re.compile(r"(^|\.)(scaled_fp8|(scale|input|weight)_(scale|weight|input)|comfy_quant)(\.|$)")
READ = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


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


def wan_names(names: Iterable[str]) -> dict[str, str]:
    """Every tensor's name in the files -> Wan's own, whatever prefix a tool has put before all of them."""
    plain = {name: WRAPPER.sub("", name) for name in names}
    if scaled := next(filter(SCALES.search, plain.values()), None):
        raise ValueError(f"found {scaled}: fp8 with scales; fetch the same model in fp16, bf16 or plain fp8")
    prefix = next((n.removesuffix(FIRST) for n in plain.values() if f".{n}".endswith(f".{FIRST}")), "")
    if stranger := next((name for name in plain.values() if not name.startswith(prefix)), None):
        raise ValueError(f"names begin with {prefix!r}, but for {stranger}: more than one model; {SUPPORTED}")
    own = {name: wan_name(short.removeprefix(prefix)) for name, short in plain.items()}
    if len(set(own.values())) < len(own):
        twice = next(name for name in own.values() if list(own.values()).count(name) > 1)
        raise ValueError(f"{twice} is there twice, under two names: more than one model; {SUPPORTED}")
    return own


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
    # Wan2.2's 5B gets a motion expert in every second block, the last among them
    layers = found["layers"]
    dual = tuple(range(1 - layers % 2, layers, 2)) if channels == PRESETS["wan2.2-5b"].channels else None
    return DualDiTConfig(**{"heads": width // WAN_HEAD_DIM} | given | found, dual=dual)


# ---------------------------------------------------------------- files


def transformer_folder(folder: Path) -> Path:
    """Where the transformer's files are: in transformer/, or in the folder itself."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected a downloaded Wan; {SUPPORTED}")
    if (folder / "transformer_2").is_dir() or (folder / "low_noise_model").is_dir():
        raise ValueError(f"{folder} has two transformers, as Wan2.2-A14B has; {SUPPORTED}")
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def shard_files(folder: Path) -> list[Path]:
    """The transformer's safetensors files: the index's shards, or the one file there is, of any name."""
    index = _only(folder, f"{STEM}.safetensors.index.json", "*.safetensors.index.json")
    if index:
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of shards ({error!r}): fetch it again") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{folder}: the index names {', '.join(missing)}, not there: fetch them")
        return files
    if file := _only(folder, f"{STEM}.safetensors", "*.safetensors"):
        return [file]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise FileNotFoundError(
        f"{folder} has neither {STEM}.safetensors nor an index (it has {found}); {SUPPORTED}"
    )


def _only(folder: Path, name: str, pattern: str) -> Path | None:
    """The file of this name, else the one of this pattern, where there is no second."""
    files = [folder / name] if (folder / name).is_file() else sorted(folder.glob(pattern))
    return files[0] if len(files) == 1 else None


def read_header(files: list[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str], set[str]]:
    """The files' tensors, unread: shapes by Wan's own names, those names by the files', and precisions."""
    shapes, kinds = {}, set()
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                part = tensors.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                kinds.add(part.get_dtype())
    own = wan_names(shapes)
    if strange := sorted(kinds - READ.keys()):
        raise ValueError(f"{files[0].parent} holds {strange[0]} numbers, expected one of {', '.join(READ)}")
    return {own[name]: shape for name, shape in shapes.items()}, own, {READ[kind] for kind in kinds}


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or no safetensors file ({error}): fetch it again") from error

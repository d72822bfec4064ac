"""The files of a Wan transformer: names of tensors, configuration, and where the files are.

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

# Diffusers' names of modules -> Wan's own, which are ours: outside of blocks, and within one
OUTSIDE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
IN_BLOCK = {
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
for _theirs, _own in (("attn1", "self_attn"), ("attn2", "cross_attn")):
    IN_BLOCK |= {f"{_theirs}.to_{x}": f"{_own}.{x}" for x in "qkv"}
    IN_BLOCK |= {f"{_theirs}.norm_{x}": f"{_own}.norm_{x}" for x in "qk"}
    IN_BLOCK[f"{_theirs}.to_out.0"] = f"{_own}.o"

# what torch.compile, activation checkpointing and FSDP put before a name, also in the middle of one
WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
FIRST = "patch_embedding.weight"  # in both layouts; what a file has before it, it has before every name
SCALES = re.compile(r"(^|\.)(scaled_fp8|(scale|input|weight)_(scale|weight|input)|comfy_quant)(\.|$)")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' words


def _renamed(name: str, outside: dict[str, str], in_block: dict[str, str]) -> str:
    block, module, kind = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name).groups("")
    return block + (in_block if block else outside).get(module, module) + kind


def wan_name(name: str) -> str:
    """A tensor's name in the Diffusers layout -> in Wan's own; Wan's own names come back unchanged."""
    return _renamed(name, OUTSIDE, IN_BLOCK)


def diffusers_name(own: str) -> str:
    """Wan's own name of a tensor -> its name in the Diffusers layout."""
    outside, in_block = ({new: old for old, new in table.items()} for table in (OUTSIDE, IN_BLOCK))
    return _renamed(own, outside, in_block)


def wan_names(names: Iterable[str]) -> dict[str, str]:
    """Every tensor's name in the files -> Wan's own; a prefix that all names share is removed."""
    plain = {name: WRAPPER.sub("", name) for name in names}
    if scaled := next(filter(SCALES.search, plain.values()), None):
        raise ValueError(f"found {scaled}: fp8 with scales; fetch the same model in fp16, bf16 or plain fp8")
    prefix = next((n.removesuffix(FIRST) for n in plain.values() if f".{n}".endswith(f".{FIRST}")), "")
    if stranger := next((name for name in plain.values() if not name.startswith(prefix)), None):
        raise ValueError(f"names begin with {prefix!r}, except {stranger}: more than one model; {SUPPORTED}")
    own = {name: wan_name(short.removeprefix(prefix)) for name, short in plain.items()}
    if len(set(own.values())) < len(own):
        raise ValueError(f"tensors are there twice, under two names: more than one model; {SUPPORTED}")
    return own


def expert_name(name: str, expert: str = "video") -> str:
    """Wan's own name -> DualDiT's: "blocks.3.ffn.0.bias" -> "blocks.3.video.ffn.0.bias"."""
    return re.sub(r"^(blocks\.\d+\.)?", rf"\g<1>{expert}.", name)


def own_names(model: DualDiT) -> dict[str, str]:
    """Name in DualDiT -> Wan's own name, of every tensor of the video expert."""
    names = [name for name in model.state_dict() if "video" in name.split(".")]
    return {name: re.sub(r"(^|\.)video\.", r"\1", name) for name in names}


# ---------------------------------------------------------------- configuration

# the fields of DualDiTConfig -> those of config.json, by its _class_name
COMMON = {
    "layers": "num_layers", "ffn": "ffn_dim", "text_dim": "text_dim", "patch": "patch_size",
    "freq_dim": "freq_dim", "eps": "eps",
}  # fmt: skip
FIELDS = {
    "WanTransformer3DModel": COMMON | {"heads": "num_attention_heads", "channels": "in_channels"},
    "WanModel": COMMON | {"heads": "num_heads", "channels": "in_dim", "width": "dim"},
}


def read_config(folder: Path) -> dict:
    """config.json under the names of DualDiTConfig's fields, empty if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text())
        kind = raw.get("_class_name", "nothing")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}): fetch it again") from error
    if kind not in FIELDS:
        raise ValueError(f"{path} describes a {kind}, expected {' or '.join(FIELDS)}; {SUPPORTED}")
    # Wan's own files leave out what is the same for every model
    stated = {ours: raw[theirs] for ours, theirs in FIELDS[kind].items() if theirs in raw}
    if kind == "WanTransformer3DModel":
        stated["width"] = raw.get("num_attention_heads", 0) * raw.get("attention_head_dim", 0)
    return stated


def config_of(shapes: dict[str, tuple[int, ...]], stated: dict) -> DualDiTConfig:
    """The configuration of tensors with these shapes (by Wan's own names), checked against config.json's."""
    image = [name for name in shapes if re.search(r"img_emb|k_img|v_img|image_embedder|add_[kv]_proj", name)]
    if image:
        raise ValueError(f"found image keys such as {image[0]}: an image-to-video model; {SUPPORTED}")
    if FIRST not in shapes:
        raise ValueError(f"no Wan transformer: found keys such as {next(iter(shapes), '')!r}; {SUPPORTED}")
    width, channels, *patch = shapes[FIRST]
    if width > max(preset.width for preset in PRESETS.values()):
        raise ValueError(f"found a transformer of width {width}, as Wan 14B has; {SUPPORTED}")
    try:
        found = {
            "layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
            "width": width, "ffn": shapes["blocks.0.ffn.0.weight"][0], "channels": channels,
            "patch": patch,  # a list, as in config.json
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
        }  # fmt: skip
    except (KeyError, ValueError) as error:
        raise ValueError(f"an incomplete Wan transformer: it lacks {error}; {SUPPORTED}") from error
    for name, value in found.items():
        if stated.get(name, value) != value:
            said = f"config.json says {name} is {stated[name]}, the tensors say {value}"
            raise ValueError(f"{said}: files of two models")
    if "heads" not in stated and width % WAN_HEAD_DIM:
        raise ValueError(f"no config.json, and width {width} does not divide into heads of {WAN_HEAD_DIM}")
    # Wan2.2's 5B gets a motion expert in every second block, the last among them
    layers = found["layers"]
    dual = tuple(range(1 - layers % 2, layers, 2)) if channels == PRESETS["wan2.2-5b"].channels else None
    return DualDiTConfig(**{"heads": width // WAN_HEAD_DIM} | stated | found, dual=dual)


# ---------------------------------------------------------------- files


def transformer_folder(folder: Path) -> Path:
    """Where the transformer's files are: in transformer/, or in the folder itself."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected a downloaded Wan; {SUPPORTED}")
    if (folder / "transformer_2").is_dir() or (folder / "low_noise_model").is_dir():
        raise ValueError(f"{folder} has two transformers, as Wan2.2-A14B has; {SUPPORTED}")
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def shard_files(folder: Path) -> list[Path]:
    """The transformer's safetensors files: the index's shards, or the one file there is, of any name."""
    if index := _only(folder, f"{STEM}.safetensors.index.json", "*.safetensors.index.json"):
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of shards ({error!r}): fetch it again") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{folder}: the index names {', '.join(missing)}, not there: fetch them")
        return files
    if file := _only(folder, f"{STEM}.safetensors", "*.safetensors"):
        return [file]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    expected = f"{STEM}.safetensors nor an index"
    raise FileNotFoundError(f"{folder} has neither {expected} (it has {found}); {SUPPORTED}")


def _only(folder: Path, name: str, pattern: str) -> Path | None:
    """The file of this name, else the file that matches the pattern; None if there is none or several."""
    files = [folder / name] if (folder / name).is_file() else sorted(folder.glob(pattern))
    return files[0] if len(files) == 1 else None


def read_shapes(files: list[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str], bool]:
    """From headers only: shapes by Wan's own names, Wan's names by the files' names, and if any is fp8."""
    shapes, kinds = {}, set()
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                part = tensors.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                kinds.add(part.get_dtype())
    own = wan_names(shapes)
    if strange := sorted(kinds - set(FLOATS)):
        raise ValueError(f"{files[0].parent} holds {strange[0]} numbers, expected one of {', '.join(FLOATS)}")
    return {own[name]: shape for name, shape in shapes.items()}, own, any("F8" in kind for kind in kinds)


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or no safetensors file ({error}): fetch it again") from error

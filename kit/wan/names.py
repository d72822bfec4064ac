"""The files of a Wan transformer: what its tensors are called, which configuration they have, where they lie.

DualDiT's names of tensors are Wan's own with the expert's name put in; the Diffusers layout has other names.
"""

import re
from collections.abc import Iterator
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
FIRST = "patch_embedding.weight"  # in both layouts: what stands before it stands before every name


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


def expert_name(name: str, expert: str = "video") -> str:
    """Wan's own name -> DualDiT's: "blocks.3.ffn.0.bias" -> "blocks.3.video.ffn.0.bias"."""
    return re.sub(r"^(blocks\.\d+\.)?", rf"\g<1>{expert}.", name)


def own_names(model: DualDiT) -> dict[str, str]:
    """Name in DualDiT -> Wan's own name, of every tensor of the video expert."""
    names = [name for name in model.state_dict() if "video" in name.split(".")]
    return {name: re.sub(r"(^|\.)video\.", r"\1", name) for name in names}


# ---------------------------------------------------------------- configuration


def config_of(shapes: dict[str, tuple[int, ...]]) -> DualDiTConfig:
    """The configuration that tensors of these shapes (by Wan's own names) have."""
    try:
        width, channels, *patch = shapes[FIRST]
        layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        ffn, text_dim = shapes["blocks.0.ffn.0.weight"][0], shapes["text_embedding.0.weight"][1]
        freq_dim = shapes["time_embedding.0.weight"][1]
    except (KeyError, ValueError) as error:
        raise ValueError(f"no whole Wan transformer: it lacks {error}; {SUPPORTED}") from error
    if width % WAN_HEAD_DIM or width > max(preset.width for preset in PRESETS.values()):
        raise ValueError(f"found a transformer of width {width}; {SUPPORTED}")
    # Wan2.2's 5B gets a motion expert in every second block
    dual = tuple(range(1, layers, 2)) if channels == PRESETS["wan2.2-5b"].channels else None
    heads = width // WAN_HEAD_DIM
    return DualDiTConfig(layers, width, heads, ffn, channels, text_dim, tuple(patch), freq_dim, dual=dual)


# ---------------------------------------------------------------- files


def transformer_folder(folder: Path) -> Path:
    """Where the transformer's files are: in transformer/, or in the folder itself."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected a downloaded Wan; {SUPPORTED}")
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def shard_files(folder: Path) -> list[Path]:
    """The transformer's safetensors files, by their published name, or those there are, of any name."""
    files = sorted(folder.glob(f"{STEM}*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"{folder} has no {STEM}.safetensors (it has {found}); {SUPPORTED}")
    return files


def read_header(files: list[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str], bool]:
    """The files' tensors, unread: shapes by Wan's own names, those names by the files', and if any is fp8."""
    shapes, fp8 = {}, False
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                if name in shapes:
                    raise ValueError(f"{file} has {name}, as another file beside it: more than one model")
                part = tensors.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                fp8 |= "F8" in part.get_dtype()
    plain = {name: WRAPPER.sub("", name) for name in shapes}
    # some tools put a prefix before all names
    prefix = next((n.removesuffix(FIRST) for n in plain.values() if f".{n}".endswith(f".{FIRST}")), "")
    own = {name: wan_name(short.removeprefix(prefix)) for name, short in plain.items()}
    if len(set(own.values())) < len(own):
        raise ValueError(f"tensors are there twice, under two names: more than one model; {SUPPORTED}")
    return {own[name]: shape for name, shape in shapes.items()}, own, fp8


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or no safetensors file ({error}): fetch it again") from error

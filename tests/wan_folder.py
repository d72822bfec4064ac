"""Tiny folders in the formats in which Wan is published, written by the libraries that define them.

    write(folder, version)    the Diffusers layout of Wan2.1-T2V-1.3B or Wan2.2-TI2V-5B, whole
    shard(folder)             its transformer cut into several files with an index
    original(folder)          its transformer renamed into Wan's own layout

Sizes are shrunk and weights random, nothing is zero; fields and files are those of the published folders.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

STEM = "diffusion_pytorch_model"
TEXT_DIM = 32
TRANSFORMERS = {
    "2.1": {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 320, "in_channels": 16},
    # no power of two, and rotary axes of 16, 12 and 12
    "2.2": {"num_attention_heads": 3, "attention_head_dim": 40, "ffn_dim": 192, "in_channels": 48},
}
VAES = {
    "2.1": {},  # the class's defaults are the published file's
    "2.2": {
        "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 16,
        "latents_mean": torch.linspace(-0.3, 0.5, 48).tolist(),
        "latents_std": torch.linspace(0.4, 1.7, 48).tolist(),
    },
}  # fmt: skip


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Its own initialisation and some noise on all of it, so that no parameter is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with umT5's special tokens and </s> at the end of every text."""
    special = [(piece, 0.0) for piece in ("<pad>", "</s>", "<s>", "<unk>")]
    words = [(f"▁{word}", -1.0) for word in ("a", "person", "the", "left", "arm", "dancer", "waves", "turns")]
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,.&<>"]
    fast = Tokenizer(models.Unigram(special + words + letters, unk_id=3))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2))


def write(folder: Path, version: str, seed: int = 0) -> Path:
    """Write a whole folder, version "2.1" or "2.2"; another seed is another model of the same shapes."""
    torch.manual_seed(seed)
    sizes = TRANSFORMERS[version]
    transformer = WanTransformer3DModel(
        **sizes, out_channels=sizes["in_channels"], text_dim=TEXT_DIM, freq_dim=32, num_layers=2
    )
    umt5 = UMT5Config(
        vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    pipeline = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=randomised(UMT5EncoderModel(umt5), seed),
        vae=randomised(AutoencoderKLWan(base_dim=4, **VAES[version]), seed),
        transformer=randomised(transformer, seed),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        expand_timesteps=version == "2.2",
    )
    pipeline.save_pretrained(folder)
    # as the published files say it; today's transformers writes other words
    edit_json(folder / "text_encoder" / "config.json", tie_word_embeddings=False)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="T5Tokenizer", extra_ids=0)
    edit_json(folder / "model_index.json", tokenizer=["transformers", "T5TokenizerFast"])
    return folder


def shard(folder: Path) -> Path:
    """Cut the Diffusers layout's transformer into files of at most 1 MB, with their index."""
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    (folder / "transformer" / f"{STEM}.safetensors").unlink()
    model.save_pretrained(folder / "transformer", max_shard_size="1MB")
    return folder


# The names in Wan's own code beside those in Diffusers, replaced in this order wherever they occur
ORIGINAL = [
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("proj_out.", "head.head."),
    (".scale_shift_table", ".modulation"),  # of a block
    ("scale_shift_table", "head.modulation"),  # of the head
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0.", ".o."),
    (".to_", "."),
    (".norm2.", ".norm3."),
    (".net.0.proj.", ".0."),
    (".net.2.", ".2."),
]


def original_name(name: str) -> str:
    for theirs, wans in ORIGINAL:
        name = name.replace(theirs, wans)
    return name


def original(folder: Path, shards: int = 1) -> Path:
    """Rewrite the transformer into Wan's own layout: one file as Wan2.1's, or shards as Wan2.2's."""
    folder = folder / "transformer"
    theirs = json.loads((folder / "config.json").read_text())
    tensors = {
        original_name(k): v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()
    }
    for file in folder.iterdir():
        file.unlink()
    width = theirs["num_attention_heads"] * theirs["attention_head_dim"]
    config = {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": width, "eps": theirs["eps"],
        "ffn_dim": theirs["ffn_dim"], "freq_dim": theirs["freq_dim"], "in_dim": theirs["in_channels"],
        "model_type": "ti2v" if theirs["in_channels"] == 48 else "t2v", "text_len": 512,
        "num_heads": theirs["num_attention_heads"], "num_layers": theirs["num_layers"],
        "out_dim": theirs["out_channels"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / f"{STEM}.safetensors")
        return folder.parent
    weight_map = {}
    for i in range(shards):
        file = f"{STEM}-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return folder.parent

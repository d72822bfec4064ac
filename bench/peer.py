"""What speed is measured against, the peer: diffusers' Wan with the weights of a DualDiT's video expert."""

import torch
from torch import nn

from dual_dit import DualDiT
from kit.wan.names import diffusers_name, own_names

NEEDED = "diffusers is the peer: pip install -r requirements-wan.txt"


def diffusers_twin(model: DualDiT) -> nn.Module:
    """diffusers' WanTransformer3DModel with the video expert's weights, shared in memory where dtypes agree.

    In a bf16 network diffusers keeps less in fp32: its norms of queries and keys and its last timestep layer
    are bf16. ImportError where diffusers is missing.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise ImportError(NEEDED) from error

    config, dtype = model.config, model.video.patch_embedding.weight.dtype
    head_dim = config.width // config.heads
    with torch.device("meta"):
        twin = WanTransformer3DModel(
            num_attention_heads=config.heads, attention_head_dim=head_dim, patch_size=config.patch,
            in_channels=config.channels, out_channels=config.channels, ffn_dim=config.ffn,
            num_layers=config.layers, text_dim=config.text_dim, freq_dim=config.freq_dim, eps=config.eps,
        )  # fmt: skip
    state, weights = model.state_dict(), {}
    for name, own in own_names(model).items():
        theirs = diffusers_name(own)
        exact = any(part in theirs for part in twin._keep_in_fp32_modules)
        weights[theirs] = state[name].to(torch.float32 if exact else dtype)
    twin.load_state_dict(weights, assign=True)
    # rotary tables are not loaded with the weights: make them
    twin.rope = type(twin.rope)(head_dim, config.patch, twin.rope.max_seq_len).to(model.motion_mean.device)
    return twin.eval().requires_grad_(False)

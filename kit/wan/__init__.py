"""Real backbones from a local folder: Wan's transformer, VAE and text encoder."""

from kit.wan.load import (
    TextEncoder,
    VideoVAE,
    copy_video_to_motion,
    load_transformer,
    save_transformer,
    transformer_config,
)

__all__ = [
    "TextEncoder",
    "VideoVAE",
    "copy_video_to_motion",
    "load_transformer",
    "save_transformer",
    "transformer_config",
]

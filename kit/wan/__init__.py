"""Real backbones from a local folder: Wan's transformer, VAE and text encoder."""

from kit.wan.load import TextEncoder as TextEncoder
from kit.wan.load import VideoVAE as VideoVAE
from kit.wan.load import copy_video_to_motion as copy_video_to_motion
from kit.wan.load import load_transformer as load_transformer
from kit.wan.load import save_transformer as save_transformer
from kit.wan.load import transformer_config as transformer_config

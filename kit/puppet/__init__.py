"""The embedded world: a small body that moves, its videos and captions, a tiny video codec and text encoder.

Everything is a pure function of a seed and needs no download: the body is procedural but runs through
smplx, so that a real SMPL file is a drop-in. 16 frames a second, 64x64 pixels, metres, y up; the camera
stands in front of the body and looks along -z.
"""

from kit.puppet.codec import Codec
from kit.puppet.drawing import SIZE, project, render, silhouette
from kit.puppet.skeleton import body
from kit.puppet.text import TEXT_LEN, encode_text
from kit.puppet.world import ACTIONS, FPS, FRAMES, Clips, clips

__all__ = [
    "ACTIONS", "FPS", "FRAMES", "SIZE", "TEXT_LEN", "Clips", "Codec", "body", "clips", "encode_text",
    "project", "render", "silhouette",
]  # fmt: skip

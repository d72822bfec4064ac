"""1.3B-shaped blocks beside diffusers: forward, training, guided sampling, and the price of motion.

Both sides of a ratio have the same weights, tokens and dtype, and their runs alternate. Where diffusers' time
is divided by ours, above 1 is good.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import flow
from bench.peer import diffusers_twin
from bench.timing import Figure, figure, interleaved, random_model, ratio
from dual_dit import PRESETS, DualDiTConfig
from flow import Task
from kit.devices import matmul_rate
from kit.flops import Tokens, forward_flops
from motion_tokens import MOTION_DIM
from rope import FRAMES_PER_LATENT, TOKENS_PER_FRAME

FORWARD, MOTION, TRAIN, SAMPLE = 25, 15, 40, 35  # seconds
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
STEPS = 3  # of a sample
GUIDANCE, SHIFT = 5.0, 5.0  # Wan's own


class Shape(NamedTuple):
    """Token grid of a clip, and the tokens of its text."""

    t: int
    h: int
    w: int
    text: int = 512

    def tokens(self, motion: bool = False) -> Tokens:
        return Tokens(self.t * self.h * self.w, motion * self.frames * TOKENS_PER_FRAME, self.text)

    @property
    def frames(self) -> int:
        return FRAMES_PER_LATENT * (self.t - 1) + 1

    def __str__(self) -> str:
        return f"{self.t} latents of {self.h}x{self.w} tokens, text of {self.text}"


# 81 frames of 480x832, and less of it: motion tokens keep their proportion to video tokens. The last are for
# CPUs that have no units for a dtype.
SHAPES = (
    Shape(21, 30, 52), Shape(9, 29, 51), Shape(5, 28, 49), Shape(3, 27, 45), Shape(2, 24, 42),
    Shape(1, 15, 27), Shape(1, 10, 18, 256), Shape(1, 6, 10, 64), Shape(1, 4, 7, 16), Shape(1, 2, 4, 4),
)  # fmt: skip


class Row(NamedTuple):
    """One figure; `key` is its name in the JSON file."""

    key: str
    what: str
    figure: Figure


class Setting(NamedTuple):
    """What is measured on a CPU, and in which time."""

    config: DualDiTConfig = dataclasses.replace(PRESETS["wan2.1-1.3b"], layers=2)
    shapes: tuple[Shape, ...] = SHAPES
    share: float = 1.0  # of the seconds that each measurement is given
    least: int = 3  # rounds of each

    def rounds(self, calls: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
        return interleaved(calls, budget * self.share, self.least)

    def fitting(self, dtype: torch.dtype, forwards: float, budget: float) -> Shape:
        """The largest shape of which a round of so many forward calls takes a sixth of the budget."""
        rate = matmul_rate(torch.device("cpu"), dtype)
        for shape in self.shapes:
            flops = forwards * sum(forward_flops(self.config, shape.tokens()).values())
            if flops / rate < budget * self.share / 6:
                return shape
        return self.shapes[-1]


class Sides:
    """Ours and diffusers' network on the same weights, with inputs for both."""

    def __init__(self, config: DualDiTConfig, dtype: torch.dtype, device: str = "cpu", peer: bool = True):
        self.config, self.dtype, self.device = config, dtype, device
        self.ours = random_model(config, device, dtype)
        self.peer = diffusers_twin(self.ours) if peer else None

    def inputs(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, motion, time and text of one clip."""
        _, ph, pw = self.config.patch
        video = torch.randn(1, self.config.channels, shape.t, ph * shape.h, pw * shape.w, device=self.device)
        motion = torch.randn(1, shape.frames, MOTION_DIM, device=self.device)
        text = torch.randn(1, shape.text, self.config.text_dim, device=self.device)
        return video, motion, torch.full((1,), 0.5, device=self.device), text

    def calls(self, shape: Shape) -> dict[str, Callable[[], Tensor]]:
        """A forward call of each, video only."""
        video, _, time, text = self.inputs(shape)
        low = video.to(self.dtype), 1000 * time, text.to(self.dtype)
        return {
            "ours": lambda: self.ours(video, None, time, None, text, Task.VIDEO_ONLY)[0],
            "peer": lambda: self.peer(*low, return_dict=False)[0],
        }

    def joint(self, shape: Shape) -> Callable[[], Tensor]:
        """Ours, with motion beside the video."""
        video, motion, time, text = self.inputs(shape)
        return lambda: self.ours(video, motion, time, time, text, Task.JOINT)[0]

    def training(self, shape: Shape) -> dict[str, Callable[[], None]]:
        """Forward and backward of each, video only; gradients of all the weights of Wan, then freed."""
        for p in (*self.ours.video_parameters(), *self.peer.parameters()):
            p.requires_grad_(True)

        def step(model: nn.Module, call: Callable[[], Tensor]) -> None:
            with torch.enable_grad():
                call().float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        calls, models = self.calls(shape), {"ours": self.ours, "peer": self.peer}
        return {side: functools.partial(step, model, calls[side]) for side, model in models.items()}

    def sampling(self, shape: Shape, steps: int = STEPS) -> dict[str, Callable[[], Tensor]]:
        """A whole sample guided by text: flow.sample, and diffusers' pipeline with Euler's scheduler."""
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

        video, _, _, text = self.inputs(shape)
        null_text = torch.randn_like(text)
        pipeline = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=SHIFT), self.peer)
        pipeline.set_progress_bar_config(disable=True)
        options = {
            "height": 8 * video.shape[3], "width": 8 * video.shape[4], "num_frames": shape.frames,
            "num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "latent",
            "prompt_embeds": text.to(self.dtype), "negative_prompt_embeds": null_text.to(self.dtype),
        }  # fmt: skip
        ours = {"steps": steps, "guidance_text": GUIDANCE, "shift": SHIFT, "solver": "euler"}
        given = self.ours, video, None, text, null_text, Task.VIDEO_ONLY
        return {
            "ours": lambda: flow.sample(*given, **ours)[0],
            "peer": lambda: pipeline(latents=video, **options).frames,
        }


@functools.lru_cache(maxsize=1)  # measurements of one dtype follow each other
def sides(config: DualDiTConfig, dtype: torch.dtype) -> Sides:
    return Sides(config, dtype)


def compared(key: str, dtype: torch.dtype, shape: Shape, times: dict[str, list[float]]) -> list[Row]:
    """diffusers' time over ours."""
    what = f"diffusers / ours, {NAMES[dtype]}, {shape}; ours {figure(times['ours']).median:.3g} s"
    return [Row(f"{key}_ratio_{NAMES[dtype]}", what, ratio(times["peer"], times["ours"]))]


@torch.no_grad()
def forward(setting: Setting, dtype: torch.dtype) -> list[Row]:
    shape = setting.fitting(dtype, 2, FORWARD)
    calls = sides(setting.config, dtype).calls(shape)
    return compared("forward", dtype, shape, setting.rounds(calls, FORWARD))


def training(setting: Setting, dtype: torch.dtype) -> list[Row]:
    shape = setting.fitting(dtype, 6, TRAIN)
    calls = sides(setting.config, dtype).training(shape)
    return compared("train", dtype, shape, setting.rounds(calls, TRAIN))


@torch.no_grad()
def sampling(setting: Setting, dtype: torch.dtype) -> list[Row]:
    shape = setting.fitting(dtype, 4 * STEPS, SAMPLE)
    calls = sides(setting.config, dtype).sampling(shape)
    return compared("sample", dtype, shape, setting.rounds(calls, SAMPLE))


@torch.no_grad()
def motion(setting: Setting, dtype: torch.dtype) -> list[Row]:
    """What motion tokens cost beyond their share of the arithmetic."""
    shape, both = setting.fitting(dtype, 3, MOTION), sides(setting.config, dtype)
    times = setting.rounds({"video": both.calls(shape)["ours"], "joint": both.joint(shape)}, MOTION)
    price = motion_price(setting.config, shape)
    what = f"joint / video-only time over {price:.3g}, the ratio of their FLOPs, {shape}"
    return [Row("motion_overhead", what, ratio(times["joint"], times["video"], price))]


def motion_price(config: DualDiTConfig, shape: Shape) -> float:
    """FLOPs of a joint call over those of a video-only one."""
    joint, video = (sum(forward_flops(config, shape.tokens(motion)).values()) for motion in (True, False))
    return joint / video

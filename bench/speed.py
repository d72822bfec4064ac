"""1.3B-shaped blocks against diffusers: forward, training, guided sampling, and the price of motion.

Both sides of a ratio have the same weights, tokens and dtype, and their runs alternate. In ratios of
diffusers' time to ours, above 1 means that ours is faster.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import flow
from bench.peer import diffusers_twin
from bench.plan import price_of_motion
from bench.timing import CPU, Figure, figure, interleaved, random_model, ratio
from dual_dit import PRESETS, DualDiTConfig
from flow import Task
from kit.flops import Tokens
from motion_tokens import MOTION_DIM
from rope import TOKENS_PER_FRAME, frames_of

STEPS = 3  # of a sample
GUIDANCE, SHIFT = 5.0, 5.0  # Wan's own


class Shape(NamedTuple):
    """Token grid of a clip, and the tokens of its text."""

    t: int
    h: int
    w: int
    text: int = 512

    def tokens(self) -> Tokens:
        return Tokens(self.t * self.h * self.w, self.frames * TOKENS_PER_FRAME, self.text)

    @property
    def frames(self) -> int:
        return frames_of(self.t)

    def latents(self, config: DualDiTConfig) -> tuple[int, int, int]:
        """(T h w) before patching."""
        _, ph, pw = config.patch
        return self.t, ph * self.h, pw * self.w

    def __str__(self) -> str:
        return f"{self.t} latents of {self.h}x{self.w} tokens, text of {self.text}"


# up to 81 frames of 480x832; the last six have about its ratio of motion to video tokens, the first four are
# for CPUs without units for a dtype
SHAPES = (
    Shape(1, 2, 4, 4), Shape(1, 4, 7, 16), Shape(1, 6, 10, 64), Shape(1, 10, 18, 256), Shape(1, 15, 27),
    Shape(2, 24, 42), Shape(3, 27, 45), Shape(5, 28, 49), Shape(9, 29, 51), Shape(21, 30, 52),
)  # fmt: skip


class Row(NamedTuple):
    """One figure; `key` is its name in the JSON file."""

    key: str
    what: str
    figure: Figure


class Setting(NamedTuple):
    """What is measured on a CPU, and for how long."""

    config: DualDiTConfig = dataclasses.replace(PRESETS["wan2.1-1.3b"], layers=2)
    shapes: tuple[Shape, ...] = SHAPES
    seconds: float = 25.0  # for each measurement

    def rounds(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        return interleaved(calls, self.seconds)

    def fitting(self, calls: Callable[[Shape], dict[str, Callable]]) -> tuple[Shape, dict[str, Callable]]:
        """The calls of the first shape whose round takes a twentieth of the time or more."""
        for shape in self.shapes:
            made, begin = calls(shape), time.perf_counter()
            for call in made.values():
                call()
            if time.perf_counter() - begin > self.seconds / 20:
                break
        return shape, made


def inputs(
    config: DualDiTConfig, shape: Shape, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, motion, time and text of one clip."""
    video = torch.randn(1, config.channels, *shape.latents(config), device=device)
    motion = torch.randn(1, shape.frames, MOTION_DIM, device=device)
    text = torch.randn(1, shape.text, config.text_dim, device=device)
    return video, motion, torch.full((1,), 0.5, device=device), text


class Sides:
    """Our and diffusers' networks with the same weights, and the calls that are compared."""

    def __init__(
        self, config: DualDiTConfig, dtype: torch.dtype, device: torch.device = CPU, peer: bool = True
    ):
        self.config, self.dtype, self.device = config, dtype, device
        self.ours = random_model(config, device, dtype)
        self.peer = diffusers_twin(self.ours) if peer else None

    def forward(self, shape: Shape) -> dict[str, Callable[[], Tensor]]:
        """A forward call of each network, video only."""
        video, _, time, text = inputs(self.config, shape, self.device)
        low = video.to(self.dtype), 1000 * time, text.to(self.dtype)
        return {
            "ours": lambda: self.ours(video, None, time, None, text, Task.VIDEO_ONLY)[0],
            "peer": lambda: self.peer(*low, return_dict=False)[0],
        }

    def joint(self, shape: Shape) -> Callable[[], Tensor]:
        """Ours, with motion beside the video."""
        video, motion, time, text = inputs(self.config, shape, self.device)
        return lambda: self.ours(video, motion, time, time, text, Task.JOINT)[0]

    def train(self, shape: Shape) -> dict[str, Callable[[], None]]:
        """Forward and backward of each network, video only, with gradients of all of Wan's weights."""
        for p in (*self.ours.video_parameters(), *self.peer.parameters()):
            p.requires_grad_(True)

        def step(model: nn.Module, call: Callable[[], Tensor]) -> None:
            with torch.enable_grad():
                call().float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        models = {"ours": self.ours, "peer": self.peer}
        return {
            side: functools.partial(step, models[side], call) for side, call in self.forward(shape).items()
        }

    def sample(self, shape: Shape, steps: int = STEPS) -> dict[str, Callable[[], Tensor]]:
        """A whole sample guided by text: flow.sample, and diffusers' pipeline with Euler's scheduler."""
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

        video, _, _, text = inputs(self.config, shape, self.device)
        null_text = torch.randn_like(text)
        pipeline = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=SHIFT), self.peer)
        pipeline.set_progress_bar_config(disable=True)
        options = {
            "height": 8 * video.shape[3], "width": 8 * video.shape[4], "num_frames": shape.frames,
            "num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "latent",
            "prompt_embeds": text.to(self.dtype), "negative_prompt_embeds": null_text.to(self.dtype),
        }  # fmt: skip
        ours = {"steps": steps, "guidance_text": GUIDANCE, "shift": SHIFT, "solver": "euler"}
        arguments = self.ours, video, None, text, null_text, Task.VIDEO_ONLY
        return {
            "ours": lambda: flow.sample(*arguments, **ours)[0],
            "peer": lambda: pipeline(latents=video, **options).frames,
        }


@functools.lru_cache(maxsize=1)  # measurements of one dtype follow each other
def sides(config: DualDiTConfig, dtype: torch.dtype) -> Sides:
    return Sides(config, dtype)


COMPARED = {"forward": Sides.forward, "sample": Sides.sample, "train": Sides.train}  # by key in the table


@torch.no_grad()
def compared(setting: Setting, key: str, dtype: torch.dtype) -> list[Row]:
    """diffusers' time over ours."""
    shape, calls = setting.fitting(functools.partial(COMPARED[key], sides(setting.config, dtype)))
    times = setting.rounds(calls)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    what = f"diffusers / ours, {name}, {shape}; ours {figure(times['ours']).median:.3g} s"
    return [Row(f"{key}_ratio_{name}", what, ratio(times["peer"], times["ours"]))]


@torch.no_grad()
def motion(setting: Setting) -> list[Row]:
    """What motion tokens cost beyond their share of the arithmetic."""
    both = sides(setting.config, torch.float32)
    calls_of = lambda shape: {"video": both.forward(shape)["ours"], "joint": both.joint(shape)}
    shape, calls = setting.fitting(calls_of)
    times = setting.rounds(calls)
    price = 1 + price_of_motion(setting.config, shape.tokens())[1]
    what = f"joint / video-only time over {price:.3g}, the ratio of their FLOPs, {shape}"
    return [Row("motion_overhead", what, ratio(times["joint"], times["video"], price))]

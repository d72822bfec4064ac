"""1.3B-shaped blocks beside diffusers: forward, training, guided sampling, and the price of motion.

Both sides of a ratio have the same weights, tokens and dtype, and their runs alternate. Where diffusers' time
is divided by ours, above 1 is good.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import flow
from bench.peer import diffusers_twin
from bench.plan import price_of_motion
from bench.timing import CPU, interleaved, random_model, ratio
from dual_dit import PRESETS, DualDiTConfig
from flow import Task
from kit.flops import Tokens
from motion_tokens import MOTION_DIM
from rope import FRAMES_PER_LATENT, TOKENS_PER_FRAME

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

    def latents(self, config: DualDiTConfig) -> tuple[int, int, int]:
        """(T h w) before patching."""
        _, ph, pw = config.patch
        return self.t, ph * self.h, pw * self.w

    def __str__(self) -> str:
        return f"{self.t} latents of {self.h}x{self.w} tokens, text of {self.text}"


CONFIG = dataclasses.replace(PRESETS["wan2.1-1.3b"], layers=2)
# what is compared, by methods of Sides, at sizes that take a CPU half a second to three
COMPARED = {
    (torch.float32, "forward"): Shape(2, 24, 42),
    (torch.float32, "sample"): Shape(1, 6, 10, 64),
    (torch.float32, "train"): Shape(1, 10, 18, 256),
    (torch.bfloat16, "forward"): Shape(2, 24, 42),
    (torch.bfloat16, "sample"): Shape(1, 15, 27),
    (torch.bfloat16, "train"): Shape(1, 15, 27),
}
WITH_MOTION = Shape(1, 15, 27)


class Row(NamedTuple):
    """One figure; `key` is its name in the JSON file."""

    key: str
    what: str
    values: list[float]  # a round each


def inputs(
    config: DualDiTConfig, shape: Shape, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, motion, time and text of one clip."""
    video = torch.randn(1, config.channels, *shape.latents(config), device=device)
    motion = torch.randn(1, shape.frames, MOTION_DIM, device=device)
    text = torch.randn(1, shape.text, config.text_dim, device=device)
    return video, motion, torch.full((1,), 0.5, device=device), text


class Sides:
    """Ours and diffusers' network on the same weights, and what is called of both."""

    def __init__(self, config: DualDiTConfig, dtype: torch.dtype, device: torch.device = CPU):
        self.config, self.dtype, self.device = config, dtype, device
        self.ours = random_model(config, device, dtype)
        self.peer = diffusers_twin(self.ours)

    def forward(self, shape: Shape) -> dict[str, Callable[[], Tensor]]:
        """A forward call of each, video only."""
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
        """Forward and backward of each, video only; gradients of all the weights of Wan, then freed."""
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

    def sample(self, shape: Shape) -> dict[str, Callable[[], Tensor]]:
        """A whole sample guided by text: flow.sample, and diffusers' pipeline with Euler's scheduler."""
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

        video, _, _, text = inputs(self.config, shape, self.device)
        null_text = torch.randn_like(text)
        pipeline = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=SHIFT), self.peer)
        pipeline.set_progress_bar_config(disable=True)
        options = {
            "height": 8 * video.shape[3], "width": 8 * video.shape[4], "num_frames": shape.frames,
            "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent",
            "prompt_embeds": text.to(self.dtype), "negative_prompt_embeds": null_text.to(self.dtype),
        }  # fmt: skip
        ours = {"steps": STEPS, "guidance_text": GUIDANCE, "shift": SHIFT, "solver": "euler"}
        given = self.ours, video, None, text, null_text, Task.VIDEO_ONLY
        return {
            "ours": lambda: flow.sample(*given, **ours)[0],
            "peer": lambda: pipeline(latents=video, **options).frames,
        }


@torch.no_grad()
def compared(dtype: torch.dtype) -> list[Row]:
    """diffusers' time over ours."""
    sides, rows, precision = Sides(CONFIG, dtype), [], {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    for key in ("forward", "sample", "train"):
        shape = COMPARED[dtype, key]
        times = interleaved(getattr(sides, key)(shape))
        what = f"diffusers / ours, {precision}, {shape}; ours {statistics.median(times['ours']):.3g} s"
        rows.append(Row(f"{key}_ratio_{precision}", what, ratio(times["peer"], times["ours"])))
    return rows


@torch.no_grad()
def motion() -> list[Row]:
    """What motion tokens cost beyond their share of the arithmetic."""
    sides, shape = Sides(CONFIG, torch.float32), WITH_MOTION
    times = interleaved({"video": sides.forward(shape)["ours"], "joint": sides.joint(shape)})
    price = 1 + price_of_motion(CONFIG, shape.tokens(motion=True))[1]
    what = f"joint / video-only time over {price:.3g}, the ratio of their FLOPs, {shape}"
    return [Row("motion_overhead", what, ratio(times["joint"], times["video"], price))]

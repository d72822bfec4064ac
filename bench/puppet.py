"""The embedded world's speed: a guided sample, a training step, the clips that feed it, the optimizer."""

from collections.abc import Callable
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import flow
from bench.speed import Row, Setting
from bench.timing import figure, ratio
from dual_dit import DualDiT
from flow import Task
from kit import devices, distributed, puppet, weights
from kit.backbone import PUPPET_DEFAULTS
from kit.data import batch as batches
from kit.data.sources import open_sources
from kit.geometry import PUPPET
from kit.muon import Muon
from motion_tokens import MOTION_DIM

WEIGHTS = Path(__file__).parent.parent / "assets" / "puppet.safetensors"
GUIDED, TRAINING, MUON = 15, 25, 8  # seconds
STEPS = PUPPET_DEFAULTS.steps
DEFAULT = PUPPET_DEFAULTS.guidance_text, PUPPET_DEFAULTS.guidance_condition
OMEGAS = {"iccfg_speedup": (5.0, 1.5), "iccfg_default_speedup": DEFAULT}  # where ω1 = ω2, a term cancels
BATCH = 16  # clips a step, as train.py takes them


def naive_sample(
    model: DualDiT,
    video: Tensor,
    motion: Tensor,
    text: Tensor,
    null_text: Tensor,
    w1: float,
    w2: float,
    steps: int,
) -> Tensor:
    """In-context guidance from motion to video as its formula says: three calls a step."""
    still = torch.zeros(len(video))
    for t, t_next in pairwise(flow.shift_time(torch.linspace(1, 0, steps + 1), PUPPET_DEFAULTS.shift)):
        now = t.expand(len(video))
        full = model(video, motion, now, still, text, Task.MOTION_TO_VIDEO)[0]
        no_text = model(video, motion, now, still, null_text, Task.MOTION_TO_VIDEO)[0]
        nothing = model(video, None, now, None, null_text, Task.VIDEO_ONLY)[0]
        video = video + (t_next - t) * (nothing + w1 * (full - no_text) + w2 * (no_text - nothing))
    return video


@torch.no_grad()
def guidance(setting: Setting) -> list[Row]:
    """A puppet's video from a motion, one clip, against three plain calls a step."""
    model, _ = weights.load_weights(WEIGHTS)
    noise, motion = torch.randn(1, puppet.LATENT_CHANNELS, 5, 8, 8), torch.randn(1, puppet.FRAMES, MOTION_DIM)
    text, null_text = puppet.encode_text(["a person in a red shirt waves the left hand", ""]).split(1)
    given, rows = (noise, motion, text, null_text), []
    for name, omegas in OMEGAS.items():
        options = dict(zip(("guidance_text", "guidance_condition"), omegas, strict=True))
        options |= {"shift": PUPPET_DEFAULTS.shift, "solver": "euler"}
        calls = {
            "ours": partial(flow.sample, model, *given, Task.MOTION_TO_VIDEO, STEPS, **options),
            "peer": partial(naive_sample, model, *given, *omegas, STEPS),
        }
        times = setting.rounds(calls, GUIDED)
        what = f"three calls a step / ours, {STEPS} guided steps, ω1 = {omegas[0]:g}, ω2 = {omegas[1]:g}"
        seconds = f"ours {figure(times['ours']).median:.3g} s"
        rows.append(Row(name, f"{what}: {seconds}", ratio(times["peer"], times["ours"])))
    return rows


def training(setting: Setting, optimizers: Callable) -> list[Row]:
    """Training steps as train.py does them, and the world that feeds them; Muon against torch's own."""
    model, extra = weights.load_weights(WEIGHTS)
    model.train().requires_grad_(True)
    codec = puppet.Codec.from_state(extra)
    device = torch.device("cpu")
    bf16 = devices.has_bf16_units(device)
    sources = open_sources(["puppet"], PUPPET, puppet.body())
    opts, step, made = optimizers(model, pretrained=False), count(), []
    micro = BATCH // devices.microbatches(BATCH, device)

    def generate() -> None:
        now = next(step)
        made[:] = [
            batches.batch(
                sources, model.motion_mean, model.motion_std, seed=0, step=now, stage=2,
                frames=puppet.FRAMES, batch=BATCH, samples=range(first, first + micro), device=device,
                codec=codec,
            ) for first in range(0, BATCH, micro)
        ]  # fmt: skip

    def train() -> None:
        for batch in made:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = flow.loss(model, *batch)
            (loss.total / len(made)).backward()
        distributed.clip(model, 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    times = setting.rounds({"world": generate, "step": train}, TRAINING)
    what = f"a training step on {BATCH} clips of {puppet.FRAMES} frames, {'bf16' if bf16 else 'fp32'}"
    rows = [
        Row("puppet_step_seconds", what, figure(times["step"])),
        Row(
            "puppet_data_ratio", "clips generated / trained on a second", ratio(times["step"], times["world"])
        ),
    ]
    return rows + muon(setting, [p for p in model.blocks.parameters() if p.ndim == 2])


def muon(setting: Setting, matrices: list[nn.Parameter]) -> list[Row]:
    """A step of kit/muon.py against torch's."""
    for p in matrices:
        p.grad = torch.randn_like(p)
    ours = Muon(matrices, weight_decay=0.01)
    peer = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    times = setting.rounds({"ours": ours.step, "peer": peer.step}, MUON)
    took = figure(times["ours"]).median
    what = f"torch.optim.Muon / ours, a step on the puppet's {len(matrices)} matrices; ours {took:.3g} s"
    return [Row("muon_speedup", what, ratio(times["peer"], times["ours"]))]

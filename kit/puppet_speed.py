"""The embedded world's speed: a guided sample, a training step, the clips that feed it, the optimizer."""

from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import flow
from dual_dit import DualDiT
from flow import Task
from kit import data, parallel, puppet, weights
from kit.backbone import PUPPET_DEFAULTS
from kit.geometry import PUPPET
from kit.muon import Muon
from kit.speed import Row, Setting
from kit.timing import figure, ratio
from motion_tokens import MOTION_DIM

WEIGHTS = Path(__file__).parent.parent / "assets" / "puppet.safetensors"
GUIDED, TRAINING, MUON = 15, 25, 8  # seconds
STEPS = 12  # of a sample, as sample.py takes them
TEXT, CONDITION = 5.0, 1.5  # ω1 and ω2: they differ, so that no term of the formula cancels
BATCH = 16  # clips a step, as train.py takes them


def naive_sample(
    model: DualDiT, video: Tensor, motion: Tensor, text: Tensor, null_text: Tensor, steps: int
) -> Tensor:
    """In-context guidance from motion to video as its formula says: three calls a step."""
    w1, w2 = TEXT, CONDITION
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
    given = noise, motion, text, null_text
    options = {"guidance_text": TEXT, "guidance_condition": CONDITION, "shift": PUPPET_DEFAULTS.shift}
    options["solver"] = "euler"
    calls = {
        "ours": lambda: flow.sample(model, *given, Task.MOTION_TO_VIDEO, STEPS, **options),
        "peer": lambda: naive_sample(model, *given, STEPS),
    }
    times = setting.rounds(calls, GUIDED)
    what = (
        f"three calls a step / ours, {STEPS} guided steps, puppet: ours {figure(times['ours']).median:.3g} s"
    )
    return [Row("iccfg_speedup", what, ratio(times["peer"], times["ours"]))]


def training(setting: Setting, optimizers: Callable) -> list[Row]:
    """Training steps as train.py does them, and the world that feeds them; Muon against torch's own."""
    model, extra = weights.load_weights(WEIGHTS)
    model.train().requires_grad_(True)
    codec = puppet.Codec.from_state(extra)
    device = torch.device("cpu")
    bf16 = parallel.faster_in_bf16(device)
    sources = data.open_sources(["puppet"], PUPPET, puppet.body())
    opts, step, made = optimizers(model, pretrained=False), count(), []

    def generate() -> None:
        clips = data.batch(
            sources, model.motion_mean, model.motion_std, seed=0, step=next(step), stage=2,
            frames=puppet.FRAMES, batch=BATCH, samples=range(BATCH), device=device, codec=codec,
        )  # fmt: skip
        made[:] = [clips]

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = flow.loss(model, *made[0])
        loss.total.backward()
        parallel.clip(model, 1.0)
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

"""What only a real GPU shows: it computes what the CPU does, in training, resuming, sampling and evaluation.

`python -m pytest tests/gpu`, with a GPU: elsewhere these tests are deselected, and the run says how many.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model
from safetensors.torch import load_file
from torch import Tensor

import flow
import train
from dual_dit import PRESETS, DualDiT
from flow import Draw, Role, Task
from kit import distributed, graphs, puppet
from kit.backbone import PUPPET_DEFAULTS, SHIPPED
from kit.data import batch as batches
from kit.data.sources import open_sources
from kit.geometry import PUPPET
from kit.weights import load_weights
from sample import denoise

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def same_noise_and_exact_products(monkeypatch):
    """Noise is a function of the seed and of the kind of device; here the CPU's counts. No TF32."""
    real = flow.noise_like
    monkeypatch.setattr(flow, "noise_like", lambda x, seeds: real(x.cpu(), seeds).to(x.device))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def batch(device: torch.device, frames: int = 17, step: int = 0) -> batches.Batch:
    _, extra = load_weights(SHIPPED, device)
    model, codec = tiny_model().to(device), puppet.Codec.from_state(extra)
    sources = open_sources(["puppet"], PUPPET, puppet.body())
    wanted = [batches.Wanted(2, step, frames, range(4))]
    return batches.read(
        sources, model.motion_mean, model.motion_std, wanted, seed=0, batch=4, device=device, codec=codec
    )[0]


def loss_and_gradients(
    model: DualDiT, given: batches.Batch, task: Task, bf16: bool = False, network: flow.Network | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Of `network`, which is the model if nothing stands for it."""
    generator = torch.Generator().manual_seed(0)
    drawn = Draw(task, *flow.draw(generator, 2, len(given.text))[1:])
    model.zero_grad(set_to_none=True)
    with torch.autocast(given.text.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        loss = flow.loss(network or model, *given, drawn).total
    loss.backward()
    found = [p.grad.cpu() if p.grad is not None else torch.zeros(()) for p in model.parameters()]
    return loss.detach().cpu(), found


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """All of them together, as one vector."""
    difference = sum((a - b).square().sum() for a, b in zip(found, expected, strict=True)).sqrt()
    assert difference <= tolerance * sum(b.square().sum() for b in expected).sqrt()


def test_a_batch_is_the_cpus():
    for ours, expected in zip(batch(GPU), batch(CPU), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("how", ("plain", "checkpointed", "compiled", "compiled, checkpointed"))
@pytest.mark.parametrize("task", Task)
def test_a_step_is_the_cpus(task, how):
    given = batch(CPU)
    expected, gradients = loss_and_gradients(tiny_model(), given, task)
    model = tiny_model().to(GPU)
    if "checkpointed" in how:
        distributed.recompute_blocks(model)
    if "compiled" in how:
        distributed.compile_blocks(model)
    on_gpu = batches.Batch(*(x.to(GPU) for x in given))
    loss, found = loss_and_gradients(model, on_gpu, task)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    close(found, gradients, 1e-3)
    loss, found = loss_and_gradients(model, on_gpu, task, bf16=True)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-2)
    close(found, gradients, 5e-2)


@pytest.mark.parametrize("bf16", (False, True))
@pytest.mark.parametrize("task", Task)
def test_a_replayed_step_is_the_launched_one(task, bf16):
    # catches inputs that a replay does not see, weights as they were when it was recorded, other gradients
    model = tiny_model().to(GPU)
    network, found = graphs.Recorded(model), []
    loss_and_gradients(model, batch(GPU, step=1), task, bf16, network)  # records
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.9)
    for called in (model, network):
        loss, gradients = loss_and_gradients(model, batch(GPU), task, bf16, called)
        found.append((loss, gradients, [p.grad is None for p in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    close(found[1][1], found[0][1], 1e-2 if bf16 else 1e-4)
    assert found[1][2] == found[0][2]


def test_passes_that_share_memory_replay_in_any_order():
    # catches memory of one pass that another has overwritten while it is needed
    model = tiny_model().to(GPU)
    network, tasks = graphs.Recorded(model), (Task.JOINT, Task.VIDEO_TO_MOTION, Task.MOTION_TO_VIDEO)
    for task in tasks:
        loss_and_gradients(model, batch(GPU, step=1), task, network=network)
    for task in (*reversed(tasks), *tasks):
        expected, gradients = loss_and_gradients(model, batch(GPU), task)
        loss, found = loss_and_gradients(model, batch(GPU), task, network=network)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        close(found, gradients, 1e-4)


def test_checkpointing_keeps_the_attention_that_ran():
    # a kernel that kit.distributed.KEPT does not name would be recomputed
    model = DualDiT(PRESETS["puppet"]).to(GPU)
    distributed.recompute_blocks(model)
    given = batches.Batch(*(x.to(GPU) for x in batch(CPU)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_and_gradients(model, given, Task.JOINT, bf16=True)
    kept = {op.name().split("::")[1].split(".")[0] for op in distributed.KEPT}
    calls = {e.key: e.count for e in profile.key_averages() if "_scaled_dot_product" in e.key}
    forward = {name: n for name, n in calls.items() if "backward" not in name}
    layers, attentions = 6, 3  # joint, and of each expert to the text
    assert {name.split("::")[1] for name in forward} <= kept
    # the profiler sees a call twice where its result is kept, and once more where that answers
    assert sum(forward.values()) == 3 * layers * attentions, calls


def test_the_optimizers_move_as_on_the_cpu():
    models, given = (tiny_model(), tiny_model().to(GPU)), batch(CPU)
    for model in models:
        device = model.motion_mean.device
        opts = train.optimizers(model, "puppet")
        for task in (Task.JOINT, Task.MOTION_TO_VIDEO):
            loss_and_gradients(model, batches.Batch(*(x.to(device) for x in given)), task)
            for optimizer in opts:
                optimizer.step()
    ours, expected = ([p.detach().cpu() for p in model.parameters()] for model in reversed(models))
    close(ours, expected, 2e-3)


@pytest.mark.parametrize("task", (Task.JOINT, Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION))
def test_a_sample_is_the_cpus(task):
    clips = puppet.clips(range(2))
    text, null_text = puppet.encode_text(clips.caption), puppet.encode_text([""])
    made = []
    for device in (CPU, GPU):
        model, extra = load_weights(SHIPPED, device)
        codec = puppet.Codec.from_state(extra)
        video = puppet.render(clips.joints, clips.betas, clips.shirt)[0].to(device)
        motion = batch(CPU).motion[:2] * model.motion_std.cpu() + model.motion_mean.cpu()
        given = {"latents": codec.encode(video), "motion": motion, "seed": 0, "grid": (5, 8, 8)}
        made.append(denoise(model, task, text, null_text, **given, **PUPPET_DEFAULTS._asdict()))
    for ours, expected, role in zip(made[1], made[0], (task.video, task.motion), strict=True):
        if role is Role.NOISY:
            torch.testing.assert_close(ours.cpu(), expected, rtol=1e-2, atol=1e-2)


def training(*arguments: object) -> None:
    call = [sys.executable, "train.py", *map(str, arguments)]
    subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_a_run_that_goes_on_is_one_that_never_stopped(tmp_path):
    # fused AdamW on a GPU takes no counter that lies on the CPU
    plan = ("--stage", 2, "--batch", 4, "--frames", 5, "--save-every", 2, "--validate-every", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training(*plan, "--steps", 4, "--init", SHIPPED, "--out", whole)
    shutil.copytree(whole, parts)
    shutil.rmtree(max((parts / "checkpoints").iterdir()))
    (parts / "weights.safetensors").unlink()
    training(*plan, "--steps", 4, "--init", SHIPPED, "--resume", "--out", parts)
    expected = load_file(whole / "weights.safetensors")
    ours = load_file(parts / "weights.safetensors")
    close([ours[k] for k in expected], list(expected.values()), 1e-3)


def test_evaluation_runs(tmp_path):
    call = [sys.executable, "-m", "study.evaluate", "--clips", "4", "--json", str(tmp_path / "scores.json")]
    subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert Path(tmp_path / "scores.json").is_file()

"""Every path runs on one device that is not the CPU, without having one; and how often the host waits for it.

Fake tensors have a device, a dtype and a shape, but no memory, and an operation on two devices raises. The
device is "cuda" where torch has one; else "meta", which torch's CPU build can differentiate too.
"""

import collections
import contextlib
import dataclasses
import functools
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dual_dit
import flow
import train
from dual_dit import PRESETS, DualDiT
from flow import Draw, Role, Task
from kit import checkpoints, data, devices, distributed, puppet, validation
from kit.data import batch as batches
from kit.data.batch import Batch
from kit.data.sources import open_sources
from kit.geometry import PUPPET
from kit.puppet import world as puppet_world
from sample import denoise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "meta")


class Watch(TorchDispatchMode):
    """Answers `.item()` of a fake tensor with a stand-in; notes where the host waits and where it uploads."""

    def __init__(self):
        super().__init__()
        self.waits, self.uploads, self.waited_uploads = (collections.Counter() for _ in range(3))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self.uploads[place()] += 1
            if not kwargs.get("non_blocking"):
                self.waited_uploads[place()] += 1
        if func is not torch.ops.aten._local_scalar_dense.default or not isinstance(args[0], FakeTensor):
            return func(*args, **kwargs)
        if args[0].device.type == DEVICE.type:
            self.waits[place()] += 1
        if args[0].constant is not None:
            return args[0].constant.item()
        return 1.0 if args[0].dtype.is_floating_point else args[0].dtype is torch.bool  # all are finite


def place() -> str:
    """Which function of this repository is running."""
    root = Path(flow.__file__).parent
    others = {"tests", "site-packages"}
    calls = [(Path(f.filename), f.name) for f in traceback.extract_stack()]
    ours = [(path, name) for path, name in calls if path.is_relative_to(root)]
    own = [(path, name) for path, name in ours if not others & {*path.relative_to(root).parts}]
    return f"{own[-1][0].name}:{own[-1][1]}" if own else "?"


@pytest.fixture(scope="module")
def real_codec() -> puppet.Codec:
    return puppet.Codec.fit(range(1 << 20, (1 << 20) + 8))


@pytest.fixture
def watch(monkeypatch, real_codec):
    kept = [devices.constant, puppet_world._motion_table, dual_dit.rope_tables]
    kept += [data.sources._features, puppet.text._code]
    for cached in kept:
        cached.cache_clear()
    fresh = functools.cache(puppet.body.__wrapped__)
    for module in (puppet, puppet_world):
        monkeypatch.setattr(module, "body", fresh)
    if DEVICE.type == "meta":  # autocast does not know it, and it has no generator
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        monkeypatch.setattr(flow, "noise_like", lambda x, seeds: torch.randn_like(x))
    puppet.body("cpu")  # real
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as mode:
        yield mode
    for cached in kept:  # what is made of fakes must not stay
        cached.cache_clear()


@pytest.fixture
def model(watch) -> DualDiT:
    with DEVICE:
        return DualDiT(dataclasses.replace(PRESETS["puppet"], layers=2))


@pytest.fixture
def codec(watch, real_codec) -> puppet.Codec:
    return puppet.Codec.from_state({name: x.to(DEVICE) for name, x in real_codec.state().items()})


def given(task: Task) -> tuple:
    """Video, motion and text, where the task has them."""
    video, motion, text = (torch.randn(2, *s, device=DEVICE) for s in ((48, 5, 8, 8), (17, 235), (16, 64)))
    video = None if task.video is Role.ABSENT else video
    return video, None if task.motion is Role.ABSENT else motion, text


def there(*tensors) -> bool:
    return all(x is None or x.device.type == DEVICE.type for x in tensors)


def open_puppet() -> list:
    return open_sources(["puppet"], PUPPET, puppet.body())


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("task", Task)
def test_a_step(model, watch, task, checkpointing):
    if checkpointing:
        distributed.recompute_blocks(model)
    video, motion, text = given(Task.JOINT)
    clips = iter([Batch(video, motion, text, torch.zeros_like(text))] * 2)
    draw = Draw(task, torch.zeros(2, dtype=torch.bool), torch.rand(2), torch.arange(2))
    # catches times uploaded while the host waits, and a look at the loss before the step is on its way
    for _ in range(2):  # the first uploads what is kept
        watch.waited_uploads.clear()
        losses = train.gradients(distributed.Objective(model), clips, draw, [range(2)], bf16=True)
    norm = distributed.clip_gradients(model, 1.0)
    average = {name: x.clone() for name, x in model.state_dict().items()}
    opts = train.optimizers(model, "puppet")
    opts = opts if DEVICE.type == "cuda" else opts[:1]  # fused AdamW has no kernel for meta
    train.update(model.state_dict(), average, opts, 1e-3, train.Step(2, 0, 10, 17))
    assert there(losses, norm, *(p.grad for p in model.parameters()), *average.values())
    assert not watch.waits and not watch.waited_uploads, watch.waits + watch.waited_uploads


@pytest.mark.parametrize("task", Task)
def test_a_sample(model, watch, task):
    video, motion, text = given(task)
    options = {"steps": 2, "guidance_text": 5.0, "guidance_condition": 1.5}
    assert there(*flow.sample(model, video, motion, text, torch.zeros_like(text), task, **options))
    assert not watch.waits, watch.waits


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_a_batch(watch, model, codec, stage):
    sources, mean, std = open_puppet(), model.motion_mean, model.motion_std
    for step in (0, 1):  # the first uploads what is kept
        watch.waits.clear()
        watch.waited_uploads.clear()
        watch.uploads.clear()
        wanted = [batches.Wanted(stage, step, 17, range(4))]
        (batch,) = batches.read(sources, mean, std, wanted, seed=0, batch=4, device=DEVICE, codec=codec)
    assert there(*batch)
    # catches parents that lie on the device (46 waits), a box of pixels, numbers uploaded in every call
    assert not watch.waits and not watch.waited_uploads, watch.waits + watch.waited_uploads
    assert watch.uploads == {"devices.py:upload": 2}, watch.uploads  # the clips' draws, the texts


@pytest.mark.parametrize("task", (Task.JOINT, Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION))
def test_from_a_condition_on_the_cpu(model, task):
    video, motion, text = (torch.randn(2, *shape) for shape in ((48, 5, 8, 8), (17, 235), (16, 64)))
    assert there(denoise(model, task, text, torch.zeros_like(text), 0, (5, 8, 8), video, motion, steps=2)[0])


def test_validation(model, codec):
    _, held = validation.hold_out(open_puppet())
    held = validation.read_held_out(held[:4], model, 2, 17, codec, DEVICE)
    assert there(held.video, held.motion, held.text, held.null_text, codec.decode(held.video))
    validation.validate(model, held, flow.STAGES[2], 4, False)


def test_optimizers_go_on_where_their_parameters_are(model, monkeypatch):
    # fused AdamW on a GPU takes no counter that lies on the CPU
    slots = ("exp_avg", "exp_avg_sq", "step")
    shapes = {f"optimizer/{name}/{slot}": p.shape for name, p in model.named_parameters() for slot in slots}
    shapes = {key: torch.Size() if key.endswith("step") else shape for key, shape in shapes.items()}
    stored = {key: collections.namedtuple("Stored", "size")(shape) for key, shape in shapes.items()}
    monkeypatch.setattr(checkpoints, "_stored", lambda folder: stored)
    monkeypatch.setattr(checkpoints, "_read", lambda *args, **options: None)
    opts = train.optimizers(model, "puppet")
    checkpoints.load(Path(), model, {}, opts)
    assert there(*(value for o in opts for slots in o.state.values() for value in slots.values()))


def test_weights_in_bf16_are_not_kept_until_the_step_ends():
    # catches autocast's cache: 5 GiB of weights that are not used again (1.3B)
    cached = []

    def objective(video, motion, text, null_text, draw):
        cached.append(torch.is_autocast_cache_enabled())
        return flow.Loss(video.requires_grad_(), None)

    clips = iter([Batch(torch.ones(2), None, torch.zeros(2, 1, 1), None)])
    draw = Draw(Task.VIDEO_ONLY, torch.zeros(2, dtype=torch.bool), torch.rand(2), torch.arange(2))
    train.gradients(objective, clips, draw, [range(2)], bf16=True)
    assert cached == [False]


@pytest.mark.parametrize(
    ("device", "made", "first", "read_before"),
    [
        ("cpu", True, 0, [[0]]),
        ("cuda", False, 0, [[0], [1]]),  # a thread is one step ahead
        ("cuda", True, 0, [list(range(32))]),
        ("cuda", True, 33, [list(range(32, 40))]),  # as a run that never stopped has read them
    ],
)
def test_steps_are_read_in_order_and_as_suits_the_device(
    monkeypatch, model, device, made, first, read_before
):
    begun = []

    def read(sources, mean, std, wanted, **where) -> list[int]:
        begun.append([part.step for part in wanted])
        return begun[-1]

    monkeypatch.setattr(batches, "read", read)
    steps = [train.Step(step // 40, 0, 0, 5) for step in range(70)]
    where = {"seed": 0, "batch": 32, "device": torch.device(device), "codec": object() if made else None}
    clips = batches.stream([], model, steps, first, [range(2)], **where)
    assert next(clips) == first
    wait = time.monotonic() + 60
    while len(begun) < len(read_before) and time.monotonic() < wait:
        time.sleep(0.001)
    assert begun == read_before
    assert list(clips) == list(range(first + 1, 70))
    # catches steps of two stages, whose clips differ in kind, read together
    assert all(len({step // 40 for step in steps}) == 1 for steps in begun)

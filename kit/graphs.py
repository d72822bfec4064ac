"""CUDA graphs: a small network's passes through a GPU, recorded once and then replayed.

A step of the puppet is thousands of kernels of a few microseconds each, and its host needs longer to launch
them one by one than the GPU to run them. A recorded pass is one launch.
"""

import torch
from torch import Tensor

from dual_dit import DualDiT
from flow import Role, Task

DRY_RUNS = 3  # passes before a recording: they compile, and allocate what later passes reuse


class RecordedPass:
    """Forward and backward pass for one task and one shape, with the memory that they run in."""

    def __init__(self, model: DualDiT, task: Task, inputs: list[Tensor], pool: tuple[int, int] | None):
        self.model, self.task = model, task
        self.inputs = [x.clone() for x in inputs]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(DRY_RUNS):
                outputs = self.run_forward()
                self.run_backward(outputs, [torch.zeros_like(u) for u in outputs])
        torch.cuda.current_stream().wait_stream(side)
        # thread_local: the thread that writes a checkpoint may use the GPU meanwhile
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool, capture_error_mode="thread_local"):
            self.outputs = self.run_forward()
        self.output_gradients = [torch.empty_like(u) for u in self.outputs]
        with torch.cuda.graph(self.backward, self.forward.pool(), capture_error_mode="thread_local"):
            self.gradients = self.run_backward(self.outputs, self.output_gradients)

    def run_forward(self) -> list[Tensor]:
        """Velocities of what is noise. `inputs`: video, motion, their times, text, without what is absent."""
        tensors, roles = iter(self.inputs), (self.task.video, self.task.motion)
        inputs = [None if role is Role.ABSENT else next(tensors) for role in roles * 2]
        velocities = self.model(*inputs, next(tensors), self.task)
        return [u for u, role in zip(velocities, roles, strict=True) if role is Role.NOISY]

    def run_backward(self, outputs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradient of each trained parameter; None if the task does not use it."""
        # as in train.py, whose backward pass is outside autocast
        with torch.autocast(outputs[0].device.type, enabled=False):
            return torch.autograd.grad(outputs, self.trained, gradients, allow_unused=True)


class Replay(torch.autograd.Function):
    """A recorded pass as one operation of autograd; it sets the parameters' .grad itself."""

    @staticmethod
    def forward(ctx, anchor: Tensor, recorded: RecordedPass, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`anchor` requires a gradient, so that there is a backward pass."""
        torch._foreach_copy_(recorded.inputs, inputs)
        recorded.forward.replay()
        ctx.recorded = recorded
        return tuple(u.detach() for u in recorded.outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[None, ...]:
        recorded = ctx.recorded
        torch._foreach_copy_(recorded.output_gradients, gradients)
        recorded.backward.replay()
        for p, gradient in zip(recorded.trained, recorded.gradients, strict=True):
            p.grad = gradient
        return (None,) * (2 + len(recorded.inputs))


class Recorded:
    """Stands in for the network: records each task and shape when first called with it, then replays it.

    Weights must keep their place in memory, and the same parameters must train. .grad is set, not added to,
    so a step has one backward pass. Autocast must not cache cast weights (cache_enabled=False). A clean
    condition's velocity is None.
    """

    def __init__(self, model: DualDiT):
        self.model = model
        self.passes: dict[tuple, RecordedPass] = {}
        self.pool = None  # memory shared by all passes: none needs what another left there
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(
        self, video: Tensor | None, motion: Tensor | None, t_video: Tensor | None, t_motion: Tensor | None,
        text: Tensor, task: Task,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        inputs = [x for x in (video, motion, t_video, t_motion, text) if x is not None]
        key = task, *(x.shape for x in inputs)
        if key not in self.passes:
            self.passes[key] = RecordedPass(self.model, task, inputs, self.pool)
            self.pool = self.passes[key].forward.pool()
        velocities = iter(Replay.apply(self.anchor, self.passes[key], *inputs))
        return tuple(next(velocities) if role is Role.NOISY else None for role in (task.video, task.motion))

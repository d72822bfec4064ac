"""CUDA graphs: a small network's passes through a GPU, recorded once and then replayed.

A step of the puppet is thousands of kernels of a few microseconds each, and its host needs longer to launch
them one by one than the GPU to run them. A recorded pass is one launch.
"""

import torch
from torch import Tensor

from dual_dit import DualDiT
from flow import Role, Task

WARM_UP = 3  # passes before a recording: what is compiled or allocated once is not recorded


class Pass:
    """Forward and backward pass for one task and one shape, with the memory that they run in."""

    def __init__(self, model: DualDiT, task: Task, given: list[Tensor]):
        self.model, self.task = model, task
        self.inputs = [x.clone() for x in given]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                made = self.velocities()
                self.gradients_of(made, [torch.zeros_like(u) for u in made])
        torch.cuda.current_stream().wait_stream(side)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward):
            self.made = self.velocities()
        self.errors = [torch.empty_like(u) for u in self.made]  # d loss / d velocity
        with torch.cuda.graph(self.backward, pool=self.forward.pool()):
            self.gradients = self.gradients_of(self.made, self.errors)

    def velocities(self) -> list[Tensor]:
        """Of what is generated. `inputs`: what is there of video, motion and their times, and the text."""
        tensors, roles = iter(self.inputs), (self.task.video, self.task.motion)
        inputs = [None if role is Role.ABSENT else next(tensors) for role in roles * 2]
        made = self.model(*inputs, next(tensors), self.task)
        return [u for u, role in zip(made, roles, strict=True) if role is Role.NOISY]

    def gradients_of(self, made: list[Tensor], errors: list[Tensor]) -> tuple[Tensor | None, ...]:
        """One for each parameter that trains; None where this task does not reach it."""
        with torch.autocast(made[0].device.type, enabled=False):  # it is for forward passes
            return torch.autograd.grad(made, self.trained, errors, allow_unused=True)


class Replay(torch.autograd.Function):
    """A recorded pass to autograd; parameters get their gradients without it."""

    @staticmethod
    def forward(ctx, anchor: Tensor, recorded: Pass, *given: Tensor) -> tuple[Tensor, ...]:
        """`anchor` requires a gradient, so that there is a backward pass."""
        torch._foreach_copy_(recorded.inputs, given)
        recorded.forward.replay()
        ctx.recorded = recorded
        return tuple(u.detach() for u in recorded.made)

    @staticmethod
    def backward(ctx, *errors: Tensor) -> tuple[None, ...]:
        recorded = ctx.recorded
        torch._foreach_copy_(recorded.errors, errors)
        recorded.backward.replay()
        for p, gradient in zip(recorded.trained, recorded.gradients, strict=True):
            p.grad = gradient
        return (None,) * (2 + len(recorded.inputs))


class Recorded:
    """A network, called as itself; each task and shape is recorded when it first comes.

    Weights may change in place, but what trains may not. Gradients are set, not added, and the task's next
    backward pass overwrites them: a step can have one. The velocity of a clean condition comes as None.
    """

    def __init__(self, model: DualDiT):
        self.model = model
        self.passes: dict[tuple, Pass] = {}
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(
        self, video: Tensor | None, motion: Tensor | None, t_video: Tensor | None, t_motion: Tensor | None,
        text: Tensor, task: Task,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        given = [x for x in (video, motion, t_video, t_motion, text) if x is not None]
        key = task, *(x.shape for x in given)
        if key not in self.passes:
            self.passes[key] = Pass(self.model, task, given)
        made = iter(Replay.apply(self.anchor, self.passes[key], *given))
        return tuple(next(made) if role is Role.NOISY else None for role in (task.video, task.motion))

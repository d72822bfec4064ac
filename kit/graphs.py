"""CUDA graphs: a small network's passes through a GPU, recorded once and then replayed.

A step of the puppet is thousands of kernels of a few microseconds each, and its host needs longer to launch
them one by one than the GPU to run them. A recorded pass is one launch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dual_dit import DualDiT
from flow import Role, Task


class Pass(nn.Module):
    """The network for one task: tensors in, velocities of what is generated out."""

    def __init__(self, model: DualDiT, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What is there of video, motion, t_video and t_motion, and text."""
        task, tensors = self.task, iter(given)
        roles = task.video, task.motion
        inputs = [None if role is Role.ABSENT else next(tensors) for role in roles * 2]
        made = self.model(*inputs, next(tensors), task)
        return tuple(u for u, role in zip(made, roles, strict=True) if role is Role.NOISY)


class Recorded:
    """A network, called as itself; each task and shape is recorded when it first comes.

    Weights may change in place. What trains may not; and a gradient is overwritten by the next backward pass
    of the same task, so a step can have one such pass only. The velocity of a clean condition comes as None.
    """

    def __init__(self, model: DualDiT):
        self.model = model
        self.passes: dict[tuple, Callable] = {}

    def __call__(
        self, video: Tensor | None, motion: Tensor | None, t_video: Tensor | None, t_motion: Tensor | None,
        text: Tensor, task: Task,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        given = [x for x in (video, motion, t_video, t_motion, text) if x is not None]
        key = task, *(x.shape for x in given)
        if key not in self.passes:
            samples = tuple(x.clone() for x in given)  # they stay: each call is copied into them
            made = torch.cuda.make_graphed_callables(Pass(self.model, task), samples, allow_unused_input=True)
            self.passes[key] = made
        velocities = iter(self.passes[key](*given))
        return tuple(next(velocities) if role is Role.NOISY else None for role in (task.video, task.motion))

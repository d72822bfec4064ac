"""Flow matching over two modalities: tasks, the training recipe, in-context guidance, sampling.

A straight path runs from data x0 at t = 0 to noise ε at t = 1; the network learns its velocity:

    x_t = (1 - t)·x0 + t·ε          u = d x_t / d t = ε - x0

The paper's t runs the other way: there x0 is the noise and x1 the data, and the velocity x1 - x0 is -u.
A task says what each modality is: noise to be denoised, a clean condition, or absent. One network
trained on all of them is a model of p(video, motion | text) and of each given the other.
"""

from collections.abc import Callable, Iterable
from enum import Enum, IntEnum
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Network = Callable[..., tuple[Tensor | None, Tensor | None]]  # dual_dit.DualDiT, or what stands for it


class Role(Enum):
    NOISY = "noise"  # to be denoised
    CLEAN = "a clean condition"  # enters at t = 0; its velocity is not used
    ABSENT = "None"  # no tokens in the sequence


class Task(IntEnum):
    """What is generated from what; a task's value is its row in the task hint's embedding."""

    JOINT = 0
    MOTION_TO_VIDEO = 1
    VIDEO_TO_MOTION = 2
    MOTION_ONLY = 3
    VIDEO_ONLY = 4

    @property
    def video(self) -> Role:
        return ROLES[self][0]

    @property
    def motion(self) -> Role:
        return ROLES[self][1]

    @property
    def without_condition(self) -> "Task":
        """The task that generates the same modality with the condition absent."""
        without = {Task.MOTION_TO_VIDEO: Task.VIDEO_ONLY, Task.VIDEO_TO_MOTION: Task.MOTION_ONLY}
        return without.get(self, self)


ROLES = {  # task: (video, motion)
    Task.JOINT: (Role.NOISY, Role.NOISY),
    Task.MOTION_TO_VIDEO: (Role.NOISY, Role.CLEAN),
    Task.VIDEO_TO_MOTION: (Role.CLEAN, Role.NOISY),
    Task.MOTION_ONLY: (Role.ABSENT, Role.NOISY),
    Task.VIDEO_ONLY: (Role.NOISY, Role.ABSENT),
}


# ---------------------------------------------------------------- the training recipe (paper, section 3.2)

STAGES = {  # the tasks of a stage; each step draws one
    0: (Task.VIDEO_ONLY,),  # text -> video, as Wan was trained; for the puppet, whose Wan is made here
    1: (Task.MOTION_ONLY,),
    2: (Task.JOINT, Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION),
}
# paper is silent: the rates
DROP_TEXT = 0.1  # of samples
DROP_CONDITION = 0.1  # of steps that have a condition


class Draw(NamedTuple):
    """Everything random in one step, except the choice of clips."""

    task: Task  # of all samples: an absent modality has no tokens in any of them
    drop_text: Tensor  # (b,) bool
    # paper is silent: one noise level for both modalities, or one for each
    t: Tensor  # (b,) noise levels, of both modalities
    seeds: Tensor  # (b,) int64, of each sample's noise

    def rows(self, first: int, end: int) -> "Draw":
        """The same for samples first to end - 1."""
        return Draw(self.task, *(x[first:end] for x in self[1:]))


def draw(generator: torch.Generator, stage: int, b: int, shift: float = 1.0) -> Draw:
    """Draw a step of b samples; all randomness comes from the generator.

    Text is dropped sample by sample, a condition for the whole step:
        joint, stages 0 and 1   text at random
        motion to video         text, or text and motion, at random
        video to motion         video at random, text always
    """
    tasks = STAGES[stage]
    task = tasks[int(torch.randint(len(tasks), (1,), generator=generator))]
    drop_condition = torch.rand(1, generator=generator).item() < DROP_CONDITION
    drop_text = torch.rand(b, generator=generator) < DROP_TEXT
    t = shift_time(torch.rand(b, generator=generator), shift)
    seeds = torch.randint(2**62, (b,), generator=generator)
    if drop_condition and task.without_condition is not task:
        task, drop_text = task.without_condition, torch.ones_like(drop_text)
    if task is Task.VIDEO_TO_MOTION:
        drop_text = torch.ones_like(drop_text)
    return Draw(task, drop_text, t, seeds)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t <- s·t / (1 + (s-1)·t): s > 1 moves levels towards noise, where the coarse layout is decided."""
    return shift * t / (1 + (shift - 1) * t)


def noise_like(x: Tensor, seeds: Tensor) -> Tensor:
    """Noise of the shape of x (b ...); a sample's depends only on its seed and on the type of device."""
    generator = torch.Generator(x.device)
    rows = [
        torch.randn(x.shape[1:], generator=generator.manual_seed(s), device=x.device) for s in seeds.tolist()
    ]
    return torch.stack(rows)


class Loss(NamedTuple):
    """Squared velocity error per sample (b,), None for a modality that is not noise."""

    video: Tensor | None
    motion: Tensor | None

    @property
    def total(self) -> Tensor:
        # paper is silent: both modalities count the same
        return sum(part.mean() for part in self if part is not None)


def loss(
    model: Network, video: Tensor | None, motion: Tensor | None, text: Tensor, null_text: Tensor, drawn: Draw
) -> Loss:
    """The objective on clean latents (b c T h w) and normalised motion (b f 235).

    text (b l text_dim); null_text, the empty prompt's features, broadcasts to it. A modality that is absent
    from the task may be None.
    """
    drop_text = drawn.drop_text.to(text.device, non_blocking=True)  # the host does not wait for the copy
    text = torch.where(drop_text[:, None, None], null_text, text)
    x_video, t_video, target_video = by_role(video, drawn.t, drawn.seeds, drawn.task.video)
    # + 1: not the noise of the video
    x_motion, t_motion, target_motion = by_role(motion, drawn.t, drawn.seeds + 1, drawn.task.motion)
    u_video, u_motion = model(x_video, x_motion, t_video, t_motion, text, drawn.task)
    return Loss(squared_error(u_video, target_video), squared_error(u_motion, target_motion))


def by_role(
    x0: Tensor | None, t: Tensor, seeds: Tensor, role: Role
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """For a modality in this role: the network's input, its times (b,), and the target velocity."""
    if role is Role.ABSENT:
        return None, None, None
    t = t.to(x0.device, non_blocking=True)
    if role is Role.CLEAN:
        return x0, torch.zeros_like(t), None
    noise = noise_like(x0, seeds)
    level = t.view(-1, *[1] * (x0.ndim - 1))  # (b 1 ... 1)
    x_t = (1 - level) * x0 + level * noise
    return x_t, t, noise - x0


def squared_error(u: Tensor | None, target: Tensor | None) -> Tensor | None:
    """Mean over all axes but the first -> (b,)."""
    return None if target is None else (u.float() - target).square().flatten(1).mean(dim=1)


# ---------------------------------------------------------------- in-context guidance (equations 4 to 6)


def guided(
    model: Network, video: Tensor | None, motion: Tensor | None, t: Tensor, text: Tensor, null_text: Tensor,
    task: Task, w1: float, w2: float,
) -> Tensor:  # fmt: skip
    """Guided velocity at t (1,) of the noisy modalities -> (b, numbers): video's, then motion's.

    w1 is ω1, the weight of the text; w2 is ω2, the weight of the condition.
    """
    x, m, y, null = video, motion, text, null_text
    t_video, t_motion = (0 * t if role is Role.CLEAN else t for role in (task.video, task.motion))

    def u(x: Tensor | None, m: Tensor | None, y: Tensor) -> Tensor:
        """One network call; if the condition is left out, under the task that has none."""
        # paper is silent: the task hint of a call that leaves the condition out
        as_task = task if x is video and m is motion else task.without_condition
        times = (None if x is None else t_video), (None if m is None else t_motion)
        velocities = zip(model(x, m, *times, y, as_task), (task.video, task.motion), strict=True)
        return torch.cat([v.float().flatten(1) for v, role in velocities if role is Role.NOISY], dim=1)

    if task is Task.MOTION_TO_VIDEO:
        u_xmy, u_x = u(x, m, y), u(x, None, null)
        u_xm = u(x, m, null) if w1 != w2 else u_x  # with equal weights u_xm cancels: save the call
        return u_x + w1 * (u_xmy - u_xm) + w2 * (u_xm - u_x)  # (5)
    if task is Task.VIDEO_TO_MOTION:
        u_xm, u_m = u(x, m, null), u(None, m, null)
        return u_m + w2 * (u_xm - u_m)  # (6): no text anywhere
    u_xmy, u_xm = u(x, m, y), u(x, m, null)
    return u_xm + w1 * (u_xmy - u_xm)  # (4), and the same for one modality alone


# ---------------------------------------------------------------- sampling

# paper is silent: the solver, and whether its guidance scale 6.0 is ω1, ω2 or both
SOLVERS = {"euler": 1, "ab2": 2}  # Euler and Adams-Bashforth: their orders


@torch.no_grad()
def sample(
    model: Network,
    video: Tensor | None,
    motion: Tensor | None,
    text: Tensor,
    null_text: Tensor,
    task: Task,
    steps: int = 50,
    guidance_text: float = 6.0,
    guidance_condition: float = 6.0,
    shift: float = 8.0,
    solver: str = "ab2",
    progress: Callable[[list], Iterable] = iter,
) -> tuple[Tensor | None, Tensor | None]:
    """Follow the guided velocity from t = 1 to t = 0 -> video and motion.

    `video` and `motion` are noise if the task generates them, clean if they condition it, None if absent; a
    condition is returned unchanged. Shapes are as in `loss`. `progress` wraps the list of steps, as tqdm
    does. Steps, guidance and shift default to the paper's. ValueError if the inputs do not fit the task.
    """
    for name, x, role in (("video", video, task.video), ("motion", motion, task.motion)):
        if (x is None) != (role is Role.ABSENT):
            got = "None" if x is None else "a tensor"
            raise ValueError(f"{task.name}: {name} must be {role.value}, got {got}")
    order = SOLVERS[solver]
    times = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    previous, previous_step = None, 0.0
    for now, then in progress(list(pairwise(times))):
        t, step = text.new_tensor([now], dtype=torch.float32), then - now
        u = guided(model, video, motion, t, text, null_text, task, guidance_text, guidance_condition)
        displacement = step * u
        if order == 2 and previous_step:  # extrapolate the velocity to the middle of the step
            displacement = step * (u + step / (2 * previous_step) * (u - previous))
        if task.video is Role.NOISY:
            video = video + displacement[:, : video[0].numel()].view_as(video)
        if task.motion is Role.NOISY:
            motion = motion + displacement[:, -motion[0].numel() :].view_as(motion)
        previous, previous_step = u, step
    return video, motion


if __name__ == "__main__":
    # Two toy modalities: "motion" is an angle, "video" the point of a circle at that angle, and the "text"
    # says which half of the circle. A small MLP stands in for the network; the rest is the code above.
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the MLP is too small to gain from more
    hint = nn.Embedding(len(Task), 32)
    mlp = nn.Sequential(nn.Linear(38, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 3))

    def toy(video, motion, t_video, t_motion, text, task):
        inputs = (video, 2), (motion, 1), (t_video, 1), (t_motion, 1), (text, 1), (hint.weight[task], 32)
        rows = [torch.zeros(1, n) if x is None else x.view(-1, n) for x, n in inputs]
        u = mlp(torch.cat([row.expand(len(text), -1) for row in rows], dim=1))
        return u[:, :2], u[:, 2:]

    def circle(angle: Tensor) -> Tensor:
        return torch.cat((angle.cos(), angle.sin()), dim=1)

    def clips(n: int) -> tuple[Tensor, Tensor, Tensor]:
        half = torch.randint(2, (n, 1)) * 2.0 - 1  # +1: upper, -1: lower
        angle = half * (0.2 + 2.7 * torch.rand(n, 1))
        return circle(angle), angle, half[..., None]

    optimizer = torch.optim.Adam([*hint.parameters(), *mlp.parameters()])
    generator = torch.Generator().manual_seed(0)
    for step in range(steps := 2500):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        video, motion, text = clips(128)
        loss(toy, video, motion, text, 0 * text, draw(generator, stage=2, b=128)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    video, motion, text = clips(512)
    print("the circle's radius is 1; mean distance of the video from the point at its motion's angle:")
    for task in STAGES[2]:
        x = torch.randn_like(video) if task.video is Role.NOISY else video
        m = torch.randn_like(motion) if task.motion is Role.NOISY else motion
        x, m = sample(toy, x, m, text, 0 * text, task, 20, guidance_text=1.5, guidance_condition=1.5, shift=1)
        distance = (x - circle(m)).norm(dim=1).mean()
        line = f"{task.name.lower().replace('_', ' '):16} {distance:.3f}"
        if task is Task.JOINT:  # in the other tasks the condition decides which half
            line += f", {(x[:, 1].sign() == text[:, 0, 0]).float().mean():.0%} in the half the text says"
        print(line)

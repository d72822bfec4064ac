"""Flow matching over two modalities: noising, tasks, the objective, guidance, the solvers.

A straight path runs from data x0 at t = 0 to noise ε at t = 1; the network learns its velocity:

    x_t = (1 - t)·x0 + t·ε          u = d x_t / d t = ε - x0

A task says what each modality is: noise to be denoised, a clean condition, or absent. One network
trained on all of them is a model of p(video, motion | text) and of each given the other.
"""

from collections.abc import Callable, Iterable
from enum import Enum, IntEnum
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dual_dit import DualDiT, Prompt


class Role(Enum):
    NOISY = "generated"
    CLEAN = "condition: enters without noise, at t = 0; its output is discarded"
    ABSENT = "absent: has no tokens in the sequence"


class Task(IntEnum):
    """What is made from what; the value is the row of the network's task embedding."""

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
    def unconditional(self) -> "Task":
        """The same outputs with the condition absent: the base that guidance starts from."""
        without = {Task.MOTION_TO_VIDEO: Task.VIDEO_ONLY, Task.VIDEO_TO_MOTION: Task.MOTION_ONLY}
        return without.get(self, self)


ROLES = {  # task: (video, motion)
    Task.JOINT: (Role.NOISY, Role.NOISY),
    Task.MOTION_TO_VIDEO: (Role.NOISY, Role.CLEAN),
    Task.VIDEO_TO_MOTION: (Role.CLEAN, Role.NOISY),
    Task.MOTION_ONLY: (Role.ABSENT, Role.NOISY),
    Task.VIDEO_ONLY: (Role.NOISY, Role.ABSENT),
}


# ---------------------------------------------------------------- the objective


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t <- s·t / (1 + (s-1)·t): more of [0, 1] is spent near noise, where large signals are decided."""
    return shift * t / (1 + (shift - 1) * t)


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b 1 1 ...), to be multiplied with `like`."""
    return t.view(-1, *[1] * (like.ndim - 1))


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of every sample; t (b,)."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


class Draw(NamedTuple):
    """The randomness of one training step, drawn by the caller so that a step can be repeated."""

    noise_video: Tensor  # like the latents
    noise_motion: Tensor  # like the motion
    t_video: Tensor  # (b,), already shifted
    t_motion: Tensor  # (b,)


class Loss(NamedTuple):
    """Squared velocity error per sample (b,), None for a modality that was not generated."""

    video: Tensor | None
    motion: Tensor | None

    @property
    def total(self) -> Tensor:
        # paper is silent: both modalities count the same
        return sum(part.mean() for part in self if part is not None)


def enter(x0: Tensor, noise: Tensor, t: Tensor, role: Role) -> tuple[Tensor | None, Tensor | None]:
    """A modality as the network sees it in this role: (x_t, t)."""
    if role is Role.ABSENT:
        return None, None
    if role is Role.CLEAN:
        return x0, None  # the network takes it at t = 0, and gives nothing back
    return noised(x0, noise, t), t


def velocity_error(u: Tensor | None, x0: Tensor, noise: Tensor, role: Role) -> Tensor | None:
    if role is not Role.NOISY:
        return None
    return (u.float() - (noise - x0)).square().flatten(1).mean(dim=1)


def loss(model: DualDiT, video: Tensor, motion: Tensor, text: Tensor, task: Task, draw: Draw) -> Loss:
    """The training objective of one task on clean latents (b c t h w) and motion (b f 235), normalised.

    Absent modalities may be None. Dropped text is simply the empty caption's features in `text`.
    """
    x_video, t_video = enter(video, draw.noise_video, draw.t_video, task.video)
    x_motion, t_motion = enter(motion, draw.noise_motion, draw.t_motion, task.motion)
    u_video, u_motion = model(x_video, x_motion, t_video, t_motion, text, task)
    return Loss(
        velocity_error(u_video, video, draw.noise_video, task.video),
        velocity_error(u_motion, motion, draw.noise_motion, task.motion),
    )


# ---------------------------------------------------------------- in-context classifier-free guidance


class Velocity(NamedTuple):
    """d x / d t of both modalities; None for what does not move (a condition, or absent)."""

    video: Tensor | None
    motion: Tensor | None


class Branch(NamedTuple):
    """One call of the network in every guided step: terms of the same tokens, each with its text."""

    task: Task
    weights: list[float]  # of the n terms
    text: Prompt  # of n·b rows, term by term; read once, as it does not depend on the step


def branches(
    model: DualDiT,
    text: Tensor,
    null_text: Tensor,
    task: Task,
    guidance_text: float = 1.0,
    guidance_condition: float = 1.0,
) -> list[Branch]:
    """In-context guidance (paper, section 3.4). With y the text, m the condition, ∅ "absent":

        given a condition:  u(x,∅,∅) + ω1·(u(x,m,y) - u(x,m,∅)) + ω2·(u(x,m,∅) - u(x,∅,∅))
        otherwise:          u(x,∅)   + ω1·(u(x,y) - u(x,∅))

    text and null_text (b l text_dim); guidance_text is ω1, guidance_condition is ω2. The formula is summed
    by its terms, and a term that cancels is left out: ω1 = ω2 = 1 is the plain conditional call.
    """
    w1, w2 = guidance_text, guidance_condition
    if task.unconditional is task:
        w2 = 1.0  # there is no condition to guide by
    given = [(w, words) for w, words in ((w1, text), (w2 - w1, null_text)) if w]
    without = [(1 - w2, null_text)] if w2 != 1 else []
    return [
        Branch(of, [w for w, _ in terms], model.read_text(torch.cat([words for _, words in terms])))
        for of, terms in ((task, given), (task.unconditional, without))
        if terms
    ]


def guided(
    model: DualDiT,
    video: Tensor | None,
    motion: Tensor | None,
    t_video: float,
    t_motion: float,
    plan: list[Branch],
) -> Velocity:
    """The velocity of what is generated, summed over `branches` of the task; a condition stays at t = 0."""
    total = [None, None]
    for branch in plan:
        n, inputs, times = len(branch.weights), [], []
        roles = branch.task.video, branch.task.motion
        for x, t, role in zip((video, motion), (t_video, t_motion), roles, strict=True):
            inputs.append(None if role is Role.ABSENT else x)
            # a modality that is made already, at t = 0, is now a condition
            times.append(x.new_full((1,), t) if role is Role.NOISY and t else None)
        outputs = model(*inputs, *times, branch.text, branch.task)
        for j, (u, time) in enumerate(zip(outputs, times, strict=True)):
            if time is not None:
                terms = zip(branch.weights, u.float().chunk(n), strict=True)
                total[j] = sum((w * term for w, term in terms), start=0 if total[j] is None else total[j])
    return Velocity(*total)


# ---------------------------------------------------------------- solvers and sampling


def euler(u: Tensor, previous_u: Tensor | None, step: float, previous_step: float) -> Tensor:
    """First order: the displacement of one step with the velocity at its beginning."""
    return step * u


def adams_bashforth(u: Tensor, previous_u: Tensor | None, step: float, previous_step: float) -> Tensor:
    """Second order, multistep: extrapolate the velocity to the middle of the step, at no extra call."""
    if not previous_step:
        return step * u
    return step * (u + (u - previous_u) * (step / (2 * previous_step)))


SOLVERS = {"euler": euler, "ab2": adams_bashforth}


class Sample(NamedTuple):
    video: Tensor | None
    motion: Tensor | None
    trajectory: list[tuple[Tensor | None, Tensor | None]]  # states from noise to sample, if asked for


def clocks(steps: int, shift: float, lead: float) -> list[tuple[float, float]]:
    """(t_video, t_motion) on the way from (1, 1) to (0, 0), on which each takes `steps` steps.

    Video is pure noise for the first share `lead` of the way, and motion is done for the last: 0 is one clock
    for both, with 0.5 motion is made first, and then video as if from given motion.
    """
    # paper is silent: one clock, or motion first; a network with a time for each modality can do both
    way = torch.linspace(0, 1, round(steps / (1 - lead)) + 1, dtype=torch.float64)
    t_video = 1 - (way - lead).clamp(min=0) / (1 - lead)
    t_motion = 1 - (way / (1 - lead)).clamp(max=1)
    return list(zip(*(shift_time(t, shift).tolist() for t in (t_video, t_motion)), strict=True))


@torch.no_grad()
def sample(
    model: DualDiT,
    video: Tensor | None,
    motion: Tensor | None,
    text: Tensor,
    null_text: Tensor,
    task: Task,
    steps: int = 30,
    guidance_text: float = 1.0,
    guidance_condition: float = 1.0,
    shift: float = 1.0,
    lead: float = 0.0,
    solver: str = "ab2",
    keep_trajectory: bool = False,
    progress: Callable[[list], Iterable] = iter,
) -> Sample:
    """Follow the guided velocity from t = 1 to t = 0.

    `video` and `motion` are noise where the task generates, clean where it conditions, None where
    absent; a condition comes back as it went in. The solvers see one modality at a time. Each takes `steps`
    steps; `lead` is how far motion is ahead of video where both are generated (see clocks). `progress` is
    what the steps go through, such as tqdm.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(SOLVERS)}")
    if not 0 <= lead <= 0.5:
        raise ValueError(f"lead must be from 0 (one clock) to 0.5 (motion first, then video), got {lead}")
    for name, x, role in (("video", video, task.video), ("motion", motion, task.motion)):
        if (x is None) != (role is Role.ABSENT):
            raise ValueError(
                f"{task.name}: {name} is {role.value}, got {'nothing' if x is None else 'a tensor'}"
            )
    plan = branches(model, text, null_text, task, guidance_text, guidance_condition)
    times = clocks(steps, shift, lead if task is Task.JOINT else 0.0)
    state, previous, previous_step = (video, motion), (None, None), (0.0, 0.0)
    trajectory = [state] if keep_trajectory else []
    for t, t_next in progress(list(pairwise(times))):
        velocity = guided(model, *state, *t, plan)
        step = [after - before for before, after in zip(t, t_next, strict=True)]
        state = tuple(
            x if u is None else x + SOLVERS[solver](u, *last)
            for x, u, *last in zip(state, velocity, previous, step, previous_step, strict=True)
        )
        previous, previous_step = velocity, step
        if keep_trajectory:
            trajectory.append(state)
    return Sample(*state, trajectory)


if __name__ == "__main__":

    class Toy:
        """Stands for the network and says what it was given."""

        def read_text(self, text):
            return text

        def __call__(self, video, motion, t_video, t_motion, text, task):
            for y in text:
                m, y = ("∅" if motion is None else "m"), ("y" if y.any() else "∅")
                print(f"  u(x, {m}, {y}) at t = {t_video[0]:g}")
            return torch.cat([torch.zeros_like(video)] * len(text)), None

    video, motion, text = torch.randn(1, 48, 5, 8, 8), torch.randn(1, 17, 235), torch.ones(1, 16, 64)
    for w1, w2 in ((1.0, 1.0), (1.5, 1.5), (5.0, 1.5)):
        print(f"motion to video, ω1 = {w1}, ω2 = {w2}: the terms that do not cancel")
        terms = branches(Toy(), text, torch.zeros_like(text), Task.MOTION_TO_VIDEO, w1, w2)
        guided(Toy(), video, motion, 0.5, 0.0, terms)

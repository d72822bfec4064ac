import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import flow
from dual_dit import DualDiT, DualDiTConfig
from flow import Draw, Role, Task
from motion_tokens import MOTION_DIM

B = 3
every_task = pytest.mark.parametrize("task", Task, ids=[task.name for task in Task])
every_solver = pytest.mark.parametrize("solver", flow.SOLVERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*roles: Role) -> list[Tensor | None]:
    """Small stand-ins for video (b c t h w) and motion (b f 235), None where absent."""
    shapes = ((B, 2, 1, 2, 2), (B, 1, 4))
    return [
        None if role is Role.ABSENT else torch.randn(shape) for shape, role in zip(shapes, roles, strict=True)
    ]


def draw() -> Draw:
    return Draw(*randn(Role.NOISY, Role.NOISY), torch.rand(B), torch.rand(B))


TEXT = torch.arange(1.0, B + 1).view(B, 1, 1).expand(B, 5, 8)  # a caption for each sample
NULL = torch.zeros(B, 5, 8)


class Spy:
    """A model that writes down, row by row, what it is asked, and answers with a function of just that.

    Rows, not calls: equal-shaped terms may share one batched call.
    """

    def __init__(self):
        self.rows, self.read = [], []

    def read_text(self, text):
        self.read.append(text)
        return text

    def __call__(self, video, motion, t_video, t_motion, text, task):
        answers = []
        for i, words in enumerate(text):  # several for each sample, text after text
            row = (
                Task(task),
                *(None if x is None else x[i % B] for x in (video, motion)),
                *(
                    None if x is None else 0.0 if t is None else t[i % len(t)].item()
                    for x, t in ((video, t_video), (motion, t_motion))
                ),
                words.mean().item(),
            )
            self.rows.append(row)
            answers.append(answer(*row))
        parts = zip(zip(*answers, strict=True), (t_video, t_motion), strict=True)
        return tuple(None if t is None else torch.stack(part) for part, t in parts)

    def terms(self) -> list[tuple]:
        """The rows without their tensors: (task, video there?, motion there?, t_video, t_motion, text)."""
        rows = [(row[0].name, row[1] is not None, row[2] is not None, *row[3:]) for row in self.rows]
        return sorted(rows, key=str)


class Knows(Spy):
    """A model with this velocity, a function of what the network is given."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def __call__(self, *given):
        return self.velocity(*given)


def guided(model, video, motion, task: Task, *weights: float) -> flow.Velocity:
    return flow.guided(model, video, motion, 0.75, 0.75, flow.branches(model, TEXT, NULL, task, *weights))


def answer(task, video, motion, t_video, t_motion, text):
    """Velocities of one row, as different for different questions as can be."""
    seen = sum(weight * x.sum() for weight, x in ((1, video), (3, motion)) if x is not None)
    mixed = torch.sin(seen + 5 * (t_video or 0) + 7 * (t_motion or 0) + 2 * text + task)
    u_video = None if video is None else video * mixed + 1
    u_motion = None if motion is None else motion * mixed.cos() - 1
    return u_video, u_motion


# ---------------------------------------------------------------- the path


def test_path_runs_from_data_to_noise_at_its_velocity():
    x0, noise = torch.randn(2, B, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)  # one for each sample
    x, velocity = torch.func.jvp(lambda t: flow.noised(x0, noise, t), (t,), (torch.ones(B).double(),))
    assert torch.equal(x[0], x0[0]) and torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], 0.7 * x0[1] + 0.3 * noise[1])
    torch.testing.assert_close(velocity, noise - x0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
def test_shift_multiplies_the_odds_of_noise(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = flow.shift_time(t, shift)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()
    odds = t[1:-1] / (1 - t[1:-1])
    torch.testing.assert_close(shifted[1:-1] / (1 - shifted[1:-1]), shift * odds)


# ---------------------------------------------------------------- the objective


@every_task
def test_loss_enters_conditions_clean_and_noise_at_its_own_time(task):
    video, motion = randn(task.video, task.motion)
    step, spy = draw(), Spy()
    flow.loss(spy, video, motion, TEXT, task, step)
    assert len(spy.rows) == B
    for i, (row_task, *entered, text) in enumerate(spy.rows):
        assert row_task is task and text == i + 1
        for j, (x0, role) in enumerate(((video, task.video), (motion, task.motion))):
            x, t = entered[j], entered[2 + j]
            if role is Role.ABSENT:
                assert x is None and t is None
            elif role is Role.CLEAN:
                assert torch.equal(x, x0[i]) and t == 0
            else:
                drawn = step[2 + j][i]
                assert t == drawn.item()
                torch.testing.assert_close(x, (1 - drawn) * x0[i] + drawn * step[j][i])


@every_task
def test_loss_is_each_samples_mean_squared_velocity_error(task):
    video, motion = randn(task.video, task.motion)
    step = draw()
    outputs = randn(Role.NOISY, Role.NOISY)
    got = flow.loss(lambda *_: outputs, video, motion, TEXT, task, step)
    total = 0.0
    for part, u, x0, noise, role in zip(
        got, outputs, (video, motion), step[:2], (task.video, task.motion), strict=True
    ):
        if role is not Role.NOISY:
            assert part is None
            continue
        by_hand = [((u[i] - (noise[i] - x0[i])) ** 2).sum().item() / u[i].numel() for i in range(B)]
        torch.testing.assert_close(part, torch.tensor(by_hand))
        total += sum(by_hand) / B
    assert got.total.item() == pytest.approx(total)


def test_right_velocity_has_no_loss():
    video, motion = randn(Role.NOISY, Role.NOISY)
    step = draw()
    right = step.noise_video - video, step.noise_motion - motion
    assert flow.loss(lambda *_: right, video, motion, TEXT, Task.JOINT, step).total == 0


@pytest.mark.parametrize("task", [Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION])
@pytest.mark.parametrize("garbage", [0.0, 1e6, math.nan])
def test_output_of_a_condition_is_not_in_the_loss(task, garbage):
    step, (video, motion) = draw(), randn(Role.NOISY, Role.NOISY)
    outputs = [x.requires_grad_() for x in randn(Role.NOISY, Role.NOISY)]
    condition = 1 if task is Task.MOTION_TO_VIDEO else 0
    expected = flow.loss(lambda *_: outputs, video, motion, TEXT, task, step).total.item()
    with torch.no_grad():
        outputs[condition].fill_(garbage)
    total = flow.loss(lambda *_: outputs, video, motion, TEXT, task, step).total
    assert total.item() == expected > 0
    total.backward()
    assert outputs[condition].grad is None and outputs[1 - condition].grad.any()


# ---------------------------------------------------------------- in-context guidance

V, M, MV, VM, J = (Task(i).name for i in (4, 3, 1, 2, 0))
# (task, video there?, motion there?, t_video, t_motion, caption?) of each term
TERMS = {
    Task.MOTION_TO_VIDEO: [
        (MV, True, True, 0.75, 0.0, True),
        (MV, True, True, 0.75, 0.0, False),
        (V, True, False, 0.75, None, False),
    ],
    Task.VIDEO_TO_MOTION: [
        (VM, True, True, 0.0, 0.75, True),
        (VM, True, True, 0.0, 0.75, False),
        (M, False, True, None, 0.75, False),
    ],
    Task.JOINT: [(J, True, True, 0.75, 0.75, True), (J, True, True, 0.75, 0.75, False)],
    Task.MOTION_ONLY: [(M, False, True, None, 0.75, True), (M, False, True, None, 0.75, False)],
    Task.VIDEO_ONLY: [(V, True, False, 0.75, None, True), (V, True, False, 0.75, None, False)],
}


@every_task
def test_guidance_asks_for_the_terms_of_the_paper_once_each(task):
    spy = Spy()
    guided(spy, *randn(task.video, task.motion), task, 3.0, 2.0)
    expected = [(*term[:-1], i + 1.0 if term[-1] else 0.0) for term in TERMS[task] for i in range(B)]
    assert spy.terms() == sorted(expected, key=str)


@every_task
@pytest.mark.parametrize(("w1", "w2"), [(3.0, 2.0), (1.0, 2.0), (3.0, 1.0), (0.0, 0.0), (5.0, 0.0)])
def test_guidance_combines_them_by_the_formula(task, w1, w2):
    video, motion = randn(task.video, task.motion)
    got = guided(Spy(), video, motion, task, w1, w2)
    for i in range(B):

        def u(term: tuple, i=i) -> tuple[Tensor | None, Tensor | None]:
            name, has_video, has_motion, t_video, t_motion, caption = term
            x, m = video[i] if has_video else None, motion[i] if has_motion else None
            return answer(Task[name], x, m, t_video, t_motion, i + 1.0 if caption else 0.0)

        for j, role in enumerate((task.video, task.motion)):
            if role is not Role.NOISY:
                assert got[j] is None
                continue
            full, textless, *bare = (u(term)[j] for term in TERMS[task])
            if bare:
                expected = bare[0] + w1 * (full - textless) + w2 * (textless - bare[0])
            else:
                expected = textless + w1 * (full - textless)
            torch.testing.assert_close(got[j][i], expected, atol=1e-5, rtol=1e-5)


@every_task
def test_guidance_of_one_is_the_conditional_call(task):
    inputs, spy = randn(task.video, task.motion), Spy()
    got = guided(spy, *inputs, task)
    assert {row[0] for row in spy.rows} == {task} and {row[-1] for row in spy.rows} == {1, 2, 3}
    for i in range(B):
        _, *question = spy.rows[i]
        for u, expected, role in zip(got, answer(task, *question), (task.video, task.motion), strict=True):
            assert u is None if role is not Role.NOISY else torch.equal(u[i], expected)


@every_task
def test_text_is_read_once_a_prompt(task):
    spy = Spy()
    solve(spy, randn(task.video, task.motion), task, steps=5, guidance_text=3.0, guidance_condition=2.0)
    assert len(spy.read) == len({row[0] for row in spy.rows})


def network() -> DualDiT:
    config = DualDiTConfig(layers=2, width=48, heads=4, ffn=80, channels=4, text_dim=8, freq_dim=16)
    model = DualDiT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


@every_task
@torch.no_grad()
def test_guidance_of_the_network_is_the_sum_of_plain_calls(task):
    # catches rows that get another term's text, time or weight when they share a batch
    model, w1, w2 = network().double(), 3.0, 2.0
    video, motion = torch.randn(B, 4, 2, 4, 4).double(), torch.randn(B, 5, MOTION_DIM).double()
    text, t = torch.randn(B, 6, 8).double(), torch.full((B,), 0.75).double()
    given = [
        x if role is not Role.ABSENT else None for x, role in ((video, task.video), (motion, task.motion))
    ]
    plan = flow.branches(model, text, 0 * text, task, w1, w2)
    got = flow.guided(model, *given, 0.75, 0.75, plan)

    def u(task: Task, text: Tensor) -> list[Tensor | None]:
        """One term by a plain call of the network."""
        roles = task.video, task.motion
        inputs = [None if role is Role.ABSENT else x for x, role in zip((video, motion), roles, strict=True)]
        return model(*inputs, *(0 * t if role is Role.CLEAN else t for role in roles), text, task)

    alone = task.unconditional
    for x, full, textless, bare, role in zip(
        got, u(task, text), u(task, 0 * text), u(alone, 0 * text), (task.video, task.motion), strict=True
    ):
        if role is not Role.NOISY:
            assert x is None
            continue
        expected = textless + w1 * (full - textless)
        if alone is not task:
            expected = bare + w1 * (full - textless) + w2 * (textless - bare)
        torch.testing.assert_close(x, expected.float(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the solvers


def clock(x: Tensor | None, t: Tensor | None, velocity) -> Tensor | None:
    return None if x is None or t is None else velocity(x, t.view(-1, *[1] * (x.ndim - 1)))


def ode(velocity_video, velocity_motion):
    """A model that knows two ordinary differential equations."""
    return Knows(
        lambda video, motion, t_video, t_motion, text, task: (
            clock(video, t_video, velocity_video),
            clock(motion, t_motion, velocity_motion),
        )
    )


def solve(model, state: list[Tensor | None], task=Task.JOINT, **options) -> flow.Sample:
    return flow.sample(model, *state, TEXT, NULL, task, **options)


@pytest.mark.parametrize("lead", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_convergence(solver, order, shift, lead):
    # u = x² cos t has 1/x(0) = 1/x(1) + sin 1, and u = -2tx has x(0) = e·x(1)
    model = ode(lambda x, t: x.square() * t.cos(), lambda x, t: -2 * t * x)
    start = [x.abs().double() + 0.5 for x in randn(Role.NOISY, Role.NOISY)]
    exact = 1 / (1 / start[0] + math.sin(1)), math.e * start[1]
    errors = []
    for steps in (12, 24, 48):
        got = solve(model, start, steps=steps, shift=shift, solver=solver, lead=lead)
        errors.append([(x - y).abs().max().item() for x, y in zip(got[:2], exact, strict=True)])
    for video_and_motion in pairwise(errors):
        for coarse, fine in zip(*video_and_motion, strict=True):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert max(errors[-1]) < 0.1**order


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_ab2_is_exact_for_linear_velocities_after_its_first_step(shift):
    # catches coefficients that hold for equal steps only: those keep the order, but lose this
    steps, slope = 6, 1.5
    video, _ = randn(Role.NOISY, Role.ABSENT)
    model = ode(lambda x, t: 0.5 + slope * t + 0 * x, None)
    got = solve(model, [video.double(), None], Task.VIDEO_ONLY, steps=steps, shift=shift, solver="ab2").video
    t = (steps - 1) / steps
    first_step = 1 - shift * t / (1 + (shift - 1) * t)
    exact = video.double() - 0.5 - slope / 2
    torch.testing.assert_close(got, exact - slope * first_step**2 / 2, atol=1e-6, rtol=0)


@every_task
@every_solver
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (7, 5.0)])
def test_velocity_of_the_path_leads_from_noise_to_data(task, solver, steps, shift):
    data, state = randn(task.video, task.motion), randn(task.video, task.motion)
    velocity = [None if x is None else noise - x for x, noise in zip(data, state, strict=True)]
    got = solve(Knows(lambda *_: velocity), state, task, steps=steps, shift=shift, solver=solver)
    assert got.trajectory == []
    for x, x0, entered, role in zip(got[:2], data, state, (task.video, task.motion), strict=True):
        if role is Role.ABSENT:
            assert x is None
        elif role is Role.CLEAN:
            assert torch.equal(x, entered)
        else:
            torch.testing.assert_close(x, x0, atol=1e-5, rtol=1e-5)


@every_task
def test_trajectory_runs_from_noise_to_sample_in_straight_steps(task):
    state = randn(task.video, task.motion)
    before = [None if x is None else x.clone() for x in state]
    velocity = randn(task.video, task.motion)
    got = solve(Knows(lambda *_: velocity), state, task, steps=4, shift=3.0, keep_trajectory=True)
    assert len(got.trajectory) == 5
    # t = 1, ¾, ½, ¼, 0 after the shift s·t / (1 + (s-1)·t)
    for visited, t in zip(got.trajectory, (1, 0.9, 0.75, 0.5, 0), strict=True):
        for x, x1, u, role in zip(visited, before, velocity, (task.video, task.motion), strict=True):
            if role is Role.NOISY:
                torch.testing.assert_close(x, x1 - (1 - t) * u)
            else:
                assert x is x1 is None or torch.equal(x, x1)
    for ends in ((got.trajectory[0], before), (got.trajectory[-1], got[:2])):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_sampling_asks_at_the_shifted_times_and_guides_every_step():
    spy, (video, motion) = Spy(), randn(Role.NOISY, Role.NOISY)
    solve(spy, [video, motion], Task.MOTION_TO_VIDEO, steps=4, shift=3.0, guidance_text=3.0)
    times = sorted({row[3] for row in spy.rows})
    assert times == pytest.approx([0.5, 0.75, 0.9, 1.0])
    assert {row[4] for row in spy.rows if row[2] is not None} == {0.0}
    assert len(spy.rows) == 4 * 2 * B


@pytest.mark.parametrize(
    ("lead", "t_video", "t_motion"),
    [
        (0.0, (1, 0.75, 0.5, 0.25), (1, 0.75, 0.5, 0.25)),
        (0.25, (1, 1, 2 / 3, 1 / 3), (1, 2 / 3, 1 / 3, 0)),
        (0.5, (1, 1, 1, 0.5), (1, 0.5, 0, 0)),
    ],
)
def test_in_joint_sampling_motion_is_ahead(lead, t_video, t_motion):
    spy, noise = Spy(), randn(Role.NOISY, Role.NOISY)
    solve(spy, noise, steps=round(4 * (1 - lead)), lead=lead, guidance_text=2.0)
    assert [row[3] for row in spy.rows[:: 2 * B]] == pytest.approx(t_video)
    assert [row[4] for row in spy.rows[:: 2 * B]] == pytest.approx(t_motion)
    # nothing is ahead of a condition: both clocks of the other tasks are the plain one
    spy = Spy()
    solve(spy, noise, Task.MOTION_TO_VIDEO, steps=4, lead=lead)
    assert [row[3] for row in spy.rows[::B]] == [1, 0.75, 0.5, 0.25]


@torch.no_grad()
def test_motion_that_is_made_is_only_read():
    # catches its last block being computed for nothing, and another time than 0 for it
    model, t = network(), torch.full((B,), 0.75)
    video, motion = torch.randn(B, 4, 2, 4, 4), torch.randn(B, 5, MOTION_DIM)
    text = torch.randn(B, 6, 8)
    got = flow.guided(model, video, motion, 0.75, 0.0, flow.branches(model, text, text, Task.JOINT))
    assert got.motion is None
    torch.testing.assert_close(got.video, model(video, motion, t, 0 * t, text, Task.JOINT)[0])


@every_task
@every_solver
def test_same_noise_gives_the_same_sample(task, solver):
    model = network()
    noise = [
        None if task.video is Role.ABSENT else torch.randn(B, 4, 2, 4, 4),
        None if task.motion is Role.ABSENT else torch.randn(B, 5, MOTION_DIM),
    ]
    entered = [None if x is None else x.clone() for x in noise]
    options = dict(steps=3, shift=3.0, guidance_text=3.0, guidance_condition=2.0, solver=solver)
    first, second = (solve(model, noise, task, **options) for _ in range(2))
    for x, y, x1, role in zip(first[:2], second[:2], entered, (task.video, task.motion), strict=True):
        if role is Role.ABSENT:
            assert x is None
            continue
        assert torch.equal(x, y) and x.isfinite().all() and not x.requires_grad
        assert torch.equal(x, x1) == (role is Role.CLEAN)


@pytest.mark.parametrize(
    ("task", "absent", "options", "message"),
    [
        (Task.JOINT, (), {"solver": "heun"}, "unknown solver 'heun': choose one of euler, ab2"),
        (Task.JOINT, (), {"steps": 0}, "steps must be at least 1, got 0"),
        (Task.JOINT, (), {"lead": 0.6}, "lead must be from 0 .* to 0.5 .*, got 0.6"),
        (Task.MOTION_TO_VIDEO, ("motion",), {}, "MOTION_TO_VIDEO: motion is condition.*got nothing"),
        (Task.VIDEO_TO_MOTION, ("video",), {}, "VIDEO_TO_MOTION: video is condition.*got nothing"),
        (Task.JOINT, ("video",), {}, "JOINT: video is generated, got nothing"),
        (Task.MOTION_ONLY, (), {}, "MOTION_ONLY: video .*no tokens.*got a tensor"),
        (Task.VIDEO_ONLY, (), {}, "VIDEO_ONLY: motion .*no tokens.*got a tensor"),
    ],
)
def test_impossible_requests_are_refused(task, absent, options, message):
    state = [
        None if name in absent else x
        for name, x in zip(("video", "motion"), randn(Role.NOISY, Role.NOISY), strict=True)
    ]
    with pytest.raises(ValueError, match=message):
        solve(Spy(), state, task, **options)

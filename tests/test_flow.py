"""flow.py: guidance by the calls it makes, the training recipe, a step, the solvers."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import flow
from flow import Draw, Role, Task

B = 3
every_task = pytest.mark.parametrize("task", Task, ids=[task.name for task in Task])
TEXT, NULL = torch.ones(B, 5, 8), torch.zeros(B, 5, 8)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*roles: Role) -> list[Tensor | None]:
    """Small stand-ins for video (b c T h w) and motion (b f 235), None where absent."""
    shapes = ((B, 2, 1, 2, 2), (B, 2, 4))
    return [
        None if role is Role.ABSENT else torch.randn(shape) for shape, role in zip(shapes, roles, strict=True)
    ]


# ---------------------------------------------------------------- what the network is asked

# A call: (task, is the video there, is the motion there, is it the text rather than the null text).
JOINT = (Task.JOINT, True, True, True)
M2V = (Task.MOTION_TO_VIDEO, True, True, True)
V2M = (Task.VIDEO_TO_MOTION, True, True, True)
VIDEO = (Task.VIDEO_ONLY, True, False, True)
MOTION = (Task.MOTION_ONLY, False, True, True)


def textless(call: tuple) -> tuple:
    return (*call[:3], False)


class Recorder:
    """Stands for the network: writes down what it is asked, and answers each new call with a new unit vector.

    So what is made of the answers has, at index k, the weight of the k-th call.
    """

    def __init__(self):
        self.calls, self.times = [], []

    def __call__(self, video, motion, t_video, t_motion, text, task):
        assert (t_video is None, t_motion is None) == (video is None, motion is None)
        call = (Task(task), video is not None, motion is not None, bool(text.any()))
        assert torch.equal(text, TEXT if call[3] else NULL)
        self.calls.append(call)
        self.times.append(tuple(None if t is None else t.item() for t in (t_video, t_motion)))
        unit = torch.eye(8)[list(dict.fromkeys(self.calls)).index(call)]
        answers = (None if x is None else unit.view(1, *x.shape[1:]).expand(x.shape) for x in (video, motion))
        return tuple(answers)


GUIDED = {  # every call with its weight, from equations 4 to 6; None: is not made
    Task.JOINT: lambda w1, w2: {JOINT: w1, textless(JOINT): 1 - w1},
    Task.MOTION_TO_VIDEO: lambda w1, w2: {
        M2V: w1,
        textless(M2V): None if w1 == w2 else w2 - w1,
        textless(VIDEO): 1 - w2,
    },
    Task.VIDEO_TO_MOTION: lambda w1, w2: {textless(V2M): w2, textless(MOTION): 1 - w2},
    Task.VIDEO_ONLY: lambda w1, w2: {VIDEO: w1, textless(VIDEO): 1 - w1},
    Task.MOTION_ONLY: lambda w1, w2: {MOTION: w1, textless(MOTION): 1 - w1},
}


@every_task
@pytest.mark.parametrize(("w1", "w2"), [(6.0, 6.0), (3.0, 2.0), (1.5, 4.0), (1.0, 0.0)])
def test_guidance_makes_these_calls_with_these_weights(task, w1, w2):
    # catches a wrong weight, text in video to motion, text that stays where motion is dropped, a condition
    # with noise or at another time than 0
    start = randn(task.video, task.motion)
    network, options = Recorder(), {"guidance_text": w1, "guidance_condition": w2}
    made = flow.sample(network, *start, TEXT, NULL, task, steps=1, shift=1.0, **options)  # x0 = x1 - u
    expected = {call: w for call, w in GUIDED[task](w1, w2).items() if w is not None}
    assert sorted(network.calls) == sorted(expected)
    for call, times in zip(network.calls, network.times, strict=True):
        for there, t, role in zip(call[1:3], times, (task.video, task.motion), strict=True):
            assert t == (None if not there else 0.0 if role is Role.CLEAN else 1.0)
    weights = torch.tensor([expected[call] for call in network.calls] + [0] * (8 - len(expected)))
    for before, after, role in zip(start, made, (task.video, task.motion), strict=True):
        if role is Role.NOISY:
            velocity = (before - after).flatten(1)
            torch.testing.assert_close(velocity, weights.expand(B, 8), atol=1e-5, rtol=0)
        else:
            assert after is before


TRAINED = {  # rate of every call in training, of samples, stage by stage
    0: {VIDEO: 0.9, textless(VIDEO): 0.1},
    1: {MOTION: 0.9, textless(MOTION): 0.1},
    2: {
        JOINT: 0.9 / 3,
        textless(JOINT): 0.1 / 3,
        M2V: 0.9 * 0.9 / 3,
        textless(M2V): 0.9 * 0.1 / 3,  # text alone is dropped
        textless(VIDEO): 0.1 / 3,  # text and motion together
        textless(V2M): 0.9 / 3,  # never has text
        textless(MOTION): 0.1 / 3,
    },
}


@pytest.mark.parametrize("stage", TRAINED)
def test_training_draws_every_call_at_its_rate(stage):
    # catches text in video to motion, motion dropped but not the text, a modality that is there though absent
    generator, counted = torch.Generator().manual_seed(0), Counter()

    def network(video, motion, t_video, t_motion, text, task):
        for words in text:
            counted[(Task(task), video is not None, motion is not None, bool(words.any()))] += 1
        return video, motion

    for _ in range(4000):
        draw = flow.draw(generator, stage, B)
        flow.loss(network, *randn(Role.NOISY, Role.NOISY), TEXT, NULL, draw)
    rates = {call: count / counted.total() for call, count in counted.items()}
    # the text is drawn for each sample, the rest for all three: spreads of at most 0.008
    assert rates == pytest.approx(TRAINED[stage], abs=0.025)
    assert all(rate == pytest.approx(TRAINED[stage][call], rel=0.25) for call, rate in rates.items())


# ---------------------------------------------------------------- a step


def test_a_draw_is_a_function_of_the_generator():
    one, same = (flow.draw(torch.Generator().manual_seed(3), 2, 64, shift=8.0) for _ in range(2))
    assert one.task is same.task and all(torch.equal(a, b) for a, b in zip(one[1:], same[1:], strict=True))
    other = flow.draw(torch.Generator().manual_seed(4), 2, 64, shift=8.0)
    assert not (one.seeds == other.seeds).any() and len(one.seeds.unique()) == 64
    part = one.rows(2, 5)
    assert part.task is one.task and torch.equal(part.t, one.t[2:5])


def test_noise_of_a_sample_depends_on_its_seed_alone():
    # catches noise that depends on the batch: ranks and microbatches would train on another one
    seeds = torch.tensor([5, 6, 2**61])
    noise = flow.noise_like(torch.empty(3, 4, 500), seeds)
    assert torch.equal(noise[1:2], flow.noise_like(torch.empty(1, 4, 500), seeds[1:2]))
    assert noise.std() == pytest.approx(1, abs=0.03) and noise.mean() == pytest.approx(0, abs=0.03)
    assert (noise[0] * noise[1]).mean().abs() < 0.1


def test_noise_levels_are_shifted():
    t = flow.draw(torch.Generator().manual_seed(0), 2, 20_000, shift=8.0).t
    # 8t / (1 + 7t) has its median at 8/9
    assert t.median().item() == pytest.approx(8 / 9, abs=0.005) and 0 <= t.min() < t.max() <= 1


@every_task
def test_a_step_asks_for_the_velocity_at_a_point_of_the_path_and_its_loss_is_the_squared_error(task):
    # catches a condition with noise or with a loss, noise shared by the modalities, a wrong target, samples
    # averaged before their time, text that is dropped for all samples
    video, motion = randn(task.video, task.motion)
    roles, asked, total = (task.video, task.motion), [], 0.0
    outputs = randn(Role.NOISY, Role.NOISY)
    outputs = [u if role is Role.NOISY else u * math.nan for u, role in zip(outputs, roles, strict=True)]
    draw = Draw(task, torch.tensor([True, False, True]), torch.rand(B), torch.randint(2**62, (B,)))
    got = flow.loss(lambda *given: asked.append(given) or outputs, video, motion, TEXT, NULL, draw)
    ((x_video, x_motion, t_video, t_motion, text, asked_task),) = asked
    assert asked_task is task and text.mean(dim=(1, 2)).tolist() == [0, 1, 0]
    for role, x0, x, t, seeds, u, part in (
        (task.video, video, x_video, t_video, draw.seeds, outputs[0], got.video),
        (task.motion, motion, x_motion, t_motion, draw.seeds + 1, outputs[1], got.motion),
    ):
        if role is Role.NOISY:
            noise = flow.noise_like(x0, seeds)
            assert torch.equal(t, draw.t)  # one for both
            for i in range(B):
                torch.testing.assert_close(x[i], (1 - t[i]) * x0[i] + t[i] * noise[i])
            by_hand = [((u[i] - (noise[i] - x0[i])) ** 2).sum().item() / u[i].numel() for i in range(B)]
            torch.testing.assert_close(part, torch.tensor(by_hand))
            total += sum(by_hand) / B
        elif role is Role.CLEAN:
            assert part is None and torch.equal(x, x0) and not t.any()
        else:
            assert part is x is t is None
    assert got.total.item() == pytest.approx(total)


# ---------------------------------------------------------------- the solvers


def solve(network, state: list[Tensor | None], task=Task.JOINT, **options) -> tuple:
    options = {"guidance_text": 1.0, "guidance_condition": 1.0, "shift": 1.0} | options
    return flow.sample(network, *state, TEXT, NULL, task, **options)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_convergence(solver, order, shift):
    # u = x² cos t has 1/x(0) = 1/x(1) + sin 1, and u = -2tx has x(0) = e·x(1)
    network = lambda video, motion, t, *_: (video.square() * t.cos(), -2 * t * motion)
    start = [x.double().sigmoid() + 0.5 for x in randn(Role.NOISY, Role.NOISY)]
    exact = 1 / (1 / start[0] + math.sin(1)), math.e * start[1]
    errors = []
    for steps in (12, 24, 48):
        got = solve(network, start, steps=steps, shift=shift, solver=solver)
        errors.append([(x - y).abs().max().item() for x, y in zip(got, exact, strict=True)])
    for video_and_motion in pairwise(errors):
        for coarse, fine in zip(*video_and_motion, strict=True):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert max(errors[-1]) < 0.1**order


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_ab2_is_exact_for_linear_velocities_after_its_first_step(shift):
    # catches coefficients that hold for equal steps only: those keep the order, but lose this
    steps, slope = 6, 1.5
    video, _ = randn(Role.NOISY, Role.ABSENT)
    network = lambda video, motion, t, *_: (0.5 + slope * t + 0 * video, None)
    got, _ = solve(network, [video.double(), None], Task.VIDEO_ONLY, steps=steps, shift=shift)
    t = (steps - 1) / steps
    first_step = 1 - shift * t / (1 + (shift - 1) * t)
    exact = video.double() - 0.5 - slope / 2
    torch.testing.assert_close(got, exact - slope * first_step**2 / 2, atol=1e-6, rtol=0)


def test_sampling_asks_at_these_times_shows_every_step_and_needs_no_gradients():
    asked, shown = [], []

    def network(video, motion, t_video, t_motion, text, task):
        asked.append((t_video.item(), t_motion.item()))
        return video, motion

    start = [x.requires_grad_() for x in randn(Role.NOISY, Role.NOISY)]
    made = solve(network, start, steps=4, shift=3.0, progress=lambda steps: shown.append(len(steps)) or steps)
    for t in zip(*dict.fromkeys(asked), strict=True):
        assert t == pytest.approx((1, 0.9, 0.75, 0.5))  # 3t / (1 + 2t)
    assert shown == [4] and not any(x.requires_grad for x in made)


@pytest.mark.parametrize(
    ("task", "absent", "message"),
    [
        (Task.MOTION_TO_VIDEO, "motion", "motion must be a clean condition, got None"),
        (Task.JOINT, "video", "video must be noise, got None"),
        (Task.MOTION_ONLY, None, "video must be None, got a tensor"),
    ],
)
def test_inputs_that_do_not_fit_the_task_are_refused(task, absent, message):
    roles = (Role.ABSENT if name == absent else Role.NOISY for name in ("video", "motion"))
    with pytest.raises(ValueError, match=message):
        solve(None, randn(*roles), task)


def test_velocities_of_a_bf16_network_are_weighted_in_fp32():
    # catches guidance of 6 in bf16: a difference of two near numbers, six times their rounding
    velocities = [randn(Role.NOISY, Role.ABSENT)[0].bfloat16() for _ in range(2)]
    answers = iter([(u, None) for u in velocities])
    given = torch.zeros(B, 2, 1, 2, 2), None, torch.ones(1), TEXT, NULL
    got = flow.guided(lambda *_: next(answers), *given, Task.VIDEO_ONLY, 6.0, 6.0)
    u_xy, u_x = (u.float().flatten(1) for u in velocities)
    torch.testing.assert_close(got, u_x + 6.0 * (u_xy - u_x))


def test_times_stay_fp32_beside_bf16_text():
    # catches times in the text's dtype: a Wan's text is bf16 on a GPU, in which 0.996 and 0.998 are the same
    asked = []
    network = lambda video, motion, t, *_: asked.append(t) or (video, None)
    start = randn(Role.NOISY, Role.ABSENT)
    flow.sample(network, *start, TEXT.bfloat16(), NULL.bfloat16(), Task.VIDEO_ONLY, steps=50)
    assert len({t.item() for t in asked}) == 50 and {t.dtype for t in asked} == {torch.float32}

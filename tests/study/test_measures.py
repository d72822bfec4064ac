"""study/measures.py: every measure against a reference of its own."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from kit import puppet
from study import measures


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- measures of motion


def test_mpjpe_is_the_mean_distance_about_the_pelvis_in_millimetres():
    real = randn(2, 3, 24, 3)
    found = real + 1.0
    found[0, :, 5, 1] += 0.24  # one of 24 joints, in one of two clips
    assert measures.mpjpe(found, real).tolist() == pytest.approx([10, 0], abs=1e-3)


@pytest.mark.parametrize("mirror", (1, -1), ids=("near", "mirrored"))
def test_pa_mpjpe_agrees_with_scipy_and_a_mirror_image_is_not_free(mirror):
    real = randn(2, 3, 24, 3, seed=1)
    found = mirror * real + 0.1 * randn(2, 3, 24, 3, seed=2)
    errors = []
    for a, b in zip(*(x.double().numpy().reshape(6, 24, 3) for x in (found, real)), strict=True):
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        turned = Rotation.align_vectors(b, a)[0].apply(a)
        scale = np.sum(turned * b) / np.sum(turned * turned)
        errors.append(1000 * np.linalg.norm(scale * turned - b, axis=-1).mean())
    expected = np.reshape(errors, (2, 3)).mean(axis=1)
    np.testing.assert_allclose(measures.pa_mpjpe(found, real), expected, rtol=1e-4)
    assert min(expected) > 500 if mirror == -1 else max(expected) < 200


def test_nearest_action_is_a_clips_own_whatever_its_heading_and_place():
    # catches a heading taken with the wrong sign: it doubles instead of vanishing
    bank = puppet.clips(range(40))
    turns = Rotation.from_rotvec([(0, angle, 0) for angle in np.linspace(-3, 3, 40)]).as_matrix()
    turned = torch.einsum("bik,bfjk->bfji", torch.from_numpy(turns).float(), bank.joints) + 2.0
    assert len(bank.action.unique()) > 8
    assert torch.equal(measures.nearest_action(turned, bank), bank.action)


def test_bone_variation_is_deviation_over_mean_within_a_clip():
    parents = torch.tensor([-1, 0, 1])
    # clip by clip: bone lengths (1, 2) and (1, 2); (1, 1) and (1, 3)
    ends = torch.tensor([[[1, 3], [1, 3]], [[1, 2], [1, 4]]]).float()
    joints = torch.zeros(2, 2, 3, 3)
    joints[:, :, 1:, 0] = ends
    expected = [0, math.sqrt(2) / 4]
    assert measures.bone_variation(joints, parents).tolist() == pytest.approx(expected)


def test_jerk_is_the_third_difference():
    joints, t = torch.zeros(2, 8, 24, 3), torch.arange(8.0)[:, None]
    joints[..., 1] = t**3 + t**2  # even acceleration has none
    assert measures.jerk(joints).tolist() == pytest.approx([6, 6], abs=1e-5)


def test_usual_poses_are_within_what_99_of_100_real_ones_do():
    # catches a range over all joints together: an elbow may bend further than a spine
    real = torch.zeros(1, 100, 2, 3)
    real[0, :, 0, 1], real[0, :, 1, 2] = torch.arange(100.0) / 100, torch.arange(100.0) / 10
    made = torch.tensor([[[[0.95, 0, 0], [0, 9.5, 0]]], [[[0.985, 0, 0], [0, 0, 9.85]]]])
    assert measures.usual_poses(made, real).tolist() == [1, 0]


def motions(n: int, shift: float, size: float, seed: int) -> torch.Tensor:
    """Joints (n 1 24 3) that face the camera, one coordinate of one joint random."""
    joints = torch.zeros(n, 1, 24, 3)
    joints[:, :, 1, 0], joints[:, :, 2, 0] = 0.1, -0.1
    joints[:, 0, 20, 1] = shift + size * randn(n, seed=seed)
    return joints


def test_frechet_is_what_it_is_for_two_normal_distributions():
    # |μ - ν|² + (σ - τ)², in cm², a joint; catches metres, a lost mean, covariances for deviations
    real = motions(4000, 0.0, 0.02, 1)
    found = measures.frechet(motions(2000, 0.10, 0.05, 2), real)
    assert found.mean().item() == pytest.approx((10**2 + 3**2) / 24, rel=0.05)
    error = measures.summary(found[None])["error"]
    assert 0 < error < 0.2


def test_frechet_of_the_same_distribution_is_zero_within_its_error_however_few():
    # catches the bias of few samples, which would favour whatever is measured on more of them
    bank = puppet.clips(range(400)).joints
    few = measures.summary(measures.frechet(puppet.clips(range(1000, 1040)).joints, bank)[None])
    assert abs(few["mean"]) < 4 * few["error"] + 1


def test_summary_by_hand():
    found = measures.summary(torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]))
    # clips: 3, 4, 5; seeds: 2, 6
    assert found == {"mean": 4.0, "error": pytest.approx(3**-0.5), "error_seeds": pytest.approx(2.0)}
    assert "error_seeds" not in measures.summary(torch.ones(1, 3))


# ---------------------------------------------------------------- measures of video


def test_iou_by_hand():
    a, b = torch.zeros(4, 1, 2, 2, dtype=torch.bool), torch.zeros(4, 1, 2, 2, dtype=torch.bool)
    a[0, 0, 0], b[0, 0, :, 0] = True, True  # two pixels each, one shared, three in all
    a[1], b[1] = True, True
    a[2] = True
    torch.testing.assert_close(measures.iou(a, b), torch.tensor([1 / 3, 1.0, 0.0, 0.0]))


def test_psnr_by_hand():
    # a difference of 0.2 is a tenth of the range [-1, 1]: 20 dB
    video = torch.zeros(2, 3, 5, 4, 4)
    other = video + torch.tensor([0.2, 2.0]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(measures.psnr(video, other), torch.tensor([20.0, 0.0]), atol=1e-4, rtol=0)


def test_iou_by_offset_peaks_where_the_motion_was_put():
    # pixel g lights in frame g: in clip i video frame f shows what motion frame f + OFFSETS[i] shows
    moments = torch.eye(30, dtype=torch.bool).view(30, 5, 6)
    video = torch.stack([moments[4 + lag : 21 + lag] for lag in measures.OFFSETS])
    by_offset = measures.iou_by_offset(video, moments[4:21].expand_as(video))
    torch.testing.assert_close(by_offset, torch.eye(len(measures.OFFSETS)))


def test_change_and_sharpness_are_differences_of_pixels_a_clip():
    video = torch.zeros(2, 3, 5, 4, 6)
    video[1] = torch.arange(5.0).view(5, 1, 1) ** 3  # of t³ the third difference is 6, the first 1 7 19 37
    assert measures.change(video, 3).tolist() == [0, 6] and measures.change(video, 1).tolist() == [0, 16]
    video[0] = torch.arange(6.0) + 2 * torch.arange(4.0)[:, None]
    assert measures.sharpness(video).tolist() == [3, 0]


def test_outlines_forgive_place_and_nothing_else():
    # catches a shift by frames, which would make a walk a march on the spot
    shape = torch.zeros(3, 5, 8, 16, dtype=torch.bool)
    shape[0, :, 2:6, 2:4], shape[1, :, 2:6, 6:8], shape[2, :, 0:4, 2:4] = True, True, True
    found = measures.outlines(shape)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    for f in range(5):
        shape[1, f] = shape[1, f].roll(f, -1)
    assert not torch.equal(measures.outlines(shape)[1], found[0])

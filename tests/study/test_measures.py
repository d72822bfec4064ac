"""study/measures.py: every measure against a reference of its own, then the learned 4:1 alignment."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_model
from scipy.spatial.transform import Rotation

import dual_dit
from flow import Task
from kit import puppet, weights
from kit.backbone import SHIPPED
from kit.data.datasets import puppet_motion
from motion_tokens import TOKENS_PER_FRAME, decode_smpl
from study import measures


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- measures of motion


def test_mpjpe_is_the_mean_distance_about_the_pelvis_in_millimetres():
    found, real = randn(2, 3, 24, 3, seed=1), randn(2, 3, 24, 3, seed=2)
    for b in range(2):
        distances = [
            math.dist((found[b, f, j] - found[b, f, 0]).tolist(), (real[b, f, j] - real[b, f, 0]).tolist())
            for f in range(3)
            for j in range(24)
        ]
        assert measures.mpjpe(found, real)[b].item() == pytest.approx(1000 * np.mean(distances), rel=1e-5)


def reference_pa(found: np.ndarray, real: np.ndarray) -> float:
    """Frames (f j 3): scipy finds each frame's rotation, least squares its scale."""
    errors = []
    for a, b in zip(found, real, strict=True):
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        turned = Rotation.align_vectors(b, a)[0].apply(a)
        scale = np.sum(turned * b) / np.sum(turned * turned)
        errors.append(np.linalg.norm(scale * turned - b, axis=-1).mean())
    return 1000 * np.mean(errors)


@pytest.mark.parametrize("mirror", (1, -1), ids=("near", "mirrored"))
def test_pa_mpjpe_agrees_with_scipy_and_a_mirror_image_is_not_free(mirror):
    real = randn(2, 3, 24, 3, seed=1)
    found = mirror * real + 0.1 * randn(2, 3, 24, 3, seed=2)
    expected = [
        reference_pa(*pair) for pair in zip(found.double().numpy(), real.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(measures.pa_mpjpe(found, real), expected, rtol=1e-4)
    assert min(expected) > 500 if mirror == -1 else max(expected) < 200


def test_pa_mpjpe_forgives_place_heading_and_size_of_each_frame_and_mpjpe_only_place():
    real = randn(1, 3, 24, 3)
    turns = torch.from_numpy(Rotation.random(3, rng=0).as_matrix()).float()
    moved = 1.7 * torch.einsum("fik,bfjk->bfji", turns, real) + randn(1, 3, 1, 3, seed=1)
    assert measures.pa_mpjpe(moved, real).item() < 0.1
    assert measures.mpjpe(moved, real).item() > 500
    assert measures.mpjpe(real + randn(1, 3, 1, 3, seed=1), real).item() < 0.1


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
    expected = (0 + 0 + 0 + math.sqrt(2) / 2) / 4
    assert measures.bone_variation(joints, parents) == pytest.approx(expected)
    turn = torch.from_numpy(Rotation.from_rotvec([(0, 0, 0), (0, 0, 1)]).as_matrix()).float()
    turned = torch.einsum("fik,bfjk->bfji", turn, joints[:1])  # bones that turn keep their length
    assert measures.bone_variation(turned, parents) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("power", "expected"), ((3, 6.0), (2, 0.0)), ids=("cubic", "even acceleration"))
def test_jerk_is_the_third_difference(power, expected):
    joints = torch.zeros(2, 8, 24, 3)
    joints[..., 1] = (torch.arange(8.0) ** power).view(8, 1)
    assert measures.jerk(joints) == pytest.approx(expected, abs=1e-5)


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


@pytest.mark.parametrize("lag", measures.OFFSETS)
def test_iou_by_offset_peaks_where_the_motion_was_put(lag):
    # pixel g lights in frame g: video frame f shows what motion frame f + lag shows
    moments = torch.eye(30, dtype=torch.bool).view(30, 5, 6)
    video, motion = moments[None, 4 + lag : 21 + lag], moments[None, 4:21]
    by_offset = measures.iou_by_offset(video, motion)
    expected = torch.tensor([[float(offset == lag) for offset in measures.OFFSETS]])
    torch.testing.assert_close(by_offset, expected)
    assert measures.peak_rate(by_offset) == (lag == 0)


def test_peak_rate_is_a_share_of_clips():
    by_offset = torch.eye(9)[[4, 4, 4, 0]]
    assert measures.peak_rate(by_offset) == 0.75


# ---------------------------------------------------------------- the 4:1 alignment


def test_own_latent_is_the_causal_codecs():
    # a causal first frame, then four frames a latent: floor(f/4) would be one late for three of four
    expected = [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert measures.own_latent(17).tolist() == expected


def test_attention_share_by_hand():
    own = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1], [0, 1]])
    even = torch.full((5, 2), 0.5)
    late = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1]])
    shares = measures.attention_share(torch.stack((own, even, late, 1 - own)))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.5, 0.4, 0.0]))


def test_attention_share_of_each_group_of_tokens_by_hand():
    # catches groups cut at the wrong token, and tokens that hardly look at the video counted like the others
    own = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1], [0, 1]])
    position, rotation, shape = [own] * 25, [1 - own] * 25, [torch.full((5, 2), 0.5)]
    rotation[0] = 72 * own  # as heavy as three times the others
    mass = torch.stack((*position, *rotation, *shape), dim=1)[None]  # (layers=1 f=5 i=51 t=2)
    found = {name: share.item() for name, share in measures.attention_share_by_group(mass).items()}
    assert found == pytest.approx({"position": 1, "rotation": 0.75, "shape": 0.5})


def test_attention_is_that_of_a_loop_over_tokens(monkeypatch):
    # catches queries and keys exchanged, a lost scale or rotation, tokens given to the wrong frame
    model = tiny_model().eval()
    with torch.no_grad():
        for block in model.blocks:  # sharper than at the start of training, so that maps are not even
            block.motion.self_attn.norm_q.weight.mul_(4)
    clips, latents, rows, columns, f = 2, 2, 2, 3, 5
    video, motion = randn(clips, TINY.channels, latents, rows, columns), randn(clips, f, 235, seed=1)
    text, noise = randn(clips, 3, TINY.text_dim, seed=2), randn(clips, f, 235, seed=3)
    found = measures.attention_mass(model, video, motion, text, noise)

    pixels, seen, attend = latents * rows * columns, [], dual_dit.attend

    def listen(q, k, v):
        if q.shape[2] == k.shape[2] == pixels + f * TOKENS_PER_FRAME:  # the joint attention, no other
            seen.append((q.double().numpy(), k.double().numpy()))
        return attend(q, k, v)

    monkeypatch.setattr(dual_dit, "attend", listen)
    half = torch.full((clips,), 0.5)
    with torch.no_grad():
        model(video, (motion + noise) / 2, torch.zeros(clips), half, text, Task.VIDEO_TO_MOTION)
    assert len(seen) == TINY.layers
    for layer, (q, k) in enumerate(seen):
        expected = np.zeros((f, TOKENS_PER_FRAME, latents))
        for b, head, token in np.ndindex(clips, TINY.heads, f * TOKENS_PER_FRAME):
            logits = k[b, head] @ q[b, head, pixels + token] / np.sqrt(TINY.width / TINY.heads)
            mass = np.exp(logits) / np.exp(logits).sum()
            for pixel in range(pixels):
                expected[*divmod(token, TOKENS_PER_FRAME), pixel // (rows * columns)] += mass[pixel]
        assert expected.std() > 0.01
        np.testing.assert_allclose(found[layer], expected / (clips * TINY.heads), atol=1e-4)
        expected = expected.sum(axis=1) / expected.sum(axis=(1, 2))[:, None]
        np.testing.assert_allclose(measures.attention_map(found)[layer], expected, atol=1e-4)


def test_attention_mass_leaves_the_network_as_it_was():
    model = tiny_model().eval()
    inputs = randn(1, TINY.channels, 1, 1, 1), randn(1, 1, 235), randn(1, 3, TINY.text_dim), randn(1, 1, 235)
    assert measures.attention_mass(model, *inputs).shape == (TINY.layers, 1, TOKENS_PER_FRAME, 1)
    assert not any(block._forward_pre_hooks for block in model.blocks)


# ---------------------------------------------------------------- on real clips


def test_measures_of_the_real_thing_are_perfect():
    # catches a measure that mixes up clips, axes or units: nothing may be lost on the way through 235 numbers
    clips = measures.held_out(3)
    motion = puppet_motion(clips)
    smpl = decode_smpl(motion)
    assert measures.mpjpe(smpl["joints"], clips.joints).max() < 0.01
    shape = puppet.silhouette(puppet.render(clips.joints, clips.betas, clips.shirt)[0])
    assert measures.iou(measures.silhouettes_of_motion(motion, clips.shirt), shape).min() > 0.99
    assert measures.bone_variation(smpl["joints"], puppet.body().parents) < 1e-5


def test_shipped_weights_have_learned_the_4_to_1_alignment():
    # the paper's central claim for MVS-RoPE: some layer finds its own latent, at 3 x chance (README),
    # where an untrained network is at 1
    model, extra = weights.load_weights(SHIPPED)
    clips = measures.held_out(8)
    video = puppet.Codec.from_state(extra).encode(puppet.render(clips.joints, clips.betas, clips.shirt)[0])
    motion = (puppet_motion(clips) - model.motion_mean) / model.motion_std
    text = puppet.encode_text(clips.caption)
    maps = measures.attention_map(measures.attention_mass(model, video, motion, text, randn(*motion.shape)))
    assert measures.attention_share(maps).max() >= 3 / video.shape[2]

"""kit/attention.py: what is recorded, against a loop over tokens; shares by hand. 4:1: test_alignment.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_model

import dual_dit
from flow import Task
from kit import attention
from motion_tokens import TOKENS_PER_FRAME

CLIPS, LATENTS, ROWS, COLUMNS, FRAMES = 2, 2, 2, 3, 5
PIXELS, LAYERS = LATENTS * ROWS * COLUMNS, TINY.layers


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", (Task.JOINT, Task.MOTION_TO_VIDEO, Task.VIDEO_TO_MOTION))
def test_attention_is_that_of_a_loop_over_tokens(monkeypatch, task):
    # catches queries and keys exchanged, a lost scale or rotation, tokens given to the wrong frame, a noised
    # condition
    monkeypatch.setattr(attention, "ROWS", 7)  # parts that end within a frame
    video, motion = randn(CLIPS, TINY.channels, LATENTS, ROWS, COLUMNS), randn(CLIPS, FRAMES, 235, seed=1)
    text, model = randn(CLIPS, 3, TINY.text_dim, seed=2), tiny_model()
    for block in model.blocks:
        for expert in (block.video, block.motion):
            expert.self_attn.norm_q.weight.data.mul_(4)  # more decided, so that maps are not even
    before = dual_dit.attention
    to_video = attention.motion_to_video(model, video, motion, text, task, seed=3)
    to_motion = attention.video_to_motion(model, video, motion, text, task, seed=3)
    assert dual_dit.attention is before  # nothing goes on recording

    seen, attend = [], F.scaled_dot_product_attention

    def listen(q, k, v):
        if q.shape[2] == k.shape[2] == PIXELS + FRAMES * TOKENS_PER_FRAME:  # the joint attention, no other
            seen.append((q.double().numpy(), k.double().numpy()))
        return attend(q, k, v)

    generator = torch.Generator().manual_seed(3)
    noise_video, noise_motion = (torch.randn(x.shape, generator=generator) for x in (video, motion))
    half, clean = torch.full((CLIPS,), 0.5), torch.zeros(CLIPS)
    noisy_video, noisy_motion = (video + noise_video) / 2, (motion + noise_motion) / 2
    given = {
        Task.JOINT: (noisy_video, noisy_motion, half, half),
        Task.MOTION_TO_VIDEO: (noisy_video, motion, half, clean),
        Task.VIDEO_TO_MOTION: (video, noisy_motion, clean, half),
    }[task]
    monkeypatch.setattr(F, "scaled_dot_product_attention", listen)
    with torch.no_grad():
        model(*given, text, task)
    assert len(seen) == LAYERS
    for layer, (q, k) in enumerate(seen):
        by_frame, by_latent = np.zeros((FRAMES, LATENTS)), np.zeros((LATENTS, FRAMES))
        for b, head, token in np.ndindex(CLIPS, TINY.heads, q.shape[2]):
            logits = k[b, head] @ q[b, head, token] / np.sqrt(TINY.width / TINY.heads)
            mass = np.exp(logits) / np.exp(logits).sum() / (CLIPS * TINY.heads)
            on_video = mass[:PIXELS].reshape(LATENTS, -1).sum(axis=1)
            on_motion = mass[PIXELS:].reshape(FRAMES, -1).sum(axis=1)
            if token >= PIXELS:
                by_frame[(token - PIXELS) // TOKENS_PER_FRAME] += on_video / TOKENS_PER_FRAME
            else:
                by_latent[token // (ROWS * COLUMNS)] += on_motion / (ROWS * COLUMNS)
        assert by_frame.std() > 0.01 and by_latent.std() > 0.01
        np.testing.assert_allclose(to_video[layer], by_frame, atol=1e-4)
        np.testing.assert_allclose(to_motion[layer], by_latent, atol=1e-4)
        for made, by_hand in ((to_video, by_frame), (to_motion, by_latent)):
            expected = by_hand / by_hand.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(attention.shared_out(made)[layer], expected, atol=1e-4)


def test_shares_by_hand():
    own = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1], [0, 1]])
    even, late = torch.full((5, 2), 0.5), torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1]])
    shares = attention.frame_share(torch.stack((own, even, late, 1 - own)))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.5, 0.4, 0.0]))
    own, even = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.25, 0.25, 0.25, 0.25]]), torch.full((2, 5), 0.2)
    shares = attention.latent_share(torch.stack((own, even)))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.5]))  # chance is 1/T, as for frames


def test_a_samples_map_normalises_the_motion_and_is_none_without_a_modality():
    # catches motion in metres given to the network, which knows it normalised
    video, motion = randn(1, TINY.channels, LATENTS, ROWS, COLUMNS), randn(1, FRAMES, 235, seed=1)
    text, model = randn(1, 3, TINY.text_dim, seed=2), tiny_model()
    model.motion_mean.fill_(0.5)
    model.motion_std.fill_(2.0)
    expected = attention.motion_to_video(model, video, motion, text, Task.JOINT)
    found = attention.attention_to_latents(model, video, 2 * motion + 0.5, text, Task.JOINT)
    torch.testing.assert_close(found, attention.shared_out(expected))
    assert (found - attention.attention_to_latents(model, video, motion, text, Task.JOINT)).abs().max() > 1e-4
    assert attention.attention_to_latents(model, video, None, text, Task.VIDEO_ONLY) is None

"""motion_tokens.py: rotations against scipy, the 235 numbers against smplx, and which token has which."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from motion_tokens import (
    MOTION_DIM,
    TOKENS_PER_FRAME,
    MotionDecoder,
    MotionEncoder,
    axis_angle_to_matrix,
    decode_smpl,
    encode_smpl,
    matrix_to_6d,
    matrix_to_axis_angle,
    motion_statistics,
    sixd_to_matrix,
)
from rope import FRAMES_PER_LATENT

ANGLES = {
    "identity": [0.0],
    "tiny": [1e-12, 1e-9, 1e-7, 1e-5, 0.99e-4, 1.01e-4, 1e-3],
    "random": np.linspace(0.01, 3.0, 50).tolist(),
    "near π": [math.pi - 1e-2, math.pi - 1e-4, math.pi - 1e-6, math.pi],
}
# where the 51 tokens live in the 235 numbers
SLICES = [(0, 3)]
SLICES += [(3 + 3 * j, 6 + 3 * j) for j in range(24)]
SLICES += [(75 + 6 * j, 81 + 6 * j) for j in range(24)]
SLICES += [(219, 225), (225, 235)]


def smpl(b: int = 2, f: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "global_orient": torch.randn(b, f, 3) * 1.5,
        "body_pose": torch.randn(b, f, 23, 3) * 0.7,
        "betas": torch.randn(b, 10),
        "transl": torch.randn(b, f, 3) * 2,
    }


# ---------------------------------------------------------------- rotations


def rotation_vectors(angles: list[float]) -> np.ndarray:
    """Each angle about 20 random axes and the six of the frame: (n 3)."""
    axes = np.random.default_rng(0).normal(size=(20, 3))
    axes /= np.linalg.norm(axes, axis=-1, keepdims=True)
    # half a turn about one of these: the quaternion's real part is zero, another of its rows must lead
    axes = np.vstack((axes, np.eye(3), -np.eye(3)))
    return (axes * np.array(angles)[:, None, None]).reshape(-1, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)
def test_rotations_equal_scipy(angles, dtype):
    tolerance = 1e-13 if dtype is torch.float64 else 1e-6
    vectors = rotation_vectors(angles)
    expected = Rotation.from_rotvec(vectors)
    matrix = axis_angle_to_matrix(torch.tensor(vectors, dtype=dtype))
    assert matrix.dtype == dtype
    np.testing.assert_allclose(matrix, expected.as_matrix(), rtol=0, atol=tolerance)

    back = matrix_to_axis_angle(torch.tensor(expected.as_matrix(), dtype=dtype))
    assert back.dtype == dtype and back.norm(dim=-1).max() <= math.pi + tolerance
    # at π both ends of the axis are right, so it is the rotations that are compared
    off = (Rotation.from_rotvec(back.double().numpy()) * expected.inv()).magnitude()
    assert off.max() < tolerance
    if max(angles) <= 1e-3:  # a tiny angle is not rounded to zero
        np.testing.assert_allclose(back, vectors, rtol=1e-5 if dtype is torch.float32 else 1e-9)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 1e-4])
def test_gradient_at_angle_zero_is_the_generator(angle):
    generators = torch.zeros(3, 3, 3, dtype=torch.float64)  # d R[a, b] / d r[c] = -epsilon[a, b, c]
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        generators[a, b, c], generators[b, a, c] = -1, 1
    at = torch.tensor([0.0, angle, 0.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(axis_angle_to_matrix, at)
    torch.testing.assert_close(jacobian, generators, atol=2 * angle, rtol=0)


def test_6d_is_the_first_two_columns_and_round_trips():
    matrix = torch.tensor(Rotation.random(200, random_state=0).as_matrix())
    sixd = matrix_to_6d(matrix)
    assert torch.equal(sixd, torch.cat((matrix[:, :, 0], matrix[:, :, 1]), dim=1))
    torch.testing.assert_close(sixd_to_matrix(sixd), matrix, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_any_six_numbers_give_the_rotation_of_a_qr_decomposition(scale):
    torch.manual_seed(0)
    sixd = scale * torch.randn(200, 6, dtype=torch.float64)
    q, r = np.linalg.qr(sixd.view(200, 2, 3).mT.numpy())
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    expected = np.concatenate((q, np.cross(q[..., 0], q[..., 1])[..., None]), axis=2)
    np.testing.assert_allclose(sixd_to_matrix(sixd), expected, atol=1e-10)
    np.testing.assert_allclose(np.linalg.det(expected), 1, atol=1e-10)


# ---------------------------------------------------------------- SMPL <-> 235 numbers


def test_layout_of_the_235_numbers(body):
    parameters = smpl()
    x = encode_smpl(**parameters, body=body)
    rotations = torch.cat((parameters["global_orient"][:, :, None], parameters["body_pose"]), dim=2)
    matrices = Rotation.from_rotvec(rotations.view(-1, 3).double().numpy()).as_matrix()
    sixd = matrices[:, :, :2].transpose(0, 2, 1).reshape(2, 5, 24, 6)
    # smplx itself places the joints, by skinning its mesh
    _, posed = body.mesh(**{**parameters, "betas": parameters["betas"][:, None]})

    assert x.shape == (2, 5, 235) and MOTION_DIM == 235 and TOKENS_PER_FRAME == len(SLICES) == 51
    assert torch.equal(x[..., :3], parameters["transl"])
    torch.testing.assert_close(x[..., 3:75], posed.flatten(2), atol=1e-5, rtol=0)
    np.testing.assert_allclose(x[..., 75:219], sixd.reshape(2, 5, 144), atol=1e-6)
    np.testing.assert_allclose(x[..., 219:225], sixd[:, :, 0], atol=1e-6)
    assert torch.equal(x[..., 225:], parameters["betas"][:, None].expand(2, 5, 10))


def test_smpl_survives_the_235_numbers(body):
    parameters = smpl()

    def joints(global_orient, body_pose, betas, transl) -> torch.Tensor:
        return body.joints(global_orient, body_pose, betas[:, None], transl)

    decoded = decode_smpl(encode_smpl(**parameters, body=body))
    assert torch.equal(decoded.pop("joints"), joints(**parameters))
    assert {k: v.shape for k, v in decoded.items()} == {k: v.shape for k, v in parameters.items()}
    torch.testing.assert_close(joints(**decoded), joints(**parameters), atol=1e-5, rtol=0)


def test_decoding_takes_the_root_from_orient_and_averages_betas(body):
    x = encode_smpl(**smpl(), body=body)
    decoded = decode_smpl(x)
    noisy = x.clone()
    noisy[..., 75:81] = torch.randn(2, 5, 6)  # row 0 of θ
    noisy[:, 0, 225:] += 1.0  # β of the first of five frames
    noisy = decode_smpl(noisy)
    torch.testing.assert_close(noisy.pop("betas"), decoded.pop("betas") + 0.2)
    assert all(torch.equal(noisy[name], decoded[name]) for name in decoded)

    x[..., 219:225] = matrix_to_6d(torch.eye(3))
    assert torch.equal(decode_smpl(x)["global_orient"], torch.zeros(2, 5, 3))


@pytest.mark.parametrize(("name", "shape"), [("body_pose", (2, 4, 23, 3)), ("betas", (2, 16))])
def test_wrong_shapes_are_named(body, name, shape):
    with pytest.raises(ValueError, match=rf"{name}: expected shape .*got {re.escape(str(shape))}"):
        encode_smpl(**smpl() | {name: torch.zeros(shape)}, body=body)


@pytest.mark.parametrize("shape", [(5, 235), (1, 5, 263)])
def test_what_is_no_motion_is_not_decoded(shape):
    with pytest.raises(ValueError, match=r"expected motion of shape \(b, f, 235\), got"):
        decode_smpl(torch.zeros(shape))


def test_statistics_equal_numpy_and_still_channels_are_not_blown_up():
    generator = np.random.default_rng(0)
    motion = generator.normal(0.5, generator.uniform(1, 2, 235), (3, 40, 235))
    motion[..., 80] = 0.3  # a still rotation among rotations that move
    motion[..., 225:] = 0.7  # one body only: all ten shape numbers are still
    mean, std = motion_statistics(torch.tensor(motion))

    flat = motion.reshape(-1, 235)
    expected = flat.std(axis=0, ddof=1)
    expected[80] = np.sqrt((expected[75:219] ** 2).mean()) / 2
    expected[225:] = 1e-3
    assert mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(mean, flat.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(std, expected, rtol=1e-6)


# ---------------------------------------------------------------- 235 numbers <-> 51 tokens


@pytest.fixture(scope="module")
def coders():
    torch.manual_seed(0)
    encoder, decoder = MotionEncoder(16), MotionDecoder(16)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder, decoder


@torch.no_grad()
def test_a_token_reads_and_writes_its_own_numbers(coders):
    encoder, decoder = coders
    torch.manual_seed(0)
    motion, tokens, frame = torch.randn(1, 3, MOTION_DIM), torch.randn(1, 3 * TOKENS_PER_FRAME, 16), 1
    for token, (start, stop) in enumerate(SLICES):
        place = frame * TOKENS_PER_FRAME + token
        for number in range(start, stop):
            other = motion.clone()
            other[:, frame, number] += 1
            changed = (encoder(other) != encoder(motion)).any(-1)  # (b f·51)
            assert changed.nonzero()[:, 1].tolist() == [place]
        other = tokens.clone()
        other[:, place] += 1
        changed = decoder(other) != decoder(tokens)  # (b f 235)
        expected = torch.zeros(1, 3, MOTION_DIM, dtype=torch.bool)
        expected[:, frame, start:stop] = True
        assert torch.equal(changed, expected), token


@torch.no_grad()
def test_tokens_of_a_group_share_an_mlp_and_differ_by_their_embedding(coders):
    encoder, _ = coders
    tokens = (encoder(torch.ones(1, 1, MOTION_DIM))[0] - encoder.token - encoder.phase[0]).split((25, 25, 1))
    for group in tokens:
        torch.testing.assert_close(group, group[:1].expand_as(group), atol=1e-5, rtol=0)
    assert not torch.allclose(tokens[0][0], tokens[1][0], atol=0.1)
    assert not torch.allclose(tokens[1][0], tokens[2][0], atol=0.1)
    assert len(encoder.token.unique(dim=0)) == TOKENS_PER_FRAME


@torch.no_grad()
def test_a_token_knows_which_of_its_latents_four_frames_it_is_of(coders):
    # catches a phase that follows the token or the clip instead of the frame
    encoder, _ = coders
    tokens = encoder(torch.ones(2, 9, MOTION_DIM)).unflatten(1, (9, TOKENS_PER_FRAME))
    torch.testing.assert_close(tokens[:, 4:], tokens[:, :5])
    for f in range(1, 4):
        expected = (encoder.phase[f] - encoder.phase[0]).expand_as(tokens[:, f])
        torch.testing.assert_close(tokens[:, f] - tokens[:, 0], expected, atol=1e-5, rtol=0)
    assert len(encoder.phase.unique(dim=0)) == FRAMES_PER_LATENT

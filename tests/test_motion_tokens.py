"""motion_tokens.py: rotations against scipy, the 235 numbers against smplx, and which token has which."""

import math

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


def test_gradient_at_angle_zero_is_the_generator():
    # catches NaN from the norm at zero, or from a quotient where the angle is tiny
    generators = torch.zeros(3, 3, 3, dtype=torch.float64)  # d R[a, b] / d r[c] = -epsilon[a, b, c]
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        generators[a, b, c], generators[b, a, c] = -1, 1
    for angle in (0.0, 1e-12, 1e-4):
        at = torch.tensor([0.0, angle, 0.0], dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(axis_angle_to_matrix, at)
        torch.testing.assert_close(jacobian, generators, atol=2 * angle, rtol=0)


def test_6d_is_the_first_two_columns_and_any_six_numbers_are_orthonormalised():
    matrix = torch.tensor(Rotation.random(200, random_state=0).as_matrix())
    sixd = matrix_to_6d(matrix)
    assert torch.equal(sixd, torch.cat((matrix[:, :, 0], matrix[:, :, 1]), dim=1))
    torch.testing.assert_close(sixd_to_matrix(sixd), matrix, atol=1e-12, rtol=0)
    # the same rotation from columns of other lengths that are not at right angles
    skewed = torch.cat((1e-3 * sixd[:, :3], 7 * sixd[:, 3:] - 2 * sixd[:, :3]), dim=1)
    torch.testing.assert_close(sixd_to_matrix(skewed), matrix, atol=1e-10, rtol=0)


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
    def joints(global_orient, body_pose, betas, transl) -> torch.Tensor:
        return body.joints(global_orient, body_pose, betas[:, None], transl)

    parameters = smpl()
    x = encode_smpl(**parameters, body=body)
    decoded = decode_smpl(x)
    assert torch.equal(decoded.pop("joints"), joints(**parameters))
    assert {k: v.shape for k, v in decoded.items()} == {k: v.shape for k, v in parameters.items()}
    torch.testing.assert_close(joints(**decoded), joints(**parameters), atol=1e-5, rtol=0)

    # the root comes from γ, and β is averaged
    x[..., 75:81] = torch.randn(2, 5, 6)  # row 0 of θ
    x[:, 0, 225:] += 1.0  # β of the first of five frames
    other = decode_smpl(x)
    torch.testing.assert_close(other.pop("betas"), decoded.pop("betas") + 0.2)
    assert all(torch.equal(other[name], decoded[name]) for name in decoded)


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


@torch.no_grad()
def test_a_token_has_its_own_numbers_by_its_groups_mlp():
    # catches tokens exchanged, and a phase that follows the token or the clip instead of the frame
    torch.manual_seed(0)
    encoder, decoder = MotionEncoder(16), MotionDecoder(16)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    motion, written = torch.randn(2, 9, MOTION_DIM), torch.randn(2, 9, TOKENS_PER_FRAME, 16)
    read = encoder(motion).unflatten(1, (9, TOKENS_PER_FRAME))
    numbers = decoder(written.flatten(1, 2))
    phase = encoder.phase[torch.arange(9) % 4]
    for token, (start, stop) in enumerate(SLICES):
        group = "position" if token < 25 else "rotation" if token < 50 else "shape"
        expected = encoder.mlps[group](motion[..., start:stop]) + encoder.token[token] + phase
        torch.testing.assert_close(read[:, :, token], expected, atol=1e-5, rtol=1e-5)
        expected = decoder.mlps[group](written[:, :, token])
        torch.testing.assert_close(numbers[..., start:stop], expected, atol=1e-5, rtol=1e-5)

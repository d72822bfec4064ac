"""SMPL motion as tokens: SMPL parameters <-> 235 numbers a frame <-> 51 tokens (paper, section 3.1).

    v  root translation    1 token  of  3     position group
    η  joint positions    24 tokens of  3     position group
    θ  joint rotations    24 tokens of  6     rotation group
    γ  root rotation       1 token  of  6     rotation group
    β  body shape          1 token  of 10     shape group
                          51 tokens, 235 numbers

Positions and rotations say the same thing twice, on purpose: positions are what pixels show,
rotations are what an animator needs. Rotations are 6D, the first two columns of the matrix, because
that map is continuous (Zhou et al. 2019), which axis-angle and quaternions are not.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from rope import FRAMES_PER_LATENT, TOKENS_PER_FRAME

JOINTS = 24
# numbers a frame: v, η, θ, γ and β, in the order of the 235-vector
SIZES = {"transl": 3, "joints": JOINTS * 3, "rotations": JOINTS * 6, "orient": 6, "betas": 10}
# each group owns an MLP: (tokens a frame, numbers a token), in the same order
GROUPS = {"position": (25, 3), "rotation": (25, 6), "shape": (1, 10)}
MOTION_DIM = sum(SIZES.values())


# ---------------------------------------------------------------- 235 numbers <-> 51 tokens


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(approximate="tanh"), nn.Linear(width, outputs))


class MotionEncoder(nn.Module):
    """Normalised motion (b f 235) -> tokens (b, f*51, d); one MLP for each of the three groups."""

    def __init__(self, width: int):
        super().__init__()
        self.mlps = nn.ModuleDict({name: mlp(size, width, width) for name, (_, size) in GROUPS.items()})
        # paper is silent: joints of a group share an MLP, so a learned embedding says which token this is
        self.token = nn.Parameter(torch.empty(TOKENS_PER_FRAME, width))
        # paper is silent: RoPE encodes only position differences; this embedding tells a token its f mod 4
        self.phase = nn.Parameter(torch.empty(FRAMES_PER_LATENT, width))

    def forward(self, motion: Tensor) -> Tensor:
        position, rotation, shape = motion.split([25 * 3, 25 * 6, 10], dim=-1)
        tokens = (
            self.mlps["position"](rearrange(position, "b f (i c) -> b f i c", c=3)),  # (b f 25 d)
            self.mlps["rotation"](rearrange(rotation, "b f (i c) -> b f i c", c=6)),  # (b f 25 d)
            self.mlps["shape"](rearrange(shape, "b f c -> b f 1 c")),  # (b f 1 d)
        )
        phase = self.phase[torch.arange(motion.shape[1], device=motion.device) % FRAMES_PER_LATENT]  # (f d)
        x = torch.cat(tokens, dim=2) + self.token + rearrange(phase, "f d -> f 1 d")  # (b f 51 d)
        return rearrange(x, "b f i d -> b (f i) d")


class MotionDecoder(nn.Module):
    """Tokens (b, f*51, d) -> motion (b f 235); the encoder's mirror image."""

    def __init__(self, width: int):
        super().__init__()
        self.mlps = nn.ModuleDict({name: mlp(width, width, size) for name, (_, size) in GROUPS.items()})

    def forward(self, tokens: Tensor) -> Tensor:
        x = rearrange(tokens, "b (f i) d -> b f i d", i=TOKENS_PER_FRAME)
        groups = zip(self.mlps.values(), x.split([25, 25, 1], dim=2), strict=True)
        numbers = [rearrange(net(group), "b f i c -> b f (i c)") for net, group in groups]
        return torch.cat(numbers, dim=-1)  # (b f 235)


# ---------------------------------------------------------------- SMPL <-> 235 numbers


def encode_smpl(global_orient: Tensor, body_pose: Tensor, betas: Tensor, transl: Tensor, body) -> Tensor:
    """SMPL parameters -> motion vectors (b f 235), not yet normalised.

    global_orient (b f 3), body_pose (b f 23 3) axis-angle in radians, betas (b 10), transl (b f 3) in
    metres. `body.joints(...)` gives the joint positions η (kit/body.py): absolute, in the coordinates of
    `transl`, so that with a paired clip they project straight onto its pixels.
    """
    # paper is silent: the coordinates of η
    joints = body.joints(global_orient, body_pose, betas[:, None], transl)  # (b f j 3)
    pose = torch.cat((global_orient[:, :, None], body_pose), dim=2)  # (b f j 3)
    rotations = matrix_to_6d(axis_angle_to_matrix(pose))  # (b f j 6)
    parts = (
        transl,  # v
        rearrange(joints, "b f j c -> b f (j c)"),  # η
        rearrange(rotations, "b f j c -> b f (j c)"),  # θ
        rotations[:, :, 0],  # γ: the root once more, as a token of its own
        repeat(betas, "b c -> b f c", f=transl.shape[1]),  # β
    )
    return torch.cat(parts, dim=-1)  # (b f 235)


def decode_smpl(x: Tensor) -> dict[str, Tensor]:
    """Motion vectors (b f 235), denormalised -> SMPL parameters and the joints that were generated.

    Returns global_orient (b f 3), body_pose (b f 23 3), betas (b 10), transl (b f 3), joints
    (b f 24 3). The root comes from γ, the body from θ[1:], β is averaged over frames; `joints` are the
    positions η unchanged, which need not agree exactly with forward kinematics of the rotations.
    """
    transl, joints, rotations, orient, betas = x.split(list(SIZES.values()), dim=-1)
    rotations = rearrange(rotations, "b f (j c) -> b f j c", c=6)
    return {
        "global_orient": matrix_to_axis_angle(sixd_to_matrix(orient)),
        "body_pose": matrix_to_axis_angle(sixd_to_matrix(rotations[:, :, 1:])),
        "betas": betas.mean(dim=1),
        "transl": transl,
        "joints": rearrange(joints, "b f (j c) -> b f j c", c=3),
    }


def motion_statistics(motion: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (235,) of motion vectors (n f 235), for normalisation.

    A nearly constant channel (a wrist that never turns) is not scaled up to unit variance: its
    deviation is at least half the root mean square of the deviations in its part (v, η, θ, γ or β).
    """
    flat = rearrange(motion, "n f c -> (n f) c").double()
    mean, std = flat.mean(0), flat.std(0)
    floors = [part.square().mean().sqrt().expand_as(part) / 2 for part in std.split(list(SIZES.values()))]
    return mean.float(), torch.maximum(std, torch.cat(floors)).clamp_min(1e-3).float()


# ---------------------------------------------------------------- rotations


def axis_angle_to_matrix(axis_angle: Tensor) -> Tensor:
    """(... 3) radians -> (... 3 3), by Rodrigues' formula; smooth at angle 0."""
    angle = torch.linalg.vector_norm(axis_angle, dim=-1, keepdim=True)
    small = angle < 1e-4
    safe = torch.where(small, torch.ones_like(angle), angle)
    # sin(a)/a and (1-cos(a))/a², by their series where the quotient is near 0/0
    first = torch.where(small, 1 - angle**2 / 6, safe.sin() / safe)[..., None]
    second = torch.where(small, 0.5 - angle**2 / 24, (1 - safe.cos()) / safe**2)[..., None]
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).unflatten(-1, (3, 3))
    eye = torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device)
    return eye + first * skew + second * (skew @ skew)


def matrix_to_axis_angle(matrix: Tensor) -> Tensor:
    """(... 3 3) -> (... 3) radians, angle in [0, π]; goes through the quaternion, stable at 0 and π."""
    m = rearrange(matrix, "... row column -> row column ...")
    # row k of this symmetric matrix is 4·q[k] times the quaternion q = (w, x, y, z); take the largest |q[k]|
    products = [
        [1 + m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
        [m[2, 1] - m[1, 2], 1 + m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
        [m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], 1 - m[0, 0] + m[1, 1] - m[2, 2], m[1, 2] + m[2, 1]],
        [m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], 1 - m[0, 0] - m[1, 1] + m[2, 2]],
    ]
    rows = torch.stack([torch.stack(row, dim=-1) for row in products], dim=-2)  # (... k 4)
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)
    q = rows.gather(-2, repeat(largest, "... -> ... 1 four", four=4)).squeeze(-2)
    q = F.normalize(torch.where(q[..., :1] < 0, -q, q), dim=-1)
    w, axis = q[..., :1], q[..., 1:]
    half_sine = torch.linalg.vector_norm(axis, dim=-1, keepdim=True)
    half_angle = torch.atan2(half_sine, w)
    return torch.where(half_sine < 1e-7, 2 * axis, axis * (2 * half_angle / half_sine.clamp_min(1e-12)))


def matrix_to_6d(matrix: Tensor) -> Tensor:
    """(... 3 3) -> (... 6): the first column, then the second."""
    return torch.cat((matrix[..., 0], matrix[..., 1]), dim=-1)


def sixd_to_matrix(sixd: Tensor) -> Tensor:
    """(... 6) -> (... 3 3): Gram-Schmidt on the two columns, the third is their cross product."""
    first = F.normalize(sixd[..., :3], dim=-1)
    second = sixd[..., 3:] - (first * sixd[..., 3:]).sum(-1, keepdim=True) * first
    second = F.normalize(second, dim=-1)
    return torch.stack((first, second, torch.linalg.cross(first, second)), dim=-1)


if __name__ == "__main__":
    print("the 51 tokens of a frame, in their order:")
    token = number = 0
    for name, size in SIZES.items():
        tokens = JOINTS if name in ("joints", "rotations") else 1
        places, numbers = f"{token:2}..{token + tokens - 1:2}", f"{number}..{number + size - 1}"
        print(f"  {places}  {name:10} {tokens:2} x {size // tokens:2}   numbers {numbers}")
        token, number = token + tokens, number + size
    encoder, motion = MotionEncoder(128), torch.randn(1, 17, MOTION_DIM)
    print(f"motion {tuple(motion.shape)} -> tokens {tuple(encoder(motion).shape)}: 17 frames of {token}")

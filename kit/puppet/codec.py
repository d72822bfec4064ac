"""A tiny linear video codec, fitted to the puppet's clips, with the geometry of Wan2.1's VAE."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from kit.puppet.drawing import render
from kit.puppet.world import clips

LATENT_CHANNELS = 48
FIT_SEEDS = range(1 << 20, (1 << 20) + 512)
RIDGE = 1e-5  # of a latent's variance


class Codec:
    """A linear video codec with the geometry of Wan2.1's VAE: 4x in time, 8x in space, first frame alone.

    A latent frame is the principal components of 4 frames of 8x8 pixels; decoding reads a latent and its
    eight neighbours, which removes the blocks' edges. The components are not whitened: one number scales
    them all to a mean variance of 1, so that weak ones stay weak.
    """

    def __init__(self, encode: Tensor, decode: Tensor, mean: Tensor, scale: Tensor):
        self.weight = encode  # (c, 768)
        self.kernel = decode  # (768, c, 3, 3)
        self.mean = mean  # (768,): the mean block
        self.scale = scale  # (): the root of the components' mean variance

    @classmethod
    def fit(cls, seeds: Sequence[int] = FIT_SEEDS) -> "Codec":
        """Closed form, from the clips of these seeds: PCA, then ridge regression from latents to blocks."""
        shown = map(clips, torch.tensor(seeds).split(64))
        videos = [render(clip.joints, clip.betas, clip.shirt)[0] for clip in shown]
        total = sum(_blocks(video).shape[:-1].numel() for video in videos)
        mean = sum(reduce(_blocks(video), "b T h w p -> p", "sum") for video in videos) / total
        covariance = 0.0
        for video in videos:
            block = rearrange(_blocks(video) - mean, "b T h w p -> (b T h w) p")
            covariance = covariance + block.T @ block / total
        variances, components = torch.linalg.eigh(covariance.double())  # ascending
        encode = rearrange(components[:, -LATENT_CHANNELS:].flip(1), "p c -> c p").float().contiguous()
        scale = variances[-LATENT_CHANNELS:].mean().sqrt().float()

        codec = cls(encode, torch.zeros(len(mean), LATENT_CHANNELS, 3, 3), mean, scale)
        gram, cross = 0.0, 0.0
        for video in videos:
            block = rearrange(_blocks(video) - mean, "b T h w p -> (b T h w) p")
            latents = rearrange(codec.encode(video), "b c T h w -> (b T) c h w")
            around = rearrange(F.unfold(latents, 3, padding=1), "n c hw -> (n hw) c")
            gram, cross = gram + around.T @ around / total, cross + around.T @ block / total
        solution = torch.linalg.solve((gram + RIDGE * torch.eye(len(gram))).double(), cross.double())
        codec.kernel = rearrange(solution.float(), "(c i j) p -> p c i j", i=3, j=3).contiguous()
        return codec

    def encode(self, video: Tensor) -> Tensor:
        """Video (b 3 f H W) in [-1, 1], f = 4n+1, H and W multiples of 8 -> latents (b c n+1 H/8 W/8)."""
        latents = (_blocks(video) - self.mean) @ self.weight.T / self.scale
        return rearrange(latents, "b T h w c -> b c T h w")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b c T h w) -> video (b 3 4(T-1)+1 8h 8w), clamped to [-1, 1]."""
        if latents.shape[1] != len(self.weight):
            raise ValueError(f"this codec's latents have {len(self.weight)} channels, got {latents.shape[1]}")
        flat = rearrange(latents, "b c T h w -> (b T) c h w")
        blocks = F.conv2d(flat, self.kernel, self.mean, padding=1).unflatten(0, (len(latents), -1))
        video = rearrange(blocks, "b T (c k p q) h w -> b c T k (h p) (w q)", k=4, p=8, q=8)
        first = reduce(video[:, :, 0], "b c k h w -> b c 1 h w", "mean")
        rest = rearrange(video[:, :, 1:], "b c T k h w -> b c (T k) h w")
        return torch.cat((first, rest), dim=2).clamp(-1, 1)

    def state(self) -> dict[str, Tensor]:
        """The codec as tensors, to travel with the weights."""
        return {"encode": self.weight, "decode": self.kernel, "mean": self.mean, "scale": self.scale}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Codec":
        if missing := sorted({"encode", "decode", "mean", "scale"} - state.keys()):
            raise ValueError(
                f"no puppet codec in these weights, {missing} missing: a Wan's need sample.py --wan FOLDER"
            )
        return cls(**state)


def _blocks(video: Tensor) -> Tensor:
    """(b 3 f 8h 8w) -> (b T h w 768): blocks of 4 frames of 8x8 pixels; the first frame is held for four."""
    held = torch.cat((repeat(video[:, :, 0], "b c h w -> b c 4 h w"), video[:, :, 1:]), dim=2)
    return rearrange(held, "b c (T k) (h p) (w q) -> b T h w (c k p q)", k=4, p=8, q=8)

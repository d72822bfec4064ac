"""The dual-modality diffusion transformer (paper, section 3.1): Wan's, with a second expert beside it.

Video and motion are two streams of tokens. Each has an expert of its own: an embedding, a head and, in every
block, Wan's layers (norms, modulation, query/key/value and output projections, cross-attention to the text, a
feed-forward network). In the 5B only every second block has a motion expert. Wan's embeddings of noise level
and text, before the blocks, serve both experts. The streams meet in one place only: self-attention runs once
over both, concatenated.

          video tokens                          motion tokens
    norm, modulate, q k v, rope           norm, modulate, q k v, rope
                 └─────────── joint attention ───────────┘
    o-projection, gate                    o-projection, gate
    norm, cross-attention to text         norm, cross-attention to text
    norm, modulate, feed-forward, gate    norm, modulate, feed-forward, gate

Either stream may be absent. Without motion, and while the task hint is zero, this computes what Wan does.

Axes: b batch, c channels, h w of the latents, T H W token grid, f motion frames, n tokens, l words,
d width = heads·head_dim.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from motion_tokens import MOTION_DIM, MotionDecoder, MotionEncoder, mlp
from rope import apply_rope, frames_of, motion_positions, rope_table, video_positions

TASK_COUNT = 5  # rows of the task hint's embedding, one for each flow.Task


@dataclass(frozen=True)
class DualDiTConfig:
    """Everything that shapes the network. Both experts have the same width."""

    layers: int
    width: int  # d
    heads: int
    ffn: int  # hidden width of the feed-forward networks
    channels: int  # c, of the video latents
    text_dim: int  # width of the text encoder's features
    patch: tuple[int, int, int] = (1, 2, 2)  # (1, height, width) of the latents in one video token
    freq_dim: int = 256  # width of the sinusoidal timestep embedding
    eps: float = 1e-6
    dual: tuple[int, ...] | None = None  # the blocks that have a motion expert; None: all of them
    synced: bool = True  # False is an ablation: motion at time f, not f/4
    apart: bool = True  # False is an ablation: motion begins at the grid's corner, positions collide
    shared: bool = False  # True is an ablation: single-stream, one set of block weights for both

    def __post_init__(self):
        for name in ("patch", "dual"):  # JSON has lists only
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))


PRESETS = {
    "puppet": DualDiTConfig(
        layers=6, width=128, heads=2, ffn=512, channels=48, text_dim=64, patch=(1, 1, 1), freq_dim=128
    ),
    "wan2.1-1.3b": DualDiTConfig(layers=30, width=1536, heads=12, ffn=8960, channels=16, text_dim=4096),
    # paper is silent: which 15 of the 30 blocks are dual
    "wan2.2-5b": DualDiTConfig(
        layers=30, width=3072, heads=24, ffn=14336, channels=48, text_dim=4096, dual=tuple(range(1, 30, 2))
    ),
}  # fmt: skip


# ---------------------------------------------------------------- pieces that both experts use


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Over the width, in fp32 whatever the dtype of x."""
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps).type_as(x)


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Over the width, in fp32 whatever the dtype of x."""
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.eps).type_as(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Normalise, scale and shift in fp32; the result has the dtype of x."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).type_as(x)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(b,) times in [0, 1] -> (b dim) float32: cosines, then sines, of 1000·t at geometric frequencies."""
    exponent = torch.arange(dim // 2, device=t.device, dtype=torch.float64) / (dim // 2)
    angles = torch.outer(1000 * t.double(), 10_000**-exponent)  # (b dim/2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def concatenated(streams: tuple[Tensor, ...]) -> Tensor:
    """torch.cat along n of streams (b heads n head_dim). In memory it is (b n heads head_dim), so that
    attention's result becomes (b n d) without a copy."""
    return torch.cat([x.transpose(1, 2) for x in streams], dim=1).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·k / sqrt(head_dim))·v: (b heads n head_dim) -> (b n d)."""
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n head_dim -> b n (heads head_dim)")


class Attention(nn.Module):
    """Projections of one attention; q and k are RMS-normalised over the full width, as in Wan."""

    def __init__(self, config: DualDiTConfig):
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(d, eps=config.eps) for _ in range(2))

    def qkv(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (b n d) -> (b heads n head_dim); keys and values of the source (b l d)
        -> (b heads l head_dim)."""
        q, k, v = rms_norm(self.q(x), self.norm_q), rms_norm(self.k(source), self.norm_k), self.v(source)
        pattern = "b n (heads head_dim) -> b heads n head_dim"
        return tuple(rearrange(y, pattern, heads=self.heads) for y in (q, k, v))


# ---------------------------------------------------------------- one block


class Context(NamedTuple):
    """What a block receives for a modality besides its tokens; the same for every block."""

    timestep_proj: Tensor  # (b 6 d) the noise level's part of the modulation, float32
    text: Tensor  # (b l d)
    rope: tuple[Tensor, Tensor]  # cos and sin of the tokens' positions, each (n head_dim/2)


class ExpertBlock(nn.Module):
    """One expert's share of a block: everything but the joint attention itself. Names are Wan's."""

    def __init__(self, config: DualDiTConfig):
        super().__init__()
        d = config.width
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, d))
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(d, eps=config.eps)  # before cross-attention: affine, not modulated
        self.cross_attn = Attention(config)
        self.ffn = mlp(d, config.ffn, d)

    def before_attention(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (b n d) -> rotated queries and keys, and values: each (b heads n head_dim)."""
        shift, scale, *_ = (self.modulation + context.timestep_proj).chunk(6, dim=1)  # each (b 1 d)
        y = modulate(x, shift, scale, self.eps)
        q, k, v = self.self_attn.qkv(y, y)
        return apply_rope(q, *context.rope), apply_rope(k, *context.rope), v

    def after_attention(self, x: Tensor, attended: Tensor, context: Context) -> Tensor:
        """Tokens, and the joint attention's result for them (b n d) -> the tokens after the block."""
        _, _, gate, shift2, scale2, gate2 = (self.modulation + context.timestep_proj).chunk(6, dim=1)
        x = (x + gate * self.self_attn.o(attended)).type_as(x)  # the gate is fp32
        q, k, v = self.cross_attn.qkv(layer_norm(x, self.norm3), context.text)
        x = x + self.cross_attn.o(attention(q, k, v))
        return (x + gate2 * self.ffn(modulate(x, shift2, scale2, self.eps))).type_as(x)


class DualBlock(nn.Module):
    """Two experts that meet in one self-attention; a video-only block has no motion expert."""

    def __init__(self, config: DualDiTConfig, dual: bool):
        super().__init__()
        self.shared = dual and config.shared  # one expert for both
        self.video = ExpertBlock(config)
        self.motion = ExpertBlock(config) if dual and not config.shared else None

    def forward(self, xs: dict[str, Tensor], contexts: dict[str, Context]) -> dict[str, Tensor]:
        """Tokens (b n d) of "video", "motion" or both -> the same after the block."""
        experts = {"video": self.video, "motion": self.video if self.shared else self.motion}
        meet = [m for m in xs if experts[m] is not None]  # motion passes a video-only block unchanged
        if not meet:
            return xs
        parts = [experts[m].before_attention(xs[m], contexts[m]) for m in meet]
        q, k, v = (concatenated(part) for part in zip(*parts, strict=True))  # (b heads n head_dim), n of both
        attended = attention(q, k, v).split([xs[m].shape[1] for m in meet], dim=1)  # each (b n d)
        after = zip(meet, attended, strict=True)
        return xs | {m: experts[m].after_attention(xs[m], y, contexts[m]) for m, y in after}


# ---------------------------------------------------------------- into the blocks and out of them


class Head(nn.Module):
    """Last norm and modulation of an expert, then its projection back to the modality."""

    def __init__(self, config: DualDiTConfig, head: nn.Module):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.width))
        self.head = head

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (b n d); temb (b d), the noise level's embedding, float32."""
        shift, scale = (self.modulation + temb[:, None]).chunk(2, dim=1)  # each (b 1 d)
        return self.head(modulate(x, shift, scale, self.eps))


class VideoEnds(nn.Module):
    """The video expert outside the blocks: latents (b c T h w) -> tokens (b, T·H·W, d) -> their velocity; and
    the embeddings of noise level and text that both experts use. Names are Wan's."""

    def __init__(self, config: DualDiTConfig):
        super().__init__()
        d = config.width
        self.freq_dim, self.patch = config.freq_dim, config.patch[1:]
        self.text_embedding = mlp(config.text_dim, d, d)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.patch_embedding = nn.Conv3d(config.channels, d, config.patch, stride=config.patch)
        self.head = Head(config, nn.Linear(d, math.prod(config.patch) * config.channels))

    def context(self, t: Tensor, text: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Context]:
        """t (b,), text (b l text_dim) -> the noise level's embedding (b d), float32; the blocks' context."""
        with torch.autocast(t.device.type, enabled=False):  # autocast would round it to bf16
            temb = self.time_embedding(timestep_embedding(t, self.freq_dim))  # (b d)
            timestep_proj = rearrange(self.time_projection(temb), "b (six d) -> b six d", six=6)
        return temb, Context(timestep_proj, self.text_embedding(text), rope)

    def embed(self, video: Tensor) -> Tensor:
        ph, pw = self.patch
        patches = rearrange(video, "b c T (H ph) (W pw) -> b (T H W) (c ph pw)", ph=ph, pw=pw)
        # the same as the convolution, whose patches do not overlap
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def predict(self, x: Tensor, temb: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (T, H, W), (ph, pw) = grid, self.patch
        pattern = "b (T H W) (ph pw c) -> b c T (H ph) (W pw)"  # c comes last here, as in Wan
        return rearrange(self.head(x, temb), pattern, T=T, H=H, W=W, ph=ph, pw=pw)


# ---------------------------------------------------------------- the network


class DualDiT(nn.Module):
    """u(video, motion, text): the velocities of both modalities, or of the one that is present."""

    def __init__(self, config: DualDiTConfig):
        super().__init__()
        d = config.width
        self.config = config
        self.video = VideoEnds(config)
        self.motion = nn.ModuleDict({"encoder": MotionEncoder(d), "head": Head(config, MotionDecoder(d))})
        # from_pretrained skips nn.Embedding's random initialisation; init_weights does it
        embedding = nn.Embedding.from_pretrained(torch.empty(TASK_COUNT, d), freeze=False)
        self.task_hint = nn.Sequential(embedding, nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        dual = range(config.layers) if config.dual is None else config.dual
        self.blocks = nn.ModuleList(DualBlock(config, dual=i in dual) for i in range(config.layers))
        # statistics of the motion data travel with the weights (motion_tokens.motion_statistics)
        self.register_buffer("motion_mean", torch.zeros(MOTION_DIM))
        self.register_buffer("motion_std", torch.ones(MOTION_DIM))
        if not self.motion_mean.is_meta:  # else weights are loaded later
            self.init_weights()

    def forward(
        self, video: Tensor | None, motion: Tensor | None, t_video: Tensor | None, t_motion: Tensor | None,
        text: Tensor, task: int,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Velocities (d x_t / d t) of video and motion.

        video (b c T h w) latents, motion (b f 235) normalised, f = 4(T-1)+1; t_video and t_motion (b,) or
        (1,) in [0, 1]; text (b l text_dim); task a flow.Task. An absent input is None and gives None back.
        A clean condition has t = 0, and its velocity means nothing. ValueError where f does not fit T.
        """
        # without video the grid does not matter: attention depends on differences of positions only
        size = (0, 0, 0) if video is None else video.shape[2:]
        T, H, W = (n // patch for n, patch in zip(size, self.config.patch, strict=True))
        f = 0 if motion is None else motion.shape[1]
        if video is not None and motion is not None and f != frames_of(T):
            raise ValueError(f"{T} video latents span {frames_of(T)} frames, but motion has {f}")
        dtype = self.video.patch_embedding.weight.dtype
        video, motion, text = (None if x is None else x.to(dtype) for x in (video, motion, text))
        rope_video, rope_motion = rope_tables(self.config, (T, H, W), f, text.device)
        with torch.autocast(text.device.type, enabled=False):
            hint = self.task_hint[1:](self.task_hint[0].weight[task])  # (d,)

        xs, contexts = {}, {}
        if video is not None:
            temb_video, contexts["video"] = self.video.context(t_video, text, rope_video)
            x = self.video.embed(video)  # (b T·H·W d)
            xs["video"] = x + hint.type_as(x)
        if motion is not None:
            # paper is silent: Wan's embeddings of noise level and text serve both experts
            temb_motion, contexts["motion"] = self.video.context(t_motion, text, rope_motion)
            x = self.motion["encoder"](motion)  # (b f·51 d)
            xs["motion"] = x + hint.type_as(x)

        for block in self.blocks:
            xs = block(xs, contexts)

        u_video = None if video is None else self.video.predict(xs["video"], temb_video, (T, H, W))
        u_motion = None if motion is None else self.motion["head"](xs["motion"], temb_motion)
        return u_video, u_motion

    def video_parameters(self) -> list[nn.Parameter]:
        """The parameters that are Wan's: trained in stage 0, frozen in stage 1."""
        return [p for name, p in self.named_parameters() if "video" in name.split(".")]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Wan's initialisation. Zero: the last layers of both heads and of the task hint."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, (ExpertBlock, Head)):
                nn.init.normal_(module.modulation, std=self.config.width**-0.5)
        for layer in (*self.video.text_embedding[::2], *self.video.time_embedding[::2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(self.task_hint[0].weight)
        nn.init.normal_(self.motion["encoder"].token, std=0.5)
        nn.init.normal_(self.motion["encoder"].phase, std=0.5)
        ends = [layers[-1] for layers in self.motion["head"].head.mlps.values()]
        for layer in (self.video.head.head, self.task_hint[-1], *ends):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.motion_mean.zero_()
        self.motion_std.fill_(1.0)


@functools.cache
def rope_tables(
    config: DualDiTConfig, grid: tuple[int, int, int], f: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The rotary tables of video and of motion, kept: they are the same in every step."""
    T, H, W = grid
    video, motion = video_positions(T, H, W), motion_positions(f, H, W, config.synced, config.apart)
    return tuple(rope_table(p.to(device), config.width // config.heads) for p in (video, motion))


if __name__ == "__main__":
    model, t = DualDiT(PRESETS["puppet"]), torch.tensor([0.5])
    video, motion, text = torch.randn(1, 48, 5, 8, 8), torch.randn(1, 17, MOTION_DIM), torch.randn(1, 16, 64)

    def show(what: str, **tensors: Tensor) -> None:
        print(f"{what:18}", ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items()))

    model.blocks[0].register_forward_hook(lambda _, inputs, xs: show("out of a block", **xs))
    show("latents and motion", video=video, motion=motion)
    u_video, u_motion = model(video, motion, t, t, text, task=0)  # Task.JOINT
    show("velocities", video=u_video, motion=u_motion)
    print("video alone:")
    model(video, None, t, None, text, task=4)  # Task.VIDEO_ONLY

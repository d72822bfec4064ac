"""The dual-modality diffusion transformer (paper, section 3.3): Wan's, with a second expert beside it.

Video and motion are two streams of tokens. Each has an expert of its own: embeddings, and in every
block norms, modulation, query/key/value and output projections, cross-attention to the text and a
feed-forward network, all exactly Wan's. The streams meet in one place only: self-attention runs once
over both, concatenated.

        video tokens                      motion tokens
    norm, modulate, q k v, rope       norm, modulate, q k v, rope
                \\_________ joint attention _________/
    o-projection, gate                o-projection, gate
    cross-attention to text           cross-attention to text
    modulate, feed-forward, gate      modulate, feed-forward, gate

Either stream may be absent. Without motion, what runs is Wan, number for number.

Axes: b batch, c channels, t h w latent grid, f motion frames, n tokens, d width, heads x k = d.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from motion_tokens import MOTION_DIM, MotionDecoder, MotionEncoder
from rope import FRAMES_PER_LATENT, apply_rope, motion_positions, rope_table, video_positions

TASKS = 5  # rows of the task embedding, one for each flow.Task
# bytes of a CPU's cache for the scores of bf16 attention; without AVX-512 there are no units for its products
CACHE = 2**23 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0


@dataclass(frozen=True)
class DualDiTConfig:
    """Everything that shapes the network. Both experts have the same width and depth."""

    layers: int
    width: int  # d
    heads: int
    ffn: int  # hidden width of the feed-forward networks
    channels: int  # c, of the video latents
    text_dim: int  # width of the text encoder's features
    patch: tuple[int, int, int] = (1, 2, 2)  # (t h w) latents that make one video token
    freq_dim: int = 256  # width of the sinusoidal timestep embedding
    eps: float = 1e-6
    synced: bool = True  # MVS-RoPE; False is the ablation
    grid: tuple[int, int] | None = None  # (H W) of learned absolute positions; Wan has none

    def __post_init__(self):
        for name in ("patch", "grid"):  # JSON has lists only
            object.__setattr__(self, name, getattr(self, name) and tuple(getattr(self, name)))
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must divide into {self.heads} heads of an even size")
        if self.patch[0] != 1:
            raise ValueError(f"patches span one latent frame, as in Wan; got patch {self.patch}")


PRESETS = {
    "puppet": DualDiTConfig(
        layers=6,
        width=128,
        heads=2,
        ffn=512,
        channels=48,
        text_dim=64,
        patch=(1, 1, 1),
        freq_dim=128,
        grid=(8, 8),
    ),
    "wan2.1-1.3b": DualDiTConfig(layers=30, width=1536, heads=12, ffn=8960, channels=16, text_dim=4096),
    "wan2.2-5b": DualDiTConfig(layers=30, width=3072, heads=24, ffn=14336, channels=48, text_dim=4096),
}


# ---------------------------------------------------------------- pieces that both experts use


class Modulation(NamedTuple):
    """What the timestep does to one sub-layer: x + gate * sublayer(norm(x) * (1 + scale) + shift)."""

    shift: Tensor  # each (b 1 d), float32
    scale: Tensor
    gate: Tensor


class Prompt(NamedTuple):
    """A text as the blocks read it: cross-attention's keys and values (b heads l k), a pair a block."""

    video: list[tuple[Tensor, Tensor]]
    motion: list[tuple[Tensor, Tensor]]


class Stream(NamedTuple):
    """One modality on its way through the blocks."""

    x: Tensor  # (b n d) tokens
    time: Tensor  # (b 6 d) the timestep's part of the modulation, float32; (1 6 d) if all have the same
    text: Tensor | tuple[Tensor, Tensor]  # (b l d) projected features, or a block's keys and values of them
    cos: Tensor  # (n k/2) the tokens' rotary table
    sin: Tensor
    wanted: bool = True  # False: the block reads these tokens, but need not say what they become


def layer_norm(x: Tensor, eps: float, affine: nn.LayerNorm | None = None) -> Tensor:
    """Over the width, in fp32 whatever the dtype of x."""
    weight, bias = (affine.weight.float(), affine.bias.float()) if affine else (None, None)
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).type_as(x)


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Over the width, in fp32 whatever the dtype of x."""
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.eps).type_as(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Normalise, scale and shift in fp32; the result has the dtype of x."""
    return (layer_norm(x.float(), eps) * (1 + scale) + shift).type_as(x)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch in fp32, as the gate is; the result has the dtype of x."""
    return (x + gate * branch).type_as(x)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(b,) times in [0, 1] -> (b dim) float32: cosines, then sines, of 1000·t at geometric frequencies."""
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float64) / half
    angles = torch.outer(1000 * t.double(), 10_000**-exponent)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class Attention(nn.Module):
    """Projections of one attention; q and k are RMS-normalised over the full width, as in Wan."""

    def __init__(self, config: DualDiTConfig):
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(d, eps=config.eps) for _ in range(2))

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (heads k) -> b heads n k", heads=self.heads)

    def queries(self, x: Tensor) -> Tensor:
        return self.split(rms_norm(self.q(x), self.norm_q))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(rms_norm(self.k(x), self.norm_k)), self.split(self.v(x))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·k / sqrt(head size))·v: (b heads n k) -> (b n d)."""
    scores = q.shape[2] * k.shape[2] * q.element_size()  # bytes, of one head
    # one head's at a time, but a backward pass needs those of all heads of each sample
    kept = scores * q.shape[1] if torch.is_grad_enabled() else scores
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and kept <= CACHE:
        x = attend_by_parts(q, k, v, CACHE // scores)
    else:
        x = F.scaled_dot_product_attention(q, k, v)
    return rearrange(x, "b heads n k -> b n (heads k)")


def attend_by_parts(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same in plain products, so many heads at a time.

    On a CPU's bf16 units this is faster than torch's fused kernel (bench's forward_ratio_bf16), as long as
    scores stay in the cache. They are rounded to bf16, and kept for the backward pass.
    """
    b = len(q)
    q, k, v = (rearrange(x, "b heads n k -> (b heads) n k") for x in (q * q.shape[-1] ** -0.5, k, v))
    parts = zip(q.split(heads), k.split(heads), v.split(heads), strict=True)
    x = torch.cat([torch.softmax(queries @ keys.mT, dim=-1) @ values for queries, keys, values in parts])
    return rearrange(x, "(b heads) n k -> b heads n k", b=b)


# ---------------------------------------------------------------- one block


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
        self.ffn = nn.Sequential(
            nn.Linear(d, config.ffn), nn.GELU(approximate="tanh"), nn.Linear(config.ffn, d)
        )

    def modulations(self, time: Tensor) -> tuple[Modulation, Modulation]:
        """(b 6 d) -> shift, scale, gate of self-attention and of the feed-forward network."""
        parts = (self.modulation.float() + time).chunk(6, dim=1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def before_attention(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: each (b heads n k)."""
        mod, _ = self.modulations(stream.time)
        x = modulate(stream.x, mod.shift, mod.scale, self.eps)
        q = self.self_attn.queries(x)
        k, v = self.self_attn.keys_values(x)
        return apply_rope(q, stream.cos, stream.sin), apply_rope(k, stream.cos, stream.sin), v

    def after_attention(self, stream: Stream, attended: Tensor) -> Tensor:
        """This expert's rows of the joint attention (b n d) -> its tokens after the block, for each text."""
        attention_mod, ffn_mod = self.modulations(stream.time)
        x = gated(stream.x, attention_mod.gate, self.self_attn.o(attended))
        queries = self.cross_attn.queries(layer_norm(x, self.eps, self.norm3))
        text = stream.text if isinstance(stream.text, tuple) else self.cross_attn.keys_values(stream.text)
        # up to here tokens do not depend on the text; of several texts, each now gets its own
        texts = len(text[0]) // len(x)
        x, queries = (repeat(tokens, "b ... -> (texts b) ...", texts=texts) for tokens in (x, queries))
        x = x + self.cross_attn.o(attend(queries, *text)).type_as(x)
        return gated(x, ffn_mod.gate, self.ffn(modulate(x, ffn_mod.shift, ffn_mod.scale, self.eps)))


class DualBlock(nn.Module):
    """Two experts that meet in one self-attention."""

    def __init__(self, config: DualDiTConfig):
        super().__init__()
        self.video = ExpertBlock(config)
        self.motion = ExpertBlock(config)

    def read_text(self, video: Tensor, motion: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Text projected by each expert (b l d) -> each expert's keys and values of it."""
        return [self.video.cross_attn.keys_values(video), self.motion.cross_attn.keys_values(motion)]

    def forward(self, video: Stream | None, motion: Stream | None) -> tuple[Tensor | None, Tensor | None]:
        present = [(e, s) for e, s in ((self.video, video), (self.motion, motion)) if s is not None]
        q, k, v = zip(*(expert.before_attention(stream) for expert, stream in present), strict=True)
        q = [queries for queries, (_, stream) in zip(q, present, strict=True) if stream.wanted]
        # alone, a stream needs no copy of its queries, keys and values
        attended = attend(*(x[0] if len(x) == 1 else torch.cat(x, dim=2) for x in (q, k, v)))
        rows = iter(attended.split([queries.shape[2] for queries in q], dim=1))  # each (b n d)
        x_video, x_motion = (
            expert.after_attention(stream, next(rows)) if stream is not None and stream.wanted else None
            for expert, stream in ((self.video, video), (self.motion, motion))
        )
        return x_video, x_motion


# ---------------------------------------------------------------- into the blocks and out of them


class Head(nn.Module):
    """Last norm and modulation of an expert, then its projection back to the modality."""

    def __init__(self, config: DualDiTConfig, head: nn.Module):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.width))
        self.head = head

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (b n d), time (b d) float32."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        return self.head(modulate(x, shift, scale, self.eps))


class Conditioning(nn.Module):
    """What an expert is told besides its tokens: the time and the text. Names are Wan's."""

    def __init__(self, config: DualDiTConfig):
        super().__init__()
        d = config.width
        self.freq_dim = config.freq_dim
        # paper is silent: each expert projects the text for itself
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, d), nn.GELU(approximate="tanh"), nn.Linear(d, d)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def embed_text(self, text: Tensor) -> Tensor:
        """(b l text_dim) -> (b l d)."""
        return self.text_embedding(text.to(self.text_embedding[0].weight.dtype))

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(b,) -> (b d) for the head and (b 6 d) for the blocks, float32 even under autocast."""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.time_embedding[0].weight.dtype
            time = self.time_embedding(timestep_embedding(t, self.freq_dim).to(dtype))
            return time.float(), rearrange(self.time_projection(time), "b (six d) -> b six d", six=6).float()


class VideoExpert(Conditioning):
    """Latents (b c t h w) <-> video tokens (b, t*H*W, d)."""

    def __init__(self, config: DualDiTConfig):
        super().__init__(config)
        self.patch = config.patch
        self.patch_embedding = nn.Conv3d(config.channels, config.width, config.patch, stride=config.patch)
        self.head = Head(config, nn.Linear(config.width, math.prod(config.patch) * config.channels))
        # paper is silent: a small network from scratch is slow to learn from RoPE alone where a token is
        self.place = nn.Parameter(torch.empty(*config.grid, config.width)) if config.grid else None

    def grid(self, video: Tensor) -> tuple[int, int, int]:
        """Token grid (t, H, W) of latents (b c t h w)."""
        return tuple(size // patch for size, patch in zip(video.shape[2:], self.patch, strict=True))

    def embed(self, video: Tensor) -> Tensor:
        x = self.patch_embedding(video.to(self.patch_embedding.weight.dtype))
        x = rearrange(x, "b d t h w -> b t h w d")
        if self.place is not None:
            x = x + self.place.type_as(x)
        # a convolution's rows lie across memory, and every layer after it would keep them so
        return rearrange(x, "b t h w d -> b (t h w) d").contiguous()

    def predict(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (t, h, w), (pt, ph, pw) = grid, self.patch
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return rearrange(self.head(x, time), pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


class MotionExpert(Conditioning):
    """Normalised motion (b f 235) <-> motion tokens (b, f*51, d)."""

    def __init__(self, config: DualDiTConfig):
        super().__init__(config)
        self.encoder = MotionEncoder(config.width)
        self.head = Head(config, MotionDecoder(config.width))

    def embed(self, motion: Tensor) -> Tensor:
        return self.encoder(motion.to(self.encoder.token.dtype))

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        return self.head(x, time)


# ---------------------------------------------------------------- the network


# attention is what costs most to recompute, and its result is as small as the tokens
KEPT = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
recomputed = functools.partial(
    checkpoint, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, KEPT)
)


class DualDiT(nn.Module):
    """u(video, motion | text): the velocities of both modalities, or of the one that is there."""

    def __init__(self, config: DualDiTConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass, but for fused attention
        self.video = VideoExpert(config)
        self.motion = MotionExpert(config)
        self.task_hint = nn.Sequential(
            # drawn in init_weights: an embedding's own draw on the meta device imports torch's compiler
            nn.Embedding.from_pretrained(torch.empty(TASKS, config.width), freeze=False),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
        )
        self.blocks = nn.ModuleList(DualBlock(config) for _ in range(config.layers))
        # statistics of the motion data travel with the weights (motion_tokens.motion_statistics)
        self.register_buffer("motion_mean", torch.zeros(MOTION_DIM))
        self.register_buffer("motion_std", torch.ones(MOTION_DIM))
        if not self.motion_mean.is_meta:  # values come later, from a file
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Wan's initialisation. Zero: both heads and the task hint, so that training starts from Wan."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0)
            elif isinstance(module, (ExpertBlock, Head)):
                nn.init.normal_(module.modulation, std=module.modulation.shape[-1] ** -0.5)
            elif isinstance(module, MotionEncoder):
                nn.init.normal_(module.token, std=0.5)
                nn.init.normal_(module.phase, std=0.5)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        for expert in (self.video, self.motion):
            for layer in (*expert.text_embedding[::2], *expert.time_embedding[::2]):
                nn.init.normal_(layer.weight, std=0.02)
        last_layers = [self.video.head.head, self.task_hint[-1]]
        last_layers += [mlp[-1] for mlp in self.motion.head.head.mlps.values()]
        for layer in last_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.video.place is not None:
            nn.init.zeros_(self.video.place)
        self.motion_mean.zero_()
        self.motion_std.fill_(1.0)

    def video_parameters(self) -> list[nn.Parameter]:
        """The parameters that are Wan's, frozen in stage 1."""
        return [p for name, p in self.named_parameters() if "video" in name.split(".")]

    def check(
        self,
        video: Tensor | None,
        motion: Tensor | None,
        times: tuple[Tensor | None, Tensor | None],
        text: Tensor | Prompt,
    ) -> None:
        """Raise ValueError where shapes do not fit the configuration or each other."""
        if video is not None:
            _, ph, pw = self.config.patch
            if video.ndim != 5 or video.shape[1] != self.config.channels:
                raise ValueError(
                    f"video latents: expected (b, {self.config.channels}, t, h, w), got {tuple(video.shape)}"
                )
            if video.shape[3] % ph or video.shape[4] % pw:
                raise ValueError(
                    f"latent size {tuple(video.shape[3:])} must be a multiple of the patch {(ph, pw)}"
                )
            if self.config.grid and self.video.grid(video)[1:] != self.config.grid:
                raise ValueError(f"{self.video.grid(video)[1:]} tokens a frame, expected {self.config.grid}")
        if motion is not None and (motion.ndim != 3 or motion.shape[-1] != MOTION_DIM):
            raise ValueError(f"motion: expected (b, f, {MOTION_DIM}), got {tuple(motion.shape)}")
        if video is not None and motion is not None:
            frames = FRAMES_PER_LATENT * (video.shape[2] - 1) + 1
            if motion.shape[1] != frames:
                raise ValueError(
                    f"{video.shape[2]} video latents span {frames} frames, but motion has {motion.shape[1]}"
                )
        b = len(video if video is not None else motion)
        if motion is not None and len(motion) != b:
            raise ValueError(f"{b} videos, but {len(motion)} motions: expected one for each")
        texts = len(text.video[0][0] if isinstance(text, Prompt) else text)
        if texts == 0 or texts % b:
            raise ValueError(f"{texts} texts for {b} samples: expected one or more for each")
        allowed = {(1,), (b,)} if texts == b else {(1,)}
        for t in times:
            if t is not None and tuple(t.shape) not in allowed:
                raise ValueError(
                    f"times {tuple(t.shape)} for {b} samples of {texts // b} texts: expected one of {allowed}"
                )

    def read_text(self, text: Tensor) -> Prompt:
        """(b l text_dim) -> what forward takes as well, to read a text once and not in every step."""
        embedded = self.video.embed_text(text), self.motion.embed_text(text)
        return Prompt(*map(list, zip(*(block.read_text(*embedded) for block in self.blocks), strict=True)))

    def forward(
        self,
        video: Tensor | None,
        motion: Tensor | None,
        t_video: Tensor | None,
        t_motion: Tensor | None,
        text: Tensor | Prompt,
        task: Tensor | int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities (d x_t / d t) of video and motion.

        video (b c t h w) latents or None, motion (b f 235) normalised or None, t_video and t_motion (b,) or
        (1,) in [0, 1], text (b l text_dim) or what read_text made of it, task a flow.Task or (b,) of them. An
        absent input gives None back, and so does one without a time: it is a clean condition, at t = 0.
        With n texts for each sample, (n·b l text_dim), text after text, and times (1,), there are n·b
        velocities; what comes before the first word is computed once.
        """
        if (video is None or t_video is None) and (motion is None or t_motion is None):
            raise ValueError("nothing to denoise: give video with t_video, motion with t_motion, or both")
        self.check(video, motion, (t_video, t_motion), text)
        first = video if video is not None else motion
        with torch.autocast(first.device.type, enabled=False):
            hint = self.task_hint(torch.as_tensor(task, device=first.device).expand(first.shape[0]))[:, None]
        head_dim = self.config.width // self.config.heads

        def stream(
            expert: VideoExpert | MotionExpert, x: Tensor, t: Tensor | None, positions: Tensor
        ) -> tuple[Stream, Tensor]:
            """What the blocks get of a modality, and the time for its head."""
            time, blocks_time = expert.embed_time(x.new_zeros(1) if t is None else t)
            words = None if isinstance(text, Prompt) else expert.embed_text(text)
            x = expert.embed(x)
            table = rope_table(positions.to(x.device), head_dim)
            return Stream(x + hint.type_as(x), blocks_time, words, *table), time

        video_stream = motion_stream = None
        # without video, motion begins at (0, 0): attention sees differences of positions only
        t, h, w = self.video.grid(video) if video is not None else (0, 0, 0)
        if video is not None:
            video_stream, time_video = stream(self.video, video, t_video, video_positions(t, h, w))
        if motion is not None:
            positions = motion_positions(motion.shape[1], h, w, synced=self.config.synced)
            motion_stream, time_motion = stream(self.motion, motion, t_motion, positions)

        for i, block in enumerate(self.blocks):
            if isinstance(text, Prompt):
                video_stream = video_stream and video_stream._replace(text=text.video[i])
                motion_stream = motion_stream and motion_stream._replace(text=text.motion[i])
            if i == len(self.blocks) - 1:  # a clean condition has been read when this block has read it
                video_stream = video_stream and video_stream._replace(wanted=t_video is not None)
                motion_stream = motion_stream and motion_stream._replace(wanted=t_motion is not None)
            if self.checkpointing and torch.is_grad_enabled():
                x_video, x_motion = recomputed(block, video_stream, motion_stream)
            else:
                x_video, x_motion = block(video_stream, motion_stream)
            video_stream = video_stream and video_stream._replace(x=x_video)
            motion_stream = motion_stream and motion_stream._replace(x=x_motion)

        u_video = None if x_video is None else self.video.predict(x_video, time_video, (t, h, w))
        u_motion = None if x_motion is None else self.motion.predict(x_motion, time_motion)
        return u_video, u_motion


if __name__ == "__main__":
    config = PRESETS["puppet"]
    model, shapes = DualDiT(config), lambda *tensors: ", ".join(str(tuple(x.shape)) for x in tensors)
    video, motion, t = torch.randn(1, 48, 5, 8, 8), torch.randn(1, 17, MOTION_DIM), torch.tensor([0.5])
    block = model.blocks[0]
    block.register_forward_pre_hook(
        lambda _, streams: print("into a block       ", shapes(*(stream.x for stream in streams)))
    )
    for name, expert in (("video", block.video), ("motion", block.motion)):
        expert.self_attn.o.register_forward_hook(
            lambda _, inputs, output, name=name: print(f"attended, {name:9}", shapes(output))
        )
    block.register_forward_hook(lambda _, inputs, output: print("out of a block     ", shapes(*output)))
    print("latents and motion ", shapes(video, motion))
    velocities = model(video, motion, t, t, torch.randn(1, 16, config.text_dim), 0)
    print("velocities         ", shapes(*velocities))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.video, model.motion, block)]
    print("parameters: video ends {:,}, motion ends {:,}, a block {:,}".format(*counts))

"""The denoising UNet of Stable Diffusion 1.x (Rombach et al. 2112.10752, section 3.3).

It computes what diffusers' UNet2DConditionModel computes, with the same weight names. InstructPix2Pix
(2211.09800, section 3.2) only adds 4 input channels to conv_in, for the latents of the input picture.
R is a residual block, RT a residual block followed by a transformer. For a picture of 512 x 512 pixels:

    part            latents    channels in -> out of each block                        after the blocks
    conv_in         64 x 64    4 or 8 -> 320
    down_blocks.0   64 x 64    RT 320 -> 320, RT 320 -> 320                            halve
    down_blocks.1   32 x 32    RT 320 -> 640, RT 640 -> 640                            halve
    down_blocks.2   16 x 16    RT 640 -> 1280, RT 1280 -> 1280                         halve
    down_blocks.3    8 x 8     R 1280 -> 1280, R 1280 -> 1280
    mid_block        8 x 8     RT 1280 -> 1280, R 1280 -> 1280
    up_blocks.0      8 x 8     R 2560 -> 1280, R 2560 -> 1280, R 2560 -> 1280          double
    up_blocks.1     16 x 16    RT 2560 -> 1280, RT 2560 -> 1280, RT 1920 -> 1280       double
    up_blocks.2     32 x 32    RT 1920 -> 640, RT 1280 -> 640, RT 960 -> 640           double
    up_blocks.3     64 x 64    RT 960 -> 320, RT 640 -> 320, RT 640 -> 320
    conv_out        64 x 64    320 -> 4

Skip connections: conv_in, every block of down_blocks and every halving push their output onto a stack, 12 in
all. Each block of up_blocks pops one output and concatenates it to its own input: 1920 = 1280 + 640 channels.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanoip2p.attention import attention
from nanoip2p.common.config import FIXED, IGNORED, read_config

DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # name in config.json -> has attention
UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True)
class UNetConfig:
    """Config of the UNet: names as in diffusers' config.json, default values as in SD 1.5."""

    in_channels: int = 4  # 8 for an editor: noised latents, then the input picture's latents
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # one for each level
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2  # residual blocks per level in down_blocks; one more in up_blocks
    attention_head_dim: int | tuple[int, ...] = 8  # despite its name, the NUMBER of heads (tuple: per level)
    cross_attention_dim: int = 768  # width of a text token
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True  # the timestep embedding has the cosines first
    freq_shift: int = 0

    def __post_init__(self):
        widths, levels = self.block_out_channels, len(self.block_out_channels)
        for key, known in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            names = getattr(self, key)
            if len(names) != levels or not set(names) <= set(known):
                raise ValueError(f"UNetConfig: {key} = {names} must be {levels} names from {sorted(known)}")
        if any(width % self.norm_num_groups for width in widths) or widths[0] % 2 or widths[0] < 4:
            raise ValueError(f"UNetConfig: norm_num_groups must divide block_out_channels = {widths}, "
                             "the first of which must be even and at least 4")
        if len(self.heads) != levels or any(c % h for c, h in zip(widths, self.heads)):
            raise ValueError(f"UNetConfig: attention_head_dim = {self.heads} must divide {widths} one by one")

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each level."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)

    def to_json(self) -> dict:
        """The config.json from which diffusers builds the same network."""
        return {"_class_name": "UNet2DConditionModel", **asdict(self), **FIXED["unet"]}


def timestep_embedding(timestep: Tensor, width: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Timesteps (B,) -> sines and cosines (B, width) float32, of wavelengths from 2 pi to almost 20000 pi."""
    steps = torch.arange(width // 2, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * steps / (width // 2 - freq_shift))
    return torch.cat((angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos()), dim=1)


class TimeEmbedding(nn.Module):
    """Timesteps (B,) or a number -> (B, 4 C_0) or (1, 4 C_0), where C_0 is the width of the first level.

    Every residual block uses this embedding after a SiLU, so we apply that SiLU here, once.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[0]
        self.embedding_settings = width, config.flip_sin_to_cos, config.freq_shift
        self.linear_1, self.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)

    def forward(self, timestep: Tensor | float) -> Tensor:
        bias = self.linear_1.bias  # not the weight, which speed/cpu.py replaces
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=bias.device).reshape(-1)
        x = timestep_embedding(timestep, *self.embedding_settings).to(bias.dtype)
        return F.silu(self.linear_2(F.silu(self.linear_1(x))))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. (B, C_in, h, w) -> (B, C_out, h, w).

    Between the convolutions, adds a projection of time (B, time_width), or time[self] if time is a dict.
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, time_width: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_width:
            self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | dict | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:  # the VAE has no time
            h = h + (time[self] if isinstance(time, dict) else self.time_emb_proj(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Projected(NamedTuple):
    """Keys and values of R texts in each cross-attention layer, from `UNet.project_context`."""
    layers: dict  # cross-attention layer -> (keys, values), (R, L, C) each
    rows: Tensor  # (R,): for each text, the row of the latents that it belongs to


Context = Tensor | Projected
# (layer, x, context) -> attention before the output projection. context is x in self-attention
Attend = Callable[["Attention", Tensor, Context], Tensor]


def repeat_rows(x: Tensor, context: Context) -> Tensor:
    """Repeat the rows of x (B, ...) to one row per text (R, ...), unless x has R rows already."""
    if isinstance(context, Tensor) or len(x) == len(context.rows):
        return x
    # Indexing alone would turn a feature map in channels_last into a contiguous one, which is slower
    return x.movedim(1, -1)[context.rows].movedim(-1, 1) if x.ndim == 4 else x[context.rows]


def attend(layer: "Attention", x: Tensor, context: Context) -> Tensor:
    """Ordinary attention: row i of x, after `repeat_rows`, attends to text i. (B, T, C) -> (R, T, C)."""
    return layer.attention(repeat_rows(layer.to_q(x), context), *layer.project(context), layer.heads)


class Attention(nn.Module):
    """Tokens x (B, T, C) attend to a context (B, L, C_context). Only the output projection has a bias."""

    def __init__(self, channels: int, c_context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention = attention  # speed/ may replace this function by a faster one
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(c_context, channels, bias=False)
        self.to_v = nn.Linear(c_context, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def project(self, context: Context) -> tuple[Tensor, Tensor]:
        """The keys and values of the context: (B, L, C) each, or (R, L, C) if it is Projected."""
        projected = isinstance(context, Projected)
        return context.layers[self] if projected else (self.to_k(context), self.to_v(context))

    def forward(self, x: Tensor, context: Context, attend: Attend) -> Tensor:
        return self.to_out[0](attend(self, x, context))


class FeedForward(nn.Module):
    """Feed-forward layer with GEGLU (Shazeer 2002.05202) of width 4 C. (B, T, C) -> (B, T, C)."""

    def __init__(self, c: int):
        super().__init__()
        wide = nn.ModuleDict({"proj": nn.Linear(c, 8 * c)})  # net.0.proj in diffusers, where net.1 is dropout
        self.net = nn.ModuleList([wide, nn.Identity(), nn.Linear(4 * c, c)])

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net[0]["proj"](x).chunk(2, dim=-1)           # (B, T, 4 C) each
        return self.net[2](value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to text, feed-forward. (B, T, C) -> (R, T, C) for R texts."""

    def __init__(self, channels: int, c_context: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, c_context, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context, attend: Attend) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h, attend)
        x = repeat_rows(x, context) + self.attn2(self.norm2(x), context, attend)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over all positions of a feature map. (B, C, h, w) -> (R, C, h, w) for R texts."""

    def __init__(self, channels: int, heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)  # not config.norm_eps
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, config.cross_attention_dim, heads)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context, attend: Attend) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)       # (B, h*w, C)
        h = self.transformer_blocks[0](h, context, attend)
        return repeat_rows(x, context) + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


def _resample(channels: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution: (B, C, h, w) -> (B, C, h/2, w/2) with stride 2, (B, C, h, w) with stride 1."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 3, stride, padding=1)))


class Level(nn.Module):
    """The blocks at one resolution: a row of the table above. Block i: (B, C_in, h, w) -> (R, C_out, h, w).

    c_ins: input channels of each residual block. transformers: their number; transformer i follows block i.
    """

    def __init__(self, c_ins: list[int], c_out: int, transformers: int, heads: int, resample: str | None,
                 config: UNetConfig):
        super().__init__()
        settings = config.norm_num_groups, config.norm_eps, 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c_out, *settings) for c_in in c_ins)
        self.attentions = nn.ModuleList(SpatialTransformer(c_out, heads, config) for _ in range(transformers))
        self.downsamplers = nn.ModuleList([_resample(c_out, 2)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([_resample(c_out, 1)] if resample == "up" else [])

    def block(self, i: int, x: Tensor, time: Tensor | dict, context: Context, attend: Attend,
              recompute: bool = False) -> Tensor:
        """Run residual block i, then transformer i if there is one. recompute: gradient checkpointing."""
        if recompute:
            return checkpoint(self.block, i, x, time, context, attend, use_reentrant=False,
                              preserve_rng_state=False)
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context, attend) if i < len(self.attentions) else x


class UNet(nn.Module):
    """Predicts the noise (or v, see diffusion.add_noise) in the latents from the timestep and the text."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(config)

        c, skips = widths[0], [widths[0]]  # channels of x, and of each skip connection
        self.down_blocks = nn.ModuleList()
        for i, (c_out, heads, name) in enumerate(zip(widths, config.heads, config.down_block_types)):
            resample = None if i == len(widths) - 1 else "down"
            c_ins = [c] + [c_out] * (layers - 1)
            self.down_blocks.append(Level(c_ins, c_out, layers * DOWN_TYPES[name], heads, resample, config))
            c, skips = c_out, skips + [c_out] * (layers + 1 if resample else layers)

        self.mid_block = Level([c, c], c, 1, config.heads[-1], None, config)

        self.up_blocks = nn.ModuleList()
        for c_out, heads, name in zip(widths[::-1], config.heads[::-1], config.up_block_types):
            resample = "up" if len(skips) > layers + 1 else None
            c_ins = [c_in + skips.pop() for c_in in [c] + [c_out] * layers]
            self.up_blocks.append(Level(c_ins, c_out, (layers + 1) * UP_TYPES[name], heads, resample, config))
            c = c_out
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    @classmethod
    def from_config(cls, config: dict) -> "UNet":
        """Build from diffusers' unet/config.json. Raises ValueError for unsupported settings."""
        return cls(read_config(UNetConfig, config, FIXED["unet"], IGNORED["unet"]))

    def project_context(self, context: Tensor, rows: Tensor | None = None) -> Projected:
        """Keys and values of texts (R, L, D), for all steps. rows: as in Projected; None: 0 to R - 1."""
        layers = [block.attn2 for block in self.modules() if isinstance(block, TransformerBlock)]
        rows = torch.arange(len(context)) if rows is None else rows
        return Projected({layer: layer.project(context) for layer in layers}, rows.to(context.device))

    def project_timesteps(self, timestep_of: dict[float, Tensor]) -> dict[float, dict]:
        """Project all timesteps once, before sampling. {sigma: timestep (1,)} -> {sigma: {block: (1, C)}}."""
        time = self.time_embedding(torch.cat(list(timestep_of.values())))        # (N, 4 C_0)
        blocks = [block for block in self.modules() if isinstance(block, ResnetBlock)]
        rows = zip(*(block.time_emb_proj(time).split(1) for block in blocks))
        return {sigma: dict(zip(blocks, row)) for sigma, row in zip(timestep_of, rows)}

    def forward(self, latents: Tensor, timestep: Tensor | float | dict, context: Context,
                attend: Attend = attend, recompute: bool = False,
                deep: Tensor | bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Latents (B, C_in, h, w), timestep, text (B, L, D) -> predicted noise (B, C_out, h, w).

        h and w are arbitrary. timestep: a number, a tensor (1,) or (B,), or one value of the dictionary from
        `project_timesteps`; Karras sigmas have fractional timesteps. context may also be R texts from
        `project_context`; then the noise has R rows. attend: the attention of every layer. recompute:
        gradient checkpointing (Chen et al. 1604.06174), which takes a third more time and much less memory.
        deep = True: also return the input (R, C, h, w) of the last two blocks in up_blocks, as deep features.
        A later step can pass them as `deep`. It then skips all deeper blocks, see guidance.make_denoiser.
        """
        assert isinstance(context, Projected) or len(context) == len(latents), "one text for each row"
        time = timestep if isinstance(timestep, dict) else self.time_embedding(timestep)    # (B, 4 C_0)

        x = self.conv_in(latents)
        skips, levels = [x], self.up_blocks
        if isinstance(deep, Tensor):  # two skip connections are enough for the last two blocks
            skips.append(self.down_blocks[0].block(0, x, time, context, attend))
            x, levels = deep, levels[-1:]
        else:
            for level in self.down_blocks:
                for i in range(len(level.resnets)):
                    x = level.block(i, x, time, context, attend, recompute)
                    skips.append(x)
                for downsample in level.downsamplers:
                    x = downsample(x)                                   # (B, C, h/2, w/2)
                    skips.append(x)

            for i in range(2):
                x = self.mid_block.block(i, x, time, context, attend, recompute)

        for level in levels:
            for i in range(len(level.resnets))[-len(skips):]:
                if deep is True and len(skips) == 2:
                    kept = x
                x = torch.cat([x, repeat_rows(skips.pop(), context)], dim=1)
                x = level.block(i, x, time, context, attend, recompute)
            for upsample in level.upsamplers:
                x = upsample(F.interpolate(x, skips[-1].shape[2:], mode="nearest"))  # the skip's h and w
        noise = self.conv_out(F.silu(self.conv_norm_out(x)))
        return (noise, kept) if deep is True else noise

"""The variational autoencoder of latent diffusion (Rombach et al. 2112.10752): pixels <-> latents.

It computes the same as diffusers' AutoencoderKL, with the same weight names. Unlike in the UNet, every
GroupNorm uses eps 1e-6, and the encoder's strided convolutions pad only on the right and at the bottom.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoip2p.attention import attention
from nanoip2p.common.config import FIXED, IGNORED, read_config
from nanoip2p.common.schema import checked
from nanoip2p.unet import ResnetBlock

EPS = 1e-6  # of every GroupNorm; torch's default is 1e-5
MAX_UNTILED = 96  # longest side without tiles, in latent positions (768 pixels in SD 1.5)
TILE, OVERLAP = 64, 16  # side of a tile and least overlap of two tiles, in latent positions
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class VAEConfig:
    """Config of the autoencoder: names as in diffusers' config.json, default values as in SD 1.5."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # one per level; each but the last halves h, w
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def to_json(self) -> dict:
        """The config.json from which diffusers builds the same network."""
        return {"_class_name": "AutoencoderKL", **asdict(self), **_fixed(len(self.block_out_channels))}


def _fixed(levels: int) -> dict:
    """The settings of which our code supports only one value."""
    return {"down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels, **FIXED["vae"]}


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with one head of width C. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attention = attention  # speed/ may replace this function by a faster one
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)               # (B, H*W, C)
        h = self.to_out[0](self.attention(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])          # (B, C, H, W)


class MidBlock(nn.Module):
    """The middle of encoder and decoder: residual block, attention, residual block. Keeps (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, EPS) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def resample(channels: int, down: bool) -> nn.Sequential:
    """A convolution to (B, C, H/2, W/2) if `down`. Else: enlarge to (B, C, 2 H, 2 W), then convolve."""
    first = nn.ZeroPad2d((0, 1, 0, 1)) if down else nn.Upsample(scale_factor=2.0)  # pads right and bottom
    conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)
    return nn.Sequential(OrderedDict(first=first, conv=conv))


def _levels(widths: tuple[int, ...], blocks: int, groups: int, down: bool) -> nn.Sequential:
    """One level for each width: `blocks` residual blocks, then `resample`, except in the last level."""
    levels = nn.Sequential()
    for i, (c_in, c_out) in enumerate(zip((widths[0], *widths), widths)):
        resnets = [ResnetBlock(c, c_out, groups, EPS) for c in [c_in] + [c_out] * (blocks - 1)]
        resamples = [resample(c_out, down)] if i < len(widths) - 1 else []
        levels.append(nn.Sequential(OrderedDict({
            "resnets": nn.Sequential(*resnets),
            "downsamplers" if down else "upsamplers": nn.Sequential(*resamples)})))
    return levels


class VAE(nn.Module):
    """Autoencoder with a Gaussian posterior. The factor f is `downsampling`, 8 in SD 1.5."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, latent = config, config.latent_channels
        widths, blocks, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
        self.scaling_factor = config.scaling_factor  # scales latents to about unit variance
        self.downsampling = 2 ** (len(widths) - 1)  # f: pixels per latent position
        self.encoder = nn.Sequential(OrderedDict(                       # (B, C_in, H, W)
            conv_in=nn.Conv2d(config.in_channels, widths[0], 3, padding=1),
            down_blocks=_levels(widths, blocks, groups, down=True),
            mid_block=MidBlock(widths[-1], groups),
            conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=EPS),
            silu=nn.SiLU(),
            conv_out=nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)))  # mean and log variance, concatenated
        self.decoder = nn.Sequential(OrderedDict(                       # (B, latent, h, w)
            conv_in=nn.Conv2d(latent, widths[-1], 3, padding=1),
            mid_block=MidBlock(widths[-1], groups),
            up_blocks=_levels(widths[::-1], blocks + 1, groups, down=False),
            conv_norm_out=nn.GroupNorm(groups, widths[0], eps=EPS),
            silu=nn.SiLU(),
            conv_out=nn.Conv2d(widths[0], config.out_channels, 3, padding=1)))
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    @classmethod
    def from_config(cls, config: dict) -> "VAE":
        """Build from diffusers' vae/config.json. Raises ValueError for unsupported settings."""
        widths = config.get("block_out_channels", VAEConfig.block_out_channels)
        levels = len(checked(widths, tuple[int, ...], "VAEConfig: block_out_channels"))
        return cls(read_config(VAEConfig, config, _fixed(levels), IGNORED["vae"]))

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) in [-1, 1] -> mean and log variance, each (B, latent, H/f, W/f), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, latent, h, w) -> image (B, 3, f*h, f*w), about [-1, 1] but not clipped."""
        return self.decoder(self.post_quant_conv(latents))

    def encode_low_memory(self, image: Tensor) -> Tensor:
        """The mean from `encode`, with less memory: one picture at a time, large pictures in tiles. Tiles
        change the result slightly, because norms and attention then see one tile, not the whole picture."""
        return in_tiles(lambda part: self.encode(part)[0], image, self.downsampling, 1)

    def decode_low_memory(self, latents: Tensor) -> Tensor:
        """`decode` with less memory, see `encode_low_memory`."""
        return in_tiles(self.decode, latents, 1, self.downsampling)

    @staticmethod
    def published_names(state_dict: dict) -> dict:
        """Rename attention weights from before 2023: diffusers' `query` is now `to_q`, and so on."""
        old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(OLD_ATTENTION_NAMES)})\b")
        return {old.sub(lambda match: OLD_ATTENTION_NAMES[match[0]], name): tensor
                for name, tensor in state_dict.items()}


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, scale_in: int, scale_out: int) -> Tensor:
    """Apply `function` to one picture at a time. Splits large pictures into tiles, and blends the results.

    (B, C, h, w) -> (B, C', h', w'). scale_in, scale_out: pixels of x and of the result per latent position.
    """
    if len(x) > 1:
        return torch.cat([in_tiles(function, picture, scale_in, scale_out) for picture in x.split(1)])
    h, w = (-(-side // scale_in) for side in x.shape[2:])               # latent positions
    if max(h, w) <= MAX_UNTILED:
        return function(x)
    total = weights = 0
    for top in tile_starts(h):
        for left in tile_starts(w):
            rows, columns = (slice(start * scale_in, (start + TILE) * scale_in) for start in (top, left))
            tile = function(x[:, :, rows, columns])
            fade_y, fade_x = (fade(side, OVERLAP * scale_out).to(x.device) for side in tile.shape[2:])
            weight = fade_y[:, None] * fade_x                           # (tile height, tile width)
            x0, y0 = left * scale_out, top * scale_out
            place = (x0, w * scale_out - x0 - len(fade_x), y0, h * scale_out - y0 - len(fade_y))
            total, weights = total + F.pad(tile * weight, place), weights + F.pad(weight, place)
    return (total / weights).to(x.dtype)


def tile_starts(length: int) -> list[int]:
    """Start positions of tiles that cover `length` evenly and overlap by at least OVERLAP."""
    gaps = max(0, -(-(length - TILE) // (TILE - OVERLAP)))
    return [round(i * (length - TILE) / gaps) for i in range(gaps + 1)] if gaps else [0]


def fade(length: int, width: int) -> Tensor:
    """Blending weights (length,) along a side of a tile: 1, with a linear ramp of `width` at both ends."""
    rise = torch.arange(1, length + 1)
    return (torch.minimum(rise, rise.flip(0)) / width).clamp(max=1)

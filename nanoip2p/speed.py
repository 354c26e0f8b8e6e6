"""The same networks, faster: functions that change a network in place and return it, as nn.Module.to does.

    unet = fast_convolutions(unet)

Every one gives what the plain network gives, to rounding, and leaves the state dict as it was. They come after
loading and after the move to a device, for some keep what they make of the weights. `fast` takes those that
help on a device.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nanoip2p.attention import attention
from nanoip2p.unet import Attention, UNet, attend

CACHE = "~/.cache/nanoip2p/inductor"


def fast(unet: UNet, say: Callable[[str], None]) -> UNet:
    """What helps on the device of the weights. say: is told in a line what takes long."""
    weight = unet.conv_in.weight
    if weight.device.type == "cuda":
        return cuda_graph(compile(fused_projections(channels_last(unet)), say))
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return fast_convolutions(unet)
    return unet


def channels_last(model: nn.Module) -> nn.Module:
    """Weights of convolutions, and so all feature maps, with channels side by side: as tensor cores want."""
    return model.to(memory_format=torch.channels_last)


class FusedAttention(Attention):
    """Self-attention with one product for queries, keys and values; told otherwise, an Attention."""

    def forward(self, x: Tensor, context, attend=attend) -> Tensor:
        if context is not x or attend is not PLAIN:
            return super().forward(x, context, attend)
        q, k, v = F.linear(x, self.qkv).chunk(3, dim=-1)                # (B, T, C) each, of one (B, T, 3 C)
        return self.to_out[0](attention(q, k, v, self.heads))


PLAIN = attend


def fused_projections(model: nn.Module) -> nn.Module:
    """q, k and v of each self-attention by one product. The three weights become views into one.

    Keys and values of a text are not worth it: they are made once for a prompt, not once a step.
    """
    for layer in model.modules():
        if type(layer) is Attention and layer.to_k.in_features == layer.to_q.in_features:
            layers = (layer.to_q, layer.to_k, layer.to_v)
            layer.register_buffer("qkv", torch.cat([part.weight.detach() for part in layers]), persistent=False)
            for part, weight in zip(layers, layer.qkv.chunk(3)):
                part.weight.data = weight
            layer.__class__ = FusedAttention
    return model


TRANSFORM = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
TILES = 512  # computed together, so that they stay in the cache


class Winograd(nn.Conv2d):
    """A 3x3 convolution with 4 multiplications for 9: F(2x2, 3x3) of Lavin & Gray, 1509.09308, section 4.1.

    A tile of 2x2 results comes from 4x4 inputs; 16 products of matrices, one for each transformed place,
    take the place of the convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        (batch, _, height, width), c_out = x.shape, self.out_channels
        h, w = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2 * w - width + 1, 1, 2 * h - height + 1))
        out = x.new_empty(batch, h, 2, w, 2, c_out)
        rows = max(1, TILES // (batch * w))
        for top in range(0, h, rows):
            strip = slice(top, min(top + rows, h))
            self.convolve(x[:, 2 * strip.start : 2 * strip.stop + 2], out[:, strip])
        return out.view(batch, 2 * h, 2 * w, c_out)[:, :height, :width].permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, out: Tensor) -> None:
        """x (B, 2 h + 2, 2 w + 2, C_in) -> out (B, h, 2, w, 2, C_out)."""
        batch, h, _, w, _, c_out = out.shape
        tiles = x.new_empty(4, 4, batch, h, w, x.shape[3])
        a, b, c, d = (x[:, i : i + 2 * h - 1 : 2] for i in range(4))    # (B, h, 2 w + 2, C_in)
        for row, places in zip((a - c, b + c, c - b, b - d), tiles):
            a, b, c, d = (row[:, :, i : i + 2 * w - 1 : 2] for i in range(4))
            for place, (one, two, sign) in zip(places, ((a, c, -1), (b, c, 1), (c, b, -1), (b, d, -1))):
                torch.add(one, two, alpha=sign, out=place)
        made = torch.bmm(tiles.flatten(2, 4).flatten(0, 1), self.transformed).view(4, 4, batch, h, w, c_out)
        for i, (a, b, c, d) in enumerate((made[0] + made[1] + made[2], made[1] - made[2] - made[3])):
            torch.add(a + b, c + self.bias, out=out[:, :, i, :, 0])
            torch.sub(b - c, d - self.bias, out=out[:, :, i, :, 1])


def fast_convolutions(model: nn.Module, least: int = 64) -> nn.Module:
    """3x3 convolutions of at least so many channels by Winograd's method; for CPUs.

    It keeps the weights transformed besides, which take 16/9 of their memory.
    """
    for layer in model.modules():
        if (type(layer) is nn.Conv2d and layer.kernel_size == (3, 3) and layer.stride == (1, 1)
                and layer.padding == (1, 1) and min(layer.in_channels, layer.out_channels) >= least):
            weight, g = layer.weight.detach().float(), TRANSFORM.to(layer.weight.device)
            transformed = torch.einsum("xi,ocij,yj->xyco", g, weight, g).flatten(0, 1)  # (16, C_in, C_out)
            layer.register_buffer("transformed", transformed.to(layer.weight.dtype).contiguous(),
                                  persistent=False)
            layer.__class__ = Winograd
    return model

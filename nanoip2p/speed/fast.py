"""`--fast`: faster inference for a UNet of SD's widths. The predicted noise differs only by rounding.

On a CPU, 3x3 convolutions use Winograd's method, which multiplies less but rounds more often, and oneDNN
packs the weights of all matrix products once. On CUDA, torch.compile fuses the operations and replays them as
a CUDA graph.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoip2p.unet import UNet

TILES_AT_ONCE = 256  # Winograd tiles per matrix product, few enough for the CPU's cache
TRANSFORM = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.double)  # G


def speed_up(unet: UNet, say: Callable[[str], None], injects: bool = False) -> UNet:
    """Speed up a UNet in place, as its device allows, and return it. Load the weights before this call.

    say: called with a line of text before slow work. injects: True if most calls of the UNet pass `attend`;
    then it is not compiled on CUDA, because it would recompile at every step. The state dict stays the same.
    """
    device = unet.conv_in.weight.device.type
    if device == "cuda":
        from nanoip2p.speed.kernels import use_kernels  # needs triton, as torch.compile does
        use_kernels(unet.to(memory_format=torch.channels_last))  # the layout of tensor cores
        return unet if injects else compile_unet(unet, say)
    return repack(unet) if device == "cpu" else unet


def compile_unet(unet: UNet, say: Callable[[str], None]) -> UNet:
    """Compile the UNet at the first call of each input size. A call overwrites the last call's output."""
    torch._dynamo.config.recompile_limit = 64  # input sizes, each twice with deep_every (default 8)
    say("compiling: the first step at each picture size takes about a minute")
    unet.compile(dynamic=False, mode="reduce-overhead")
    return unet


def repack(model: nn.Module, min_channels: int = 128) -> nn.Module:
    """For a CPU: replace linear layers and 1x1 convolutions by `Packed`, 3x3 convolutions by `Winograd`.

    Winograd is faster from `min_channels` on. Both layers compute with a copy of the weights (Winograd's is
    16/9 times as large). The model is frozen, because a change of the weights would not change the copy.
    """
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1) else None
            if isinstance(layer, nn.Linear) or kernel == (1, 1):
                setattr(parent, name, Packed(layer))
            elif kernel == (3, 3) and min(layer.in_channels, layer.out_channels) >= min_channels:
                setattr(parent, name, Winograd(layer))
            elif isinstance(layer, nn.GroupNorm):  # loses digits in channels_last (findings/groupnorm-*.sh)
                layer.register_forward_pre_hook(lambda _, given: given[0].contiguous())

    def refuse(*_) -> None:
        raise RuntimeError("a fast network cannot load other weights; load them before speed.fast.speed_up")

    model.register_load_state_dict_pre_hook(refuse)
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


def packed_product(weight: Tensor) -> Callable[..., Tensor]:
    """F.linear with a fixed weight (C_out, C_in), which oneDNN copies into its own layout once."""
    packable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    if not packable or not torch.backends.mkldnn.is_available():
        return lambda x, bias=None: F.linear(x, weight, bias)
    onednn = torch.ops.mkldnn  # torch.compile uses these operators too
    packed = onednn._reorder_linear_weight(weight.contiguous(), TILES_AT_ONCE)
    return lambda x, bias=None: onednn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


class Packed(nn.Module):
    """Linear layer (..., C_in) -> (..., C_out), or 1x1 convolution (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.product = packed_product(layer.weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return self.product(x, self.bias)
        return self.product(x.permute(0, 2, 3, 1), self.bias).permute(0, 3, 1, 2)


class Winograd(nn.Module):
    """A 3x3 convolution with 4 multiplications per output, not 9: F(2x2, 3x3) of Lavin & Gray 1509.09308.

    A tile of 2x2 outputs depends on 4x4 inputs. Y = A^T [(G w G^T) * (B^T x B)] A (section 4.1), where * is a
    matrix product (C_in -> C_out) at each of the 4x4 positions. (B, C_in, h, w) -> (B, C_out, h, w).
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        weight = layer.weight.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
        g = TRANSFORM.to(weight)
        weight = torch.einsum("xi,ocij,yj->xyoc", g, weight, g).to(layer.weight.dtype)
        self.products = [packed_product(place) for place in weight.flatten(0, 1)]   # 16 of (C_out, C_in)

    def forward(self, x: Tensor) -> Tensor:
        (batch, _, height, width), c_out = x.shape, len(self.weight)
        h, w = (height + 1) // 2, (width + 1) // 2                      # tiles down and across
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2 * w - width + 1, 1, 2 * h - height + 1))
        out = x.new_empty(batch, h, 2, w, 2, c_out)
        rows = max(1, TILES_AT_ONCE // (batch * w))
        for top in range(0, h, rows):
            bottom = min(top + rows, h)
            self.convolve(x[:, 2 * top : 2 * bottom + 2], out[:, top:bottom])
        return out.view(batch, 2 * h, 2 * w, c_out)[:, :height, :width].permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, out: Tensor) -> None:
        """Convolve padded x (B, 2 h + 2, 2 w + 2, C_in) into out (B, h, 2, w, 2, C_out)."""
        h, w, products, columns = out.shape[1], out.shape[3], iter(self.products), []
        a, b, c, d = (x[:, i : i + 2 * h - 1 : 2] for i in range(4))    # (B, h, 2 w + 2, C_in)
        for row in (a - c, b + c, c - b, b - d):                        # B^T x
            a, b, c, d = (row[:, :, i : i + 2 * w - 1 : 2] for i in range(4))
            a, b, c, d = (next(products)(place) for place in (a - c, b + c, c - b, b - d))
            columns.append((a + b + c, b - c - d))                      # (B, h, w, C_out) each
        for j, (a, b, c, d) in enumerate(zip(*columns)):
            torch.add(a + b, c + self.bias, out=out[:, :, 0, :, j])
            torch.sub(b - c, d - self.bias, out=out[:, :, 1, :, j])

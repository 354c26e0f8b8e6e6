"""Faster layers for inference on a CPU. Each keeps its weight in a faster layout, in place of the plain one.

oneDNN computes with blocks of a weight. `F.conv2d` lays out the whole weight in blocks at each call, which on
small feature maps takes longer than the convolution itself. `lay_out` does this once. Winograd's method
multiplies less, but its weights are 16/9 as large and it rounds more often.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_CHANNELS = 16      # layers with fewer (such as conv_out) gain nothing
SMALL_MAP = 2048         # B * h * w, up to which the layout of a weight takes much of a convolution's time
WINOGRAD_CHANNELS = 256  # with fewer, Winograd's transforms take longer than the multiplications it saves
TILES_AT_ONCE = 256      # Winograd tiles per matrix product, few enough for the CPU's cache
TRANSFORM = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.double)  # G


def lay_out(model: nn.Module, winograd: bool = False, direct: tuple[nn.Module, ...] = (),
            least: int = WINOGRAD_CHANNELS) -> nn.Module:
    """Replace the layers of a network on the CPU in place, and return it. Results differ by rounding only.

    winograd: 3x3 convolutions with at least `least` channels use Winograd's method, except those inside the
    modules `direct`. The network then only infers: its weights can no longer be read, loaded or moved.
    """
    inside = {layer for module in direct for layer in module.modules()}
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if name == "conv_in":  # small; its weight tells the pipeline the dtype and device
                continue
            kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else None
            channels = min(layer.in_channels, layer.out_channels) if kernel else 0
            # Without AVX-512, torch's own convolution takes ten times as long as Winograd's in bf16 and fp16
            naive = kernel and layer.weight.itemsize == 2 and not has_blocks(layer.weight)
            if isinstance(layer, nn.GroupNorm):  # loses digits in channels_last (findings/groupnorm-*.sh)
                layer.register_forward_pre_hook(lambda _, given: given[0].contiguous())
            elif isinstance(layer, nn.Linear) or (channels >= LEAST_CHANNELS and kernel == (1, 1)):
                setattr(parent, name, Product(layer))
            elif (winograd and kernel == (3, 3) and layer.stride == (1, 1) and
                  (naive or channels >= least and layer not in inside)):
                setattr(parent, name, Winograd(layer))
            elif channels >= LEAST_CHANNELS:
                setattr(parent, name, Convolution(layer))
    for weight in model.parameters():  # the small ones: otherwise they keep a memory-mapped file in memory
        weight.data = weight.data.clone()
    return model.requires_grad_(False)


class LaidOut(nn.Module):
    """A layer that cannot be saved, loaded, copied or moved."""

    def refuse(self, *_, **__) -> None:
        """Called instead of what a layer without a plain weight cannot do."""
        raise RuntimeError("a fast network holds no plain weights; do this before speed.fast.speed_up")

    _save_to_state_dict = _load_from_state_dict = _apply = __deepcopy__ = __reduce_ex__ = refuse


def has_blocks(weight: Tensor) -> bool:
    """Whether torch lets oneDNN lay out this weight. In bf16, it refuses on a CPU without AVX-512."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return half or weight.dtype == torch.float32


class Product(LaidOut):
    """Linear layer (..., C_in) -> (..., C_out), or 1x1 convolution (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        weight, self.bias, self.on_maps = layer.weight.detach().flatten(1), layer.bias, layer.weight.ndim == 4
        self.blocks = has_blocks(weight)
        self.held = (torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TILES_AT_ONCE)
                     if self.blocks else weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if self.on_maps else x
        if self.blocks:  # torch.compile uses this operator too
            x = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.held, self.bias, "none", [], "")
        else:
            x = F.linear(x, self.held, self.bias)
        return x.permute(0, 3, 1, 2) if self.on_maps else x


class Convolution(LaidOut):
    """Any other convolution. (B, C_in, h, w) -> (B, C_out, h', w').

    For a small map, the weight is laid out for its size: a layout for any size can take 5 times as long.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.held, self.bias, self.size, self.blocks = layer.weight.detach(), layer.bias, None, False
        self.settings = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups

    def forward(self, x: Tensor) -> Tensor:
        padding, stride, dilation, groups = self.settings
        if x.shape[2:] != self.size:
            weight = self.held.to_dense() if self.blocks else self.held
            self.blocks = has_blocks(weight) and x.shape[0] * x.shape[2] * x.shape[3] <= SMALL_MAP
            self.held = (torch.ops.mkldnn._reorder_convolution_weight(weight, *self.settings, list(x.shape))
                         if self.blocks else weight if self.size else weight.clone())
            self.size = x.shape[2:]
        if self.blocks:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.held, self.bias, *self.settings, "none", [], "")
        return F.conv2d(x, self.held, self.bias, stride, padding, dilation, groups)


class Winograd(LaidOut):
    """A 3x3 convolution with 4 multiplications per output, not 9: F(2x2, 3x3) of Lavin & Gray 1509.09308.

    A tile of 2x2 outputs depends on 4x4 inputs. Y = A^T [(G w G^T) * (B^T x B)] A (section 4.1), where * is a
    matrix product (C_in -> C_out) at each of the 4x4 positions. (B, C_in, h, w) -> (B, C_out, h, w).
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        weight, self.bias = layer.weight.detach(), layer.bias
        exact = torch.promote_types(weight.dtype, torch.float32)
        g = torch.kron(TRANSFORM, TRANSFORM).to(exact)                      # (16, 9)
        held = (g @ weight.to(exact).reshape(-1, 9).T).to(weight.dtype)     # (16, C_out * C_in)
        self.held = held.view(16, *weight.shape[:2]).transpose(1, 2)        # (16, C_in, C_out)

    def forward(self, x: Tensor) -> Tensor:
        (batch, _, height, width), c_out = x.shape, self.held.shape[2]
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
        (batch, h, _, w, _, c_out), c_in = out.shape, x.shape[3]
        half = transform(x, 2, x.new_empty(4, batch, 2 * h + 2, w, c_in))               # x B
        tiles = transform(half, 2, x.new_empty(4, 4, batch, h, w, c_in))                # B^T x B
        products = torch.bmm(tiles.view(16, -1, c_in), self.held).view(4, 4, batch, h, w, c_out)
        a, b, c, d = products                                           # the rows of the 4x4 positions
        for i, row in enumerate(((a + b).add_(c), (b - c).sub_(d))):    # A^T
            a, b, c, d = row
            torch.add(a + b, c + self.bias, out=out[:, :, i, :, 0])
            torch.sub(b - c, d - self.bias, out=out[:, :, i, :, 1])


def transform(x: Tensor, axis: int, out: Tensor) -> Tensor:
    """Multiply B to the tiles along one axis of x. Writes and returns out (4, ...), one for each column of B.

    A tile begins at every second position. The columns of B are (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0)
    and (0, 1, 0, -1).
    """
    last = 2 * out.shape[axis + 1] - 1
    a, b, c, d = (x[(slice(None),) * axis + (slice(i, i + last, 2),)] for i in range(4))
    for made, sign, one, other in zip(out, (-1, 1, -1, -1), (a, b, c, b), (c, c, b, d)):
        torch.add(one, other, alpha=sign, out=made)
    return out

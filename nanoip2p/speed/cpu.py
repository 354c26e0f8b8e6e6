"""Faster layers and attention for inference on a CPU. Each layer keeps its weight only in a faster layout.

oneDNN needs a weight in blocks. `F.conv2d` lays out the whole weight in blocks at each call. On small feature
maps, that takes longer than the convolution itself. `lay_out` lays out each weight once. Winograd's method
multiplies less, but its weights are 16/9 to 4 times as large, and it rounds more often.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoip2p.attention import split_heads
from nanoip2p.unet import FeedForward

mkldnn = torch.ops.mkldnn  # torch's name for oneDNN
LEAST_CHANNELS = 16      # layers with fewer channels (such as conv_out) gain nothing
SMALL_MAP = 2048         # up to this B * h * w, laying out the weight takes much of a convolution's time
TINY_MAP = 8 * 8         # up to this h * w, oneDNN's convolutions are slower than its products,
LARGE_WEIGHT = 2**22     # if the weight has at least so many numbers
SMALL_NORM = 32 * 32     # below this h * w, torch's GroupNorm in channels_last is slow in half precision
WINOGRAD_CHANNELS = 256  # with fewer, Winograd's transforms take longer than the saved multiplications
TILES_AT_ONCE = 512      # rows of a matrix product, such as Winograd tiles: few enough for the CPU's cache
MAP_TILE = 2**20         # weights of attention that are computed at once, few enough for the CPU's cache
LARGE_TILES = 320        # up to this number of channels, the larger weights of 4x4 tiles cost little memory
# G, B^T and A^T of Winograd's F(m x m, 3 x 3), Lavin & Gray 1509.09308, sections 4.1 and 4.3: {m: matrices}
MATRICES = {
    2: ([[1, 0, 0], [1/2, 1/2, 1/2], [1/2, -1/2, 1/2], [0, 0, 1]],
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]]),
    4: ([[1/4, 0, 0], [-1/6, -1/6, -1/6], [-1/6, 1/6, -1/6], [1/24, 1/12, 1/6], [1/24, -1/12, 1/6],
         [0, 0, 1]],
        [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0],
         [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
}


def lay_out(model: nn.Module, winograd: bool = False, direct: tuple[nn.Module, ...] = (),
            least: int = WINOGRAD_CHANNELS) -> nn.Module:
    """Replace the layers of a network on the CPU in place, and return it. Results differ by rounding only.

    winograd: use Winograd's method for 3x3 convolutions of stride 1: those with at least `least` channels
    that are not in `direct`, and all of them in a half precision that is slow here. With or without it,
    the network is then only for inference: its weights cannot be read, loaded or moved. Where the CPU has
    instructions for bf16 (and not AMX), attention in bf16 becomes `tiled_attention`.
    """
    inside = {layer for module in direct for layer in module.modules()}
    for parent in model.modules():
        for name, layer in parent.named_children():
            if name == "conv_in":  # small; its weight tells the pipeline the dtype and device
                continue
            kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else None
            channels = min(layer.in_channels, layer.out_channels) if kernel else 0
            # Without AVX-512, torch's own convolution takes ten times as long as Winograd's in bf16 and fp16
            naive = kernel and layer.weight.itemsize == 2 and not has_blocks(layer.weight)
            if hasattr(layer, "attention") and layer.to_q.weight.dtype == torch.bfloat16 and (
                    torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()):
                layer.attention = tiled_attention
            if isinstance(layer, nn.GroupNorm):
                setattr(parent, name, Norm(layer))
            elif isinstance(layer, FeedForward):
                setattr(parent, name, Gated(layer))
            elif isinstance(layer, nn.Linear) or (channels >= LEAST_CHANNELS and kernel == (1, 1)):
                setattr(parent, name, Product(layer.weight, layer.bias))
            elif (winograd and kernel == (3, 3) and layer.stride == (1, 1) and
                  (naive or channels >= least and layer not in inside)):
                setattr(parent, name, Winograd(layer))
            elif channels >= LEAST_CHANNELS:
                setattr(parent, name, Convolution(layer))
    for weight in model.parameters():  # of the other layers. Without a copy, a mapped file stays in memory
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        weight.data = weight.data.clone(memory_format=layout)  # conv_in decides the layout of all maps
    return model.requires_grad_(False)


class LaidOut(nn.Module):
    """A layer that cannot be saved, loaded, copied or moved."""

    def refuse(self, *_, **__) -> None:
        """Raises RuntimeError in place of saving, loading, copying and moving."""
        raise RuntimeError("a fast network holds no plain weights; do this before speed.fast.speed_up")

    _save_to_state_dict = _load_from_state_dict = _apply = __reduce_ex__ = refuse  # deepcopy calls the last


def has_blocks(weight: Tensor) -> bool:
    """Whether torch lets oneDNN lay out this weight. In bf16, it refuses on a CPU without AVX-512."""
    return torch.backends.mkldnn.is_available() and (weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()))


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, map_from: Tensor | None = None) -> Tensor:
    """The same as `attention.attention`, for bf16 without gradients: (B, Tq, heads * d), by parts of the map.

    On large maps, it takes 0.5 to 0.8 times the time of torch's kernel, which multiplies in fp32. A score is
    rounded to bf16 after the largest score of its row is subtracted, so large weights are rounded little.
    """
    q, k, v = (x.flatten(0, 1) for x in split_heads(q, k, v, heads, False, map_from))    # (B * heads, T, d)
    k, v, out = k.transpose(1, 2), F.pad(v, (0, 1), value=1), torch.empty_like(q)  # v: a column for the sums
    scale, rows = q.shape[2] ** -0.5, max(1, min(q.shape[1], MAP_TILE // k.shape[2]))
    many = max(1, MAP_TILE // (rows * k.shape[2]))
    for i in range(0, len(q), many):
        for j in range(0, q.shape[1], rows):
            tile, keys = q[i : i + many, j : j + rows], k[i : i + many]
            largest = torch.bmm(tile, keys).amax(2, keepdim=True) * scale
            weights = torch.baddbmm(largest, tile, keys, beta=-1, alpha=scale).exp_()
            sums = torch.bmm(weights, v[i : i + many])
            torch.div(sums[..., :-1], sums[..., -1:], out=out[i : i + many, j : j + rows])
    return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


class Norm(LaidOut):
    """A GroupNorm of maps in channels_last. (B, C, h, w) -> (B, C, h, w).

    torch's loses digits if the mean of a group is large (findings/groupnorm-*.sh). So `forward` subtracts the
    mean first. On maps below 32 x 32, torch's takes three to eight times as long in bf16 as in fp32.
    """

    def __init__(self, layer: nn.GroupNorm):
        super().__init__()
        self.groups, self.eps = layer.num_groups, layer.eps
        self.dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.weight, self.bias = (nn.Parameter(value.to(self.dtype)) for value in (layer.weight, layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(self.dtype) if x.shape[2] * x.shape[3] < SMALL_NORM else x
        mean = y.mean((2, 3)).unflatten(1, (self.groups, -1)).mean(2, keepdim=True)        # (B, groups, 1)
        y = y - mean.expand(-1, -1, x.shape[1] // self.groups).reshape(*x.shape[:2], 1, 1)
        return F.group_norm(y, self.groups, self.weight, self.bias, self.eps).to(x.dtype)


class Product(LaidOut):
    """Linear layer (..., C_in) -> (..., C_out), or 1x1 convolution (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False):
        super().__init__()
        weight, self.bias, self.on_maps = weight.detach().flatten(1), bias, weight.ndim == 4
        self.gelu = gelu
        self.blocks = has_blocks(weight)
        self.held = (mkldnn._reorder_linear_weight(weight.contiguous(), TILES_AT_ONCE)
                     if self.blocks else weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if self.on_maps else x
        if self.blocks:  # torch.compile uses these operators too. GELU's algorithm "none" is the exact one
            activation = ("gelu", [], "none") if self.gelu else ("none", [], "")
            x = mkldnn._linear_pointwise(x.contiguous(), self.held, self.bias, *activation)
        else:
            x = F.linear(x, self.held, self.bias)
            x = F.gelu(x) if self.gelu else x
        return x.permute(0, 3, 1, 2) if self.on_maps else x


class Gated(LaidOut):
    """A `unet.FeedForward` that applies GELU inside the product. (B, T, C) -> (B, T, C)."""

    def __init__(self, layer: FeedForward):
        super().__init__()
        wide, last = layer.net[0]["proj"], layer.net[2]
        value, gate = zip(*(map(nn.Parameter, part.detach().chunk(2)) for part in (wide.weight, wide.bias)))
        self.value, self.gate = Product(*value), Product(*gate, gelu=True)
        self.last = Product(last.weight, last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.value(x).mul_(self.gate(x)))


class Convolution(LaidOut):
    """Any other convolution. (B, C_in, h, w) -> (B, C_out, h', w').

    For a small map, the weight is laid out for its size; a layout for any size can take 5 times as long. A
    tiny map and a large weight become one matrix product, with the `patches` of the map as rows.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.held, self.bias, self.size = layer.weight.detach(), layer.bias, None
        self.settings = {name: getattr(layer, name) for name in ("padding", "stride", "dilation", "groups")}
        self.kernel, self.blocks, self.product = layer.kernel_size, False, False

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.size:
            self.choose(x)
        if self.product:
            x = patches(x, self.kernel, self.settings["padding"], self.settings["stride"])
            return mkldnn._linear_pointwise(x, self.held, self.bias, "none", [], "").permute(0, 3, 1, 2)
        if self.blocks:
            return mkldnn._convolution_pointwise(
                x, self.held, self.bias, **self.settings, attr="none", scalars=[], algorithm="")
        return F.conv2d(x, self.held, self.bias, **self.settings)

    def choose(self, x: Tensor) -> None:
        """Lay out the weight for maps like x. (B, C_in, h, w)."""
        weight = self.held.to_dense() if self.blocks else self.held
        if self.product:
            weight = weight.unflatten(1, (*self.kernel, -1)).permute(0, 3, 1, 2)
        height, width = self.size = x.shape[2:]
        self.blocks = has_blocks(weight) and x.shape[0] * height * width <= SMALL_MAP
        self.product = (self.blocks and height * width <= TINY_MAP and weight.numel() >= LARGE_WEIGHT and
                        self.settings["groups"] == 1 and self.settings["dilation"] == (1, 1))
        if self.product:
            self.held = mkldnn._reorder_linear_weight(weight.permute(0, 2, 3, 1).flatten(1), TILES_AT_ONCE)
        elif self.blocks:
            self.held = mkldnn._reorder_convolution_weight(weight, **self.settings, input_size=x.shape)
        else:
            self.held = weight.clone()


def patches(x: Tensor, kernel: tuple, padding: tuple, stride: tuple) -> Tensor:
    """The inputs of each output of a convolution. (B, C, h, w) -> (B, h', w', kernel height * width * C)."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    x = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return x.permute(0, 1, 2, 4, 5, 3).flatten(3)              # from (B, h', w', C, kernel height, width)


class Winograd(LaidOut):
    """A 3x3 convolution with fewer multiplications: F(m x m, 3 x 3). (B, C_in, h, w) -> (B, C_out, h, w).

    A tile of m x m outputs depends on n x n inputs, n = m + 2. Y = A^T [(G w G^T) * (B^T x B)] A, where * is
    a matrix product (C_in -> C_out) at each of the n x n positions: 4 multiplications per output for m = 2,
    9/4 for m = 4, not 9. m = 4 loses one more digit, so it is not for half precision.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        weight, self.channels = layer.weight.detach(), layer.out_channels
        large = weight.itemsize >= 4 and min(weight.shape[:2]) <= LARGE_TILES
        g, self.inputs, self.outputs = MATRICES[4 if large else 2]
        exact, g = torch.promote_types(weight.dtype, torch.float32), torch.tensor(g, dtype=torch.double)
        held = torch.kron(g, g).to(exact) @ weight.to(exact).reshape(-1, 9).T   # (n * n, C_out * C_in)
        held = held.to(weight.dtype).view(-1, *weight.shape[:2])                # (n * n, C_out, C_in)
        # A^T has ones in the column of product n + 1, so each output gets the bias once
        self.products = nn.ModuleList(Product(one, layer.bias if i == len(self.inputs) + 1 else None)
                                      for i, one in enumerate(held))

    def forward(self, x: Tensor) -> Tensor:
        (batch, _, height, width), c_out, m = x.shape, self.channels, len(self.outputs)
        h, w = -(-height // m), -(-width // m)                          # tiles down and across
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, m * w - width + 1, 1, m * h - height + 1))
        out = x.new_empty(batch, h, m, w, m, c_out)
        rows = max(1, TILES_AT_ONCE // (batch * w))
        for top in range(0, h, rows):
            bottom = min(top + rows, h)
            self.convolve(x[:, m * top : m * bottom + 2], out[:, top:bottom])
        return out.view(batch, m * h, m * w, c_out)[:, :height, :width].permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, out: Tensor) -> None:
        """Convolve padded x (B, m * h + 2, m * w + 2, C_in) into out (B, h, m, w, m, C_out)."""
        (batch, h, m, w, _, c_out), c_in, n = out.shape, x.shape[3], len(self.inputs)
        across = [x[:, :, i : i + m * w - m + 1 : m] for i in range(n)]
        half = transform(self.inputs, across, x.new_empty(n, batch, m * h + 2, w, c_in))             # x B
        down = [half[:, :, i : i + m * h - m + 1 : m] for i in range(n)]
        tiles = transform(self.inputs, down, x.new_empty(n, n, batch, h, w, c_in))                   # B^T x B
        products = [product(tile) for product, tile in zip(self.products, tiles.flatten(0, 1))]
        rows = [transform(self.outputs, products[j::n], x.new_empty(m, batch, h, w, c_out)) for j in range(n)]
        for i in range(m):
            transform(self.outputs, [row[i] for row in rows], out[:, :, i].permute(3, 0, 1, 2, 4))


def transform(matrix: list, x: Sequence[Tensor], out: Tensor) -> Tensor:
    """Write out[i] = sum over j of matrix[i][j] x[j], and return `out`. Each row of the matrix has a 1."""
    for weights, made in zip(matrix, out):
        (_, first), *others = sorted((weight != 1, j) for j, weight in enumerate(weights) if weight)
        for number, (_, j) in enumerate(others):
            torch.add(made if number else x[first], x[j], alpha=weights[j], out=made)
    return out

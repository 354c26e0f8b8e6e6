"""The same networks, faster: functions that change a network in place and return it, as nn.Module.to does.

    unet = fast_convolutions(unet)

Every one gives what the plain network gives, to rounding (Winograd's convolutions add and subtract before
they multiply, and round more), and leaves the state dict as it was. They are for inference, and come last,
when weights are loaded and on their device: some keep what they make of the weights, and such a network
refuses others. `fast` takes those that help on a device, at Stable Diffusion's widths; at nano ones nothing
does.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nanoip2p.unet import Attention, UNet, attend

CACHE = Path("~/.cache/nanoip2p/inductor")


def fast(unet: UNet, say: Callable[[str], None]) -> UNet:
    """What helps on the device of the weights. say: is told in a line what takes long."""
    device = unet.conv_in.weight.device.type
    if device == "cuda":  # as is usual, and not measured here
        from nanoip2p.speed.kernels import measured_kernels  # needs triton, as torch.compile does
        return cuda_graph(compiled(measured_kernels(fused_projections(channels_last(unet))), say))
    return channels_last(packed_products(fast_convolutions(unet))) if device == "cpu" else unet


def for_inference(model: nn.Module) -> nn.Module:
    """Weights of which something else has been made may neither be trained nor loaded again."""
    def refuse(*_) -> None:
        raise RuntimeError("this network was made fast with its weights in it; load others into a plain one")

    model.register_load_state_dict_pre_hook(refuse)
    return model.requires_grad_(False)


def channels_last(model: nn.Module) -> nn.Module:
    """Weights of convolutions, and so all feature maps, with channels side by side: as tensor cores want."""
    return model.to(memory_format=torch.channels_last)


class FusedAttention(Attention):
    """Self-attention with one product for queries, keys and values; told otherwise, an Attention."""

    def forward(self, x: Tensor, context, attend=attend) -> Tensor:
        if context is not x or attend is not PLAIN:
            return super().forward(x, context, attend)
        q, k, v = F.linear(x, self.qkv).chunk(3, dim=-1)                # (B, T, C) each, of one (B, T, 3 C)
        return self.to_out[0](self.attention(q, k, v, self.heads))


PLAIN = attend


def fused_projections(model: nn.Module) -> nn.Module:
    """q, k and v of each self-attention by one product. The three weights become views into one.

    Keys and values of a text are not worth it: they are made once for a prompt, not once a step.
    """
    for layer in model.modules():
        if type(layer) is Attention and layer.to_k.in_features == layer.to_q.in_features:
            layers = (layer.to_q, layer.to_k, layer.to_v)
            joined = torch.cat([part.weight.detach() for part in layers])               # (3 C, C)
            layer.register_buffer("qkv", joined, persistent=False)
            for part, weight in zip(layers, layer.qkv.chunk(3)):
                part.weight.data = weight
            layer.__class__ = FusedAttention
    return for_inference(model)


def product(weight: Tensor) -> Callable[..., Tensor]:
    """A function of x (..., C_in) and perhaps a bias: x weight^T, of a weight (C_out, C_in) that stays.

    On a CPU oneDNN gets it laid out once, as torch's compiler does it, not anew at each call.
    """
    if weight.device.type != "cpu" or weight.dtype not in PACKED or not torch.backends.mkldnn.is_available():
        return partial(F.linear, weight=weight)
    packed, run = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), AT_A_TIME), torch.ops.mkldnn
    return lambda x, bias=None: run._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


class PackedLinear(nn.Linear):
    """A linear layer whose weight `product` has laid out."""
    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, bias=self.bias)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as the product it is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.permute(0, 2, 3, 1), bias=self.bias).permute(0, 3, 1, 2)


def packed_products(model: nn.Module) -> nn.Module:
    """Linear layers and 1x1 convolutions by `product`: their weights once more."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.product, layer.__class__ = product(layer.weight.detach()), PackedLinear
        elif type(layer) is nn.Conv2d and layer.kernel_size == layer.stride == (1, 1):
            layer.product, layer.__class__ = product(layer.weight.detach().flatten(1)), Pointwise
    return for_inference(model)


PACKED = (torch.float32, torch.bfloat16)
AT_A_TIME = 256  # tiles computed together, so that they stay in the cache
TRANSFORM = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.double)


class Winograd(nn.Conv2d):
    """A 3x3 convolution with 4 multiplications for 9: F(2x2, 3x3) of Lavin & Gray, 1509.09308, section 4.1.

    A tile of 2x2 results comes from 4x4 inputs, by a product of matrices for each of the 16 places.
    """

    def forward(self, x: Tensor) -> Tensor:
        (batch, _, height, width), c_out = x.shape, self.out_channels
        h, w = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2 * w - width + 1, 1, 2 * h - height + 1))
        out = x.new_empty(batch, h, 2, w, 2, c_out)
        rows = max(1, AT_A_TIME // (batch * w))
        for top in range(0, h, rows):
            bottom = min(top + rows, h)
            self.convolve(x[:, 2 * top : 2 * bottom + 2], out[:, top:bottom])
        return out.view(batch, 2 * h, 2 * w, c_out)[:, :height, :width].permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, out: Tensor) -> None:
        """x (B, 2 h + 2, 2 w + 2, C_in) -> out (B, h, 2, w, 2, C_out)."""
        h, w, products, made = out.shape[1], out.shape[3], iter(self.products), []
        a, b, c, d = (x[:, i : i + 2 * h - 1 : 2] for i in range(4))    # (B, h, 2 w + 2, C_in)
        for row in (a - c, b + c, c - b, b - d):
            a, b, c, d = (row[:, :, i : i + 2 * w - 1 : 2] for i in range(4))
            a, b, c, d = (next(products)(tile) for tile in (a - c, b + c, c - b, b - d))
            made.append((a + b + c, b - c - d))                         # (B, h, w, C_out) each
        for j, (a, b, c, d) in enumerate(zip(*made)):
            torch.add(a + b, c + self.bias, out=out[:, :, 0, :, j])
            torch.sub(b - c, d - self.bias, out=out[:, :, 1, :, j])


def fast_convolutions(model: nn.Module, least: int = 128) -> nn.Module:
    """3x3 convolutions of at least so many channels by Winograd's method: their weights 16/9 times more."""
    for layer in model.modules():
        if (type(layer) is nn.Conv2d and layer.kernel_size == (3, 3) and layer.stride == (1, 1)
                and layer.padding == (1, 1) and min(layer.in_channels, layer.out_channels) >= least):
            weight = layer.weight.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
            g = TRANSFORM.to(weight)
            weight = torch.einsum("xi,ocij,yj->xyoc", g, weight, g).to(layer.weight.dtype)
            layer.products = [product(place) for place in weight.flatten(0, 1)]         # 16, (C_out, C_in)
            layer.__class__ = Winograd
    return for_inference(model)


def compiled(unet: UNet, say: Callable[[str], None], mode: str = "default") -> UNet:
    """By torch.compile, once for each shape; what it made is on disk for the next process.

    Calls with injection run as before. say: is told before it compiles. mode: torch's.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE.expanduser()))  # torch's own is in /tmp
    torch._dynamo.config.recompile_limit = 64  # shapes; or it would quietly give up at the ninth
    plain, quick, seen = unet.forward, torch.compile(unet.forward, dynamic=False, mode=mode), set()

    def forward(latents, timestep, context, inject=None, recompute=False):
        if inject is not None or recompute:
            return plain(latents, timestep, context, inject, recompute)
        leaves, _ = tree_flatten((latents, context))
        shapes = tuple(leaf.shape for leaf in leaves)
        if shapes not in seen:
            say(f"compiling for latents {tuple(latents.shape)}: takes a minute, less the next time")
            seen.add(shapes)
        return quick(latents, as_tensor(timestep, latents), context)

    unet.forward = forward
    return unet


def as_tensor(timestep: Tensor | float | dict, latents: Tensor) -> Tensor | dict:
    """(1,) or (B,): a number would be a constant of what is compiled or captured."""
    if isinstance(timestep, dict):
        return timestep
    return torch.as_tensor(timestep, dtype=torch.float32, device=latents.device).reshape(-1)


def captured(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `run`: what replays it, and the tensor that every replay writes its result to."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up at first, which no graph may hold
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = run()
    return graph.replay, made


def cuda_graph(unet: UNet, capture=captured) -> UNet:
    """One launch a step in place of a thousand: captured at the first call of a shape, and then replayed.

    Only the last shape's graph is kept, with the memory that it works in. For inference; calls with injection
    run as before. The weights must stay where they are.
    """
    plain, kept = unet.forward, {}

    @torch.inference_mode()
    def forward(latents, timestep, context, inject=None, recompute=False):
        if inject is not None or recompute:
            return plain(latents, timestep, context, inject, recompute)
        given, form = tree_flatten((latents, as_tensor(timestep, latents), context))
        key = form, [(leaf.shape, leaf.dtype) for leaf in given]
        if kept.get("key") != key:
            kept.clear()  # its memory is free before more is taken
            buffers = [leaf.clone() for leaf in given]
            replay, made = capture(lambda: plain(*tree_unflatten(buffers, form)), latents.device)
            kept.update(key=key, buffers=buffers, replay=replay, made=made)
        torch._foreach_copy_(kept["buffers"], given)
        kept["replay"]()
        return kept["made"].clone()  # the next replay overwrites it

    unet.forward = forward
    return unet

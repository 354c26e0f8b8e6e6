"""Low-rank adaptation, LoRA (Hu et al. 2106.09685): train two thin matrices beside each chosen weight.

A layer with the frozen weight W (out, in) and the input x computes

    x W^T + (x down^T) up^T            down (r, in), up (out, r), with the rank r far below in and out

In a convolution, `down` (r, in, k, k) has the kernel size and the stride of the layer; `up` is a 1x1
convolution. `up` starts at zero. Gradients, Adam's moments and the average exist for the thin matrices only.
Alpha equals the rank, as in diffusers' scripts: the factor alpha / r is 1.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoip2p.training.config import LAYERS
from nanoip2p.unet import UNet


def is_blind(unet: UNet) -> bool:
    """Whether the input picture has no effect. True for an editor that load.widen made."""
    of_picture = unet.conv_in.weight[:, unet.config.out_channels :]
    return of_picture.numel() > 0 and not of_picture.any()


def freeze(unet: UNet, dtype: torch.dtype) -> UNet:
    """A frozen copy, its linear layers and convolutions in `dtype`. Weights that do not change are shared."""
    frozen = {}
    for layer in unet.modules():
        for weight in layer.parameters(recurse=False):
            converts = isinstance(layer, (nn.Linear, nn.Conv2d))
            frozen[id(weight)] = nn.Parameter(weight.detach().to(dtype if converts else weight.dtype), False)
    return copy.deepcopy(unet, frozen)


def attach(unet: UNet, rank: int, layers: str, seed: int, conv_in: Tensor | None = None) -> None:
    """Add `lora_down` and `lora_up` to the chosen layers of a frozen UNet, in place.

    layers: a key of LAYERS. seed: of the random `down`, drawn as in peft and kohya. conv_in: the weight
    from which the layer conv_in is trained in full; None: do not train it in full.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in unet.named_modules():
        if name == "conv_in" and conv_in is not None:
            layer.weight = nn.Parameter(conv_in.detach().clone())
        elif isinstance(layer, (nn.Linear, nn.Conv2d)) and LAYERS[layers].search(name):
            bound = layer.weight[0].numel() ** -0.5
            down = torch.empty(rank, *layer.weight.shape[1:]).uniform_(-bound, bound, generator=generator)
            layer.lora_down = nn.Parameter(down)
            layer.lora_up = nn.Parameter(torch.zeros(len(layer.weight), rank))
            layer.register_forward_hook(add_low_rank)


def add_low_rank(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook of a layer: its output plus the output of the thin matrices."""
    if isinstance(layer, nn.Linear):
        return output + F.linear(F.linear(*inputs, layer.lora_down), layer.lora_up)
    low = F.conv2d(*inputs, layer.lora_down, None, layer.stride, layer.padding)          # (B, r, h, w)
    return output + F.conv2d(low, layer.lora_up[:, :, None, None])


def layers_of(unet: UNet, base: UNet, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of a layer -> (down, up) on the CPU, as `write_lora` takes them with alpha = rank.

    unet: the UNet with a LoRA. base: the UNet before training. A conv_in that was trained in full becomes a
    LoRA of full rank: `down` is the identity, `up` the change of the weight times r / rank.
    """
    layers = {name: (layer.lora_down.detach().cpu(), layer.lora_up.detach().cpu())
              for name, layer in unet.named_modules() if hasattr(layer, "lora_down")}
    if is_blind(base):
        change = (unet.conv_in.weight.cpu() - base.conv_in.weight).detach()              # (out, in, k, k)
        down = torch.eye(change[0].numel()).unflatten(1, change.shape[1:])
        layers["conv_in"] = down, change.flatten(1) * (len(down) / rank)
    return layers


@torch.no_grad()
def merged(base: UNet, layers: dict[str, tuple[Tensor, Tensor]], alpha: float) -> UNet:
    """A copy of `base` with a LoRA of factor alpha / r in its weights. layers: see layers_of."""
    unet = copy.deepcopy(base)
    for name, (down, up) in layers.items():
        unet.get_submodule(name).weight += alpha / len(down) * torch.tensordot(up, down, 1)
    return unet

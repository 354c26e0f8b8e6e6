"""Helpers of many tests: random weights with which every layer matters, and the relative error."""

import torch
from torch import Tensor, nn

NORMS = (nn.GroupNorm, nn.LayerNorm)
PERIOD = 2**18 + 3  # a prime: no two rows of a matrix are the same numbers


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw all weights in place, from `seed`, and return the module in eval mode.

    Weights have a standard deviation of 1/sqrt(fan_in), so that signals keep their size through deep
    networks; norms scale by 1 + 0.1 randn and biases are 0.1 randn, so that forgetting either one shows.
    Embeddings get a deviation of 1, other bare parameters (a class token, a temperature) keep their size.
    Large parameters repeat their first PERIOD numbers: to draw all those of Stable Diffusion takes 8 seconds.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: Tensor, scale: float, offset: float = 0.0) -> None:
        first, *others = parameter.view(-1).split(PERIOD)
        first.copy_(offset + scale * torch.randn(first.shape, generator=generator))
        for part in others:
            part.copy_(first[: len(part)])

    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if name.endswith("bias"):
                draw(parameter, 0.1)
            elif isinstance(layer, NORMS):
                draw(parameter, 0.1, offset=1.0)
            elif isinstance(layer, nn.Embedding):
                draw(parameter, 1.0)
            elif parameter.ndim >= 2:
                draw(parameter, parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                draw(parameter, 1.0)
    return module.eval()


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||. Shapes must agree, and neither side may hold a NaN."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    ours, reference = ours.detach().double(), reference.detach().double()
    assert torch.isfinite(ours).all() and torch.isfinite(reference).all(), "not finite"
    return ((ours - reference).norm() / reference.norm()).item()

"""How much memory training needs."""

import argparse

import torch

from nanoip2p.unet import UNet, UNetConfig


def training_memory(config: UNetConfig, batch: int, side: int, args: argparse.Namespace,
                    ranks: int) -> dict[str, int]:
    """Bytes on each device by what they are for."""
    with torch.device("meta"):
        unet = UNet(config)
    size = 4 * sum(weight.numel() for weight in unet.parameters())
    return {"weights": size, "gradients": size, "Adam": 2 * size, "average": size}

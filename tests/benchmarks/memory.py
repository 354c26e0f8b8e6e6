"""How much memory a training step needs, counted before it is taken.

    python -m memory                   # a table for Stable Diffusion 1.5 at 256 pixels

The step's own code runs on tensors without storage, and what storages would hold at any moment is added up.
"""

import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from live import Live
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nanoip2p.checkpoint.tensors import DTYPES
from nanoip2p.clip import CLIPTextConfig, TextEncoder
from nanoip2p.common import cli
from nanoip2p.objective import encode, model_input, noise_losses
from nanoip2p.training.config import TrainConfig
from nanoip2p.unet import UNet, UNetConfig
from nanoip2p.vae import VAE, VAEConfig

USUAL = TrainConfig(dtype="bf16", cache=Path("latents"), accumulate=8, device="cuda")
SMALL = {"recompute": True, "ema_device": "cpu"}
WAYS = {"--dtype fp32": {"dtype": "fp32"}, "bf16": {}, "bf16, no --cache": {"cache": None},
        "--recompute": {"recompute": True}, "--recompute --ema-device cpu": SMALL,
        "--recompute --ema-device cpu, no --cache": {**SMALL, "cache": None}}
BATCHES = (1, 16, 32, 64, 128)


def norms_in_float32(network: nn.Module) -> None:
    """Under autocast, CUDA computes norms in float32 and keeps their float32 input; a CPU does not."""
    for layer in network.modules():
        if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            layer.register_forward_pre_hook(lambda _, given: (given[0].float(),))


def size_of(*networks: nn.Module) -> int:
    """Bytes of their weights in fp32."""
    return 4 * sum(weight.numel() for network in networks for weight in network.parameters())


@lru_cache
def count_step(config: UNetConfig, batch: int, side: int, dtype: str, recompute: bool, held: bool,
               cuda: bool) -> int:
    """Peak bytes of a micro-batch forward and backward, with its gradients unless they are `held` already."""
    with FakeTensorMode():
        unet, latent = UNet(config).train(), (config.out_channels, side, side)
        if cuda and dtype == "bf16":
            norms_in_float32(unet)
        for weight in unet.parameters() if held else ():
            weight.grad = torch.empty_like(weight)
        null = torch.empty(77, config.cross_attention_dim)
        shapes = {"before": (2 * latent[0], *latent[1:]), "after": (2 * latent[0], *latent[1:]), "drop": (),
                  "noise": latent, "posterior": latent, "text": null.shape}
        with Live() as live:
            given = {name: torch.empty(batch, *shape) for name, shape in shapes.items()}
            timestep, alphas = torch.zeros(batch, dtype=torch.long), torch.empty(1000)
            seen = model_input({**given, "timestep": timestep}, null, 1.0, alphas)
            losses = noise_losses(unet, config.in_channels, seen, timestep, DTYPES[dtype], recompute)
            del seen
            losses.mean().backward()
    return live.peak


@lru_cache
def count_encoding(vae: VAEConfig, text: CLIPTextConfig, batch: int, side: int, dtype: str,
                   cuda: bool) -> tuple[int, int]:
    """Bytes of the encoders' weights, and peak bytes of encoding a micro-batch of pairs and instructions."""
    with FakeTensorMode():
        networks = VAE(vae).requires_grad_(False), TextEncoder(text).requires_grad_(False)
        for network in networks if cuda and dtype == "bf16" else ():
            norms_in_float32(network)
        pixels = (batch, 3, side * networks[0].downsampling, side * networks[0].downsampling)
        with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            ids = torch.zeros(batch, 77, dtype=torch.long)
            encode({"before": torch.empty(pixels), "after": torch.empty(pixels), "text": ids}, *networks)
    return size_of(*networks), live.peak


def training_memory(config: UNetConfig, batch: int, side: int, args: TrainConfig, ranks: int,
                    vae: VAEConfig | None = None, text: CLIPTextConfig | None = None) -> dict[str, int]:
    """Bytes on each device by what they are for; the sum is the peak of a step, whatever it is doing then.

    side: of the latents; vae, text: the encoders, Stable Diffusion's by
    default, for runs without --cache. "activations" is what comes on top of the rest at the peak.
    Assumed: attention never forms its maps (flash and memory-efficient kernels do not), nothing is compiled.
    Not in it: CUDA itself, workspaces of cuDNN, NCCL's buffers, pieces of memory too small to use.
    """
    cuda = str(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    with torch.device("meta"):
        unet = UNet(config)
    whole, held = size_of(unet), args.accumulate > 1 or ranks > 1  # of DDP, buckets hold the gradients
    memory = {"weights": whole, "gradients": whole, "Adam": 2 * whole,
              "average": 0 if args.ema_device == "cpu" and cuda else whole}
    peak = count_step(config, batch, side, args.dtype, args.recompute, held, cuda)
    if not args.cache:
        encoders = (vae or VAEConfig(), text or CLIPTextConfig())
        memory["encoders"], encoding = count_encoding(*encoders, batch, side, args.dtype, cuda)
        peak = max(peak, encoding)
    return memory | {"activations": peak if held else max(0, peak - whole)}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    def work() -> None:
        cli.make_parser(prog="python -m memory", description=__doc__).parse_args(argv)
        print("GB on each GPU: Stable Diffusion 1.5, 256 pixels, bf16 and --cache unless said. Counted, not "
              "measured:\nCUDA itself, workspaces and memory in pieces come on top")
        print(f"{'micro-batch':<42}" + "".join(f"{batch:>7}" for batch in BATCHES))
        for name, way in WAYS.items():
            args = replace(USUAL, **way)
            sizes = [sum(training_memory(UNetConfig(in_channels=8), batch, 32, args, 1).values()) / 1e9
                     for batch in BATCHES]
            print(f"{name:<42}" + "".join(f"{size:>7.1f}" for size in sizes), flush=True)

    return cli.run(work, "stopped", "close other programs")


if __name__ == "__main__":
    sys.exit(main())

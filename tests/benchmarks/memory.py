"""Memory of a training step of Stable Diffusion 1.5 at 256 pixels, counted without allocating it.

    python tests/benchmarks/memory.py

Runs the forward and backward pass of a micro-batch on tensors without storage, and counts the bytes that are
alive at once (live.py). Assumes that no attention kernel stores its map. Not counted: CUDA itself, workspaces
of cuDNN, and gaps between the pieces of memory.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from live import Live
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from nanoip2p.clip import CLIPTextConfig, TextEncoder  # noqa: E402
from nanoip2p.objective import encode, model_input, prediction_losses  # noqa: E402
from nanoip2p.training import low_rank  # noqa: E402
from nanoip2p.training.distill import Teacher  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402
from nanoip2p.vae import VAE, VAEConfig  # noqa: E402

SD = UNetConfig(in_channels=8), VAEConfig(), CLIPTextConfig()
BATCHES = (1, 4, 16, 32, 64, 128)
SMALL = {"recompute": True, "ema_on_cpu": True}
LORA = {"lora": (16, "attention")}
WAYS = {"--dtype fp32": {"dtype": torch.float32}, "bf16": {}, "bf16, no --cache": {"cache": False},
        "--recompute": {"recompute": True}, "--recompute --ema-device cpu": SMALL,
        "--recompute --ema-device cpu, no --cache": {**SMALL, "cache": False},
        "--lora 16": LORA, "--lora 16, no --cache": {**LORA, "cache": False},
        "--lora 16 --recompute": {**LORA, "recompute": True},
        "--lora 16 --recompute, no --cache": {**LORA, "recompute": True, "cache": False},
        "--lora 64 --lora-layers all": {"lora": (64, "all")},
        "--lora 64 --lora-layers all --distill": {"lora": (64, "all"), "distill": True},
        "the same with --recompute": {"lora": (64, "all"), "distill": True, "recompute": True}}


def weights_of(*networks: nn.Module) -> int:
    """Bytes of their weights."""
    return sum(weight.nbytes for network in networks for weight in network.parameters())


def count_step(unet: UNet, batch: int, side: int, dtype: torch.dtype, recompute: bool,
               distill: bool = False) -> int:
    """Peak bytes, above the weights, of forward and backward with `batch` samples of side x side latents.

    distill: with a teacher of three branches and an average, which share the frozen weights.
    """
    channels, width = unet.config.out_channels, unet.config.cross_attention_dim
    latent = (batch, channels, side, side)
    moments = (batch, 2 * channels, side, side)
    with Live() as live:
        samples = {"before": torch.empty(moments), "after": torch.empty(moments), "drop": torch.empty(batch),
                   "noise": torch.empty(latent), "posterior": torch.empty(latent),
                   "offset": torch.empty(batch, channels, 1, 1), "text": torch.empty(batch, 77, width),
                   "timestep": torch.zeros(batch, dtype=torch.long)}
        given = model_input(samples, torch.empty(77, width), 1.0, torch.empty(1000), (0, 0, 0))
        timestep, context = samples["timestep"], given["context"]
        if distill:
            teacher = Teacher(unet, samples["text"][0], torch.empty(1000), "epsilon", (3, 7), (1.2, 2), dtype)
            losses = teacher.losses(unet, unet, given["z_in"], timestep, context, samples["drop"], recompute)
        else:
            losses = prediction_losses(unet, unet.config.in_channels, given, timestep, dtype, recompute)
        del given, context
        losses.mean().backward()
    return live.peak


def count_encoding(vae: VAE, text_encoder: TextEncoder, batch: int, side: int, dtype: torch.dtype) -> int:
    """Peak bytes of encoding the pictures and texts of a micro-batch, above the weights."""
    pixels = (batch, 3, side * vae.downsampling, side * vae.downsampling)
    with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        encode({"before": torch.empty(pixels), "after": torch.empty(pixels),
                "text": torch.zeros(batch, 77, dtype=torch.long)}, vae, text_encoder)
    return live.peak


def norms_in_float32(*networks: nn.Module) -> None:
    """Under autocast CUDA computes norms in float32 and keeps their float32 input; make a CPU do the same."""
    for layer in (layer for network in networks for layer in network.modules()):
        if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def training_memory(batch: int, side: int = 32, dtype: torch.dtype = torch.bfloat16, recompute: bool = False,
                    ema_on_cpu: bool = False, cache: bool = True, configs: tuple = SD,
                    lora: tuple[int, str] | None = None, distill: bool = False) -> dict[str, int]:
    """Bytes on the GPU by purpose; their sum is the peak of a step. side: of the latents.

    Trained weights, their gradients, Adam's two moments and their average are fp32; "activations" is the rest
    of the peak. configs: of UNet, VAE and text encoder. lora: (rank, layers). distill: see count_step.
    """
    with FakeTensorMode(), patch.object(Tensor, "any", lambda *_: True):  # numbers that nobody knows
        unet = UNet(configs[0]).train()
        if lora:
            unet = low_rank.freeze(unet, dtype)
            low_rank.attach(unet, *lora, seed=0)
        trained = [weight for weight in unet.parameters() if weight.requires_grad]
        encoders = () if cache else (VAE(configs[1]).requires_grad_(False),
                                     TextEncoder(configs[2]).requires_grad_(False))
        if dtype == torch.bfloat16:
            norms_in_float32(unet, *encoders)
        for weight in trained:
            weight.grad = torch.empty_like(weight)  # of the micro-batches before
        size, peak = weights_of(nn.ParameterList(trained)), count_step(unet, batch, side, dtype, recompute,
                                                                       distill)
        memory = {"weights": weights_of(unet), "gradients": size, "Adam": 2 * size,
                  "average": 0 if ema_on_cpu else size}
        if encoders:
            memory["encoders"] = weights_of(*encoders)
            peak = max(peak, count_encoding(*encoders, batch, side, dtype))
    return memory | {"activations": peak}


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    print("GB on a GPU for Stable Diffusion 1.5, 256 pixels, bf16 and --cache unless said otherwise.\n"
          "Counted, not measured: CUDA itself, workspaces and fragmentation come on top.")
    print(f"{'micro-batch':<42}" + "".join(f"{batch:>7}" for batch in BATCHES))
    for name, way in WAYS.items():
        sizes = [sum(training_memory(batch, **way).values()) / 1e9 for batch in BATCHES]
        print(f"{name:<42}" + "".join(f"{size:>7.1f}" for size in sizes), flush=True)


if __name__ == "__main__":
    main()

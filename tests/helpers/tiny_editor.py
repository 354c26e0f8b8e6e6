"""Weights folders with small random networks, which nanoip2p, diffusers and transformers load."""

from pathlib import Path

import torch
from comparing import randomise
from tiny_configs import TINY_VAE
from train_tokenizer import train_tokenizer

from nanoip2p.checkpoint.folder import save_network
from nanoip2p.checkpoint.save import save_parts
from nanoip2p.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, TextEncoder
from nanoip2p.common.files import write_json
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.unet import UNet, UNetConfig
from nanoip2p.vae import VAE, VAEConfig

DEFAULTS = {"resolution": 48, "steps": 6, "cfg_text": 3.0, "cfg_image": 1.2, "sampler": "euler_ancestral"}
VOCABULARY = 600
# One level in each network: half as many tensors, for tests that read and write weights and make no pictures
SMALL_UNET = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",),
              "up_block_types": ("UpBlock2D",)}
SMALL_VAE = VAEConfig(block_out_channels=(16,), layers_per_block=1, norm_num_groups=4)


@torch.no_grad()
def write_tiny_editor(folder: Path, scheduler_config: dict | None = None, seed: int = 0,
                      in_channels: int = 8, small: bool = False) -> Path:
    """Pictures in multiples of 8 pixels: 4x down-sampling in the VAE, 2x in the UNet. Returns the folder.

    With 4 channels it is a text-to-image model. small: networks of one level.
    """
    unet = randomise(UNet(UNetConfig(**{
        "in_channels": in_channels, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32,
        "norm_num_groups": 8, **(SMALL_UNET if small else {})})), seed)
    vae = randomise(VAE(SMALL_VAE if small else TINY_VAE), seed + 1)
    vae.decoder.conv_out.weight.mul_(0.4)  # few pixels beyond [-1, 1], where clipping hides errors
    text_encoder = randomise(TextEncoder(CLIPTextConfig(VOCABULARY, 32, 64, 1 if small else 2, 4)), seed + 2)
    texts = ["make it night", "turn the red house into a blue boat"]
    train_tokenizer(texts * 3, VOCABULARY, folder / "tokenizer")
    scheduler_config = scheduler_config or NoiseSchedule().to_json()
    save_parts(folder, unet, vae, text_encoder, folder / "tokenizer", scheduler_config, DEFAULTS)
    return folder


def write_tiny_painter(folder: Path, seed: int = 0) -> Path:
    """As write_tiny_editor, a text-to-image model."""
    return write_tiny_editor(folder, seed=seed, in_channels=4)


def write_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIPModel of 32x32 pixels, its tokenizer and preprocessing, as transformers writes them."""
    text = CLIPTextConfig(VOCABULARY, 32, 64, 2, 4, projection_dim=16)
    vision = CLIPVisionConfig(32, 8, 3, 32, 64, 2, 4, 16)
    save_network(randomise(CLIP(CLIPConfig(text, vision, 16)), seed), folder)
    train_tokenizer(["a cat on a sofa", "a dog under the table"] * 3, VOCABULARY, folder)
    colours = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    write_json({**colours, "size": {"shortest_edge": 32}}, folder / "preprocessor_config.json")
    return folder

"""Small configurations of every network, for most tests."""

from nanoip2p.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from nanoip2p.unet import UNetConfig
from nanoip2p.vae import VAEConfig


def tiny_unet(in_channels: int = 4) -> UNetConfig:
    """Two levels and few channels."""
    return UNetConfig(
        in_channels=in_channels, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12)


TINY_VAE = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)  # 4x smaller
TINY_TEXT = CLIPTextConfig(1000, 32, 64, 2, 4, projection_dim=16)  # 1,000 tokens
TINY_CLIP = CLIPConfig(TINY_TEXT, CLIPVisionConfig(32, 8, 3, 32, 64, 2, 4, 16), projection_dim=16)

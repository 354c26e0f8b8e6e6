"""The training objective (section 3.2 of the paper): which inputs the UNet gets, and its loss.

Nothing here is random. A batch brings its random numbers along, see training/samples.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanoip2p.diffusion import add_noise

DROP = (0.05, 0.05, 0.05)  # shares of samples without the text, without text and image, without the image


@torch.no_grad()
def encode(batch: dict, vae: nn.Module, text_encoder: nn.Module) -> dict:
    """Replace the pictures "before" and "after" (B, 3, H, W) and token ids "text" (B, 77) by their encodings.

    Pictures become moments (B, 2C, h, w): mean and log-variance, not scaled. Texts become states (B, 77, D).
    """
    pixels = torch.cat([batch["before"], batch["after"]])                            # (2B, 3, H, W)
    moments = torch.cat(vae.encode(pixels), dim=1)                                   # (2B, 2C, h, w)
    before, after = moments.chunk(2)
    return batch | {"before": before, "after": after, "text": text_encoder(batch["text"])}


def model_input(batch: dict, null: Tensor, scale: float, alphas: Tensor,
                shares: Sequence[float] = DROP) -> dict:
    """Noise the target and drop conditions (section 3.2.1).

    batch: encoded, with `draw`'s random numbers. null: states of the empty text (77, D). scale: the VAE's
    scaling factor. alphas: `NoiseSchedule.alphas_cumprod()`. shares: see DROP.
    Returns z_in (B, 2C, h, w), the noised target beside the image condition; context (B, 77, D); and the
    noise (B, C, h, w), which the UNet should predict.
    """
    mean, logvar = batch["after"].chunk(2, dim=1)                                    # (B, C, h, w) each
    target = scale * (mean + (0.5 * logvar).exp() * batch["posterior"])
    z_image = batch["before"].chunk(2, dim=1)[0]                                     # the mean, not scaled
    # One number in [0, 1) decides both drops: by default no text below 0.10, no image from 0.05 to 0.15
    drop, (text, both, image) = batch["drop"].view(-1, 1, 1), shares
    context = torch.where(drop < text + both, null, batch["text"])
    z_image = z_image * ~((drop >= text) & (drop < text + both + image))[..., None]
    z_t = add_noise(target, batch["noise"], batch["timestep"], alphas)
    return {"z_in": torch.cat([z_t, z_image], dim=1), "context": context, "noise": batch["noise"]}


def noise_losses(unet: nn.Module, in_channels: int, given: dict, timestep: Tensor, dtype: torch.dtype,
                 recompute: bool = False) -> Tensor:
    """Equation 1 of the paper for each sample: the mean squared error of the predicted noise, (B,) float32.

    in_channels: of the UNet; a text-to-image model takes only the noised target. given: from `model_input`.
    dtype: of matrix products and convolutions; weights stay in float32. recompute: gradient checkpointing.
    """
    z_in = given["z_in"][:, :in_channels]
    with torch.autocast(z_in.device.type, dtype, enabled=dtype != torch.float32):
        predicted = unet(z_in, timestep, given["context"], recompute=recompute).float()  # (B, C, h, w)
    return (predicted - given["noise"]).square().mean((1, 2, 3))


def loss_weight(timestep: Tensor, alphas: Tensor, gamma: float) -> Tensor:
    """Min-SNR weighting (Hang et al. 2023, section 3.4): min(SNR, gamma) / SNR; 1 for gamma = 0."""
    snr = alphas[timestep] / (1 - alphas[timestep])                                  # (B,)
    return snr.clamp(max=gamma) / snr if gamma else torch.ones_like(snr)


def learning_rate(step: int, steps: int, lr: float, warmup: int, cooldown: float) -> float:
    """Linear warm-up over `warmup` steps, then constant; linear to zero over the last share `cooldown`."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    cool = min(1.0, (steps - step) / (cooldown * steps)) if cooldown else 1.0
    return lr * warm * cool

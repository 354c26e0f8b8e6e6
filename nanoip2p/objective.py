"""The training objective (section 3.2 of the paper): the inputs and the loss of the UNet.

This file draws no random numbers: training/samples.py puts them into the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanoip2p.diffusion import add_noise


@torch.no_grad()
def encode(batch: dict, vae: nn.Module, text_encoder: nn.Module) -> dict:
    """Encode the pictures "before" and "after" (B, 3, H, W) and the token ids "text" (B, 77) of a batch.

    Pictures become mean and log variance (B, 2C, h, w), unscaled. Texts become hidden states (B, 77, D).
    """
    pixels = torch.cat([batch["before"], batch["after"]])                            # (2B, 3, H, W)
    moments = torch.cat(vae.encode(pixels), dim=1)                                   # (2B, 2C, h, w)
    before, after = moments.chunk(2)
    return batch | {"before": before, "after": after, "text": text_encoder(batch["text"])}


def model_input(batch: dict, null: Tensor, scale: float, alphas: Tensor,
                shares: Sequence[float], prediction_type: str = "epsilon") -> dict:
    """Add noise to the latents of the edited picture, and drop conditions at random (section 3.2.1).

    batch: from `encode`, with the random numbers of training/samples.py. null (77, D): hidden states of the
    empty text. scale: scaling factor of the VAE. alphas: `NoiseSchedule.alphas_cumprod()`. shares:
    probabilities of dropping only the text, both, only the picture. Returns z_in (B, 2C, h, w): noised
    latents and image condition, concatenated; context (B, 77, D); target (B, C, h, w): the noise or v.
    """
    mean, logvar = batch["after"].chunk(2, dim=1)                                    # (B, C, h, w) each
    latents = scale * (mean + (0.5 * logvar).exp() * batch["posterior"])
    z_image = batch["before"].chunk(2, dim=1)[0]                                     # the mean, not scaled
    # `drop` is uniform in [0, 1). By default, below 0.10 drops the text, 0.05 to 0.15 drops the picture
    drop, (text, both, image) = batch["drop"].view(-1, 1, 1), shares                 # (B, 1, 1)
    context = torch.where(drop < text + both, null, batch["text"])                   # (B, 77, D)
    z_image = z_image * ~((drop >= text) & (drop < text + both + image))[..., None]
    target = batch["noise"]
    z_t = add_noise(latents, target, batch["timestep"], alphas)
    if prediction_type == "v_prediction":
        target = add_noise(target, -latents, batch["timestep"], alphas)
    return {"z_in": torch.cat([z_t, z_image], dim=1), "context": context, "target": target}


def predict(unet: nn.Module, z_in: Tensor, timestep: Tensor, context: Tensor, dtype: torch.dtype,
            recompute: bool = False) -> Tensor:
    """Run the UNet on z_in (B, C_in, h, w). Returns (B, C, h, w) float32. See prediction_losses."""
    with torch.autocast(z_in.device.type, dtype, enabled=dtype != torch.float32):
        return unet(z_in, timestep, context, recompute=recompute).float()


def prediction_losses(unet: nn.Module, in_channels: int, inputs: dict, timestep: Tensor, dtype: torch.dtype,
                      recompute: bool = False) -> Tensor:
    """The mean squared error of the prediction of each sample, (B,) float32: equation 1 of the paper.

    in_channels: of the UNet. A text-to-image model takes only the noised latents. inputs: from `model_input`.
    dtype: of autocast; the weights stay in float32. recompute: use gradient checkpointing.
    """
    predicted = predict(unet, inputs["z_in"][:, :in_channels], timestep, inputs["context"], dtype, recompute)
    return (predicted - inputs["target"]).square().mean((1, 2, 3))


def loss_weight(timestep: Tensor, alphas: Tensor, gamma: float, prediction_type: str = "epsilon") -> Tensor:
    """Min-SNR weights (B,), Hang et al. 2023, section 3.4: min(SNR, gamma) / SNR for epsilon prediction,
    min(SNR, gamma) / (SNR + 1) for v-prediction, 1 if gamma = 0."""
    snr = alphas[timestep] / (1 - alphas[timestep])                                  # (B,)
    if not gamma:
        return torch.ones_like(snr)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # 1 also for SNR = 0


def learning_rate(step: int, steps: int, lr: float, warmup: int, cooldown: float) -> float:
    """Linear rise in `warmup` steps, then `lr`, then linear fall to 0 in the last `cooldown` of the steps."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    cool = min(1.0, (steps - step) / (cooldown * steps)) if cooldown else 1.0
    return lr * warm * cool

"""What one training step computes (section 3.2 of the paper), and all that is random about it.

Sample n is the n-th that a run visits: sample i of optimizer step s is n = s * batch + i. Everything drawn
for it is a function of (seed, n) alone. So it does not matter which rank, worker or micro-batch it falls to,
nor whether the run was stopped in between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanoip2p.diffusion import add_noise


@torch.no_grad()
def encode(batch: dict, vae: nn.Module, text_encoder: nn.Module) -> dict:
    """Pictures and ids of a batch -> moments (B, 2C, h, w), unscaled, and text states (B, 77, D)."""
    pixels = torch.cat([batch["before"], batch["after"]])                            # (2B, 3, H, W)
    moments = torch.cat(vae.encode(pixels), dim=1)                                   # (2B, 2C, h, w)
    before, after = moments.chunk(2)
    return batch | {"before": before, "after": after, "text": text_encoder(batch["text"])}


DROP = (0.05, 0.05, 0.05)  # shares of samples without text, without text and picture, without picture


def model_input(batch: dict, null: Tensor, scale: float, alphas: Tensor, offset: float = 0.0,
                shares: Sequence[float] = DROP) -> dict:
    """What the network sees and what it should say, from an encoded batch.

    null: state of the empty text (77, D); scale: of the latents; alphas: `NoiseSchedule.alphas_cumprod()`;
    offset: strength of offset noise (a constant a channel, so that the mean brightness is learned too).
    shares: as DROP, section 3.2.1.
    Returns z_in (B, 2C, h, w): noised target | picture condition, context (B, 77, D), noise (B, C, h, w).
    """
    mean, logvar = batch["after"].chunk(2, dim=1)                                    # (B, C, h, w) each
    target = scale * (mean + (0.5 * logvar).exp() * batch["posterior"])
    z_image = batch["before"].chunk(2, dim=1)[0]                                     # the mode, not scaled
    # One number decides what is dropped; as in the original, the text below 10%, the picture from 5% to 15%
    drop, (text, both, picture) = batch["drop"].view(-1, 1, 1), shares
    context = torch.where(drop < text + both, null, batch["text"])
    z_image = z_image * ~((drop >= text) & (drop < text + both + picture))[..., None]
    noise = batch["noise"] + offset * batch["offset"]
    z_t = add_noise(target, noise, batch["timestep"], alphas)
    return {"z_in": torch.cat([z_t, z_image], dim=1), "context": context, "noise": noise}


def loss_weight(timestep: Tensor, alphas: Tensor, gamma: float) -> Tensor:
    """Min-SNR weighting (Hang et al. 2023, section 3.4): min(SNR, gamma) / SNR, or 1 where gamma is 0."""
    snr = alphas[timestep] / (1 - alphas[timestep])
    return snr.clamp(max=gamma) / snr if gamma else torch.ones_like(snr)


def noise_losses(unet: nn.Module, in_channels: int, given: dict, timestep: Tensor, dtype: torch.dtype,
                 recompute: bool = False) -> Tensor:
    """The paper's equation 1 for each sample: mean squared error of the predicted noise, (B,) float32.

    in_channels: a text-to-picture model has none for the picture. dtype: of products and convolutions.
    recompute: forget activations and compute them again on the way back (gradient checkpointing).
    """
    z_in = given["z_in"][:, :in_channels]
    with torch.autocast(z_in.device.type, dtype, enabled=dtype != torch.float32):
        predicted = unet(z_in, timestep, given["context"], recompute=recompute).float()  # (B, C, h, w)
    return (predicted - given["noise"]).square().mean((1, 2, 3))


def learning_rate(step: int, steps: int, lr: float, warmup: int, cooldown: float) -> float:
    """Linear warm-up, constant as in the paper, down to zero over the last share `cooldown` of the run."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    cool = min(1.0, (steps - step) / (cooldown * steps)) if cooldown else 1.0
    return lr * warm * cool

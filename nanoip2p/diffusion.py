"""The noise schedule: how much noise a timestep means, and how noise is added for training.

Stable Diffusion noises a clean latent z_0 as z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps (Ho et al. 2020, equation 4),
a_t = prod_{s<=t} (1 - beta_s). Samplers see the same thing divided by sqrt(a_t): x = z_0 + sigma eps with
sigma = sqrt((1 - a_t) / a_t) (Karras et al. 2022, "variance exploding" form).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import read_config


@dataclass(frozen=True)
class NoiseSchedule:
    """Field names are the keys of diffusers' scheduler_config.json; defaults are Stable Diffusion 1.5's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"

    @classmethod
    def from_config(cls, config: dict) -> "NoiseSchedule":
        """Read a scheduler_config.json dict."""
        return read_config(cls, config, {}, frozenset(config) - {"num_train_timesteps", "beta_start", "beta_end",
                                                                  "beta_schedule"})

    def alphas_cumprod(self) -> Tensor:
        """The share of signal power a_t at every training timestep: (num_train_timesteps,) float32, falling."""
        if self.beta_schedule == "scaled_linear":  # linear in sqrt(beta): Rombach et al.'s choice
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        else:
            betas = torch.linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
        return torch.cumprod(1.0 - betas, dim=0)


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps (Ho et al. 2020, equation 4).

    latents, noise: (B, C, h, w); timestep: (B,) integers; alphas_cumprod: from `NoiseSchedule`, same device.
    """
    a = alphas_cumprod[timestep].to(latents.dtype)[:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise

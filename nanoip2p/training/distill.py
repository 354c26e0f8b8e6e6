"""Consistency distillation (Luo et al. 2310.04378, algorithm 1): an editor learns to edit in a few steps.

The teacher is an editor, guided by picture and text with equation 3 of the paper. The student begins as a
copy of the teacher. It makes one network call per step, without guidance, and learns a consistency function

    f(z_t, t) = c_skip(t) z_t + c_out(t) z_0(z_t, t)                      c_skip, c_out: samplers.boundary

where z_0(z_t, t) is the network's estimate of the clean latents. f should have one value along a path that
the teacher takes from noise to picture. So the loss compares two points of such a path, 20 timesteps apart:

    z_s = one DDIM step of the teacher, from z_t at timestep t to s = t - 20, or to s = 0 from t = 19
    loss = | f(z_t, t) - f*(z_s, s) |^2                     f*: f with the averaged weights of the student
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanoip2p.diffusion import LCM_STEPS, add_noise
from nanoip2p.objective import predict
from nanoip2p.samplers import boundary

# A student edits with these settings. A scale of 1 turns guidance off
STUDENT_DEFAULTS = {"sampler": "lcm", "steps": 4, "cfg_text": 1.0, "cfg_image": 1.0}


def on_grid(timestep: Tensor, n_train: int) -> Tensor:
    """Timesteps (B,) in [0, n_train) -> the next timesteps of the sampler lcm: 19, 39, ... 999 of 1000."""
    return (timestep * LCM_STEPS // n_train + 1) * (n_train // LCM_STEPS) - 1


def clean(output: Tensor, z_t: Tensor, a: Tensor, prediction_type: str) -> Tensor:
    """The estimate of z_0 (B, C, h, w) from the network's output, eps or v. a: a_t (B, 1, 1, 1)."""
    if prediction_type == "v_prediction":
        return a.sqrt() * z_t - (1 - a).sqrt() * output
    return (z_t - (1 - a).sqrt() * output) / a.sqrt()


class Teacher:
    """The guided teacher, and the loss of a student."""

    def __init__(self, unet: nn.Module, null: Tensor, alphas: Tensor, prediction_type: str,
                 cfg_text: Sequence[float], cfg_image: Sequence[float], dtype: torch.dtype):
        """unet: frozen. null (77, D): hidden states of the empty text. alphas: `alphas_cumprod()`.

        cfg_text, cfg_image: (smallest, largest) s_T and s_I of equation 3. dtype: autocast dtype.
        """
        self.unet, self.null, self.alphas, self.prediction_type = unet, null, alphas, prediction_type
        self.scales, self.dtype = (tuple(cfg_text), tuple(cfg_image)), dtype

    @torch.no_grad()
    def step(self, z_in: Tensor, timestep: Tensor, before: Tensor, context: Tensor, share: Tensor) -> Tensor:
        """One guided DDIM step (Song et al. 2020, eta = 0) from `timestep` to `before`: z_s (B, C, h, w).

        z_in (B, 2C, h, w), or (B, C, h, w) of a text-to-image model; context (B, 77, D); timesteps (B,).
        share (B,) in [0, 1) sets both scales: 0 is the smallest value, 1 the largest.
        """
        s_t, s_i = ((low + share * (high - low)).view(-1, 1, 1, 1)                      # (B, 1, 1, 1)
                    for low, high in self.scales)
        z_t = z_in[:, : self.unet.config.out_channels]
        blank = torch.cat([z_t, torch.zeros_like(z_in[:, z_t.shape[1] :])], dim=1)      # no picture
        null = self.null.expand_as(context)
        branches = [(weight, z, text) for weight, z, text in (
            (s_t, z_in, context), (s_i - s_t, z_in, null), (1 - s_i, blank, null)) if weight.any()]
        weights, inputs, texts = zip(*branches)
        outputs = predict(self.unet, torch.cat(inputs), timestep.repeat(len(branches)), torch.cat(texts),
                          self.dtype).chunk(len(branches))
        guided = sum(weight * output for weight, output in zip(weights, outputs))
        a = self.alphas[timestep].view(-1, 1, 1, 1)
        z_0 = clean(guided, z_t, a, self.prediction_type)
        eps = (z_t - a.sqrt() * z_0) / (1 - a).sqrt()
        return add_noise(z_0, eps, before, self.alphas)

    def consistency(self, unet: nn.Module, z_in: Tensor, timestep: Tensor, context: Tensor,
                    recompute: bool = False) -> Tensor:
        """f(z_t, t) of a student: (B, C, h, w) float32. z_in, timestep, context: as in `step`."""
        output = predict(unet, z_in, timestep, context, self.dtype, recompute)
        z_t = z_in[:, : output.shape[1]]
        c_skip, c_out = (factor.view(-1, 1, 1, 1) for factor in boundary(timestep.float()))
        a = self.alphas[timestep].view(-1, 1, 1, 1)
        return c_skip * z_t + c_out * clean(output, z_t, a, self.prediction_type)

    def losses(self, student: nn.Module, average: nn.Module, z_in: Tensor, timestep: Tensor, context: Tensor,
               share: Tensor, recompute: bool = False) -> Tensor:
        """The loss (B,) of each sample. average: the UNet with f*'s weights. Other arguments: see `step`."""
        before = (timestep - len(self.alphas) // LCM_STEPS).clamp(min=0)
        z_s = self.step(z_in, timestep, before, context, share)
        with torch.no_grad():
            z_s = torch.cat([z_s, z_in[:, z_s.shape[1] :]], dim=1)
            target = self.consistency(average, z_s, before, context)
        estimate = self.consistency(student, z_in, timestep, context, recompute)
        return (estimate - target).square().mean((1, 2, 3))

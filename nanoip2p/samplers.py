"""Samplers turn noise into latents. Each sampler is a plain function:

    sampler(denoise, x, sigmas, generator) -> latents (B, C, h, w) float32

`x` (B, C, h, w) float32 are noised latents, scaled as by Karras et al. 2022: x = z_0 + sigma eps.
`denoise(x, sigma: float)` returns the estimate of z_0. `sigmas` (n, 3), from `diffusion.plan`, has one row
(sigma before, sigma after, timestep) for each step. `generator` is a CPU torch.Generator, or a list with one
for each picture. Samplers draw noise on the CPU, so that a seed gives the same noise on any device and, with
a list, in any batch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Generators = torch.Generator | list[torch.Generator] | None


def draw_noise(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Standard normal noise (B, C, h, w) float32 on the CPU. A list has one generator per picture."""
    if isinstance(generator, list):
        assert len(generator) == shape[0], f"{len(generator)} generators for {shape[0]} pictures"
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generator])
    return torch.randn(shape, generator=generator)


def _noise_like(x: Tensor, generator: Generators) -> Tensor:
    """Noise for x, on its device. On CUDA, copying from pinned memory does not wait for earlier GPU work."""
    noise = draw_noise(x.shape, generator)
    return noise.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else noise.to(x.device)


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: Generators = None) -> Tensor:
    """Euler steps of the probability flow ODE: Karras et al. 2022, algorithm 1 without Heun's correction."""
    x = x.float()
    for sigma, sigma_next, _ in sigmas.tolist():
        d = (x - denoise(x, sigma)) / sigma  # dx/dsigma
        x = x + d * (sigma_next - sigma)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: Generators = None) -> Tensor:
    """An Euler step to sigma_down, then fresh noise of sigma_up: the sampler of InstructPix2Pix's own code.

    sigma_next^2 = sigma_down^2 + sigma_up^2. sigma_up^2 is the posterior variance of Ho et al. 2020
    (equation 7), written in sigma, as in k-diffusion's `get_ancestral_step`.
    """
    x = x.float()
    for sigma, sigma_next, _ in sigmas.tolist():
        sigma_up = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        d = (x - denoise(x, sigma)) / sigma
        x = x + d * (sigma_down - sigma)
        if sigma_up > 0:
            x = x + sigma_up * _noise_like(x, generator)
    return x


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: Generators = None, eta: float = 0) -> Tensor:
    """DDIM, Song et al. 2020, equation 12. eta = 0 is deterministic; eta = 1 is DDPM's ancestral sampling.

    The state and the result are z = sqrt(a) x, not x, with a = 1 / (1 + sigma^2), as in diffusers.
    """
    z = x.float() / math.sqrt(1 + float(sigmas[0, 0]) ** 2)
    for sigma, sigma_next, _ in sigmas.tolist():
        a, a_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
        x = z / math.sqrt(a)
        denoised = denoise(x, sigma)
        eps = (x - denoised) / sigma
        noise_scale = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))  # equation 16
        z = math.sqrt(a_next) * denoised + math.sqrt(max(0, 1 - a_next - noise_scale**2)) * eps
        if noise_scale > 0:
            z = z + noise_scale * _noise_like(z, generator)
    return z


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: Generators = None) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022 (2211.01095), algorithm 2, with lambda = -log sigma.

    The first step is first-order: it has no earlier estimate. The last step is first-order if sigma_next = 0
    (lambda is infinite) or if there are fewer than 15 steps (the authors' advice). Returns z, as `ddim` does.
    """
    x = x.float()
    rows = sigmas.tolist()
    before = h_before = None
    for i, (sigma, sigma_next, _) in enumerate(rows):
        denoised = denoise(x, sigma)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        first_order = i == 0 or sigma_next == 0 or (i == len(rows) - 1 and len(rows) < 15)
        ahead = denoised if first_order else denoised + h / (2 * h_before) * (denoised - before)
        x = sigma_next / sigma * x - math.expm1(-h) * ahead
        before, h_before = denoised, h
    return x / math.sqrt(1 + sigma_next**2)


def boundary(timestep: float | Tensor) -> tuple:
    """c_skip and c_out of a consistency function f(z, t) = c_skip z + c_out z_0(z, t), so that f(z, 0) = z.

    The values are those of LCM (Luo et al. 2310.04378): sigma_data = 0.5, and timesteps times 10.
    """
    squares = (10 * timestep) ** 2 + 0.5**2
    return 0.5**2 / squares, 10 * timestep / squares**0.5


def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: Generators = None) -> Tensor:
    """Multistep consistency sampling, Luo et al. 2023 (2310.04378), algorithm 3: for distilled networks.

    Each step estimates z_0 with the consistency function, then adds fresh noise of sigma_next.
    """
    x = x.float()
    for sigma, sigma_next, timestep in sigmas.tolist():
        c_skip, c_out = boundary(timestep)
        x = c_skip / math.sqrt(1 + sigma**2) * x + c_out * denoise(x, sigma)
        if sigma_next > 0:
            x = x + sigma_next * _noise_like(x, generator)
    return x


SAMPLERS = {sampler.__name__: sampler for sampler in (euler_ancestral, euler, ddim, dpmpp_2m, lcm)}

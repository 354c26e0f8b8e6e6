"""Equation 3, its branches, and how often the UNet runs."""

import pytest
import torch

from nanoip2p.diffusion import Plan
from nanoip2p.guidance import guided_denoiser, text_guided_denoiser
from nanoip2p.unet import Projected

B, C, T, D = 2, 4, 7, 5
SIGMA = 2.5
LEVELS = Plan([321.5], torch.tensor([[SIGMA, 0.0]]), 1.0)


class FakeUNet(torch.nn.Module):
    """A fake UNet. Its output depends on every input, and it stores its inputs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def project_context(self, context, rows):
        return Projected({"text": context}, rows)

    def project_timesteps(self, timestep_of):
        return timestep_of

    def forward(self, latents, timestep, context, attend=None):
        self.calls.append((latents, timestep, context))
        if isinstance(context, Projected):
            latents, context = latents[context.rows], context.layers["text"]
        noised, image = latents.chunk(2, dim=1)
        text = context.mean(dim=(1, 2))[:, None, None, None]
        return torch.tanh(noised + 0.7 * image * noised.roll(1, 1) + text) + 0.001 * timestep


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    x, z_image = torch.randn(2, B, C, 6, 10, generator=g)
    context, null = torch.randn(2, B, T, D, generator=g)
    return x, z_image, context, null


def run(inputs, cfg_text, cfg_image, low_memory=False):
    x, z_image, context, null = inputs
    unet = FakeUNet()
    denoise = guided_denoiser(unet, LEVELS, z_image, context, null, cfg_text, cfg_image, low_memory)
    return denoise(x, SIGMA), unet.calls


def equation_3(inputs, s_T, s_I):
    x, z_image, context, null = inputs
    scaled = x / (SIGMA**2 + 1) ** 0.5
    full = FakeUNet()(torch.cat([scaled, z_image], 1), 321.5, context)
    image = FakeUNet()(torch.cat([scaled, z_image], 1), 321.5, null)
    none = FakeUNet()(torch.cat([scaled, torch.zeros_like(z_image)], 1), 321.5, null)
    assert min((full - image).abs().max(), (image - none).abs().max()) > 0.1  # the fake uses its inputs
    return x - SIGMA * (none + s_I * (image - none) + s_T * (full - image))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("cfg_text, cfg_image, branches, seen", [  # seen: different z_in
    (7.5, 1.5, 3, 2), (7.5, 1.0, 2, 1), (1.5, 1.5, 2, 2), (1.0, 1.0, 1, 1), (0.0, 1.5, 2, 2),
    (0.0, 1.0, 1, 1), (0.0, 0.0, 1, 1), (0.5, 0.0, 3, 2)])
def test_equation_3_with_no_branch_too_many(inputs, cfg_text, cfg_image, branches, seen, low_memory):
    denoised, calls = run(inputs, cfg_text, cfg_image, low_memory)
    torch.testing.assert_close(denoised, equation_3(inputs, cfg_text, cfg_image), rtol=1e-5, atol=1e-5)
    assert [len(text.rows) for _, _, text in calls] == ([B] * branches if low_memory else [B * branches])
    assert [len(latents) for latents, _, _ in calls] == ([B] * branches if low_memory else [B * seen])


@pytest.mark.parametrize("guidance, branches", [
    ([1.0, 1.0], 1), ([0.0, 0.0], 1), ([3.0, 1.0], 2), ([0.0, 7.5], 2)], ids=str)
def test_one_condition(inputs, guidance, branches):
    """Ho & Salimans' equation 6 for each picture. Both branches share one copy of the latents."""
    x, context, null = inputs[0].repeat(1, 2, 1, 1), *inputs[2:]
    s, scaled = torch.tensor(guidance), x / (SIGMA**2 + 1) ** 0.5
    full, none = FakeUNet()(scaled, 321.5, context), FakeUNet()(scaled, 321.5, null)
    wanted = x - SIGMA * torch.cat([none + s[:, None, None, None] * (full - none)] * 2, dim=1)
    unet = FakeUNet()
    unet_twice = lambda *given: torch.cat([unet(*given)] * 2, dim=1)  # noqa: E731
    unet_twice.project_context = unet.project_context
    unet_twice.project_timesteps = unet.project_timesteps
    denoise = text_guided_denoiser(unet_twice, LEVELS, context, null, s)
    torch.testing.assert_close(denoise(x, SIGMA), wanted, rtol=1e-5, atol=1e-5)
    [(latents, _, text)] = unet.calls
    assert len(latents) == B and len(text.rows) == B * branches


def test_inputs_of_each_branch(inputs):
    x, z_image, context, null = inputs
    _, [(latents, timestep, text)] = run(inputs, 7.5, 1.5)
    assert timestep == 321.5
    noised, images = latents[text.rows].chunk(2, dim=1)
    torch.testing.assert_close(noised, (x / (SIGMA**2 + 1) ** 0.5).repeat(3, 1, 1, 1))
    assert torch.equal(images, torch.cat([z_image, z_image, torch.zeros_like(z_image)]))  # not scaled
    assert torch.equal(text.layers["text"], torch.cat([context, null, null]))


def test_half_precision_networks_keep_a_float32_state(inputs):
    x, z_image, context, null = inputs
    unet = FakeUNet()
    half = [t.bfloat16() for t in (z_image, context, null)]
    denoised = guided_denoiser(unet, LEVELS, *half, 7.5, 1.5)(x, SIGMA)
    assert unet.calls[0][0].dtype == torch.bfloat16 and denoised.dtype == torch.float32
    assert (denoised - equation_3(inputs, 7.5, 1.5)).norm() < 0.1 * denoised.norm()

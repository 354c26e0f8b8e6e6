"""Edits inside a mask, against a plain loop of blended latent diffusion, and against edits without a mask."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_editor import picture
from tiny_editor import write_tiny_editor

from nanoip2p.diffusion import NoiseSchedule, plan
from nanoip2p.editor import Editor
from nanoip2p.images import fit, to_tensor
from nanoip2p.masks import fit_mask, keep_outside, paste
from nanoip2p.samplers import SAMPLERS, draw_noise


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    return Editor.load(write_tiny_editor(tmp_path_factory.mktemp("weights") / "tiny"), device="cpu")


def left_half(width, height, mode="L"):
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask.convert(mode)


def pixels(image):
    return np.asarray(image, dtype=int)


def case(rows=2):
    """A denoiser that depends on all of x, latents to keep, noise, and masks of 2 x 2 pixels per latent."""
    generator = torch.Generator().manual_seed(0)
    z_kept, target = (torch.randn(rows, 4, 6, 8, generator=generator) for _ in range(2))

    def denoise(x, sigma):
        return target + 0.3 * torch.tanh(x.roll(1, 3) / (1 + sigma)) + 0.1 * x.mean() / (1 + sigma)

    masks = [left_half(16, 12), Image.new("L", (16, 12), 0)][:rows]
    masks[-1].paste(255, (5, 3, 6, 4))  # one white pixel: one latent is inside
    inside = torch.zeros(rows, 1, 6, 8, dtype=torch.bool)
    inside[0, :, :, :4] = True
    inside[rows - 1, 0, 1, 2] = True
    return denoise, z_kept, draw_noise(z_kept.shape, generator), masks, inside


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_equals_a_plain_loop_that_replaces_the_latents_in_each_step(sampler):
    """Avrahami et al. 2206.02779, algorithm 1: outside, x is the input, noised to the sigma of the step."""
    denoise, z_kept, noise, masks, inside = case()
    sigmas = plan(NoiseSchedule(), sampler, 7).sigmas
    blended, x = keep_outside(denoise, sigmas[0, 0] * noise, z_kept, masks)
    made = SAMPLERS[sampler](blended, x, sigmas, torch.Generator().manual_seed(5))
    generator, x = torch.Generator().manual_seed(5), sigmas[0, 0] * noise
    eps = noise  # the noise in the latents outside
    for sigma, after, _ in sigmas.tolist():
        x = torch.where(inside, x, z_kept + sigma * eps)
        up = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5 if sampler == "euler_ancestral" else 0
        down = (after**2 - up**2) ** 0.5
        x = x + (x - denoise(x, sigma)) / sigma * (down - sigma)
        if up:
            fresh = draw_noise(x.shape, generator)
            x, eps = x + up * fresh, (down * eps + up * fresh) / after
    x = torch.where(inside, x, z_kept)
    assert (made - x).abs().max() < 1e-5
    assert (made - SAMPLERS[sampler](denoise, sigmas[0, 0] * noise, sigmas)).abs().max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_with_the_kept_latents_outside(sampler):
    denoise, z_kept, noise, masks, inside = case()
    levels = plan(replace(NoiseSchedule(), final_sigmas_type="zero", set_alpha_to_one=True), sampler, 5)
    blended, x = keep_outside(denoise, levels.start_scale * noise, z_kept, masks)
    seen = []

    def watched(x, sigma):
        seen.append(((x - z_kept)[~inside.expand_as(x)] / sigma).std().item())
        return blended(x, sigma)

    made = SAMPLERS[sampler](watched, x, levels.sigmas, torch.Generator().manual_seed(5))
    outside = ~inside.expand_as(made)
    assert (made - z_kept)[outside].abs().max() < 2e-3 and (made - z_kept)[~outside].abs().max() > 0.5
    assert all(0.9 < spread < 1.15 for spread in seen), f"noise over sigma in each step: {seen}"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_pixels_outside_are_those_of_the_input(editor, sampler, low_memory):
    """Pictures with different masks, or without one, give the same results in a batch as alone."""
    image = picture(70, 41, 1)
    given = dict(steps=3, seed=3, sampler=sampler, resolution=64, low_memory=low_memory)
    edit = partial(editor.edit, [image] * 3, "make it night", **given)
    plain, half = edit(), left_half(35, 50)
    masked = edit(masks=[half, None, Image.new("L", (9, 9), 255)])
    assert masked[1] == plain[1] and masked[2] == plain[2]
    before, after, without = (pixels(one) for one in (fit(image, masked[0].size), masked[0], plain[0]))
    right = masked[0].width // 2 + 3  # stretching made the edge of the mask soft
    assert (after[:, right:] == before[:, right:]).all()
    assert (without[:, right:] != before[:, right:]).mean() > 0.5
    assert (after[:, : right - 6] != before[:, : right - 6]).mean() > 0.5


def test_the_latents_outside_are_those_of_the_input(editor):
    """The latents are scaled, as for the network. A latent is inside if a pixel is at least half white."""
    image, mask = picture(64, 64, 2), Image.new("L", (64, 64), 0)
    mask.paste(128, (0, 0, 4, 4))
    mask.paste(127, (4, 4, 8, 8))
    seen = []
    editor.edit(image, "make it night", steps=2, seed=1, resolution=64, masks=mask,
                callback=lambda step, latents: seen.append(latents))
    kept = editor.vae.encode(to_tensor(image)[None])[0] * editor.vae.scaling_factor
    for latents in seen:
        changed = ((latents - kept).abs().amax((0, 1)) > 1e-6).nonzero()
        assert changed.tolist() == [[0, 0]]


def test_a_picture_of_the_right_size_keeps_its_own_pixels(editor):
    """Also beside the mask's edge, where a latent is half inside. With a blur: only far from the edge."""
    image, mask = picture(64, 64, 2), Image.new("L", (64, 64), 0)
    mask.paste(255, (11, 13, 30, 31))
    white = np.asarray(mask) > 0
    sharp, blurred = (editor.edit(image, "make it night", steps=2, seed=1, resolution=64, masks=mask,
                                  mask_blur=blur) for blur in (0, 3))
    changed = np.abs(pixels(sharp) - pixels(image)).max(-1) > 0
    assert not changed[~white].any() and changed[white].mean() > 0.9
    changed = np.abs(pixels(blurred) - pixels(image)).max(-1) > 0
    assert changed[~white].any() and not changed[48:].any() and not changed[:, 48:].any()


HALF = np.asarray(left_half(64, 64))
MASKS = {
    "L": left_half(64, 64), "another size": left_half(10, 30), "1": left_half(64, 64, "1"),
    "RGB": left_half(64, 64, "RGB"), "P": left_half(64, 64, "P"), "LA": left_half(64, 64, "LA"),
    "array": HALF, "bool": HALF > 0, "gradient": torch.from_numpy(HALF / 255.0).requires_grad_(),
    "bf16": torch.from_numpy(HALF / 255.0).bfloat16(),
    "tensor": torch.from_numpy(HALF > 0), "float": HALF / 255.0,
    "three channels": np.asarray(left_half(64, 64, "RGB")) / 255.0}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_of_any_size_and_type(mask):
    made = np.asarray(fit_mask(mask, picture(64, 64, 0), (64, 64)))
    assert (made[:, :28] == 255).all() and (made[:, 36:] == 0).all()


def test_a_mask_is_fitted_as_its_picture():
    """Mask and picture are scaled and cropped in the same way, so they stay aligned."""
    image = picture(200, 100, 0)
    mask = Image.new("L", (50, 50), 0)
    mask.paste(255, (0, 0, 10, 50))  # the left fifth; a square crop begins at a quarter
    with pytest.raises(ValueError, match="no white"):
        fit_mask(mask, image, (64, 64))
    mask.paste(255, (0, 0, 25, 50))
    made = np.asarray(fit_mask(mask, image, (64, 64)))
    assert (made[:, :30] == 255).all() and (made[:, 34:] == 0).all()
    assert fit_mask(None, image, (64, 64)) is None


@pytest.mark.parametrize("masks, message", [
    (Image.new("L", (8, 8), 100), "no white"), ([left_half(8, 8)] * 2, "2 masks"), (7, "int"),
    (np.zeros((2, 3, 4, 5)), "ndarray")], ids=["dark", "two", "number", "four axes"])
def test_unusable_masks(editor, masks, message):
    with pytest.raises(ValueError, match=message):
        editor.edit([picture(64, 64, 0)], ["make it night"], steps=1, masks=masks)


def test_a_mask_is_blurred_by_a_gaussian():
    mask = Image.new("L", (32, 8))
    mask.paste(255, (16, 0, 32, 8))
    white, black = (Image.new("RGB", mask.size, colour) for colour in ("white", "black"))
    shares = np.asarray(paste(white, black, mask, 2.0))[4, :, 0] / 255
    wanted = torch.special.ndtr((torch.arange(32) + 0.5 - 16) / 2).numpy()
    assert np.abs(shares - wanted).max() < 0.02

"""SDEdit against diffusers' StableDiffusionImg2ImgPipeline."""

from functools import cache

import diffusers
import hertz
import numpy as np
import pytest
import torch
from PIL import Image
from test_editor import difference, with_schedule
from tiny_editor import write_tiny_editor

from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.images import to_tensor
from nanoip2p.text_to_image import TextToImage

CAPTIONS, SEEDS = ["a red house at night", "turn the boat blue", "a red house at night"], [3, 3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_editor(
        tmp_path_factory.mktemp("weights") / "tiny", NoiseSchedule(steps_offset=1).to_json(), in_channels=4)


@pytest.fixture(scope="module")
def pictures():
    chance = np.random.default_rng(0)
    small = [Image.fromarray(chance.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in CAPTIONS]
    return [picture.resize((32, 32), Image.Resampling.BICUBIC) for picture in small]


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("sampler", ["euler_ancestral", "ddim"])
def test_equals_diffusers(folder, pictures, sampler, strength):
    compare(folder, folder, pictures, sampler, strength)


@cache
def networks_of(folder):
    """Diffusers' networks and tokenizer, read once for all schedules."""
    parts = hertz.open_peer(folder, "ddim").components
    parts["unet"].register_to_config(sample_size=64)  # diffusers needs this setting
    return parts


def compare(networks, folder, pictures, sampler, strength):
    painter = TextToImage.load(folder, "cpu")
    with torch.no_grad():  # the mode; diffusers would sample the posterior
        z = painter.vae.encode(torch.stack([to_tensor(picture) for picture in pictures]))[0]
    parts = networks_of(networks) | {"scheduler": hertz.open_scheduler(folder, sampler)}
    peer = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = peer(CAPTIONS, image=z * painter.vae.scaling_factor, strength=strength, num_inference_steps=8,
                  guidance_scale=3.0, generator=generators).images
    settings = {"images": pictures, "strength": strength, "seed": SEEDS, "steps": 8, "cfg_text": 3.0,
                "sampler": sampler, "resolution": 32}
    ours = painter.generate(CAPTIONS, **settings)
    assert max(difference(a, b) for a, b in zip(ours, theirs)) <= 1
    assert difference(theirs[0], theirs[2]) > 4  # the result depends on picture and seed
    assert difference(ours[0], painter.generate("turn the boat blue", **settings)[0]) > 4


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_equals_diffusers_with_v_prediction(folder, tmp_path, pictures, strength):
    schedule = NoiseSchedule(steps_offset=1, prediction_type="v_prediction", rescale_betas_zero_snr=True,
                             timestep_spacing="trailing")
    with_v = with_schedule(folder, tmp_path, schedule.to_json())
    for sampler in ("euler_ancestral", "ddim"):
        compare(folder, with_v, pictures, sampler, strength)


def test_a_strength_that_is_no_share_is_refused(folder, pictures):
    for strength in (0.1, 1.1):
        with pytest.raises(ValueError, match="with 8 steps, it must be from 1/8 to 1"):
            TextToImage.load(folder, "cpu").generate(
                CAPTIONS, images=pictures, strength=strength, steps=8, resolution=32)


def test_one_picture_for_many_captions_in_batches(folder, pictures):
    painter = TextToImage.load(folder, "cpu")
    settings = {"strength": 0.5, "seed": SEEDS, "resolution": 32}
    steps = []
    together = painter.generate(CAPTIONS, images=pictures[0], **settings,
                                callback=lambda step, latents: steps.append(len(latents)))
    apart = painter.generate(CAPTIONS, images=pictures[:1] * 3, batch=2, **settings)
    assert steps == [3] * 3  # half of the 6 steps in the weights' defaults
    assert max(difference(a, b) for a, b in zip(together, apart)) <= 1

"""SDEdit (Meng et al. 2108.01073): the paper's baseline, an edit without an editor.

The input is noised part of the way, and denoised with the caption that it should have: the more noise, the
more of the caption and the less of the input.
"""

import torch
from PIL import Image

from nanoip2p.diffusion import plan
from nanoip2p.guidance import text_guided_denoiser
from nanoip2p.images import fit, to_tensor
from nanoip2p.pipeline import encode_texts
from nanoip2p.samplers import SAMPLERS, draw_noise
from nanoip2p.text_to_image import TextToImage


def steps_taken(steps: int, strength: float) -> int:
    """How many of `steps` SDEdit takes, counted as diffusers does. ValueError for none, or more than all."""
    taken = int(steps * strength)
    if taken < 1 or strength > 1:
        raise ValueError(f"a strength of {strength} is no share of {steps} steps; take 1 at most, and one "
                         "step or more")
    return taken


@torch.inference_mode()
def sdedit(painter: TextToImage, images: list[Image.Image], captions: list[str], strength: float,
           seeds: list[int], steps: int | None = None, cfg_text: float | None = None,
           sampler: str | None = None, resolution: int | None = None) -> list[Image.Image]:
    """B RGB pictures, what each should show, and a seed for each -> B square pictures, in one batch.

    strength: the share of the steps that are taken, in (0, 1]; at 1 the input hardly counts. None takes the
    default of the weights. As diffusers' StableDiffusionImg2ImgPipeline, but for the posterior's mode, where
    that draws a sample. ValueError for settings that cannot be used.
    """
    settings = painter.complete({"steps": steps, "cfg_text": cfg_text, "sampler": sampler,
                                 "resolution": resolution})
    levels = plan(painter.schedule, settings["sampler"], settings["steps"])
    sigmas = levels.sigmas[-steps_taken(settings["steps"], strength):]                 # (taken, 2)
    weight, side = painter.unet.conv_in.weight, settings["resolution"]
    pixels = torch.stack([to_tensor(fit(image, (side, side))) for image in images])    # (B, 3, H, W)
    z = painter.vae.encode(pixels.to(weight))[0] * painter.vae.scaling_factor          # (B, C, h, w)
    texts = encode_texts(painter.text_encoder, painter.tokenizer, ["", *captions], painter.kept_texts)
    context = torch.stack([texts[caption] for caption in captions])                    # (B, T, D)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    denoise = text_guided_denoiser(
        painter.unet, levels.timestep_of(z.device), context, texts[""].expand_as(context),
        torch.full((len(images),), float(settings["cfg_text"])))
    x = z.float() + sigmas[0, 0] * draw_noise(z.shape, generators).to(z.device)
    return painter.decode(SAMPLERS[settings["sampler"]](denoise, x, sigmas, generators))

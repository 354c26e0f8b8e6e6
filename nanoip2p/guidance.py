"""Guidance by two conditions, picture and text: equation 3 of InstructPix2Pix (Brooks et al. 2211.09800).

    e~ = e(z, 0, 0) + s_I (e(z, c_I, 0) - e(z, 0, 0)) + s_T (e(z, c_I, c_T) - e(z, c_I, 0))

Gathered by branch, the weights are s_T for [text + image], s_I - s_T for [image] and 1 - s_I for [none];
they sum to 1. A branch of weight 0 is never computed: s_I = 1 saves a third of the work, s_T = s_I another.
"No image" is zeros in latent space, which is what training drops the image to; "no text" is the encoding
of "". A negative prompt takes the place of "" in both branches that have no text, as in diffusers.
"""

import math

import torch
from torch import Tensor, nn

from nanoip2p.samplers import Denoise


def guided_denoiser(
    unet: nn.Module, timestep_of: dict[float, float], z_image: Tensor, context: Tensor, null_context: Tensor,
    cfg_text: float, cfg_image: float, low_memory: bool = False,
) -> Denoise:
    """Make the denoise(x, sigma) -> estimate of z_0 that a sampler calls.

    timestep_of: from `Plan.timestep_of()`. z_image (B, C, h, w): mode of the VAE's posterior, not scaled.
    context, null_context (B, T, D): the encoded instructions and "" (or negative prompt).
    The branches run as one batch of up to 3 B, or with low_memory one after another. x and the result are
    float32; the UNet computes in the dtype of z_image.
    """
    branches = [
        (cfg_text, z_image, context),
        (cfg_image - cfg_text, z_image, null_context),
        (1.0 - cfg_image, torch.zeros_like(z_image), null_context),
    ]
    branches = [branch for branch in branches if branch[0] != 0]
    weights, images, contexts = zip(*branches)
    if not low_memory:
        images, contexts = [torch.cat(images)], [torch.cat(contexts)]            # (n B, C, h, w), (n B, T, D)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        z = (x / math.sqrt(sigma**2 + 1)).to(z_image.dtype)  # c_in: unit variance; the image is not scaled
        eps = []
        for image, text in zip(images, contexts):
            z_in = torch.cat([z.repeat(len(image) // len(z), 1, 1, 1), image], dim=1)  # (n B, 2 C, h, w)
            eps.extend(unet(z_in, timestep_of[sigma], text).float().split(len(z)))
        return x - sigma * sum(weight * e for weight, e in zip(weights, eps))

    return denoise


def text_guided_denoiser(unet: nn.Module, timestep_of: dict[float, float], context: Tensor,
                         null_context: Tensor, cfg_text: Tensor) -> Denoise:
    """The same for a text-to-picture model, which knows one condition: Ho & Salimans 2022, equation 6.

    e~ = e(z, 0) + s_T (e(z, c_T) - e(z, 0)). context, null_context (B, T, D); cfg_text (B,), of each picture.
    """
    cfg_text = cfg_text.to(context.device)[:, None, None, None]
    branches = [(weight, text) for weight, text in ((cfg_text, context), (1 - cfg_text, null_context))
                if weight.any()]
    weights, texts = zip(*branches)
    contexts = torch.cat(texts)                                                  # (n B, T, D)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        z = (x / math.sqrt(sigma**2 + 1)).to(contexts.dtype)
        eps = unet(z.repeat(len(texts), 1, 1, 1), timestep_of[sigma], contexts).float().split(len(z))
        return x - sigma * sum(weight * e for weight, e in zip(weights, eps))

    return denoise

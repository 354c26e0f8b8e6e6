"""Guidance by two conditions, picture and text: equation 3 of InstructPix2Pix (Brooks et al. 2211.09800).

    e~ = e(z, 0, 0) + s_I (e(z, c_I, 0) - e(z, 0, 0)) + s_T (e(z, c_I, c_T) - e(z, c_I, 0))

Gathered by branch, the weights are s_T for [text + image], s_I - s_T for [image] and 1 - s_I for [none];
they sum to 1. A branch of weight 0 is never computed: s_I = 1 saves a third of the work, s_T = s_I another.
What does not differ between branches or steps is computed once: see `UNet.project_context`, and
`UNet.project_timesteps` beside it.
"No image" is zeros in latent space, which is what training drops the image to; "no text" is the encoding
of "". A negative prompt takes the place of "" in both branches that have no text, as in diffusers.
"""

import math

import torch
from torch import Tensor

from nanoip2p.samplers import Denoise
from nanoip2p.unet import UNet


def guided_denoiser(
    unet: UNet, timestep_of: dict[float, Tensor], z_image: Tensor, context: Tensor, null_context: Tensor,
    cfg_text: float, cfg_image: float, low_memory: bool = False, reuse: bool = True,
) -> Denoise:
    """Make the denoise(x, sigma) -> estimate of z_0 that a sampler calls.

    timestep_of: from `Plan.timestep_of()`. z_image (B, C, h, w): mode of the VAE's posterior, not scaled.
    context, null_context (B, T, D): the encoded instructions and "" (or negative prompt).
    The branches run as one batch of up to 3 B, or with low_memory one after another. x and the result are
    float32; the UNet computes in the dtype of z_image. Without reuse, every branch and step computes all of
    its own, to the same result.
    """
    branches = zip((cfg_text, cfg_image - cfg_text, 1.0 - cfg_image), (0, 0, 1),
                   (context, null_context, null_context))
    branches = [branch for branch in branches if branch[0] != 0]
    told = unet.project_timesteps(timestep_of) if reuse else timestep_of
    images, own = torch.stack([z_image, torch.zeros_like(z_image)]), torch.arange(len(z_image))
    batches = []
    for batch in [[branch] for branch in branches] if low_memory else [branches]:
        _, seen, texts = zip(*batch)  # text + image and image alone see the same
        shown = list(dict.fromkeys(seen)) if reuse else list(seen)
        text = torch.cat(texts)                                                  # (n B, T, D)
        if reuse:
            text = unet.project_context(text, torch.cat([own + len(own) * shown.index(i) for i in seen]))
        batches.append((images[shown].flatten(0, 1), text))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        z = (x / math.sqrt(sigma**2 + 1)).to(z_image.dtype)  # c_in: unit variance; the image is not scaled
        eps = []
        for image, text in batches:
            z_in = torch.cat([z.repeat(len(image) // len(z), 1, 1, 1), image], dim=1)  # (.., 2 C, h, w)
            eps.extend(unet(z_in, told[sigma], text).float().split(len(z)))
        return x - sigma * sum(weight * e for (weight, _, _), e in zip(branches, eps))

    return denoise


def text_guided_denoiser(unet: UNet, timestep_of: dict[float, Tensor], context: Tensor, null_context: Tensor,
                         cfg_text: Tensor, reuse: bool = True) -> Denoise:
    """The same for a text-to-picture model, which knows one condition: Ho & Salimans 2022, equation 6.

    e~ = e(z, 0) + s_T (e(z, c_T) - e(z, 0)). context, null_context (B, T, D); cfg_text (B,), of each picture.
    """
    branches = [(weight.to(context.device)[:, None, None, None], text)
                for weight, text in ((cfg_text, context), (1 - cfg_text, null_context)) if weight.any()]
    weights, texts = zip(*branches)
    told = unet.project_timesteps(timestep_of) if reuse else timestep_of
    text, copies = torch.cat(texts), 1 if reuse else len(texts)                  # (n B, T, D)
    if reuse:
        text = unet.project_context(text, torch.arange(len(context)).repeat(len(texts)))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        z = (x / math.sqrt(sigma**2 + 1)).to(context.dtype).repeat(copies, 1, 1, 1)
        eps = unet(z, told[sigma], text).float().split(len(x))
        return x - sigma * sum(weight * e for weight, e in zip(weights, eps))

    return denoise

"""Classifier-free guidance by picture and text: equation 3 of InstructPix2Pix (Brooks et al. 2211.09800).

    e~ = e(z, 0, 0) + s_I (e(z, c_I, 0) - e(z, 0, 0)) + s_T (e(z, c_I, c_T) - e(z, c_I, 0))

e~ is a weighted sum of three branches: [text + image] has weight s_T, [image] s_I - s_T, [none] 1 - s_I.
A branch of weight 0 is not computed, so s_I = 1 or s_T = s_I saves about a third of the time. "No image"
is zero latents, as in training. "No text" is the encoding of "", or of the negative prompt.

e is the output of the UNet: the noise eps, or v = sqrt(a) eps - sqrt(1 - a) z_0. For a given z, eps, v and
z_0 are affine functions of each other. The weights sum to 1, so guiding any of the three is the same.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nanoip2p.diffusion import Plan
from nanoip2p.samplers import Denoise
from nanoip2p.unet import Attend, Projected, UNet, attend

Batch = tuple[int, Tensor | None, Projected]  # n copies of z; picture latents (n B, C, h, w); text


def make_denoiser(unet: UNet, levels: Plan, like: Tensor, batches: list[Batch],
                  combine: Callable[[list[Tensor]], Tensor],
                  attend_at: Callable[[float], Attend] = lambda _: attend, deep_every: int = 1) -> Denoise:
    """Make a sampler's denoise(x, sigma) -> z_0, both (B, C, h, w) float32.

    batches: the UNet runs once for each batch, in the dtype and on the device of `like`. combine: makes the
    guided output from the outputs (B, C, h, w) of all branches. attend_at: sigma -> the UNet's `attend`.

    deep_every = N: calls 0, N, 2 N, ... run the whole UNet. The calls between run only its outermost blocks,
    on the deep features of the last full call, which change slowly (DeepCache, Ma et al. 2312.00858).
    """
    calls, kept = itertools.count(), [None] * len(batches)
    time_of = unet.project_timesteps(levels.timestep_of(like.device))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        scale, outputs = math.sqrt(sigma**2 + 1), []
        z = (x / scale).to(like.dtype)  # variance of about 1, as in training
        whole = next(calls) % deep_every == 0
        for i, (copies, image, text) in enumerate(batches):
            z_in = z.repeat(copies, 1, 1, 1)
            z_in = z_in if image is None else torch.cat([z_in, image], dim=1)          # (n B, 2 C, h, w)
            given = z_in, time_of[sigma], text, attend_at(sigma)
            noise = unet(*given) if deep_every == 1 else unet(*given, deep=whole or kept[i])
            if deep_every > 1 and whole:
                noise, kept[i] = noise[0], noise[1].clone()  # the next call of a CUDA graph overwrites it
            outputs.extend(noise.float().split(len(z)))
        if levels.prediction_type == "v_prediction":
            return x / scale**2 - sigma / scale * combine(outputs)
        return x - sigma * combine(outputs)

    return denoise


def guided_denoiser(unet: UNet, levels: Plan, z_image: Tensor, context: Tensor, null_context: Tensor,
                    cfg_text: float, cfg_image: float, low_memory: bool = False,
                    deep_every: int = 1) -> Denoise:
    """The denoiser of an editor (equation 3). low_memory: run the branches one by one, not as one batch.

    z_image (B, C, h, w): mode of the VAE's posterior, unscaled. context, null_context (B, T, D).
    """
    branches = [(cfg_text, 0, context), (cfg_image - cfg_text, 0, null_context),
                (1.0 - cfg_image, 1, null_context)]          # weight, index into images, text
    branches = [branch for branch in branches if branch[0] != 0]
    images, rows, batches = torch.stack([z_image, torch.zeros_like(z_image)]), torch.arange(len(z_image)), []
    for batch in [[branch] for branch in branches] if low_memory else [branches]:
        _, image_of, texts = zip(*batch)
        used = sorted(set(image_of))  # [text + image] and [image] have the same z_in
        text_rows = torch.cat([rows + len(rows) * used.index(i) for i in image_of])    # (R,)
        text = unet.project_context(torch.cat(texts), text_rows)
        batches.append((len(used), images[used].flatten(0, 1), text))
    return make_denoiser(unet, levels, z_image, batches, deep_every=deep_every,
                         combine=lambda outputs: sum(branch[0] * e for branch, e in zip(branches, outputs)))


def text_guided_denoiser(unet: UNet, levels: Plan, context: Tensor, null_context: Tensor,
                         cfg_text: Tensor, deep_every: int = 1) -> Denoise:
    """The denoiser of a text-to-image model, guided by text only: Ho & Salimans 2022, equation 6.

    e~ = e(z, 0) + s_T (e(z, c_T) - e(z, 0)). context, null_context (B, T, D); cfg_text (B,): one per picture.
    """
    branches = [(weight.to(context.device)[:, None, None, None], text)
                for weight, text in ((cfg_text, context), (1 - cfg_text, null_context)) if weight.any()]
    weights, texts = zip(*branches)
    text = unet.project_context(torch.cat(texts), torch.arange(len(context)).repeat(len(texts)))
    return make_denoiser(unet, levels, context, [(1, None, text)], deep_every=deep_every,
                         combine=lambda outputs: sum(weight * e for weight, e in zip(weights, outputs)))

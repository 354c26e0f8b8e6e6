"""Edit only a part of a picture: the white part of a mask is edited, the black part is kept."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from nanoip2p.images import PictureError, fit
from nanoip2p.pipeline import as_image
from nanoip2p.samplers import Denoise


def fit_mask(mask, image: Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """Stretch a mask over its picture `image`, then scale and crop it to `size` by `fit`. Returns mode L.

    mask: what `as_image` takes, of any size; or an array or tensor (H, W), which may be bool; or None, which
    means everywhere. PictureError if no pixel of the result is at least half white: nothing to edit.
    """
    if mask is None:
        return None
    is_array = isinstance(mask, Tensor) or isinstance(mask, np.ndarray) and mask.dtype.kind in "buif"
    if is_array and mask.ndim == 2:
        mask = mask.detach() if isinstance(mask, Tensor) else torch.tensor(mask)
        mask = (mask.float() if mask.dtype == torch.bool else mask).expand(3, -1, -1)      # (3, H, W)
    mask = fit(as_image(mask, "masks").convert("L").resize(image.size, Image.Resampling.BILINEAR), size)
    if mask.getextrema()[1] < 128:
        raise PictureError("the mask, scaled and cropped like its picture, has no white: nothing to edit")
    return mask


def paste(edited: Image.Image, kept: Image.Image, mask: Image.Image, blur: float) -> Image.Image:
    """`edited` inside the mask, `kept` outside. blur: radius of a Gaussian blur of the mask, in pixels."""
    return Image.composite(edited, kept, mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask)


def keep_outside(denoise: Denoise, x: Tensor, z_kept: Tensor,
                 masks: list[Image.Image | None]) -> tuple[Denoise, Tensor]:
    """Change a sampler's denoiser and its first x, so that the sampler returns z_kept outside the masks.

    x: the first noise. z_kept (B, C, h, w): scaled latents of the inputs. masks: B results of fit_mask, of
    one size. A latent is inside if one of its pixels is at least half white. Outside, z_kept replaces the
    estimate of z_0. Samplers move x = z_0 + sigma eps towards the estimate, so outside the masks x is the
    input, noised to the sigma of each step: blended latent diffusion (Avrahami et al. 2206.02779).
    """
    if not any(masks):
        return denoise, x
    white = Image.new("L", next(filter(None, masks)).size, 255)
    pixels = torch.stack([torch.tensor(np.asarray(mask or white)) for mask in masks])     # (B, H, W) uint8
    inside = F.max_pool2d(pixels[:, None].float(), pixels.shape[1] // x.shape[2]) >= 128
    inside, z_kept = inside.to(x.device), z_kept.float()                                   # (B, 1, h, w) bool
    return (lambda x, sigma: torch.where(inside, denoise(x, sigma), z_kept)), x + ~inside * z_kept

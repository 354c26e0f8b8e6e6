"""Masks of sample.py: read from a file, or found where an instruction acts."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from nanoip2p.diffusion import plan
from nanoip2p.editor import Editor
from nanoip2p.guidance import guided_denoiser
from nanoip2p.images import PictureError, open_image
from nanoip2p.masks import fit_mask, paste
from nanoip2p.pipeline import encode_texts
from nanoip2p.samplers import draw_noise

LEVELS = slice(5, 16, 3)  # 4 of 20 noise levels: timesteps at about 3/4, 3/5, 2/5 and 1/4
DRAWS = 2                 # draws of noise at each level
THRESHOLD = 0.25  # share of the largest change. At 0.25, as many nano edits succeed as without a mask


def read_mask(given) -> Image.Image:
    """The mask of given.mask_file, in mode L, white where to edit. given: Settings of sample.py."""
    mask = open_image(given.mask_file).convert("L")
    return ImageOps.invert(mask) if given.mask_invert else mask


def make_masks(editor: Editor, given, originals: list[Image.Image], fitted: list[Image.Image],
               instructions: list[str], seeds: list[int], sampling: dict) -> list[Image.Image] | None:
    """Masks for `fitted`, which were scaled and cropped from `originals`, or None. given: Settings."""
    if given.mask == "auto":
        return find_masks(editor, fitted, instructions, seeds, sampling["negative"], sampling["low_memory"])
    mask = given.mask_file and read_mask(given)
    return mask and [fit_mask(mask, image if given.keep_size else original, image.size)
                     for original, image in zip(originals, fitted)]


def to_size_of(before: list[Image.Image], edited: list[Image.Image], masks: list[Image.Image] | None,
               given) -> list[Image.Image]:
    """Scale edited pictures to the sizes of `before`. Outside the masks, keep `before`. given: Settings."""
    scaled = [image.resize(last.size, Image.Resampling.LANCZOS) for image, last in zip(edited, before)]
    if masks is None:
        return scaled
    masks = [read_mask(given)] * len(scaled) if given.mask_file else masks
    return [paste(image, last, fit_mask(mask, last, last.size), given.mask_blur)
            for image, last, mask in zip(scaled, before, masks)]


@torch.inference_mode()
def find_masks(editor: Editor, images: list[Image.Image], instructions: list[str], seeds: list[int],
               negative: str = "", low_memory: bool = False) -> list[Image.Image]:
    """Masks of mode L: white where the instruction changes the estimate of the picture. NaN: PictureError.

    images: of one size, as fitted for `editor`. Noises them to several levels, and compares the branches
    [text + image] and [image] there. DiffEdit (Couairon et al. 2210.11427) compares two captions.
    """
    with editor.on_device(editor.text_encoder, low_memory):
        states = encode_texts(editor.text_encoder, editor.tokenizer, [negative, *instructions])
    context = torch.stack([states[text] for text in instructions])                          # (B, T, D)
    keys = [id(image) for image in images]  # several instructions may share a picture: encode it once
    z_image = editor.encode(keys, dict(zip(keys, images)), {}, low_memory)                  # (B, C, h, w)
    z, levels = z_image.float() * editor.vae.scaling_factor, plan(editor.schedule, "euler", 20)
    generators, changes = [torch.Generator().manual_seed(seed) for seed in seeds], 0
    with editor.on_device(editor.unet, low_memory):
        with_text, without = (
            guided_denoiser(editor.unet, levels, z_image, context, states[negative].expand_as(context),
                            cfg_text, cfg_image=1.0, low_memory=low_memory) for cfg_text in (1.0, 0.0))
        for sigma in levels.sigmas[LEVELS, 0].tolist() * DRAWS:
            x = z + sigma * draw_noise(z.shape, generators).to(z.device)
            changes += (with_text(x, sigma) - without(x, sigma)).abs().mean(1, keepdim=True)  # (B, 1, h, w)
    reach = min(z.shape[2:]) // 16  # smooth over a latent and this many on each side
    changes = F.avg_pool2d(F.pad(changes, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    if not changes.isfinite().all():
        raise PictureError("the mask came out as NaN or infinity; try --dtype bf16 or fp32")
    found = (changes >= THRESHOLD * changes.amax((2, 3), keepdim=True))[:, 0].mul(255).byte().cpu().numpy()
    return [Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
            for mask, image in zip(found, images)]

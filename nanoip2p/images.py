"""Pictures: file -> RGB -> tensor in [-1, 1] -> RGB."""

import contextlib
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nanoip2p.common.colours import scale_transparent_colour, to_rgb
from nanoip2p.common.files import regular

MAX_MEGAPIXELS = 100  # 300 MB as RGB; protects against decompression bombs
# The only formats that open_image reads. Pillow itself would start Ghostscript for a PostScript file
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's Orientation -> Image.Transpose
with contextlib.suppress(ImportError):  # HEIC: pip install pillow-heif
    import pillow_heif
    pillow_heif.register_heif_opener()


class PictureError(ValueError):
    """A picture came out as NaN, or its mask has no white. Other pictures of the batch may still succeed."""


def open_image(path: str | Path, content: BinaryIO | None = None) -> Image.Image:
    """Open a picture as 8-bit sRGB, rotated by its EXIF tag, with white behind transparency.

    content: a stream to read instead; `path` then only names the picture in errors. Raises ValueError, in one
    line, if the file is missing, truncated, too large or not in one of FORMATS, whatever its suffix says.
    """
    try:
        with warnings.catch_warnings(), content or regular(path).open("rb") as file:
            warnings.simplefilter("ignore")  # Pillow's warnings about large files and odd EXIF
            Image.init()
            known = [name for name in FORMATS if name in Image.OPEN]  # some builds of Pillow lack AVIF
            with Image.open(file, formats=known) as image:
                if image.width * image.height > MAX_MEGAPIXELS * 10**6:  # checked before decoding
                    raise ValueError(f"more than {MAX_MEGAPIXELS} megapixels; shrink it")
                if image.format == "PNG" and "transparency" in image.info:
                    scale_transparent_colour(image, file)
                rgb = to_rgb(image)
                with contextlib.suppress(Exception):  # do not rotate without a readable Orientation
                    rgb = rgb.transpose(TURNS[image.getexif()[0x0112]])
                return rgb
    except FileNotFoundError:
        raise ValueError(f"there is no picture {path}") from None
    except UnidentifiedImageError:
        advice = "" if "HEIF" in known else "; HEIC needs: pip install pillow-heif"
        raise ValueError(f"{path} cannot be used: damaged, or none of {', '.join(known)}{advice}") from None
    except Exception as error:  # a damaged file can raise anything: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()).removeprefix(f"{path} ") or type(error).__name__
        raise ValueError(f"{path} cannot be used: {reason}") from None


def fit_size(width: int, height: int, resolution: int, multiple: int) -> tuple[int, int]:
    """The size at which to edit a picture: sides are multiples of `multiple`, the longer near `resolution`.

    Rounds the short side up and the long side down, as the paper's edit_cli.py does, but in integers:
    rounding errors cost edit_cli.py 64 pixels for 7% of all sizes. First rounds `resolution` down to a
    multiple. Raises ValueError if the long side would exceed twice that, or if resolution < multiple.
    """
    if resolution < multiple:
        raise ValueError(f"a resolution of {resolution} is too small; these weights need at least {multiple}")
    resolution -= resolution % multiple  # so that a picture of a valid size keeps its size
    short, long = sorted((width, height))
    new_short = -(-short * resolution // (long * multiple)) * multiple
    new_long = long * new_short // (short * multiple) * multiple
    if new_long > 2 * resolution:
        raise ValueError(f"{width}x{height} is too thin; crop it to at most {2 * resolution // multiple}:1")
    return (new_long, new_short) if width >= height else (new_short, new_long)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale with Lanczos to cover `size` (width, height), then crop the centre."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    assert image.mode == "RGB", f"the picture has mode {image.mode}, not RGB; open it with open_image"
    pixels = torch.from_numpy(np.asarray(image).copy())           # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float() / 255 * 2 - 1          # (3, H, W)


def to_pil(tensor: Tensor) -> Image.Image:
    """(3, H, W) -> RGB picture. Clips to [-1, 1] and rounds to 8 bits.

    Raises PictureError for NaN or infinity, which fp16 can cause.
    """
    if not tensor.isfinite().all():
        raise PictureError("the picture came out as NaN or infinity; try --dtype bf16 or fp32")
    pixels = (tensor.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

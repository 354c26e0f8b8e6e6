"""Write pictures with their recipe, the settings that made them."""

import json
import warnings
from pathlib import Path

from PIL import Image, ImageOps, PngImagePlugin

from nanoip2p.common import recipes
from nanoip2p.common.colours import srgb_profile
from nanoip2p.common.files import replacing
from nanoip2p.common.web_ui import to_exif, web_text

LARGEST = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}  # maximum side in pixels


def save_png(image: Image.Image, path: str | Path, recipe: dict, web: bool = False) -> None:
    """Write a PNG atomically, with `recipe` as JSON in the text chunk nanoip2p. web: add `web_text` too."""
    info = PngImagePlugin.PngInfo()
    info.add(b"sRGB", b"\0")
    info.add_text(recipes.KEY, json.dumps(recipe))
    if web:
        info.add_text("parameters", web_text(recipe, image.size))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_image(image: Image.Image, path: str | Path, recipe: dict) -> None:
    """Write a picture atomically, with its recipe and `web_text`, as PNG, JPEG or WebP: see recipes.KINDS.

    WebP is lossless. Shrinks a picture that is too large for the format, and leaves out a recipe that is too
    long for a JPEG. Warns of both instead of raising an error, because the picture took long to make.
    """
    kind = recipes.KINDS[Path(path).suffix.lower()]
    if max(image.size) > (most := LARGEST[kind]):
        warnings.warn(f"{path}: shrunk to {most} pixels, the most that {kind} holds", stacklevel=2)
        image = ImageOps.contain(image, (most, most))
    if kind == "PNG":
        return save_png(image, path, recipe, web=True)
    metadata = {"exif": to_exif(web_text(recipe, image.size)), "xmp": recipes.to_xmp(recipe)}
    how = {"lossless": True}
    if kind == "JPEG":
        room = 65_533 - len(recipes.HEADER)  # bytes in a segment
        if left_out := [name for name, content in metadata.items() if len(content) > room]:
            warnings.warn(f"{path}: {' and '.join(left_out)} left out, as a JPEG holds 64 KB of settings; "
                          ".png and .webp hold all", stacklevel=2)
        segment = recipes.HEADER + ("xmp" not in left_out) * metadata.pop("xmp")  # Pillow 10 ignores xmp=
        how = {"quality": 95, "subsampling": 0,
               "extra": b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment}
        metadata = {} if "exif" in left_out else metadata
    with replacing(path) as temporary:
        image.save(temporary, format=kind, icc_profile=srgb_profile(), **metadata, **how)

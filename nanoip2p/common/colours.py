"""Pixels of any mode -> 8-bit sRGB: transparency, colour profiles, gamma."""

import contextlib
from functools import lru_cache
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms


def scale_transparent_colour(image: Image.Image, file: BinaryIO) -> None:
    """A PNG can name one transparent colour. Grey: scale it to 8 bits. 16-bit RGB: add an alpha channel."""
    colour, (*place, raw) = image.info["transparency"], image.tile[0]
    if image.mode == "L":
        top = {"L;2": 3, "L;4": 15}.get(raw, 255)  # by the PNG standard, higher bits are ignored
        image.info["transparency"] = (colour & top) * 255 // top
    elif raw == "RGB;16B":  # Pillow keeps the high bytes; with the raw mode RGB;16L, the low bytes
        high, low = np.divmod(np.array(colour, np.uint16), 256)
        same = (np.asarray(image) == high).all(-1)                                      # (H, W)
        with Image.open(file, formats=["PNG"]) as lower:
            lower.tile = [(*place, "RGB;16L")]
            same &= (np.asarray(lower) == low).all(-1)
        image.putalpha(Image.fromarray(np.where(same, 0, 255).astype(np.uint8)))


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode -> sRGB. ValueError for pixels without an agreed range (32 bits, floats).

    info["converted"] of the result names the profile that was applied, if any.
    """
    info, colour, grey = image.info, image.info.get("transparency"), image.mode in ("1", "L", "LA", "La")
    if image.mode == "F":
        raise ValueError("the value range of floating-point pixels is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: PNG gives "I;16" or, in older Pillow, "I"
        levels = np.asarray(image).astype(np.int32)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("the value range of 32-bit pixels is unknown; save it with 8 or 16 bits")
        levels[levels == colour] = 65535
        return _to_srgb(Image.fromarray(((levels + 128) // 257).astype(np.uint8)), True, info)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        above, below = _to_srgb(image, grey, info), Image.new("RGBA", image.size, "white")
        above.putalpha(image.getchannel("A"))
        below.info = above.info
        return Image.alpha_composite(below, above).convert("RGB")
    return _to_srgb(image, grey, info)


def _to_srgb(image: Image.Image, grey: bool, info: dict) -> Image.Image:
    """A picture -> RGB without alpha. Applies a profile that fits its channels, or the gamma of
    a PNG that has neither a profile nor an sRGB chunk."""
    profile, gamma, cmyk = info.get("icc_profile"), info.get("gamma"), image.mode == "CMYK"
    if isinstance(profile, bytes) and len(profile) < 2**23 and (found := _transform(profile)):
        mode, transform, name = found
        if {"CMYK": cmyk, "RGB": not cmyk, "L": grey}[mode]:
            image = transform.apply(image if cmyk else image.convert("RGB").convert(mode))
            image.info = {"converted": name}
            return image
    image = image.convert("RGB")  # a copy if it is RGB already
    unusual = isinstance(gamma, float) and gamma > 0.01 and abs(gamma * 2.2 - 1) > 0.05  # 5% as in libpng
    if unusual and not {"icc_profile", "srgb"} & info.keys():
        light = np.linspace(0, 1, 256) ** (1 / gamma)
        level = np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        image = image.point((level * 255).round().astype(int).tolist() * 3)
    image.info = {}  # so that a second call does not apply the gamma again
    return image


@lru_cache(maxsize=8)  # the pictures of a dataset share few profiles
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform, str] | None:
    """(mode of the profile, transform to sRGB, its name). None if the profile is broken or has no effect."""
    with contextlib.suppress(Exception):  # ignores a broken profile; some builds of Pillow lack ImageCms
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        colours = np.indices((9, 9, 9)).reshape(3, 27, 27).transpose(1, 2, 0) * 255 // 8
        sample = Image.fromarray(colours.astype(np.uint8)).convert(mode)
        change = np.asarray(transform.apply(sample)).astype(int) - np.asarray(sample.convert("RGB"))
        name = " ".join((source.profile.profile_description or "an unnamed profile").split())[:80]
        return (mode, transform, name) if np.abs(change).max() > 2 else None  # at most 2 is rounding


@lru_cache
def srgb_profile() -> bytes | None:
    """An ICC profile of sRGB (588 bytes), for files. None if Pillow lacks ImageCms."""
    with contextlib.suppress(ImportError):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        return profile[:24] + bytes(12) + profile[36:]  # no date: the same picture gives the same file
    return None

"""Read the recipe of a picture that nanoip2p wrote: the settings that made the picture."""

import contextlib
import json
from pathlib import Path

from PIL import Image

from nanoip2p.common import recipes
from nanoip2p.images import open_image


def read_recipe(path: str | Path) -> dict:
    """Read the recipe of an edit. Raises ValueError if the file has none or is not a picture."""
    open_image(path)  # reports a missing or damaged file
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        with Image.open(path, formats=list(recipes.KINDS.values())) as image:
            text = image.text.get(recipes.KEY) if image.format == "PNG" else recipes.from_xmp(_xmp(image))
        recipe = json.loads(text)
        if isinstance(recipe, dict) and recipe.get("edit"):
            return recipe
    raise ValueError(f"{path} has no recipe of an edit; only results of sample.py and of the page have one")


def _xmp(image: Image.Image) -> bytes:
    """The first XMP packet of a JPEG or WebP."""
    found = [content for name, content in getattr(image, "applist", ()) if content.startswith(recipes.HEADER)]
    return found[0][len(recipes.HEADER):] if found else image.info.get("xmp", b"")

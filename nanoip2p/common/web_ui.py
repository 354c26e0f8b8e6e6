"""The settings of a picture in the text format of AUTOMATIC1111's web UI, which many programs read."""

import hashlib
import re
import struct
from pathlib import Path

from nanoip2p.common.files import tidy

SAMPLERS = {"euler_ancestral": "Euler a", "euler": "Euler", "ddim": "DDIM",
            "dpmpp_2m": "DPM++ 2M", "lcm": "LCM"}


def web_text(recipe: dict, size: tuple[int, int]) -> str:
    """The text `parameters` of a picture, from a recipe of sample.py. size: (width, height) of the picture.

    Programs split the texts at "Negative prompt:" and at line breaks, and the values at commas and colons. So
    texts lose line breaks and the colon of "Negative prompt:"; the name loses commas, colons and quotes.
    """
    prompt, negative = (re.sub("Negative prompt:+", "Negative prompt", tidy(text)) for text in (
        ", then ".join(recipe["edit"]), recipe["negative"]))
    values = {"Steps": recipe["steps"], "Sampler": SAMPLERS[recipe["sampler"]],
              "CFG scale": recipe["cfg_text"], "Image CFG scale": recipe["cfg_image"], "Seed": recipe["seed"],
              "Size": "{}x{}".format(*size), "Model hash": model_hash(recipe["weights"]),
              "Model": re.sub(r"\.(safetensors|ckpt)$|[,:\"]", "", tidy(Path(recipe["weights"]).name))}
    line = ", ".join(f"{key}: {value}" for key, value in values.items() if value != "")
    return "\n".join([prompt, f"Negative prompt: {negative}", line] if negative else [prompt, line])


def to_exif(text: str) -> bytes:
    """EXIF with the text as UserComment, where the web UI keeps it in JPEG and WebP, and ColorSpace sRGB.

    Built by hand: Pillow 13.0 would give this comment the type BYTE, which exiv2 shows as numbers.
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    header = struct.pack(">2sHI HHHII I", b"MM", 42, 8, 1, 0x8769, 4, 1, 26, 0)        # the entry: IFD at 26
    header += struct.pack(">H HHII HHIHH I", 2, 0x9286, 7, len(comment), 56, 0xA001, 3, 1, 1, 0, 0)
    return b"Exif\0\0" + header + comment


def model_hash(weights: str) -> str:
    """The web UI's old, short hash of a weights file (its new hash takes 8 s for 4 GB); "" for a folder."""
    if not Path(weights).is_file():
        return ""
    with open(weights, "rb") as file:
        file.seek(2**20)
        return hashlib.sha256(file.read(2**16)).hexdigest()[:8]

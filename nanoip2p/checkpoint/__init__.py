"""Open, save and convert checkpoints of Stable Diffusion 1.x and InstructPix2Pix, in all common layouts.

    load_model("instruct-pix2pix-00-22000.ckpt")                       # an Editor
    convert(open_checkpoint("in.ckpt"), Path("folder"))                # a single file -> a diffusers folder
"""

from nanoip2p.checkpoint.load import load_model, open_checkpoint
from nanoip2p.checkpoint.save import convert, save_parts

__all__ = ["convert", "load_model", "open_checkpoint", "save_parts"]

"""Open, save and convert checkpoints of Stable Diffusion 1.x and InstructPix2Pix, in all common layouts.

    load_model("instruct-pix2pix-00-22000.ckpt")                       # an Editor
    convert(open_checkpoint("in.ckpt"), Path("folder"))                # a single file -> a diffusers folder
"""


def __getattr__(name: str):
    """Imports the functions, and with them torch, when they are first used."""
    if name in ("load_model", "open_checkpoint"):
        from nanoip2p.checkpoint import load as module
    elif name in ("convert", "save_parts"):
        from nanoip2p.checkpoint import save as module
    else:
        raise AttributeError(f"module 'nanoip2p.checkpoint' has no attribute {name!r}")
    return getattr(module, name)

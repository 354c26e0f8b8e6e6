"""nanoip2p: InstructPix2Pix (Brooks et al. 2211.09800), small enough to read in an afternoon.

    from nanoip2p import Editor
    edited = Editor.load().edit("house.png", "make it night")
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Import Editor and TextToImage at their first use, so that `import nanoip2p` does not load torch."""
    if name == "Editor":
        from nanoip2p.editor import Editor
        return Editor
    if name == "TextToImage":
        from nanoip2p.text_to_image import TextToImage
        return TextToImage
    raise AttributeError(f"module 'nanoip2p' has no attribute {name!r}")

"""nanoip2p: InstructPix2Pix (Brooks et al. 2211.09800), small enough to read in an afternoon.

    from nanoip2p import Editor
    edited = Editor.load().edit("house.png", "make it night")
"""

import sys

__version__ = "0.1.0"
COMMANDS = ("nanoip2p", "nanoip2p.app", "nanoip2p.checkpoint", "nanoip2p.evaluate")  # for `python -m`

if sys.argv[:1] == ["-m"]:  # `python -m nanoip2p.x` imports this package before it looks for x
    module = next((word for word in sys.orig_argv if word.startswith("nanoip2p")), "nanoip2p")
    if module not in COMMANDS and not module.endswith(".__main__"):
        print(f"error: {module} is no command; `python -m nanoip2p` lists the commands", file=sys.stderr)
        sys.exit(2)


def __getattr__(name: str):
    """Import Editor and TextToImage at their first use, so that `import nanoip2p` does not load torch."""
    if name not in ("Editor", "TextToImage"):
        raise AttributeError(f"module 'nanoip2p' has no attribute {name!r}")
    from nanoip2p import editor, text_to_image
    return getattr(editor if name == "Editor" else text_to_image, name)

"""In place of nanoip2p/prompt_to_prompt.py until that is merged: the same interface, no injection."""

import sys
from pathlib import Path
from types import ModuleType

from PIL import Image

MODES = ("self", "cross", "both", "none")


class PairPainter:
    def __init__(self, painter, source, edit, inject="self", steps=None, sampler=None, resolution=None,
                 negative=""):
        self.painter, self.captions = painter, (source, edit)
        self.settings = painter.complete({"steps": steps, "sampler": sampler, "resolution": resolution})

    def paint(self, seeds, shares, cfg_text, bar=None):
        before, after = ([
            self.painter.generate([caption], seed=[seed], cfg_text=cfg, **self.settings)[0]
            for seed, cfg in zip(seeds, cfg_text)] for caption in self.captions)
        return [(a, Image.blend(b, a, p)) for a, b, p in zip(before, after, shares)]


if not (Path(__file__).parents[1] / "nanoip2p" / "prompt_to_prompt.py").exists():
    module = ModuleType("nanoip2p.prompt_to_prompt")
    module.PairPainter, module.MODES = PairPainter, MODES
    sys.modules[module.__name__] = module

"""The work of the page, without gradio: edits to watch and to stop, masks from brush strokes, recipes."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageChops

from nanoip2p import __version__
from nanoip2p.checkpoint.lora import file_hash
from nanoip2p.common.cli import SAMPLERS
from nanoip2p.common.names import slug, unused
from nanoip2p.common.saving import save_png
from nanoip2p.common.schema import checked
from nanoip2p.editing.recipes import read_recipe
from nanoip2p.editor import Editor

MASK_BLUR = 4.0  # pixels, as in sample.py
# The ranges of the page's sliders, which also limit the values from a browser: kind, least, most
LIMITS = {"cfg_text": (float, 0, 30), "cfg_image": (float, 0, 10), "steps": (int, 1, 200), "n": (int, 1, 8),
          "seed": (int, 0, 2**50)}
ONE_AT_A_TIME = ThreadPoolExecutor(1)  # its only thread makes all edits of this process


class Stopped(Exception):
    """Somebody pressed Stop, or left the page."""


@dataclass
class Turn:
    """A result of a visit, and the input from which it was made."""

    picture: Path      # the file of the input
    before: Path       # the input at the size of the result
    files: list[Path]  # the PNG with its recipe; the mask, if there was one
    label: str


class Visit:
    """The state of one browser tab. Page changes it in place, as an edit may end after later clicks."""

    def __init__(self):
        self.picture: Path | None = None
        self.folder: Path | None = None                # of its pictures
        self.turns: list[Turn] = []
        self.shown = -1                                # index into `turns`
        self.scales: list[list[float]] = []            # cfg_text and cfg_image of the sweep's cells
        self.stop = threading.Event()                  # when set, its edit ends

    def __deepcopy__(self, memo: dict) -> "Visit":
        """A new visit: gradio gives each tab a copy of the first."""
        return Visit()


def watched(editor: Editor, stop: threading.Event, **given) -> Iterator[tuple[int, list, list | None]]:
    """Run editor.edit(**given). Yields (steps done, previews, results): previews after each quarter, else [].

    results is None until the last item. `stop`, or closing the iterator, ends the edit within a step. Raises
    Stopped, and every error of `edit`.
    """
    steps, news, left = given["steps"], queue.Queue(), threading.Event()

    def callback(step: int, latents: torch.Tensor) -> None:
        if stop.is_set() or left.is_set():
            raise Stopped
        previews, low_memory = [], given["low_memory"]
        if (step + 1) * 4 // steps > step * 4 // steps and step + 1 < steps:
            with editor.on_device(editor.vae, low_memory):
                previews = editor.decode(latents, low_memory)
        news.put((step + 1, previews, None))

    run = ONE_AT_A_TIME.submit(editor.edit, callback=callback, **given)
    run.add_done_callback(lambda _: news.put(None))
    try:
        yield from (done for done in iter(news.get, None) if not stop.is_set())
        if stop.is_set():
            raise Stopped  # the page may show steps later than they are made, or the edit may be over
        yield steps, [], run.result()
    finally:
        left.set()
        wait([run])


def mask_of(painted: dict | None) -> Image.Image | None:
    """The value of gradio's ImageEditor -> a mask of mode L, white where there is paint, or None."""
    mask = None
    for layer in (painted or {}).get("layers", []):
        alpha = layer.getchannel("A").point(lambda alpha: 255 * (alpha >= 128))
        mask = ImageChops.lighter(mask, alpha) if mask else alpha
    return mask if mask and mask.getbbox() else None


def write_result(image: Image.Image, mask: Image.Image | None, folder: Path, recipe: dict) -> list[Path]:
    """Write a result with its recipe, as sample.py does, and its mask beside it. Returns their paths."""
    stem = slug(Path(recipe["input"][0]).stem, "picture")  # the browser chose the input's name
    recipe |= {"version": __version__, "torch": torch.__version__}
    with unused(str(folder / f"{stem}-edited.png")) as path:
        mask_path = Path(path).with_stem(f"{Path(path).stem}-mask")
        if mask:
            mask.save(mask_path)
            recipe |= {"mask": mask_path.name, "mask_blur": MASK_BLUR, "mask_hash": file_hash(str(mask_path))}
        save_png(image, path, recipe, web=True)
    return [Path(path), mask_path] if mask else [Path(path)]


def read_settings(path: Path) -> tuple[dict, list[str]]:
    """The settings of an edit's recipe that the page shows, and names of the rest.

    The page shows `sampler`, the first instruction as `edit`, and the keys of LIMITS except n. Every edit's
    recipe has all of these. Raises ValueError, in one line, for other files, and for values out of range.
    """
    recipe, name, numbers = read_recipe(path), path.name, LIMITS.keys() - {"n"}
    if lacking := sorted({"sampler", *numbers} - recipe.keys()):
        raise ValueError(f"{name} has no recipe of an edit: {', '.join(lacking)} missing")
    found = {key: checked(recipe[key], kind, f"{name}: {key}", *ends)
             for key, (kind, *ends) in LIMITS.items() if key in numbers}
    edits = checked(recipe["edit"], list[str], f"{name}: edit")
    if (sampler := recipe["sampler"]) not in SAMPLERS:
        raise ValueError(f"{name}: the sampler is none of {', '.join(SAMPLERS)}")
    others = ["further instructions"] * (len(edits) > 1)
    others += [key for key in ("negative", "mask", "lora", "embedding", "vae") if recipe.get(key)]
    return found | {"sampler": sampler, "edit": edits[0]}, others

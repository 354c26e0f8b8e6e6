"""The page: its parts, and the methods that its buttons call."""

import contextlib
import html
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image, ImageOps

from nanoip2p.app import work
from nanoip2p.app.work import Stopped, Turn, Visit, mask_of, read_settings, watched, write_result
from nanoip2p.common.cli import SAMPLERS, advised, one_line
from nanoip2p.common.schema import checked
from nanoip2p.editing.pictures import SWEEP_STEPS, nano_notes, sweep_scales
from nanoip2p.editor import Editor
from nanoip2p.images import fit, fit_size, open_image
from nanoip2p.masks import fit_mask

CANVAS, PAINT = 512, "#ff00aa"  # longer side of the picture to paint on, in pixels; colour of the brush
MOST_TURNS, SEEDS = 50, 1_000_000  # results that a visit keeps; random seeds, short enough to write down
LABELS = {"cfg_text": "Follow the instruction (cfg_text)", "cfg_image": "Stay like the picture (cfg_image)",
          "steps": "Steps", "n": "Number of samples"}
HINT = ("If too much changes, raise *cfg_image* first. If too little changes, raise *cfg_text* or lower "
        "*cfg_image*. Then try another seed.")
CSS = "#picture img { width: 100%; height: 100%; object-fit: contain } progress { width: 100% }"


class Page:
    """The page of one editor: `blocks`, for gradio. It writes results into `folder`."""

    def __init__(self, editor: Editor, weights: str, folder: Path, low_memory: bool):
        self.editor, self.weights, self.folder = editor, weights, folder.resolve()
        self.low_memory, self.stop_last = low_memory, threading.Event()  # it ends the edit that began last
        with gr.Blocks(analytics_enabled=False, title="nanoip2p", delete_cache=(3600, 86_400)) as self.blocks:
            with gr.Row():
                with gr.Column():
                    self.draw_input()
                with gr.Column():
                    self.draw_results()
            self.draw_settings()
            self.connect()

    def draw_input(self) -> None:
        """The left side: the picture, the mask, the instruction."""
        self.visit = gr.State(Visit(), delete_callback=self.forget)
        self.picture = gr.Image(label="Picture", type="filepath", image_mode=None, format="png", height=360,
                                sources=["upload", "clipboard", "webcam"], elem_id="picture")
        with gr.Accordion("Edit only a part", open=False):
            self.paint = gr.ImageEditor(
                label="Paint over what may change", type="pil", format="png", sources=(), transforms=(),
                layers=False, canvas_size=(CANVAS, CANVAS), elem_id="paint",
                brush=gr.Brush(colors=[PAINT], color_mode="fixed"))
        self.instruction = gr.Textbox(label="Instruction", placeholder="make it night", max_lines=1,
                                      max_length=1000, elem_id="instruction")
        with gr.Row():
            self.start = gr.Button("Edit", variant="primary", interactive=False, elem_id="edit")
            self.stop = gr.Button("Stop", elem_id="stop")

    def draw_results(self) -> None:
        """The right side: one tab with the results of this visit, one with an edit at 5 x 5 scales."""
        with gr.Tab("Edit"):
            self.result = gr.ImageSlider(label="Before and after", format="png", elem_id="result")
            self.status = gr.HTML(elem_id="status")
            with gr.Row():
                self.again = gr.Button("Continue from the result", elem_id="continue")
                self.undo = gr.Button("Undo", elem_id="undo")
                self.download = gr.DownloadButton("Download", interactive=False, elem_id="download")
                self.mask = gr.DownloadButton("Download its mask", visible=False, elem_id="mask")
            self.history = gr.Gallery(
                label="Results of this visit", columns=6, height=160, format="png", fit_columns=False,
                object_fit="contain", allow_preview=False, interactive=False, elem_id="history")
        with gr.Tab("Sweep"):
            self.sweep_start = gr.Button("Edit at 5 x 5 scales", interactive=False, elem_id="sweep")
            self.sweep_status = gr.HTML()
            self.cells = gr.Gallery(
                label="Click on one to take its scales", columns=len(SWEEP_STEPS), height=560, format="png",
                allow_preview=False, interactive=False, elem_id="cells")

    def draw_settings(self) -> None:
        """The settings at the bottom, with the defaults of the weights."""
        defaults = self.editor.defaults
        with gr.Row():
            self.settings = {
                key: gr.Slider(*work.LIMITS[key][1:], value=defaults.get(key, 1), step=step, elem_id=key,
                               label=LABELS[key])
                for key, step in (("cfg_text", 0.1), ("cfg_image", 0.05), ("steps", 1), ("n", 1))}
        gr.Markdown(HINT)
        with gr.Row():
            self.settings["sampler"] = gr.Dropdown(SAMPLERS, value=defaults["sampler"], label="Sampler")
            self.settings["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            self.die = gr.Button("⚄ New seed", elem_id="die")
            self.locked = gr.Checkbox(label="Keep the seed", elem_id="lock")
            self.opened = gr.UploadButton("Open a result: its settings come back", file_types=["image"],
                                          elem_id="open")

    def connect(self) -> None:
        """Connect each button with its method. Edits and sweeps wait in one queue."""
        asked = [self.visit, self.paint, self.instruction, self.locked, *self.settings.values()]
        scales = [self.settings["cfg_text"], self.settings["cfg_image"]]
        shown = [self.result, self.status, self.download, self.mask, self.history]
        one = {"concurrency_id": "edit", "concurrency_limit": 1, "show_progress": "minimal"}
        seed = self.settings["seed"]
        runs = [gr.on([self.start.click, self.instruction.submit], self.edit, asked, [seed, *shown],
                      show_progress_on=self.result, **one),
                self.sweep_start.click(self.sweep, asked, [seed, self.cells, self.sweep_status],
                                       show_progress_on=self.cells, **one)]
        statuses = [self.status, self.sweep_status]
        stopped = self.stop.click(self.end, self.visit, statuses, cancels=runs, queue=False)
        # A step that was on its way may have overwritten these words, so the queue says them again
        stopped.then(lambda visit: [self.show(visit)[self.result], "Stopped.", "Stopped."], self.visit,
                     [self.result, *statuses])
        inputs = [self.picture, self.paint, self.start, self.sweep_start]
        gr.on([self.picture.upload, self.picture.clear], self.take, [self.visit, self.picture], inputs,
              preprocess=False)
        self.paint.clear(self.unpainted, self.visit, self.paint)
        self.again.click(self.go_on, self.visit, inputs)
        self.undo.click(self.go_back, self.visit, [*shown, *inputs])
        self.history.select(self.pick, self.visit, shown)
        self.die.click(lambda: (random.randrange(SEEDS), True), None, [seed, self.locked])
        seed.input(lambda: True, None, self.locked)
        self.cells.select(self.take_scales, self.visit, scales)
        self.opened.upload(self.reopen, self.opened, [self.instruction, self.locked, *self.settings.values()],
                           preprocess=False)

    def take(self, visit: Visit, upload: dict | None) -> dict:
        """Take a new input, or remove it (None). Refuses a bad file."""
        visit.picture = upload and Path(upload["path"])
        try:
            return self.given(visit) | {self.picture: gr.skip()}  # the browser shows it already
        except (ValueError, OSError) as error:
            visit.picture = None
            gr.Warning(html.escape(one_line(error)))
            return self.given(visit)

    def given(self, visit: Visit) -> dict:
        """The updates that show the input. If there is none, the buttons that edit are off."""
        ready = gr.Button(interactive=bool(visit.picture))
        return {self.picture: visit.picture, self.paint: self.unpainted(visit), self.start: ready,
                self.sweep_start: ready}

    def read(self, path: Path) -> Image.Image:
        """Read an upload or a result as sample.py does, with the limits of open_image."""
        if not path.resolve().is_relative_to(self.folder):  # gradio checks this in part only
            raise ValueError("This file was not uploaded here")
        with path.open("rb") as file:
            return open_image(path.name, file)

    def unpainted(self, visit: Visit) -> dict | None:
        """The input to paint on, without paint. None without an input."""
        if not visit.picture:
            return None
        background = self.stored(visit, ImageOps.contain(self.read(visit.picture), (CANVAS, CANVAS)))
        return {"background": background, "layers": [], "composite": None}

    def stored(self, visit: Visit, image: Image.Image) -> Path:
        """A picture -> a new file. Gradio would rewrite an equal picture's file while a browser reads it."""
        visit.folder = visit.folder or Path(tempfile.mkdtemp(dir=self.folder))
        with tempfile.NamedTemporaryFile(suffix=".png", dir=visit.folder, delete=False) as file:
            image.save(file)
        return Path(file.name)

    def forget(self, visit: Visit) -> None:
        """Stop a visit's edit and delete its files. Gradio calls this an hour after the tab was closed."""
        visit.stop.set()
        if visit.folder:
            shutil.rmtree(visit.folder, ignore_errors=True)

    def ask(self, visit: Visit, painted: dict | None, instruction: str, locked: bool, values: tuple) -> tuple:
        """Check the page's values. Return (input, Editor.edit's arguments, n, mask). Renew the stop event."""
        given = dict(zip(self.settings, values))
        if not locked:
            given["seed"] = random.randrange(SEEDS)
        if not (picture := visit.picture):
            raise ValueError("There is no picture yet: drop, paste or choose one.")
        if not instruction.strip():
            raise ValueError("The instruction is empty: write what to change, such as: make it night")
        if given["seed"] is None:
            raise ValueError("The seed is empty: write a whole number, or press New seed.")
        given |= {key: checked(given[key], kind, key, *ends) for key, (kind, *ends) in work.LIMITS.items()}
        image = self.read(picture)
        size = fit_size(*image.size, self.editor.defaults["resolution"], self.editor.multiple)
        n, mask = given.pop("n"), mask_of(painted)
        given |= {"images": fit(image, size), "instructions": instruction, "mask_blur": work.MASK_BLUR,
                  "masks": fit_mask(mask, image, size), "low_memory": self.low_memory}
        self.stop_last = visit.stop = threading.Event()
        return picture, given, n, mask

    def edit(self, visit: Visit, painted: dict | None, instruction: str, locked: bool, *values):
        """Edit, with previews on the way. The results join those of the visit."""
        with in_words():
            picture, given, n, mask = self.ask(visit, painted, instruction, locked, values)
            seeds = [given["seed"] + i for i in range(n)]
            before, began = self.stored(visit, given["images"]), time.monotonic()
            for step, previews, results in watched(  # noqa: B007
                    self.editor, visit.stop, **given | {"seed": seeds, "batch": n}):
                status = progress(step, given["steps"], began) + ", only where painted" * bool(mask)
                news = {self.settings["seed"]: seeds[0], self.status: status}
                yield news | ({self.result: (before, self.stored(visit, previews[0]))} if previews else {})
            recipe = {"input": [picture.name], "edit": [instruction], "negative": "", "weights": self.weights}
            recipe |= {key: given[key] for key in ("cfg_text", "cfg_image", "steps", "sampler")}
            for seed, after in zip(seeds, results):
                files = write_result(after, mask, visit.folder, recipe | {"seed": seed})
                visit.turns.append(Turn(picture, before, files, f"{instruction} (seed {seed})"))
            del visit.turns[:-MOST_TURNS]
            visit.shown = len(visit.turns) - n
            notes = nano_notes(self.editor, [instruction], {})
            yield self.show(visit) | {self.status: html.escape("; ".join(notes))}

    def sweep(self, visit: Visit, painted: dict | None, instruction: str, locked: bool, *values):
        """One edit at 5 x 5 scales around the scales of the page. Each cell appears when it is made."""
        with in_words():
            _, given, *_ = self.ask(visit, painted, instruction, locked, values)
            limits = zip(work.LIMITS["cfg_text"][1:], work.LIMITS["cfg_image"][1:])  # of the sliders
            scales, cells, began = np.clip(sweep_scales(given), *limits).tolist(), [], time.monotonic()
            for cfg_text, cfg_image in scales:
                *_, (_, _, after) = watched(
                    self.editor, visit.stop, **given | {"cfg_text": cfg_text, "cfg_image": cfg_image})
                cells.append((self.stored(visit, after), f"cfg_text {cfg_text:g}, cfg_image {cfg_image:g}"))
                visit.scales = scales
                yield {self.cells: cells, self.settings["seed"]: given["seed"],
                       self.sweep_status: progress(len(cells), len(scales), began)}

    def show(self, visit: Visit) -> dict:
        """The updates that show the chosen result of the visit."""
        turn = visit.turns[visit.shown] if visit.turns else None
        file, *mask = turn.files if turn else [None]
        return {self.result: turn and (turn.before, turn.files[0]), self.status: "",
                self.download: gr.DownloadButton(value=file, interactive=bool(turn)),
                self.mask: gr.DownloadButton(value=mask[0] if mask else None, visible=bool(mask)),
                self.history: [(turn.files[0], turn.label) for turn in visit.turns]}

    def pick(self, visit: Visit, chosen: gr.SelectData) -> dict:
        """Show the result whose small picture was clicked."""
        visit.shown = chosen.index
        return self.show(visit)

    def go_on(self, visit: Visit) -> dict:
        """The shown result becomes the input."""
        if not visit.turns:
            raise gr.Error("There is no result yet.", print_exception=False)
        visit.picture = visit.turns[visit.shown].files[0]
        return self.given(visit)

    def go_back(self, visit: Visit) -> dict:
        """Drop the last result, and show its input again. The paint stays if the input is still the same."""
        if not visit.turns:
            raise gr.Error("There is nothing to undo.", print_exception=False)
        turn, visit.shown = visit.turns.pop(), -1
        news = self.show(visit)
        if visit.picture != turn.picture:
            visit.picture = turn.picture
            news |= self.given(visit)
        return news

    def take_scales(self, visit: Visit, chosen: gr.SelectData) -> list[float]:
        """The scales of the clicked cell."""
        return visit.scales[chosen.index]

    def reopen(self, upload: dict) -> list:
        """The settings in the recipe of a result. They include its seed, so the seed is kept."""
        with in_words():
            found, others = read_settings(Path(upload["path"]))
            if others:
                gr.Warning(f"This picture was made with {', '.join(others)}, which the page leaves out.")
            return [found["edit"], True, *(found.get(key, gr.skip()) for key in self.settings)]

    def end(self, visit: Visit) -> tuple[str, str]:
        """Stop the edit of this visit."""
        visit.stop.set()
        return "Stopped.", "Stopped."


def progress(step: int, steps: int, began: float) -> str:
    """HTML: a bar, the step, and the time left at the pace so far."""
    left = (time.monotonic() - began) / step * (steps - step)
    bar = f'<progress value="{step}" max="{steps}" aria-label="progress"></progress>'
    return f"{bar} {step} of {steps}, {left:.0f} s left"


@contextlib.contextmanager
def in_words():
    """Show errors that the user can mend, in one line on the page. `Stopped` ends the block silently."""
    try:
        yield
    except Stopped:
        pass
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = advised(error, "Out of memory: make fewer samples, or start the page with --low-memory.")
        raise gr.Error(html.escape(message), print_exception=False) from None

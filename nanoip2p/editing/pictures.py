"""Make planned pictures. A plan is a `Settings` of sample.py: one input, one seed, one edit or all turns."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from nanoip2p.common.cli import say
from nanoip2p.common.grids import grid, wrap
from nanoip2p.editing.masks import make_masks, to_size_of
from nanoip2p.editor import Editor
from nanoip2p.images import FORMATS, PictureError, fit, open_image
from nanoip2p.pipeline import same_size
from nanoip2p.world import scenes

# --sweep varies both scales. From the paper's defaults it covers cfg_text 3 ... 12 and cfg_image 1 ... 2
SWEEP_FACTORS = (0.4, 0.7, 1, 1.3, 1.6)      # multiply cfg_text
SWEEP_STEPS = (-0.5, -0.25, 0, 0.25, 0.5)    # added to cfg_image
SWEEP_EDITS = len(SWEEP_FACTORS) * len(SWEEP_STEPS)
SUFFIXES = {".avif", ".heic", ".heif", ".hif"}  # found even if unreadable here: open_image reports it
# Nano weights have this resolution, and at most this vocabulary. Pictures larger than PHOTO get a note
NANO_RESOLUTION, NANO_VOCABULARY, PHOTO = 64, 1000, 256


def find_images(patterns: list[str]) -> list[str]:
    """Files, globs and folders -> paths without duplicates, sorted within each folder or glob.

    A folder stands for its files with a suffix of FORMATS, without hidden ones such as macOS's ._a.png.
    Raises ValueError for a pattern without a match. Does not open the files; open_image checks them.
    """
    found, extensions = [], Image.registered_extensions()
    suffixes = SUFFIXES | {suffix for suffix, name in extensions.items() if name in FORMATS}
    for pattern in patterns:
        if os.path.isdir(pattern):
            paths = sorted(str(path) for path in Path(pattern).iterdir()
                           if path.suffix.lower() in suffixes and path.name[0] != "." and path.is_file())
        else:
            paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise ValueError(f"there is no picture at {pattern}")
        found += paths
    return list(dict.fromkeys(found))


def leave_out(error: ValueError, path: str, problems: list[str], of: int) -> None:
    """Print the problem of a picture and add it to `problems`. ValueError if now all `of` pictures failed."""
    problem = str(error) if path in str(error) else f"{path}: {error}"
    if len(problems) + 1 >= of:
        raise ValueError(problem) from None
    say(f"left out: {problem}")
    problems.append(problem)


def edit_all(editor: Editor, pictures: list, sizes: dict, sampling: dict,
             problems: list[str]) -> Iterator[tuple[int, tuple[Image.Image, ...]]]:
    """Yield (index, result of edit_batch) for each picture, or (0, pair) for each edit of a sweep. Leaves out
    a picture that comes out as NaN or whose mask has no white, see leave_out."""
    queue = same_size([sizes[picture.input[0]] for picture in pictures], pictures[0].batch)
    allowed = len(problems) + len(pictures)
    while queue:
        places = queue.pop(0)
        batch = [pictures[i] for i in places]
        path, edit = batch[0].input[0], sweep if batch[0].sweep else edit_batch
        try:
            # A sweep makes SWEEP_EDITS pairs from one picture; edit_batch makes one result for each picture
            yield from zip(places * SWEEP_EDITS, edit(editor, batch, sizes[path], sampling))
        except PictureError as error:
            if len(places) > 1:  # edit them one by one: only some may be unusable
                queue = [[i] for i in places] + queue
            else:
                leave_out(error, path, problems, allowed)


def edit_batch(editor: Editor, batch: list, size: tuple[int, int],
               sampling: dict) -> list[tuple[Image.Image, ...]]:
    """Edit a batch. Returns for each picture (input, after the first instruction, after the second, ...).

    Scales and crops each input to `size`. With keep_size, stretches each input to `size`, and scales the
    results back to the size of the input, so that nothing is cropped. With show_mask, each mask comes before
    its edit.
    """
    given, seeds = batch[0], [picture.seed for picture in batch]
    opened = {path: open_image(path) for path in {picture.input[0] for picture in batch}}
    fitted = {path: image.resize(size, Image.Resampling.LANCZOS) if given.keep_size else fit(image, size)
              for path, image in opened.items()}
    originals, before = ([images[picture.input[0]] for picture in batch] for images in (opened, fitted))
    stages = [originals if given.keep_size else before]
    for instructions in zip(*(picture.edit for picture in batch)):
        masks = make_masks(editor, given, originals, before, instructions, seeds, sampling)
        before = editor.edit(before, instructions, batch=len(batch), seed=seeds, masks=masks,
                             mask_blur=given.mask_blur, **sampling)
        after = to_size_of(stages[-1], before, masks, given) if given.keep_size else before
        stages += [[mask.convert("RGB") for mask in masks], after] if given.show_mask else [after]
    return list(zip(*stages))


def sweep(editor: Editor, batch: list, size: tuple[int, int],
          sampling: dict) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Yield (input, edit) for each pair of scales of sweep_scales, with one seed."""
    [picture] = batch
    original = open_image(picture.input[0])
    before = fit(original, size)
    masks = make_masks(editor, picture, [original], [before], picture.edit, [picture.seed], sampling)
    for text, image in tqdm(sweep_scales(sampling), unit="edit"):
        scales = {"cfg_text": text, "cfg_image": image, "progress": False}
        [edited] = editor.edit([before], picture.edit[0], seed=picture.seed, masks=masks,
                               mask_blur=picture.mask_blur, **sampling | scales)
        yield before, edited


def sweep_scales(sampling: dict) -> list[tuple[float, float]]:
    """(cfg_text, cfg_image) of each edit of a sweep."""
    return [(round(sampling["cfg_text"] * factor, 4), round(sampling["cfg_image"] + step, 4))
            for factor in SWEEP_FACTORS for step in SWEEP_STEPS]


def draw(pictures: list, made: list[tuple[int, tuple]], sampling: dict) -> tuple[Image.Image, str]:
    """Draw --grid or --sweep. Returns (picture, text about it). made: the results of edit_all so far.

    --grid: each input, then every edit of it (with --turns, every turn). --sweep: the input above the edits;
    cfg_text changes by row, cfg_image by column.
    """
    if pictures[0].sweep:
        labels = [f"cfg_text {text:g}, cfg_image {image:g}" for text, image in sweep_scales(sampling)]
        befores, edits = zip(*(pair for _, pair in made))  # all edits have the same input
        columns = len(SWEEP_STEPS)
        begins = range(0, len(made), columns)
        table = grid([befores[:1], *(edits[i : i + columns] for i in begins)],
                     [["input"], *(labels[: len(made)][i : i + columns] for i in begins)])
        rest = f": {len(made)} of {SWEEP_EDITS} edits" * (len(made) < SWEEP_EDITS)
        return table, f"{pictures[0].edit[0]}, by cfg_text and cfg_image{rest}"
    several = len({picture.seed for picture in pictures}) > 1
    rows, labels = {}, {}
    for i, (before, *edited) in made:
        picture = pictures[i]
        rows.setdefault(picture.input[0], [before]).extend(edited)
        labels.setdefault(picture.input[0], ["input"]).extend(
            label for edit in picture.edit for label in (
                *["mask"] * picture.show_mask, f"{edit} (seed {picture.seed})" if several else edit))
    table = grid(*wrap(list(rows.values()), list(labels.values()), (len(edited), 1 + picture.show_mask)))
    edits, done = (sum(len(pictures[i].edit) for i in some) for some in (range(len(pictures)), dict(made)))
    return table, f"{done} of {edits} edits" if done < edits else f"{edits} edit{'s' * (edits > 1)}"


def colour_notes(converted: dict[str, str]) -> list[str]:
    """A note for each colour profile. converted: path of an input -> name of the profile that was applied."""
    paths = {}
    for path, name in converted.items():
        paths.setdefault(name, []).append(path)
    return [f"note: {first}{f' and {len(more):,} more' * bool(more)}: colours converted from {name} to sRGB"
            for name, (first, *more) in paths.items()]


def nano_notes(editor: Editor, edits: list[str], sizes: dict[str, tuple[int, int]]) -> list[str]:
    """Notes about unknown words and large pictures, for users of the nano weights. [] for other weights."""
    vocabulary = editor.tokenizer.backend.get_vocab_size()  # CLIP's tokenizer has 49,408 tokens
    if editor.defaults["resolution"] != NANO_RESOLUTION or vocabulary > NANO_VOCABULARY:
        return []
    known = {word.lower() for word in editor.tokenizer.backend.get_vocab()}  # also words of --embedding
    unknown = [word for word in scenes.unknown_words(" ".join(edits)) if word not in known]
    notes = [f"unknown here: {', '.join(unknown)}"] if unknown else []
    notes += [f"{path} is {width}x{height}, larger than the training data: photographs need other --weights"
              for path, (width, height) in sizes.items() if max(width, height) > PHOTO]
    return [f"note: the nano weights know a small painted world; {note}" for note in notes]

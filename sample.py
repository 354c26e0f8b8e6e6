"""Edit pictures by instruction.

    python sample.py --input house.png --edit "make it night" --output night.png
    python sample.py --input pictures --edit "turn the ground into snow" --output snowy/
    python sample.py --input house.png --edit "make it night" \\
        --edit "turn the house blue" --grid --output grid.png
    python sample.py --input house.png --edit "make it night" --sweep --output sweep.png
    python sample.py --recipe night.png --output again.png
"""

import argparse
import os
import random
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from nanoip2p import __version__
from nanoip2p.common import cli
from nanoip2p.common.cli import at_least, finite, flag, one_line, pixels

with cli.slow_imports():
    import torch
    from PIL import Image
    from tqdm import tqdm

    from nanoip2p.checkpoint.embeddings import add_embedding
    from nanoip2p.checkpoint.load import open_checkpoint
    from nanoip2p.checkpoint.lora import apply_loras, file_hash, split
    from nanoip2p.checkpoint.tensors import DTYPES
    from nanoip2p.common.files import check_writable, find_weights, is_shipped, unique_stems
    from nanoip2p.common.schema import checked
    from nanoip2p.editor import Editor
    from nanoip2p.images import NotFinite, find_images, fit, fit_size, grid, open_image, read_recipe, save_png
    from nanoip2p.pipeline import same_size
    from nanoip2p.samplers import SAMPLERS
    from nanoip2p.speed import fast as speed
    from nanoip2p.world import scenes

# Settings that change the picture by rounding at most
NOT_IN_RECIPE = ("output", "recipe", "device", "fast", "batch")
# A recipe comes from strangers: larger numbers, or longer lists, need the user's own flag
MOST = {"n": 16, "steps": 1000, "resolution": 2048, "edit": 64, "input": 100, "embedding": 16, "lora": 16}
LOADED = ("weights", "vae", "tokenizer", "embedding", "lora")  # a recipe names only files in weights/
MOST_PICTURES = 10**6  # of one command; planning them takes 1 minute and 0.6 GB
# --sweep varies both scales. From the paper's defaults it covers cfg_text 3 ... 12 and cfg_image 1 ... 2
SWEEP_FACTORS = (0.4, 0.7, 1, 1.3, 1.6)      # multiply cfg_text
SWEEP_STEPS = (-0.5, -0.25, 0, 0.25, 0.5)    # added to cfg_image
# `nano_notes`: resolution and maximum vocabulary of nano weights; pictures with a side above PHOTO get a note
NANO_RESOLUTION, NANO_VOCABULARY, PHOTO = 64, 1000, 256


@dataclass(frozen=True)
class Settings:
    """The flags with their defaults. The recipe in a PNG stores all except NOT_IN_RECIPE."""

    input: list[str] | None = flag("pictures, globs or folders", nargs="+", action="extend",
                                   group="what to edit, and how")
    edit: list[str] | None = flag('an instruction, such as "make it night"; may be repeated', action="append")
    turns: bool = flag("apply the instructions one after another, not each to the input", False)
    n: int = flag("samples per edit; their seeds are --seed, --seed + 1, ...", 1, type=at_least(1))
    negative: str = flag("negative prompt", "")
    raw_text: bool = flag("do not clean the texts (curly quotes, &amp;, ligatures)", False)
    steps: int | None = flag("denoising steps", type=at_least(1),
                             group="sampling (defaults: from the weights folder, else from the paper)")
    resolution: int | None = flag("approximate longer side in pixels", type=pixels)
    cfg_text: float | None = flag("guidance scale of the instruction (s_T)", type=finite)
    cfg_image: float | None = flag("guidance scale of the input picture (s_I)", type=finite)
    sampler: str | None = flag("sampling method", choices=sorted(SAMPLERS))
    deep_every: int = flag("compute the whole network only every N-th step", 1, type=at_least(1), metavar="N")
    seed: int | None = flag("seed of the noise (default: random)", type=at_least(0))
    output: str | None = flag("a PNG file, or a folder for several inputs", group="what to write")
    keep_size: bool = flag("scale the result to the size of the input", False)
    grid: bool = flag("write one labelled picture: input | edits", False)
    sweep: bool = flag("write one labelled picture: one edit at 5 x 5 guidance scales, around --cfg-text "
                       "(rows) and --cfg-image (columns)", False)
    recipe: str | None = flag("a PNG that sample.py wrote: use its settings, unless a flag overrides them")
    weights: str = flag("a diffusers folder, a .safetensors or .ckpt file, or a name on the Hub",
                        "weights/nano-ip2p", group="weights and device")
    vae: str | None = flag("use this autoencoder instead of the checkpoint's: a file or folder")
    tokenizer: str | None = flag("tokenizer of a single file of weights: a folder or a name on the Hub")
    embedding: list[str] | None = flag("a textual inversion file; may be repeated", action="append")
    lora: list[str] | None = flag("a LoRA file, or FILE:WEIGHT; may be repeated", action="append")
    raw_weights: bool | None = flag("use raw weights, not averaged ones", action=cli.SWITCH)
    device: str | None = flag("cuda, cuda:1, mps or cpu (default: the first available)")
    dtype: str = flag("half precision is faster on a GPU", "fp32", choices=sorted(DTYPES))
    batch: int = flag("maximum number of pictures, of one size, in a forward pass", 8, type=at_least(1))
    low_memory: bool = flag("compute one guidance branch at a time, keep one network on the device, and use "
                            "VAE tiles above 768 pixels (full size), which change pictures slightly", False)
    fast: bool = flag("faster, equal up to rounding. CPU: Winograd convolutions, which need more memory. "
                      "CUDA: channels last and CUDA graphs, after a minute of compiling", False)


def make_parser() -> argparse.ArgumentParser:
    """A parser with all flags of Settings. Its help ends with the world of the nano weights."""
    edits = {edit.kind: edit.instructions[0] for edit in scenes.random_scene("train", 0).edits()}
    words = {"things": scenes.KINDS, "colours": scenes.COLOURS, "times": scenes.TIMES,
             "weathers": scenes.WEATHERS, "grounds": scenes.GROUNDS, "places": scenes.SLOTS,
             "edits": edits.values()}
    lines = ["The default (nano) weights know no photographs, only a small painted world with these words.",
             "They often add a thing in the wrong place."]
    lines += [textwrap.fill(f"  {name:<11}{', '.join(known)}", 100, subsequent_indent=" " * 13)
              for name, known in words.items()]
    parser = cli.make_parser(description=__doc__, epilog="\n".join(lines))
    cli.add_settings(parser, Settings)
    return parser


def parse(argv: list[str] | None) -> Settings:
    """Flags override the recipe, which overrides the defaults. Raises ValueError for conflicting flags."""
    parser = make_parser()
    flags, brought = vars(parser.parse_args(argv)), []
    if "recipe" in flags:
        brought = as_flags(flags["recipe"], flags)
        try:
            flags = vars(parser.parse_args(brought)) | flags
        except ValueError as error:
            raise ValueError(f"{flags['recipe']}: {error}") from None
    settings = Settings(**{"seed": random.randrange(1_000_000)} | flags)
    missing = [f"--{key}" for key in ("input", "edit", "output") if not getattr(settings, key)]
    if missing:
        raise ValueError(f"needed, but not given: {', '.join(missing)} (see --help)")
    list(map(split, settings.lora or []))  # raises for a weight that is no number, before the long work
    if settings.fast and settings.low_memory:
        raise ValueError("--fast needs more memory; use either --fast or --low-memory")
    if not all(edit.strip() for edit in settings.edit):
        raise ValueError('an instruction is empty; say what to change, such as --edit "make it night"')
    sys.stderr.writelines(one_line(f"{settings.recipe} brings {word}") + "\n" for word in brought)
    return settings


def as_flags(path: str, given: dict) -> list[str]:
    """Turn the recipe of a PNG into command-line flags, so that the parser checks the ranges.

    Leaves out the settings `given` and the defaults. Raises ValueError for what only the user may choose:
    weights other than the shipped ones, which may be fetched; inputs that are no files; large numbers.
    """
    recipe, argv = {"raw_text": True} | read_recipe(path), []  # the first recipes are older than raw_text
    for key, kind in typing.get_type_hints(Settings).items():
        value, name = recipe.get(key), "--" + key.replace("_", "-")
        if key in (*NOT_IN_RECIPE, *given) or value in (None, getattr(Settings, key)):
            continue
        value = checked(value, kind, f"{path}: {key}", most=2**63)
        own = f"if you mean it, give {name} yourself"
        items = value if isinstance(value, list) else [value]
        amount = len(items) if isinstance(value, list) else value
        if key in MOST and amount > MOST[key]:
            raise ValueError(f"{path} brings {name} {amount}, more than {MOST[key]}; {own}")
        paths = [split(item)[0] for item in items] if key == "lora" else items
        if foreign := [file for file in paths if key in LOADED and not is_shipped(file)]:
            raise ValueError(f"{path} names the {key} {foreign[0]}, not in weights/; {own}")
        if missing := [item for item in items if key == "input" and not os.path.isfile(item)]:
            raise ValueError(f"{path} names the input {missing[0]}, which is no file here; {own}")
        switch = {True: [name], False: [name.replace("--", "--no-", 1)]}
        argv += switch[value] if isinstance(value, bool) else [f"{name}={item}" for item in items]
    return argv


def plan_pictures(settings: Settings, inputs: list[str]) -> list[Settings]:
    """The settings of each picture to make: one input, one seed, one output, and one edit (or all turns).

    Ordered by input, edit, sample. Raises ValueError for an unusable --output.
    """
    edits = [settings.edit] if settings.turns else [[edit] for edit in settings.edit]
    if len(inputs) * len(edits) * settings.n > MOST_PICTURES:
        raise ValueError(f"{len(inputs)} inputs x {len(edits)} edits x --n {settings.n} are more than "
                         f"{MOST_PICTURES:,} pictures; make them in parts")
    output, one = Path(settings.output), "--grid" if settings.grid else "--sweep" if settings.sweep else ""
    variants = [(edit, settings.seed + i) for edit in edits for i in range(settings.n)]
    to_folder = output.is_dir() or settings.output.endswith("/") or not output.suffix
    if not to_folder and output.suffix.lower() != ".png":
        raise ValueError(f"{output} should end in .png (or in / for a folder); only PNG is written")
    several = len(inputs) * len(settings.edit) * settings.n > 1
    if settings.sweep and (several or settings.grid or settings.keep_size):
        raise ValueError("--sweep needs one --edit and one --input, and excludes --n, --grid and --keep-size")
    if one and to_folder:
        raise ValueError(f"{one} writes one picture, so --output {settings.output} must end in .png")
    if len(inputs) > 1 and not (settings.grid or to_folder):
        raise ValueError(f"{len(inputs)} inputs need a folder as --output, not {output}")
    if to_folder:
        stems, suffix = [output / stem for stem in unique_stems(inputs)], ".png"
    else:
        stems, suffix = [output.with_suffix("")] * len(inputs), output.suffix
    numbered, digits = len(variants) > 1 and not settings.grid, len(str(len(variants)))
    pictures = [replace(settings, input=[path], edit=edit, n=1, seed=seed,
                        output=f"{stem}_{k:0{digits}}{suffix}" if numbered else f"{stem}{suffix}")
                for path, stem in zip(inputs, stems) for k, (edit, seed) in enumerate(variants, 1)]
    sources = {os.path.realpath(path) for path in inputs}
    for path in dict.fromkeys(picture.output for picture in pictures):
        if os.path.realpath(path) in sources:
            raise ValueError(f"--output {path} would overwrite an input; name another")
        check_writable(path)
    return pictures


def run(settings: Settings, problems: list[str]) -> None:
    """Check all inputs and outputs, edit, write each batch when finished. `problems`: see leave_out."""
    inputs = find_images(settings.input)
    pictures = plan_pictures(settings, inputs)
    sizes, fitted = {}, {}
    for path in inputs:
        try:
            sizes[path] = open_image(path).size
        except ValueError as error:  # show it before the long work
            leave_out(error, path, problems, len(inputs))
    checkpoint = open_checkpoint(
        find_weights(settings.weights), settings.vae, settings.tokenizer, settings.raw_weights)
    print(one_line(f"opened {settings.weights}: {checkpoint.description}"), file=sys.stderr)
    editor = Editor.load(checkpoint, settings.device, DTYPES[settings.dtype], settings.low_memory)
    if settings.raw_text:
        editor.tokenizer.clean = str
    notes = apply_loras(editor, loras := settings.lora or [])
    hashes = [file_hash(lora) for lora in loras]
    if settings.recipe and (read_recipe(settings.recipe).get("lora_hash") or hashes) != hashes:
        notes.append(f"{settings.recipe} was made with a LoRA file of other content")
    notes += [add_embedding(editor, path) for path in settings.embedding or []]
    sys.stderr.writelines(f"{one_line(note)}\n" for note in notes + nano_notes(editor, settings.edit, sizes))
    if settings.fast:
        speed.speed_up(editor.unet, lambda line: print(line, file=sys.stderr))
    sampling = editor.fill_defaults({key: getattr(settings, key) for key in editor.defaults})
    for path, size in sizes.items():
        try:
            fitted[path] = fit_size(*size, sampling["resolution"], editor.multiple)
        except ValueError as error:
            leave_out(error, path, problems, len(inputs))
    pictures = [picture for picture in pictures if picture.input[0] in fitted]
    given = sampling | {key: getattr(settings, key) for key in ("negative", "low_memory", "deep_every")}

    def write(image: Image.Image, made_by: Settings, text: str) -> None:
        recipe = {key: value for key, value in asdict(made_by).items() if key not in NOT_IN_RECIPE} | sampling
        recipe |= {"version": __version__, "torch": torch.__version__, "lora_hash": hashes}
        save_png(image, made_by.output, recipe, web=True)
        print(f"{one_line(made_by.output)}  {one_line(text)}  (seed {made_by.seed})")

    stages = {}
    for i, made in edit_all(editor, pictures, fitted, given, problems):
        if settings.grid:
            stages[i] = made
        else:
            by = ", by cfg_text and cfg_image" if settings.sweep else ""
            write(made[-1], pictures[i], ", then ".join(pictures[i].edit) + by)
    if settings.grid:
        edits = sum(len(picture.edit) for picture in pictures)
        table = draw_grid(pictures, stages)
        write(table, replace(settings, input=list(fitted)), f"{edits} edit{'s' * (edits > 1)}")


def leave_out(error: ValueError, path: str, problems: list[str], of: int) -> None:
    """Show the problem of a picture, and add it to `problems`. Raises it if none of `of` is left."""
    problem = str(error) if path in str(error) else f"{path}: {error}"
    if len(problems) + 1 >= of:
        raise ValueError(problem) from None
    print(one_line(f"left out: {problem}"), file=sys.stderr)
    problems.append(problem)


def edit_all(editor: Editor, pictures: list[Settings], sizes: dict, sampling: dict,
             problems: list[str]) -> Iterator[tuple[int, tuple[Image.Image, ...]]]:
    """Yield (index, what edit_batch returns for it) of each picture. Leaves out those that become NaN."""
    queue = same_size([sizes[picture.input[0]] for picture in pictures], pictures[0].batch)
    allowed = len(problems) + len(pictures)
    while queue:
        places = queue.pop(0)
        batch = [pictures[i] for i in places]
        path, edit = batch[0].input[0], sweep if batch[0].sweep else edit_batch
        try:
            yield from zip(places, edit(editor, batch, sizes[path], sampling))
        except NotFinite as error:
            if len(places) > 1:  # one by one: the others may be sound
                queue = [[i] for i in places] + queue
            else:
                leave_out(error, path, problems, allowed)


def nano_notes(editor: Editor, edits: list[str], sizes: dict[str, tuple[int, int]]) -> list[str]:
    """Notes about unknown words and large pictures, for users of the nano weights. [] for other weights."""
    vocabulary = editor.tokenizer.backend.get_vocab_size()  # CLIP's own tokenizer has 49,408
    if editor.defaults["resolution"] != NANO_RESOLUTION or vocabulary > NANO_VOCABULARY:
        return []
    known = {word.lower() for word in editor.tokenizer.backend.get_vocab()}  # also those of --embedding
    unknown = [word for word in scenes.unknown_words(" ".join(edits)) if word not in known]
    notes = [f"unknown here: {', '.join(unknown)}"] if unknown else []
    notes += [f"{path} is {width}x{height}, larger than the training data: photographs need other --weights"
              for path, (width, height) in sizes.items() if max(width, height) > PHOTO]
    return [f"note: the nano weights know a small painted world; {note}" for note in notes]


def edit_batch(editor: Editor, batch: list[Settings], size: tuple[int, int],
               sampling: dict) -> list[tuple[Image.Image, ...]]:
    """Edit a batch. Returns for each picture (input, after the first instruction, after the second, ...).

    Scales and crops each input to `size`. keep_size: stretches each input to `size` instead, and
    scales the results back to the size of the input, so that nothing is cropped.
    """
    paths, keep_size = [picture.input[0] for picture in batch], batch[0].keep_size
    originals = {path: open_image(path) for path in set(paths)}
    fitted = {path: image.resize(size, Image.Resampling.LANCZOS) if keep_size else fit(image, size)
              for path, image in originals.items()}
    stages = [[fitted[path] for path in paths]]
    for instructions in zip(*(picture.edit for picture in batch)):
        stages.append(editor.edit(stages[-1], instructions, batch=len(batch),
                                  seed=[picture.seed for picture in batch], progress=True, **sampling))
    if keep_size:
        stages = [[image.resize(originals[path].size, Image.Resampling.LANCZOS)
                   for path, image in zip(paths, stage)] for stage in stages]
    return list(zip(*stages))


def sweep(editor: Editor, batch: list[Settings], size: tuple[int, int], sampling: dict) -> list[tuple]:
    """[(grid,)]: the input above edits with one seed. cfg_text changes by row, cfg_image by column."""
    [picture] = batch
    texts = [round(sampling["cfg_text"] * factor, 4) for factor in SWEEP_FACTORS]
    images = [round(sampling["cfg_image"] + step, 4) for step in SWEEP_STEPS]
    before, cells = fit(open_image(picture.input[0]), size), []
    for text, image in tqdm(list(product(texts, images)), unit="edit"):
        scales = {"cfg_text": text, "cfg_image": image}
        cells.append(editor.edit(before, picture.edit[0], seed=picture.seed, **sampling | scales))
    rows = [cells[i : i + len(images)] for i in range(0, len(cells), len(images))]
    labels = [[f"cfg_text {text:g}, cfg_image {image:g}" for image in images] for text in texts]
    return [(grid([[before], *rows], [["input"], *labels]),)]


def draw_grid(pictures: list[Settings], stages: dict[int, tuple[Image.Image, ...]]) -> Image.Image:
    """One row for each input: the input, then every edit of it (with --turns, every turn)."""
    several = len({picture.seed for picture in pictures}) > 1
    rows, labels = {}, {}
    for i in sorted(stages):  # a picture that could not be made has none
        picture, (before, *edited) = pictures[i], stages[i]
        rows.setdefault(picture.input[0], [before]).extend(edited)
        labels.setdefault(picture.input[0], ["input"]).extend(
            f"{edit} (seed {picture.seed})" if several else edit for edit in picture.edit)
    return grid(list(rows.values()), list(labels.values()))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code: that of cli.run, or 1 if some pictures could not be made."""
    problems = []
    code = cli.run(lambda: run(parse(argv), problems), "interrupted; the pictures named above are complete",
                   "try --low-memory, --batch 1 or a smaller --resolution")
    for problem in problems if code == 0 else []:
        print(one_line(f"not made: {problem}"), file=sys.stderr)
    return code or min(len(problems), 1)


if __name__ == "__main__":
    sys.exit(main())

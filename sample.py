"""Edit pictures by instruction.

    python sample.py --input house.png --edit "make it night"         # writes out/house-make-it-night.png
    python sample.py --input dog.jpg --edit "make it night" --output out.webp --side-by-side
    python sample.py --input pictures --edit "turn the ground into snow" --output snowy/
    python sample.py --input house.png --edit "make it night" \\
        --edit "turn the house blue" --grid --output grid.png
    python sample.py --input house.png --edit "make it night" --sweep --output sweep.png
    python sample.py --recipe night.png --output again.png
"""

import argparse
import math
import os
import random
import sys
import textwrap
import typing
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanoip2p import __version__
from nanoip2p.common import cli
from nanoip2p.common.cli import at_least, between, finite, flag, one_line, pixels, split
from nanoip2p.common.files import check_writable, find_weights, is_shipped, unique_stems
from nanoip2p.common.names import slug, unused
from nanoip2p.common.recipes import KINDS
from nanoip2p.common.schema import checked
from nanoip2p.world import scenes

# Settings that change the picture by rounding at most
NOT_IN_RECIPE = ("output", "recipe", "device", "fast", "attention", "verbose", "batch")
# A recipe comes from strangers: larger numbers, or longer lists, need the user's own flag
MOST = {"n": 16, "steps": 1000, "resolution": 2048, "edit": 64, "input": 100, "embedding": 16, "lora": 16}
LOADED = ("weights", "vae", "tokenizer", "embedding", "lora")  # a recipe may only name files in weights/
MOST_PICTURES = 10**6  # of one command; planning them takes 1 minute and 0.6 GB


@dataclass(frozen=True)
class Settings:
    """The flags with their defaults. The recipe in a picture stores all except NOT_IN_RECIPE."""

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
    sampler: str | None = flag("sampling method", choices=cli.SAMPLERS)
    deep_every: int = flag("compute the whole network only every N-th step", 1, type=at_least(1), metavar="N")
    seed: int | None = flag("seed of the noise (default: random)", type=at_least(0))
    mask: str | None = flag("edit only where this picture is white; auto: only where the instruction acts",
                            metavar="FILE|auto", group="what to keep")
    mask_invert: bool = flag("edit where the mask is black", False)
    mask_blur: float = flag("blur the edge of the mask, in pixels", 4, type=between(0, 1000))
    show_mask: bool = flag("with --grid: also draw the masks", False)
    output: str | None = flag("a .png, .jpg or .webp file, or a folder (default: out/INPUT-EDIT.png; if this "
                              "file exists, with a number)", group="what to write")
    keep_size: bool = flag("scale the result to the size of the input", False)
    side_by_side: bool = flag("write the input beside its result (with --turns, beside all turns)", False)
    grid: bool = flag("write one labelled picture: input | edits", False)
    sweep: bool = flag("write one labelled picture: one edit at 5 x 5 guidance scales, around --cfg-text "
                       "(rows) and --cfg-image (columns)", False)
    recipe: str | None = flag("use the settings that made this picture, except where flags differ")
    weights: str = flag("a diffusers folder, a .safetensors or .ckpt file, or a name on the Hub",
                        "weights/nano-ip2p", group="weights and device")
    vae: str | None = flag("use this autoencoder instead of the checkpoint's: a file or folder")
    tokenizer: str | None = flag("tokenizer of a single-file checkpoint: a folder or a name on the Hub")
    embedding: list[str] | None = flag("a textual inversion file; may be repeated", action="append")
    lora: list[str] | None = flag("a LoRA file, or FILE:WEIGHT; may be repeated", action="append")
    raw_weights: bool | None = flag("use raw weights, not averaged ones", action=cli.SWITCH)
    device: str | None = flag("cuda, cuda:1, mps or cpu (default: the first available)")
    dtype: str = flag("half precision is faster on a GPU", "fp32", choices=cli.DTYPES)
    batch: int = flag("maximum number of pictures, of one size, in a forward pass", 8, type=at_least(1))
    low_memory: bool = flag("one guidance branch at a time, one network on the device, and VAE tiles above "
                            "768 pixels (with full-size weights), which change pictures slightly", False)
    fast: bool | None = flag("faster, equal up to rounding. On a CPU: Winograd's convolutions, with a fifth "
                             "more memory (default: on for full-size weights, from 4 steps at 256 x 256 "
                             "pixels). On CUDA: channels last and CUDA graphs, after a minute of compiling "
                             "(default: off)", action=cli.SWITCH)
    attention: str = flag("attention kernel of --fast on CUDA. auto: the fastest, measured once for each "
                          "size; sdpa: torch's; ours: our own", "auto", choices=("auto", "sdpa", "ours"))
    verbose: bool = flag("say what --attention measures and decides", False)

    @property
    def mask_file(self) -> str | None:
        """The file of the mask. None without a mask, and for --mask auto."""
        return None if self.mask == "auto" else self.mask


def make_parser() -> argparse.ArgumentParser:
    """A parser with all flags of Settings. Its help ends with the words that the nano weights know."""
    edits = {edit.kind: edit.instructions[0] for edit in scenes.random_scene("train", 0).edits()}
    words = {"things": scenes.KINDS, "colours": scenes.COLOURS, "times": scenes.TIMES,
             "weathers": scenes.WEATHERS, "grounds": scenes.GROUNDS, "places": scenes.SLOTS,
             "edits": edits.values()}
    lines = ["The default (nano) weights know no photographs, only a small painted world with these words.",
             "They sometimes add a thing in the wrong place."]
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
    missing = [f"--{key}" for key in ("input", "edit") if not getattr(settings, key)]
    missing += ["--output"] * (settings.output == "")
    if missing:
        raise ValueError(f"needed, but not given: {', '.join(missing)} (see --help)")
    list(map(split, settings.lora or []))  # raises for a weight that is no number, before the long work
    if settings.fast and settings.low_memory:
        raise ValueError("--fast needs more memory; use either --fast or --low-memory")
    if settings.attention == "ours" and not settings.fast:
        raise ValueError("--attention ours is a part of --fast; add --fast")
    if settings.show_mask and not (settings.mask and settings.grid):
        raise ValueError("--show-mask draws the masks into a grid; add --mask and --grid")
    if settings.side_by_side and (settings.grid or settings.sweep):
        raise ValueError("--grid and --sweep show the input already; leave out --side-by-side")
    if settings.mask_invert and not settings.mask_file:
        raise ValueError("--mask-invert is for a file; give a file as --mask")
    if not all(edit.strip() for edit in settings.edit):
        raise ValueError('an instruction is empty; say what to change, such as --edit "make it night"')
    cli.say(*(f"{settings.recipe} brings {word}" for word in brought))
    return settings


def as_flags(path: str, given: dict) -> list[str]:
    """Turn the recipe of a picture into command-line flags, so that the parser checks the ranges.

    Leaves out the settings `given` and the defaults. Raises ValueError for settings that only the user may
    choose: weights that are not shipped and might be downloaded; inputs that are not files; large numbers.
    """
    cli.import_torch()
    from nanoip2p.editing.recipes import read_recipe
    recipe, argv = {"raw_text": True} | read_recipe(path), []  # before raw_text, no text was cleaned
    for key, kind in typing.get_type_hints(Settings).items():
        value, name = recipe.get(key), "--" + key.replace("_", "-")
        fixed = key in (*NOT_IN_RECIPE, *given) or (key == "mask_invert" and "mask" in given)
        if fixed or value in (None, getattr(Settings, key)):
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
        if missing := [item for item in items if key in ("input", "mask") and not os.path.isfile(item)
                       and (key, item) != ("mask", "auto")]:
            raise ValueError(f"{path} names the {key} {missing[0]}, which is no file here; {own}")
        switch = {True: [name], False: [name.replace("--", "--no-", 1)]}
        argv += switch[value] if isinstance(value, bool) else [f"{name}={item}" for item in items]
    return argv


def plan_pictures(settings: Settings, inputs: list[str]) -> list[Settings]:
    """The settings of each picture to make: one input, one seed, one output, and one edit (or all turns).

    Ordered by input, edit, sample. Without --output, several pictures may have the same output, see
    names.unused. Raises ValueError for an unusable --output.
    """
    edits = [settings.edit] if settings.turns else [[edit] for edit in settings.edit]
    if len(inputs) * len(edits) * settings.n > MOST_PICTURES:
        raise ValueError(f"{len(inputs)} inputs x {len(edits)} edits x --n {settings.n} are more than "
                         f"{MOST_PICTURES:,} pictures; make them in parts")
    several = len(inputs) * len(settings.edit) * settings.n > 1
    if settings.sweep and (several or settings.grid or settings.keep_size):
        raise ValueError("--sweep needs one --edit and one --input, and excludes --n, --grid and --keep-size")
    variants = [(edit, settings.seed + i) for edit in edits for i in range(settings.n)]
    names = name_outputs if settings.output else default_names
    pictures = [replace(settings, input=[path], edit=edit, n=1, seed=seed, output=output)
                for path, outputs in zip(inputs, names(settings, inputs, [edit for edit, _ in variants]))
                for (edit, seed), output in zip(variants, outputs)]
    sources = {os.path.realpath(path) for path in (*inputs, settings.mask_file) if path and settings.output}
    for path in dict.fromkeys(picture.output for picture in pictures):
        if os.path.realpath(path) in sources:
            raise ValueError(f"--output {path} would overwrite an input or the mask; name another")
        check_writable(path)
    return pictures


def name_outputs(settings: Settings, inputs: list[str], edits: list[list[str]]) -> list[list[str]]:
    """The files that --output means: for each input, one for each of `edits`."""
    output, one = Path(settings.output), "--grid" if settings.grid else "--sweep" if settings.sweep else ""
    to_folder = output.is_dir() or settings.output.endswith("/") or not output.suffix
    if not to_folder and output.suffix.lower() not in KINDS:
        raise ValueError(f"{output} should end in {', '.join(KINDS)}, or in / for a folder")
    if one and to_folder:
        raise ValueError(f"{one} writes one file: --output {settings.output} must end in .png, .jpg or .webp")
    if len(inputs) > 1 and not (settings.grid or to_folder):
        raise ValueError(f"{len(inputs)} inputs need a folder as --output, not {output}")
    if to_folder:
        stems, suffix = [output / stem for stem in unique_stems(inputs)], ".png"
    else:
        stems, suffix = [output.with_suffix("")] * len(inputs), output.suffix
    numbered, digits = len(edits) > 1 and not settings.grid, len(str(len(edits)))
    return [[f"{stem}_{k:0{digits}}{suffix}" if numbered else f"{stem}{suffix}"
             for k in range(1, len(edits) + 1)] for stem in stems]


def default_names(settings: Settings, inputs: list[str], edits: list[list[str]]) -> list[list[str]]:
    """The files in out/ if there is no --output. Returns lists as name_outputs does."""
    stems = [f"out/{slug(stem, 'picture')}" for stem in unique_stems(inputs)]
    if settings.grid:
        return [[f"{stems[0]}-grid.png" if len(stems) == 1 else "out/grid.png"] * len(edits)] * len(stems)
    words = [slug(" ".join(edit).lower(), "edit") + "-sweep" * settings.sweep for edit in edits]
    return [[f"{stem}-{word}.png" for word in words] for stem in stems]


def load_editor(settings: Settings) -> tuple:
    """An Editor with its LoRAs and embeddings, hashes of LoRA files and mask, and notes for the user."""
    from nanoip2p import Editor
    from nanoip2p.checkpoint import embeddings, load, lora, tensors
    from nanoip2p.editing.recipes import read_recipe
    checkpoint = load.open_checkpoint(
        find_weights(settings.weights), settings.vae, settings.tokenizer, settings.raw_weights)
    cli.say(f"opened {settings.weights}: {checkpoint.description}")
    editor = Editor.load(checkpoint, settings.device, tensors.DTYPES[settings.dtype], settings.low_memory)
    if settings.raw_text:
        editor.tokenizer.clean = str
    notes = lora.apply_loras(editor, files := settings.lora or [])
    hashes = {"lora_hash": [lora.file_hash(file) for file in files],
              "mask_hash": lora.file_hash(settings.mask_file) if settings.mask_file else None}
    then = read_recipe(settings.recipe) if settings.recipe else {}
    notes += [f"{settings.recipe} was made with a {name} of other content" for key, name in (
        ("lora_hash", "LoRA file"), ("mask_hash", "mask")) if (then.get(key) or hashes[key]) != hashes[key]]
    notes += [embeddings.add_embedding(editor, path) for path in settings.embedding or []]
    return editor, hashes, notes


def run(settings: Settings, problems: list[str]) -> None:
    """Check all inputs and outputs, edit, write each finished batch. `problems`: see pictures.leave_out."""
    torch = cli.import_torch()
    import numpy as np
    from PIL import Image

    from nanoip2p.common.saving import save_image
    from nanoip2p.editing import pictures as making
    from nanoip2p.images import fit_size, open_image
    from nanoip2p.speed.fast import speed_up
    inputs = making.find_images(settings.input)
    pictures = plan_pictures(settings, inputs)
    if settings.mask_file:
        open_image(settings.mask_file)  # raises before the long work
    sizes, converted, fitted = {}, {}, {}
    for path in inputs:
        try:
            image = open_image(path)
            sizes[path] = image.size
            converted |= {path: image.info["converted"]} if "converted" in image.info else {}
        except ValueError as error:  # show it before the long work
            making.leave_out(error, path, problems, len(inputs))
    editor, hashes, notes = load_editor(settings)
    cli.say(*notes, *making.colour_notes(converted), *making.nano_notes(editor, settings.edit, sizes))
    sampling = editor.fill_defaults({key: getattr(settings, key) for key in editor.defaults})
    for path, size in sizes.items():
        try:
            fitted[path] = fit_size(*size, sampling["resolution"], editor.multiple)
        except ValueError as error:
            making.leave_out(error, path, problems, len(inputs))
    pictures = [picture for picture in pictures if picture.input[0] in fitted]
    if not settings.low_memory:
        area = sum(math.prod(fitted[picture.input[0]]) * len(picture.edit) for picture in pictures)
        latents = area * (making.SWEEP_EDITS if settings.sweep else 1) // editor.vae.downsampling**2
        speed_up(editor, settings.fast, cli.say, latents * sampling["steps"], attention=settings.attention,
                 verbose=settings.verbose)
    given = sampling | {key: getattr(settings, key) for key in ("negative", "low_memory", "deep_every")}
    given["progress"] = True

    def write(image, made_by: Settings, text: str) -> None:
        recipe = {key: value for key, value in asdict(made_by).items() if key not in NOT_IN_RECIPE} | sampling
        recipe |= {"version": __version__, "torch": torch.__version__} | hashes
        with nullcontext(made_by.output) if settings.output else unused(made_by.output) as path:
            save_image(image, path, recipe)
        print(f"{one_line(path)}  {one_line(text)}  (seed {made_by.seed})")

    made = []
    try:
        for i, stages in making.edit_all(editor, pictures, fitted, given, problems):
            if settings.grid or settings.sweep:
                made.append((i, stages))
            else:
                image = Image.fromarray(np.hstack(stages)) if settings.side_by_side else stages[-1]
                write(image, pictures[i], ", then ".join(pictures[i].edit))
    finally:  # also after Ctrl-C or an error: the finished edits are kept
        if made:
            table, text = making.draw(pictures, sorted(made, key=lambda one: one[0]), sampling)
            write(table, replace(settings, input=list(fitted), output=pictures[0].output), text)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code: that of cli.run, or 1 if some pictures could not be made."""
    problems = []
    code = cli.run(lambda: run(parse(argv), problems), "interrupted; the pictures named above are kept",
                   "try --low-memory, --batch 1 or a smaller --resolution")
    if code == 0:
        cli.say(*(f"not made: {problem}" for problem in problems))
    return code or min(len(problems), 1)


if __name__ == "__main__":
    sys.exit(main())

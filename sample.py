"""Edit pictures by instruction.

    python sample.py --input house.png --edit "make it night" --output night.png
    python sample.py --input photos --edit "make it snow" --output snowy/
    python sample.py --input house.png --edit "make it night" --edit "add a tree" --grid --output grid.png
    python sample.py --input house.png --edit "make it night" --sweep --output sweep.png
    python sample.py --recipe night.png --output again.png
"""

import argparse
import os
import random
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import nanoip2p
from nanoip2p.checkpoint.load import open_checkpoint
from nanoip2p.checkpoint.tensors import DTYPES
from nanoip2p.common import cli
from nanoip2p.common.cli import add_flags, at_least, finite
from nanoip2p.common.files import check_writable
from nanoip2p.editor import Editor
from nanoip2p.images import find_images, fit, fit_size, grid, open_image, read_recipe, save_png
from nanoip2p.pipeline import same_size
from nanoip2p.samplers import SAMPLERS
from nanoip2p.speed import fast as speed

HERE = Path(__file__).resolve().parent
# What a recipe holds: the flags that make one file again. What is not given is None until `complete`.
RECIPE_FLAGS = (
    "input", "edit", "turns", "n", "seed", "steps", "cfg_text", "cfg_image", "sampler", "resolution",
    "negative", "weights", "vae", "tokenizer", "raw_weights", "dtype", "keep_size", "grid", "sweep",
    "batch", "low_memory",
)
DEFAULTS = {
    "n": 1, "negative": "", "weights": "weights/nano-ip2p", "dtype": "fp32", "batch": 8, "turns": False,
    "keep_size": False, "grid": False, "sweep": False, "low_memory": False, "raw_weights": False,
    "fast": False,
}
# What --sweep draws around the chosen scales: around the paper's, cfg_text 3 ... 12 and cfg_image 1 ... 2
SWEEP_FACTORS = (0.4, 0.7, 1, 1.3, 1.6)      # of cfg_text
SWEEP_STEPS = (-0.5, -0.25, 0, 0.25, 0.5)    # on top of cfg_image


@dataclass(frozen=True)
class Picture:
    """One picture to make."""

    input: str
    edits: tuple[str, ...]  # one instruction, or several with --turns
    seed: int
    output: str


def make_parser() -> argparse.ArgumentParser:
    """All flags. None has a default here, so that a recipe and the weights folder can fill the gaps."""
    parser = cli.make_parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to edit, and how")
    group.add_argument("--input", nargs="+", action="extend", help="pictures, globs or folders")
    group.add_argument("--edit", action="append", help='an instruction, as "make it night"; repeat for more')
    group.add_argument("--turns", action="store_true", default=None,
                       help="apply the instructions one after another, not each to the input")
    group.add_argument("--n", type=at_least(1), help="samples of each edit, with seeds s, s + 1, ... (1)")
    group.add_argument("--negative", help="what to steer away from (nothing)")

    # Defaults of these come from the weights folder, and in its absence from the paper
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=at_least(1), help="denoising steps")
    group.add_argument("--resolution", type=at_least(1), help="of the longer side, about")
    group.add_argument("--cfg-text", type=finite, help="how much the instruction counts (s_T)")
    group.add_argument("--cfg-image", type=finite, help="how much the input picture counts (s_I)")
    group.add_argument("--sampler", choices=sorted(SAMPLERS))
    group.add_argument("--seed", type=at_least(0), help="one seed makes one picture (random)")

    group = parser.add_argument_group("what to write")
    group.add_argument("--output", help="a PNG file; for several inputs a folder")
    group.add_argument("--keep-size", action="store_true", default=None, help="in the size of the input")
    group.add_argument("--grid", action="store_true", default=None,
                       help="one labelled picture: input | edits")
    group.add_argument("--sweep", action="store_true", default=None,
                       help="one labelled picture of one edit at 5 x 5 scales of guidance, around --cfg-text "
                            "(down) and --cfg-image (across)")
    group.add_argument("--recipe", help="a PNG that sample.py wrote, to make again; other flags override it")

    group = parser.add_argument_group("with what")
    group.add_argument("--weights", help="a diffusers folder, a .safetensors or .ckpt file, or a name on the "
                                         f"Hub ({DEFAULTS['weights']})")
    add_flags(group)
    group.add_argument("--device", help="cuda, cuda:1, mps, cpu (the best there is)")
    group.add_argument("--dtype", choices=sorted(DTYPES), help="the halves are quicker on a GPU (fp32)")
    group.add_argument("--batch", type=at_least(1), help="pictures of one size that share a forward (8)")
    group.add_argument("--low-memory", action="store_true", default=None,
                       help="one branch of guidance and one network on the device at a time, and pictures "
                            "above 768 pixels in tiles for the VAE, which changes them a little")
    group.add_argument("--fast", action="store_true", default=None,
                       help="the same to rounding, in less time: on a CPU, convolutions by Winograd's method "
                            "(with more memory); on CUDA, channels last, fused projections, compiled (a "
                            "minute at first) and replayed as a CUDA graph")
    return parser


def complete(argv: list[str]) -> argparse.Namespace:
    """Flags as given, else from the recipe, else DEFAULTS. ValueError when what is left cannot work."""
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    if flags["recipe"] is not None:
        stored = vars(parser.parse_args(as_flags(read_recipe(flags["recipe"]))))
        flags = {key: stored[key] if value is None else value for key, value in flags.items()}
    flags |= {key: default for key, default in DEFAULTS.items() if flags[key] is None}
    if flags["seed"] is None:
        flags["seed"] = random.randrange(1_000_000)
    missing = [f"--{key}" for key in ("input", "edit", "output") if flags[key] is None]
    if missing:
        raise ValueError(f"needed, but not given: {', '.join(missing)} (see --help)")
    if flags["fast"] and flags["low_memory"]:
        raise ValueError("--fast keeps more in memory; leave it or --low-memory out")
    if not all(edit.strip() for edit in flags["edit"]):
        raise ValueError('an instruction is empty; say what to change, as --edit "make it night"')
    return argparse.Namespace(**flags)


def as_flags(recipe: dict) -> list[str]:
    """A recipe as a command line, so that its values pass the same checks as typed ones."""
    argv = []
    for key in RECIPE_FLAGS:
        value, flag = recipe.get(key), "--" + key.replace("_", "-")
        if isinstance(value, list):
            argv += [f"{flag}={item}" for item in value]
        elif value is True:
            argv.append(flag)
        elif value is not None and value is not False:
            argv.append(f"{flag}={value}")
    return argv


def plan_pictures(args: argparse.Namespace, inputs: list[str]) -> list[Picture]:
    """Every picture to make, in the order input, edit, sample. ValueError when --output does not suit."""
    edits = [tuple(args.edit)] if args.turns else [(edit,) for edit in args.edit]
    variants = [(edit, args.seed + i) for edit in edits for i in range(args.n)]
    output = Path(args.output)
    to_folder = output.is_dir() or args.output.endswith(("/", os.sep)) or not output.suffix
    if not to_folder and output.suffix.lower() != ".png":
        raise ValueError(f"{args.output} should end in .png (or in / for a folder); only PNG is written")
    if args.sweep and (len(inputs) * len(args.edit) * args.n > 1 or args.grid or args.keep_size):
        raise ValueError("--sweep draws one --edit of one --input, without --n, --grid and --keep-size")
    if (args.grid or args.sweep) and to_folder:
        flag = "--grid" if args.grid else "--sweep"
        raise ValueError(f"{flag} writes one picture, so --output {args.output} must end in .png")
    if not args.grid and not to_folder and len(inputs) > 1:
        raise ValueError(f"{len(inputs)} inputs need a folder as --output, not {args.output}")
    suffix = ".png" if to_folder else output.suffix
    bases = [output.with_suffix("")] * len(inputs)
    if to_folder:
        bases = [output / stem for stem in unique_stems(inputs)]
    digits = len(str(len(variants)))
    numbers = [f"_{k:0{digits}d}" for k in range(1, len(variants) + 1)]
    if len(variants) == 1 or args.grid:
        numbers = [""] * len(variants)
    return [
        Picture(path, edit, seed, f"{base}{number}{suffix}")
        for path, base in zip(inputs, bases)
        for (edit, seed), number in zip(variants, numbers)
    ]


def unique_stems(paths: list[str]) -> list[str]:
    """Names for outputs: a/house.png and b/house.jpg -> house and house-2, on any file system."""
    stems = []
    for path in paths:
        stem, k = Path(path).stem, 2
        while stem.lower() in [known.lower() for known in stems]:
            stem, k = f"{Path(path).stem}-{k}", k + 1
        stems.append(stem)
    return stems


def edit_batch(editor: Editor, batch: list[Picture], size: tuple[int, int], settings: dict,
               keep_size: bool) -> list[list[Image.Image]]:
    """Pictures of a batch -> for each, [input, after the first instruction, after the second, ...].

    Inputs of other proportions than `size` are cut at the edges; to get their own size back, with keep_size,
    they are squeezed instead, so that nothing is lost and the edit lies exactly over the input.
    """
    originals = {path: open_image(path) for path in {picture.input for picture in batch}}
    squeezed = {
        path: image.resize(size, Image.Resampling.LANCZOS) if keep_size else fit(image, size)
        for path, image in originals.items()
    }
    stages = [[squeezed[picture.input] for picture in batch]]
    for turn in range(len(batch[0].edits)):
        instructions = [picture.edits[turn] for picture in batch]
        seeds = [picture.seed for picture in batch]
        stages.append(editor.edit(stages[-1], instructions, seed=seeds, batch=len(batch), **settings))
    made = [list(of_one) for of_one in zip(*stages)]
    if keep_size:
        made = [[image.resize(originals[picture.input].size, Image.Resampling.LANCZOS) for image in images]
                for picture, images in zip(batch, made)]
    return made


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked, then edit, writing each batch as soon as it is done."""
    inputs = find_images(args.input)
    pictures = plan_pictures(args, inputs)
    check_outputs(pictures, inputs)
    original_sizes = {path: open_image(path).size for path in inputs}  # a bad one shows before the long work

    checkpoint = open_checkpoint(find_weights(args.weights), args.vae, args.tokenizer, args.raw_weights)
    print(f"opened {args.weights}: {checkpoint.found}", file=sys.stderr)
    editor = Editor.load(checkpoint, args.device, DTYPES[args.dtype], args.low_memory)
    if args.fast:
        speed.fast(editor.unet, lambda line: print(line, file=sys.stderr))
    chosen = {key: getattr(args, key) for key in editor.defaults}
    chosen = {key: editor.defaults[key] if value is None else value for key, value in chosen.items()}
    settings = chosen | {"negative": args.negative, "low_memory": args.low_memory, "progress": True}
    sizes = {path: fitted(path, size, chosen["resolution"], editor.multiple)
             for path, size in original_sizes.items()}
    recipe = {key: getattr(args, key) for key in RECIPE_FLAGS} | chosen
    recipe |= {"version": nanoip2p.__version__, "torch": torch.__version__}

    if args.sweep:
        [picture] = pictures
        save_png(sweep(editor, picture, sizes[picture.input], settings), args.output, recipe)
        print(f"{args.output}  {args.edit[0]}, by cfg_text and cfg_image  (seed {args.seed})")
        return
    made = {}
    for places in same_size([sizes[picture.input] for picture in pictures], args.batch):
        batch = [pictures[i] for i in places]
        results = edit_batch(editor, batch, sizes[batch[0].input], settings, args.keep_size)
        for picture, stages in zip(batch, results):
            if args.grid:
                made[picture] = stages
            else:
                own = {"input": [picture.input], "edit": list(picture.edits), "n": 1, "seed": picture.seed}
                save_png(stages[-1], picture.output, recipe | own)
                print(f"{picture.output}  {', then '.join(picture.edits)}  (seed {picture.seed})")
    if args.grid:
        save_png(draw_grid(pictures, made, inputs), args.output, recipe | {"input": inputs})
        edits = sum(len(picture.edits) for picture in pictures)
        print(f"{args.output}  {edits} edit{'s' * (edits > 1)}  (seed {args.seed})")


def sweep(editor: Editor, picture: Picture, size: tuple[int, int], settings: dict) -> Image.Image:
    """The input; below it the edit, with a row for each cfg_text around that of `settings` (Editor.edit's),
    and in it a column for each cfg_image, all from one seed."""
    texts = [round(settings["cfg_text"] * factor, 4) for factor in SWEEP_FACTORS]
    images = [round(settings["cfg_image"] + step, 4) for step in SWEEP_STEPS]
    before, cells = fit(open_image(picture.input), size), []
    for text, image in tqdm(list(product(texts, images)), unit="edit"):
        scales = {"cfg_text": text, "cfg_image": image, "progress": False}
        cells += editor.edit([before], list(picture.edits), seed=[picture.seed], **settings | scales)
    across = len(images)
    rows = [cells[i : i + across] for i in range(0, len(cells), across)]
    labels = [[f"cfg_text {text:g}, cfg_image {image:g}" for image in images] for text in texts]
    return grid([[before], *rows], [["input"], *labels])


def check_outputs(pictures: list[Picture], inputs: list[str]) -> None:
    """ValueError when an output cannot be written or is one of the inputs."""
    sources = {os.path.realpath(path) for path in inputs}
    for path in dict.fromkeys(picture.output for picture in pictures):
        if os.path.realpath(path) in sources:
            raise ValueError(f"--output {path} would overwrite an input; name another")
        check_writable(path)


def find_weights(name: str) -> str:
    """The weights as named from here, else from where sample.py lies."""
    return str(HERE / name) if not os.path.exists(name) and (HERE / name).exists() else name


def fitted(path: str, size: tuple[int, int], resolution: int, multiple: int) -> tuple[int, int]:
    """images.fit_size, whose complaints begin with the path."""
    try:
        return fit_size(*size, resolution, multiple)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def draw_grid(
    pictures: list[Picture], made: dict[Picture, list[Image.Image]], inputs: list[str]
) -> Image.Image:
    """One row for each input: the input, then every edit of it (with turns, every turn)."""
    several = len({picture.seed for picture in pictures}) > 1
    rows, labels = [], []
    for path in inputs:
        of_input = [picture for picture in pictures if picture.input == path]
        rows.append([made[of_input[0]][0]])
        labels.append(["input"])
        for picture in of_input:
            rows[-1] += made[picture][1:]
            labels[-1] += [f"{edit} (seed {picture.seed})" if several else edit for edit in picture.edits]
    return grid(rows, labels)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    return cli.run(lambda: run(complete(argv)), "interrupted; pictures already named are whole",
                   "try --low-memory, --batch 1 or a smaller --resolution")


if __name__ == "__main__":
    sys.exit(main())

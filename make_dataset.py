"""Make the paper's dataset (section 3.1): captions -> instructions and edited captions -> pairs of pictures.

    python make_dataset.py captions --input captions.txt --out data/prompts.jsonl --model gpt-4o-mini
    python make_dataset.py captions --backend scenes --n 1000 --out data/prompts.jsonl      # needs no server
    python make_dataset.py pairs --prompts data/prompts.jsonl --out data/pairs --weights SD-1.5
    torchrun --nproc-per-node 8 make_dataset.py pairs ...           # the same on several GPUs
    python make_dataset.py show data/pairs                          # a contact sheet and statistics

To continue a stopped `captions` or `pairs`, start it again with the same flags.
"""

import argparse
import asyncio
import os
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from nanoip2p.common import cli
from nanoip2p.common.files import check_writable, read_json
from nanoip2p.dataset.config import PairSettings, Settings


def add_captions(subparsers) -> None:
    """Add `captions`, with its subcommands `prepare-finetune` and `finetune` (the paper's method)."""
    parser = subparsers.add_parser("captions", help="captions -> instructions and edited captions",
                                   description="Set OPENAI_API_KEY to your key and, for a server other "
                                               "than OpenAI's, OPENAI_BASE_URL to its address.")
    parser.add_argument("--input", type=Path, help="captions: .txt, .csv, or .jsonl (key input or caption)")
    parser.add_argument("--column", help="key (.jsonl) or column (.csv) of the caption")
    parser.add_argument("--out", type=Path, default=Path("data/prompts.jsonl"),
                        help="output file; captions in this file or in its .dropped.jsonl are skipped")
    parser.add_argument("--backend", choices=("openai", "scenes"), default="openai",
                        help="openai: a language model; scenes: the grammar of the nano world")
    parser.add_argument("--n", type=cli.at_least(1), help="number of captions (default: all, or 1000 scenes)")
    parser.add_argument("--seed", type=cli.at_least(0), default=0, help="seed of the scenes")
    cli.add_settings(parser, Settings)
    parser.set_defaults(run=run_captions)

    below = parser.add_subparsers(title="fine-tuning, as in the paper", parser_class=cli.make_parser)
    prepare = below.add_parser("prepare-finetune", help="hand-written triplets -> training data")
    prepare.add_argument("human", type=Path, help=".jsonl of input, edit, output; the paper used 700 of them")
    prepare.add_argument("--chats", type=Path, help="output (default: the same name, ending in .chat.jsonl)")
    prepare.set_defaults(run=run_prepare)
    tune = below.add_parser("finetune", help="upload training data, start a job, print the job id")
    tune.add_argument("chats", type=Path, help="the file that prepare-finetune wrote")
    tune.add_argument("--model", default="gpt-4o-mini-2024-07-18", help="model to fine-tune, with its date")
    tune.add_argument("--epochs", type=cli.at_least(1), default=1, help="number of epochs")
    tune.set_defaults(run=run_finetune)


def run_captions(args: argparse.Namespace) -> None:
    """Ask a language model for edits of the captions, or draw random scenes and edits of them."""
    if args.backend == "scenes":
        check_writable(args.out)
        from nanoip2p.dataset.rendered import write_scenes
        write_scenes(args.out, args.n or 1000, args.seed)
        print(f"{args.n or 1000} edits of scenes written to {args.out}")
        return
    if args.input is None:
        raise ValueError("--input is needed (or --backend scenes)")
    from nanoip2p.dataset.captions import ask_all, read_captions
    captions, repeats = read_captions(args.input, args.column)
    print(f"{args.input}: {len(captions)} captions, {repeats} repeats left out")
    given = {key: value for key, value in vars(args).items() if key in Settings.__dataclass_fields__}
    print(ask_all(captions[: args.n], Settings(**given), args.out))


def run_prepare(args: argparse.Namespace) -> None:
    """Convert hand-written triplets to training data for a chat model."""
    from nanoip2p.dataset import finetune
    out = args.chats or args.human.with_suffix(".chat.jsonl")
    print(f"{finetune.prepare(args.human, out)} chats written to {out}")


def run_finetune(args: argparse.Namespace) -> None:
    """Start a fine-tuning job and print its id as the last line."""
    from nanoip2p.dataset import finetune
    job = asyncio.run(finetune.start(args.chats, args.model, args.epochs))
    print("started; when the job is done, use its model: captions --model ft:...", file=sys.stderr)
    print(job)


def add_pairs(subparsers) -> None:
    """Add `pairs`: section 3.1.2 of the paper."""
    parser = subparsers.add_parser("pairs", help="caption pairs -> picture pairs that pass the CLIP filter",
                                   description="A file pairs.json in the weights folder can set other "
                                               "defaults for --n-samples and all flags below it.")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of input, edit and output")
    parser.add_argument("--out", type=Path, required=True, help="output folder; continues its stopped job")
    parser.add_argument("--weights", required=True, help="a text-to-image model: a diffusers folder, a "
                                                         ".safetensors or .ckpt file, or a name on the Hub")
    parser.add_argument("--skip-bad", action="store_true", help="skip bad lines of --prompts")
    parser.add_argument("--fast", action=cli.SWITCH,
                        help="faster, with equal results up to rounding; see --fast of sample.py")
    parser.add_argument("--attention", choices=("auto", "sdpa", "ours"), default="auto",
                        help="attention kernels of --fast on CUDA, as in sample.py")
    parser.add_argument("--verbose", action="store_true", help="say what --attention measures and decides")
    add_device(parser)
    cli.add_settings(parser, PairSettings)
    parser.set_defaults(run=run_pairs)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --vae, --tokenizer, --raw-weights, --lora, --device, --dtype of the text-to-image model."""
    cli.add_flags(parser)
    parser.add_argument("--lora", action="append", default=[], help="a LoRA, or FILE:WEIGHT; may be repeated")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first available)")
    parser.add_argument("--dtype", choices=cli.DTYPES, help="default: bf16 if it is faster here, else fp32")


def run_pairs(args: argparse.Namespace) -> None:
    """Check all inputs, then generate pairs. Under torchrun, each process uses one GPU."""
    torch = cli.import_torch()
    from nanoip2p import TextToImage
    from nanoip2p.checkpoint import load, lora, tensors
    from nanoip2p.clip_filter import Judge
    from nanoip2p.common.device import pick_device
    from nanoip2p.dataset.pairs import list_seeds, make_pairs, pair_settings, read_prompts
    from nanoip2p.speed.fast import speed_up
    prompts, bad = read_prompts(args.prompts)
    if bad and not args.skip_bad:
        raise ValueError(f"{args.prompts}: {bad[0]} (bad lines: {len(bad)}); correct them, or skip them with "
                         "--skip-bad")
    if not prompts:
        raise ValueError(f"{args.prompts} contains no prompt")
    if args.attention == "ours" and not args.fast:
        raise ValueError("--attention ours is a part of --fast; add --fast")
    first, device = os.environ.get("RANK", "0") == "0", args.device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = pick_device(device)
    checkpoint = load.open_checkpoint(args.weights, args.vae, args.tokenizer, args.raw_weights)
    settings = pair_settings(vars(args), checkpoint.source, checkpoint.defaults)
    dtype = job_dtype(args.out, args.dtype, device)
    if first:
        cli.say(f"opened {args.weights}: {checkpoint.description}; computes in {dtype}",
                f"{len(prompts)} prompts, {len(bad)} bad lines, {settings.n_samples} candidates per prompt")
    painter = TextToImage.load(checkpoint, device, tensors.DTYPES[dtype])
    cli.say(*lora.apply_loras(painter, args.lora))
    painter.fill_defaults({key: getattr(settings, key) for key in ("steps", "resolution", "sampler")})
    judge = Judge.load(settings.clip, device)
    notes = {"weights": args.weights, "lora": args.lora, "clip": settings.clip, "dtype": dtype}
    positions = 2 * (settings.resolution // painter.vae.downsampling) ** 2  # in the latents of a pair
    prepare = partial(speed_up, painter, args.fast, cli.say,
                      positions * settings.steps * settings.n_samples * len(prompts), injects=True,
                      attention=args.attention, verbose=args.verbose)
    make_pairs(prompts, args.out, painter, judge, settings, notes, progress=first, prepare=prepare)
    if first:
        done = sum((args.out / prompt.folder).exists() for prompt in prompts)
        pairs = sum(len(seeds) for _, seeds in list_seeds(args.out))
        print(f"{args.out}: {done} of {len(prompts)} prompts finished, {pairs} pairs kept; to see them: "
              f"python make_dataset.py show {args.out}")


def job_dtype(out: Path, given: str | None, device) -> str:
    """The dtype `given`, else the dtype of the job in `out`, else the dtype that is fast on `device`."""
    from nanoip2p.common.device import pick_dtype
    path = out / "job.json"
    job = read_json(path, missing={})
    if given or not job:
        return pick_dtype(given, device)
    dtype = job.get("dtype", "fp32")  # jobs older than --dtype have no record of it and used fp32
    if dtype not in list(cli.DTYPES):
        raise ValueError(f"{path}: dtype = {dtype!r:.40} should be one of {', '.join(cli.DTYPES)}")
    return dtype


def add_pair(subparsers) -> None:
    """Add `pair`: one pair, to try Prompt-to-Prompt."""
    parser = subparsers.add_parser("pair", help="two captions -> two pictures that differ only by the edit")
    parser.add_argument("source", help="the caption of the first picture")
    parser.add_argument("edit", help="the caption of the second picture")
    parser.add_argument("--weights", default="weights/nano-sd", help="a text-to-image model")
    parser.add_argument("--out", type=Path, default=Path("out/pair.png"), help="the PNG to write")
    parser.add_argument("--heatmaps", action="store_true", help="also show the attention to each word")
    parser.add_argument("--inject", choices=cli.MODES, default="self",
                        help="attention maps that the edited picture takes from the source")
    parser.add_argument("--p", type=cli.finite, default=0.5, help="share of the steps with injection")
    parser.add_argument("--blend", nargs="+", metavar="WORD",
                        help="a word of each caption, or auto (the words that differ): change pixels only "
                             "where the attention to one of these words is high")
    parser.add_argument("--reweight", nargs=2, action="append", default=[], metavar=("WORD", "FACTOR"),
                        help="for --inject cross or both: scale attention to a word of the edited caption")
    parser.add_argument("--window", nargs=3, action="append", default=[], metavar=("WORD", "FROM", "TO"),
                        help="for --inject cross or both: inject the attention to a word only in these "
                             "steps, given as shares of all steps (0 to 1)")
    parser.add_argument("--cfg-text", type=cli.finite, help="guidance scale (default: from the weights)")
    parser.add_argument("--steps", type=cli.at_least(1), help="denoising steps (default: from the weights)")
    parser.add_argument("--resolution", type=cli.pixels, help="side in pixels (default: from the weights)")
    parser.add_argument("--sampler", choices=cli.SAMPLERS, help="sampler (default: from the weights)")
    parser.add_argument("--deep-every", type=cli.at_least(1), default=1, metavar="N",
                        help="compute the whole UNet only every N-th step")
    parser.add_argument("--negative", default="", help="negative prompt")
    parser.add_argument("--seed", type=cli.at_least(0), default=0, help="seed of all random numbers")
    add_device(parser)
    parser.set_defaults(run=run_pair)


def run_pair(args: argparse.Namespace) -> None:
    """Generate one pair and write both pictures side by side."""
    if not (args.source.strip() and args.edit.strip()):
        raise ValueError("a caption is empty; say what each picture shows")
    if args.blend and len(args.blend) != 2 and args.blend != ["auto"]:
        raise ValueError("--blend needs a word of each caption, or auto; put it after the captions")
    reweight = {word: float(factor) for word, factor in args.reweight}
    windows = {word: (float(begin), float(end)) for word, begin, end in args.window}
    if not all(0 <= begin <= end for begin, end in [(args.p, 1), *windows.values()]):
        raise ValueError("--p must be in [0, 1], and a --window needs 0 <= FROM <= TO")
    check_writable(args.out)
    cli.import_torch()
    from nanoip2p import TextToImage
    from nanoip2p.checkpoint import load, lora, tensors
    from nanoip2p.common.device import pick_device, pick_dtype
    from nanoip2p.common.grids import grid
    from nanoip2p.common.saving import save_png
    from nanoip2p.dataset.changes import MeasuredPainter
    from nanoip2p.dataset.show import draw_heatmaps
    checkpoint = load.open_checkpoint(args.weights, args.vae, args.tokenizer, args.raw_weights)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    cli.say(f"opened {args.weights}: {checkpoint.description}; computes in {dtype}")
    painter = TextToImage.load(checkpoint, device, tensors.DTYPES[dtype])
    cli.say(*lora.apply_loras(painter, args.lora))
    model = MeasuredPainter(painter, args.source, args.edit, args.inject, args.steps, args.sampler,
                            args.resolution, args.negative, reweight, windows, deep_every=args.deep_every,
                            blend="auto" if args.blend == ["auto"] else args.blend)
    cfg_text = painter.defaults["cfg_text"] if args.cfg_text is None else args.cfg_text
    note = {}
    with tqdm(total=model.settings["steps"], unit="step") as bar:
        if args.heatmaps:
            picture = draw_heatmaps(model, args.seed, args.p, cfg_text, bar)
        else:
            [pair], [note] = model.measure([args.seed], [args.p], [cfg_text], bar)
            picture = grid([list(pair)], [[args.source, args.edit]])
    save_png(picture, args.out, {})
    said = "".join(f", {key} {value if key == 'blend' else round(value, 3)}"
                   for key, value in note.items() if value is not None)
    print(f"{args.out}  {args.source} -> {args.edit}  (seed {args.seed}{said})")


def run_show(args: argparse.Namespace) -> None:
    """Print statistics and write the contact sheet."""
    cli.import_torch()
    from nanoip2p.common.saving import save_png
    from nanoip2p.dataset.show import contact_sheet, read_pairs, statistics
    sheet, pairs = args.sheet or args.folder / "contact-sheet.png", read_pairs(args.folder)
    check_writable(sheet)
    print(statistics(args.folder, pairs))
    if pairs:
        save_png(contact_sheet(pairs, args.rows, args.seed), sheet, {})
        print(f"wrote {sheet}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. `run` of the result is the function that executes the command."""
    parser = cli.make_parser(description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=cli.make_parser)
    add_captions(subparsers)
    add_pairs(subparsers)
    add_pair(subparsers)
    show = subparsers.add_parser("show", help="a contact sheet and statistics of a folder of pairs")
    show.add_argument("folder", type=Path, help="the --out folder of pairs, or the paper's dataset")
    show.add_argument("--sheet", type=Path, help="PNG to write (default: contact-sheet.png in the folder)")
    show.add_argument("--rows", type=cli.at_least(1), default=8, help="number of best and of random pairs")
    show.add_argument("--seed", type=cli.at_least(0), default=0, help="seed of the random pairs")
    show.set_defaults(run=run_show)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code, see cli.run."""
    def work() -> None:
        args = parse(argv)
        args.run(args)
    return cli.run(work, "stopped; finished work is kept, and the same command continues from there",
                   "try a smaller --batch or --resolution")


if __name__ == "__main__":
    sys.exit(main())

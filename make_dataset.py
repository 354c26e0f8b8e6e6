"""Make the paper's dataset (section 3.1): captions -> instructions and edited captions -> pairs of pictures.

    python make_dataset.py captions --input captions.txt --out data/prompts.jsonl --model gpt-4o-mini
    python make_dataset.py captions --backend scenes --n 1000 --out data/prompts.jsonl      # needs no server
    python make_dataset.py pairs --prompts data/prompts.jsonl --out data/pairs --weights SD-1.5
    torchrun --nproc-per-node 8 make_dataset.py pairs ...           # the same job over many GPUs
    python make_dataset.py show data/pairs                          # a contact sheet and statistics

captions and pairs go on where an earlier run with the same flags stopped.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from nanoip2p.checkpoint.load import open_checkpoint
from nanoip2p.checkpoint.tensors import DTYPES
from nanoip2p.clip_filter import Judge
from nanoip2p.common import cli
from nanoip2p.common.cli import add_flags, at_least, finite
from nanoip2p.common.device import pick_device
from nanoip2p.common.files import check_writable, replacing
from nanoip2p.dataset import finetune
from nanoip2p.dataset.captions import Settings, ask_all, read_captions
from nanoip2p.dataset.pairs import complete, make_pairs, read_prompts
from nanoip2p.dataset.rendered import write_scenes
from nanoip2p.dataset.show import contact_sheet, draw_heatmaps, read_pairs, statistics
from nanoip2p.images import grid, save_png
from nanoip2p.prompt_to_prompt import MODES, PairPainter
from nanoip2p.samplers import SAMPLERS
from nanoip2p.speed import fast as speed
from nanoip2p.text_to_image import TextToImage

BASE_MODEL = "gpt-4o-mini-2024-07-18"  # to be tuned; such need the date in their name


def add_captions(subparsers) -> None:
    """`captions`, and below it the paper's way: `prepare-finetune` and `finetune`."""
    parser = subparsers.add_parser("captions", help="captions -> instructions and edited captions",
                                   description="OPENAI_API_KEY and, for servers other than OpenAI's, "
                                               "OPENAI_BASE_URL say whom to ask.")
    parser.add_argument("--input", type=Path, help="captions: a text file, .jsonl (input or caption) or .csv")
    parser.add_argument("--column", help="key or column of the caption")
    parser.add_argument("--out", type=Path, default=Path("data/prompts.jsonl"),
                        help="what is there is not asked again, nor what .dropped.jsonl beside it lists")
    parser.add_argument("--backend", choices=("openai", "scenes"), default="openai",
                        help="a language model, or the nano world's own grammar")
    parser.add_argument("--n", type=at_least(1), help="the first N captions (all), or N scenes (1000)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the scenes")
    asking = parser.add_argument_group("asking a language model")
    asking.add_argument("--model", default="gpt-4o-mini", help="ft:... is asked as it was tuned")
    asking.add_argument("--temperature", type=finite, default=0.7)
    asking.add_argument("--concurrency", type=at_least(1), default=8, help="questions at a time")
    asking.add_argument("--moderate", action="store_true",
                        help="have captions and answers moderated, as the original")
    asking.add_argument("--max-tokens", type=at_least(0),
                        help="in and out, in this run; nothing is asked that could pass it")
    asking.add_argument("--max-cost", type=finite, help="the same in dollars; needs both prices")
    asking.add_argument("--price-in", type=finite, help="dollars for a million tokens in")
    asking.add_argument("--price-out", type=finite, help="and out")
    parser.set_defaults(run=run_captions)

    below = parser.add_subparsers(title="the paper's way", parser_class=cli.make_parser)
    prepare = below.add_parser("prepare-finetune", help="hand-written triplets -> training data")
    prepare.add_argument("human", type=Path, help=".jsonl of input, edit, output; the paper wrote 700")
    prepare.add_argument("--chats", type=Path, help="where to write (human.chat.jsonl)")
    prepare.set_defaults(run=run_prepare)
    tune = below.add_parser("finetune", help="upload training data, start a job, print its id")
    tune.add_argument("chats", type=Path, help="what prepare-finetune wrote")
    tune.add_argument("--model", default=BASE_MODEL)
    tune.add_argument("--epochs", type=at_least(1), default=1)
    tune.set_defaults(run=run_finetune)


def run_captions(args: argparse.Namespace) -> None:
    """Ask for, or draw, what `pairs` reads."""
    if args.backend == "scenes":
        check_writable(args.out)
        write_scenes(args.out, args.n or 1000, args.seed)
        print(f"{args.n or 1000} edits of scenes written to {args.out}")
        return
    prices = (args.price_in, args.price_out)
    if args.input is None:
        raise ValueError("--input is needed (or --backend scenes)")
    if args.max_cost is not None and None in prices:
        raise ValueError("--max-cost needs --price-in and --price-out")
    if min(0, *(price or 0 for price in prices)) < 0:
        raise ValueError("--price-in and --price-out must not be negative")
    captions, repeats = read_captions(args.input, args.column)
    print(f"{args.input}: {len(captions)} captions, {repeats} repeats left out")
    settings = Settings(args.model, args.temperature, args.concurrency, args.moderate, args.max_tokens,
                        args.max_cost, args.price_in or 0.0, args.price_out or 0.0)
    print(ask_all(captions[: args.n], settings, args.out))


def run_prepare(args: argparse.Namespace) -> None:
    """Write training data for a chat model."""
    out = args.chats or args.human.with_suffix(".chat.jsonl")
    print(f"{finetune.prepare(args.human, out)} chats written to {out}")


def run_finetune(args: argparse.Namespace) -> None:
    """Start a job, whose id is the last line."""
    job = finetune.start(args.chats, args.model, args.epochs)
    print("started; when it is done, the server names the model for captions --model ft:...", file=sys.stderr)
    print(job)


def add_pairs(subparsers) -> None:
    """Section 3.1.2. Settings have no default here, so that the weights folder can fill the gaps."""
    parser = subparsers.add_parser("pairs", help="caption pairs -> picture pairs that the CLIP filter passes")
    group = parser.add_argument_group("from what, and where to")
    group.add_argument("--prompts", type=Path, required=True, help="JSONL of input, edit and output")
    group.add_argument("--out", type=Path, required=True, help="folder; a stopped job in it goes on")
    group.add_argument("--weights", required=True, help="a text-to-picture model: a diffusers folder, a "
                                                        ".safetensors or .ckpt file, or a name on the Hub")
    add_flags(group)
    group.add_argument("--clip", help="folder or name on the Hub (the one that pairs.json beside the weights "
                                      "names, else openai/clip-vit-large-patch14)")
    group.add_argument("--skip-bad", action="store_true", help="leave out lines that are no prompts")
    # Names and defaults as in the paper's code; pairs.json in the weights folder has others
    group = parser.add_argument_group("candidates of each prompt")
    group.add_argument("--n-samples", type=at_least(1), help="how many (100)")
    group.add_argument("--early-stop", type=at_least(0), metavar="N", help="stop when N pass (0: never)")
    group.add_argument("--inject", choices=MODES, help="whose attention the edit takes over (self)")
    group.add_argument("--min-p2p", type=finite, help="least share of steps with injection (0.1)")
    group.add_argument("--max-p2p", type=finite, help="largest share (0.9)")
    group.add_argument("--min-cfg", type=finite, help="least guidance by the text (7.5)")
    group.add_argument("--max-cfg", type=finite, help="largest guidance (15)")
    group.add_argument("--steps", type=at_least(1), help="denoising steps (100)")
    group.add_argument("--resolution", type=at_least(1), help="of the square pictures (512)")
    group.add_argument("--seed", type=at_least(0), help="one seed makes one dataset (0)")
    group = parser.add_argument_group("the filter: least similarities, and how many to keep")
    group.add_argument("--clip-threshold", type=finite, help="of each caption and its picture (0.2)")
    group.add_argument("--clip-dir-threshold", type=finite, help="of the changes in both (0.2)")
    group.add_argument("--clip-img-threshold", type=finite, help="of the two pictures (0.7)")
    group.add_argument("--max-out-samples", type=at_least(1), help="pairs kept of a prompt (4)")
    group = parser.add_argument_group("running")
    group.add_argument("--batch", type=at_least(1), help="candidates that share a forward (8)")
    group.add_argument("--device", help="cuda, cuda:1, mps, cpu (the best there is)")
    group.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of painting; CLIP is fp32")
    group.add_argument("--fast", action="store_true", help="see speed.py; not for nano networks")
    parser.set_defaults(run=run_pairs)


def run_pairs(args: argparse.Namespace) -> None:
    """Check everything that can be checked, then paint. Under torchrun, one process for each GPU."""
    prompts, bad = read_prompts(args.prompts)
    if bad and not args.skip_bad:
        more = f" (and {len(bad) - 1} more bad lines)" if len(bad) > 1 else ""
        raise ValueError(f"{args.prompts}: {bad[0]}{more}; mend it, or leave out such lines with --skip-bad")
    if not prompts:
        raise ValueError(f"{args.prompts}: there is no prompt in it")
    first = os.environ.get("RANK", "0") == "0"
    device = args.device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = pick_device(device)
    checkpoint = open_checkpoint(args.weights, args.vae, args.tokenizer, args.raw_weights)
    settings = complete(vars(args), checkpoint.source, checkpoint.defaults)
    if first:
        skipped = f", {len(bad)} bad lines skipped" if bad else ""
        print(f"opened {args.weights}: {checkpoint.found}", file=sys.stderr)
        print(f"{len(prompts)} prompts{skipped}, {settings['n_samples']} candidates of each", file=sys.stderr)
    painter = TextToImage.load(checkpoint, device, DTYPES[args.dtype])
    painter.complete({key: settings[key] for key in ("steps", "resolution", "sampler")})
    if args.fast:
        speed.fast(painter.unet, lambda line: print(line, file=sys.stderr), injects=True)
    try:
        judge = Judge.load(settings["clip"], device)
    except ValueError as error:
        raise ValueError(f"the judge, --clip {settings['clip']}: {error}") from None
    names = {"weights": args.weights, "clip": settings["clip"]}
    make_pairs(prompts, args.out, painter, judge, settings, names, progress=first)
    if first:
        kept = [seeds for _, seeds in json.loads((args.out / "seeds.json").read_text())]
        done = sum((args.out / prompt.folder).exists() for prompt in prompts)
        others = "" if done == len(prompts) else ", others are at the rest or the same command goes on"
        print(f"{args.out}: {done} of {len(prompts)} prompts finished, {sum(map(len, kept))} pairs of "
              f"{len(kept)} prompts{others}; to see them, python make_dataset.py show {args.out}")


def add_pair(subparsers) -> None:
    """One pair, to try Prompt-to-Prompt on."""
    parser = subparsers.add_parser("pair", help="two captions -> two pictures that differ only by the edit")
    parser.add_argument("source", help="the caption of the first picture")
    parser.add_argument("edit", help="the caption of the second")
    parser.add_argument("--weights", default="weights/nano-sd", help="a text-to-picture model")
    add_flags(parser)
    parser.add_argument("--out", type=Path, default=Path("out/pair.png"))
    parser.add_argument("--heatmaps", action="store_true", help="show what each word was attended to as well")
    parser.add_argument("--inject", choices=MODES, default="self")
    parser.add_argument("--p", type=finite, default=0.5, help="share of the steps that inject")
    parser.add_argument("--blend", nargs=2, metavar=("WORD", "WORD"),
                        help="change the picture only where the source's and the edit's word are seen")
    parser.add_argument("--reweight", nargs=2, action="append", default=[], metavar=("WORD", "FACTOR"),
                        help="with cross or both: how much a word of the edited caption counts")
    parser.add_argument("--window", nargs=3, action="append", default=[], metavar=("WORD", "FROM", "TO"),
                        help="with cross or both: a word's own time, in shares of the steps, instead of --p")
    parser.add_argument("--cfg-text", type=finite, help="guidance (of the weights)")
    for name in ("steps", "resolution"):
        parser.add_argument(f"--{name}", type=at_least(1), help="(of the weights)")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), help="(of the weights)")
    parser.add_argument("--negative", default="", help="what to steer away from (nothing)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    parser.set_defaults(run=run_pair)


def run_pair(args: argparse.Namespace) -> None:
    """Paint one pair and write it side by side."""
    if not (args.source.strip() and args.edit.strip()):
        raise ValueError("a caption is empty; say what each picture shows")
    if args.heatmaps and args.inject == "none":
        raise ValueError("--heatmaps shows a run with injection; with --p 0 nothing is injected")
    try:
        args.reweight = {word: finite(factor) for word, factor in args.reweight}
        args.window = {word: (finite(begin), finite(end)) for word, begin, end in args.window}
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    if not all(0 <= begin <= end for begin, end in [(args.p, 1), *args.window.values()]):
        raise ValueError("--p is a share of the steps, 0 to 1, and a --window goes from one to a later one")
    check_writable(args.out)
    checkpoint = open_checkpoint(args.weights, args.vae, args.tokenizer, args.raw_weights)
    print(f"opened {args.weights}: {checkpoint.found}", file=sys.stderr)
    painter = TextToImage.load(checkpoint, args.device, DTYPES[args.dtype])
    model = PairPainter(painter, args.source, args.edit, args.inject, args.steps, args.sampler,
                        args.resolution, args.negative, args.reweight, args.window, args.blend)
    cfg_text = painter.defaults["cfg_text"] if args.cfg_text is None else args.cfg_text
    with tqdm(total=model.settings["steps"], unit="step", disable=args.inject == "none") as bar:
        if args.heatmaps:
            picture = draw_heatmaps(model, args.seed, args.p, cfg_text, bar)
        else:
            pair = model.paint([args.seed], [args.p], [cfg_text], bar)[0]
            picture = grid([list(pair)], [[args.source, args.edit]])
    with replacing(args.out) as temporary:
        picture.save(temporary, format="PNG")
    print(f"{args.out}  {args.source} -> {args.edit}  (seed {args.seed})")


def add_show(subparsers) -> None:
    """What came out."""
    parser = subparsers.add_parser("show", help="a contact sheet and statistics of a folder of pairs")
    parser.add_argument("folder", type=Path, help="the --out of pairs, or the paper's own dataset")
    parser.add_argument("--sheet", type=Path, help="the PNG to write (contact-sheet.png in the folder)")
    parser.add_argument("--rows", type=at_least(1), default=8, help="pairs of each sort on the sheet")
    parser.add_argument("--seed", type=at_least(0), default=0, help="another one draws other random pairs")
    parser.set_defaults(run=run_show)


def run_show(args: argparse.Namespace) -> None:
    """Print the statistics, write the contact sheet."""
    sheet = args.sheet or args.folder / "contact-sheet.png"
    pairs = read_pairs(args.folder)
    check_writable(sheet)
    print(statistics(args.folder, pairs))
    if pairs:
        save_png(contact_sheet(pairs, args.rows, args.seed), sheet, {})
        print(f"wrote {sheet}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of every command; `run` is the function that does it."""
    parser = cli.make_parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=cli.make_parser)
    add_captions(subparsers)
    add_pairs(subparsers)
    add_pair(subparsers)
    add_show(subparsers)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    def work() -> None:
        args = parse(argv)
        args.run(args)
    return cli.run(work, "stopped; what is finished is kept, and the same command goes on from there",
                   "try a smaller --batch or --resolution")


if __name__ == "__main__":
    sys.exit(main())

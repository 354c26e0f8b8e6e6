"""Make the paper's dataset (section 3.1): captions -> instructions and edited captions -> pairs of pictures.

    python make_dataset.py captions --input captions.txt --out data/prompts.jsonl --model gpt-4o-mini
    python make_dataset.py captions --backend scenes --n 1000 --out data/prompts.jsonl       # needs no server

Every subcommand goes on where an earlier run with the same flags stopped.
"""

import argparse
import sys
from pathlib import Path

from nanoip2p import cli, finetune
from nanoip2p.captions import Settings, ask_all
from nanoip2p.cli import at_least, finite
from nanoip2p.files import check_writable
from nanoip2p.prompts import read_captions, write_scenes

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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """One parser a subcommand; `run` is what does it."""
    parser = cli.make_parser(description=__doc__.splitlines()[0])
    subparsers = parser.add_subparsers(required=True, metavar="what", parser_class=cli.make_parser)
    add_captions(subparsers)
    return parser.parse_args(argv)


def work(argv: list[str] | None) -> None:
    """Do what the words ask for."""
    args = parse(argv)
    args.run(args)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    return cli.run(lambda: work(argv), "stopped; the same command goes on from here", "try a smaller --batch")


if __name__ == "__main__":
    sys.exit(main())

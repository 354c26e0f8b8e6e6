"""Score an editor or a text-to-image model."""

import argparse
import ast
import sys
from pathlib import Path

from nanoip2p.checkpoint import hub
from nanoip2p.common import cli
from nanoip2p.common.files import check_writable, write_json

DEFAULT = "as in sample.py (default: from the weights)"


def make_parser() -> argparse.ArgumentParser:
    """The parser of the five commands. `command` of its result is the name of the chosen command."""
    parser = cli.make_parser(prog="python -m nanoip2p.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     parser_class=cli.make_parser)

    def add(name: str, weights: str | list[str], n: int | None, **out):
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(source), clean=False)
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        several = "+" if isinstance(weights, list) else None
        command.add_argument("--weights", default=weights, nargs=several, help="as in sample.py")
        command.add_argument("--out", type=Path, **out)
        unit = {"captions": "captions", "magicbrush": "sessions (default: all)"}.get(name, "edits")
        command.add_argument("--n", type=cli.at_least(1), default=n, help=f"number of {unit}")
        command.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
        if name != "calls":
            command.add_argument("--steps", type=cli.at_least(1), help=DEFAULT)
            command.add_argument("--cfg-text", type=cli.finite, help=DEFAULT if name != "curve" else (
                "as in sample.py (default: 7.5; for nano weights: 2)"))
            command.add_argument("--sampler", choices=cli.SAMPLERS, help=DEFAULT)
        return command.add_argument

    flag = add("scenes", "weights/nano-ip2p", 500, help="folder for scores and pictures of failures")
    flag("--combinations", choices=("seen", "held-out"), default="seen", help="which edits, see above")
    flag("--wordings", choices=("held-out", "plain", "polite", "seen", "reworded"), default="held-out",
         help="which instructions, see above")
    flag("--deep-every", type=cli.at_least(1), default=1, metavar="N", help="as in sample.py")
    flag("--cfg-image", type=cli.finite, help=DEFAULT)

    flag = add("captions", "weights/nano-sd", 320, help="folder for scores.json")
    flag("--clip", default="weights/nano-clip", help="CLIP model: a folder or a name on the Hub")

    flag = add("curve", "weights/nano-ip2p", 300, default=Path("runs/curve"), help="folder for points, plot")
    flag("--sdedit", type=Path, metavar="WEIGHTS", help="text-to-image model for the SDEdit baseline")
    flag("--data", default="scenes", help="as in train.py; both pictures of a pair need captions")
    flag("--split", choices=("train", "validation", "test"), default="test", help="split to measure on")
    flag("--clip", help=f"CLIP model (default: {hub.CLIP}; nano: weights/nano-clip)")
    flag("--cfg-images", type=cli.finite, nargs="+", metavar="CFG", help="default: 1 to 2.2; nano: 0.2 to 2")
    flag("--strengths", type=cli.finite, nargs="+", metavar="SHARE", help="strengths of SDEdit",
         default=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    flag("--seed", type=cli.at_least(0), default=0, help="edit i has seed + i")
    flag("--batch", type=cli.at_least(1), default=30, help="number of edits in a forward pass")

    flag = add("calls", ["weights/nano-ip2p"], 140, default=Path("runs/calls"),
               help="folder for points and plot")
    flag("--calls", type=cli.at_least(1), nargs="+", default=(2, 4, 8, 16, 30, 60), metavar="N",
         help="network calls per edit")

    flag = add("magicbrush", "weights/nano-ip2p", None, required=True, help="folder for scores and pictures")
    flag("--data", type=Path, required=True, help="folder of a split, with edit_turns.json")
    flag("--clip", default="openai/clip-vit-base-patch32", help="CLIP model, as in MagicBrush")
    flag("--cfg-image", type=cli.finite, help=DEFAULT)
    flag("--seed", type=cli.at_least(0), default=0, help="seed of every edit, as in MagicBrush")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command, write its numbers to <out>/scores.json, print its text, and return the exit code."""
    def work() -> None:
        args = make_parser().parse_args(argv)
        cli.import_torch()
        from nanoip2p.evaluate import calls, captions, curve, magicbrush, scenes
        run = {"scenes": scenes.run, "captions": captions.run, "curve": curve.run, "calls": calls.run,
               "magicbrush": magicbrush.run}[args.command]
        if args.out:
            check_writable(args.out / "scores.json")
        text, numbers = run(args)
        if args.out and numbers:
            write_json(numbers, args.out / "scores.json")
        print(text)

    return cli.run(work, "interrupted; finished files in --out stay", "try a smaller --n or --device cpu")


if __name__ == "__main__":
    sys.exit(main())

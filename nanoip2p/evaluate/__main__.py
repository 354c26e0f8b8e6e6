"""Score an editor or a text-to-picture model."""

import argparse
import sys
from pathlib import Path

from nanoip2p.clip_filter import Judge
from nanoip2p.common import cli
from nanoip2p.common.cli import at_least, finite
from nanoip2p.common.files import check_writable, write_json
from nanoip2p.dataset.layouts import SPLITS
from nanoip2p.editor import Editor
from nanoip2p.evaluate import captions, curve, magicbrush, scenes
from nanoip2p.images import grid, save_png
from nanoip2p.samplers import SAMPLERS
from nanoip2p.text_to_image import TextToImage


def make_parser() -> argparse.ArgumentParser:
    """Flags of the four commands; `run` is the function of the chosen command."""
    parser = cli.make_parser(prog="python -m nanoip2p.evaluate", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=cli.make_parser)

    def add(name: str, run, text: str, weights: str = "nano-ip2p", n: int | None = None, **out):
        command = commands.add_parser(name, help=text, description=text, formatter_class=cli.HelpWithDefaults)
        command.set_defaults(run=run)
        command.add_argument("--weights", default=f"weights/{weights}", help="as in sample.py")
        command.add_argument("--out", type=Path, **out)
        command.add_argument("--n", type=at_least(1), default=n, help="how many edits, captions or sessions")
        for flag, kind in (("--steps", at_least(1)), ("--cfg-text", finite)):
            command.add_argument(flag, type=kind, help="as in sample.py; the weights name the default")
        command.add_argument("--sampler", choices=sorted(SAMPLERS), help="the weights name the default")
        command.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
        return command.add_argument

    flag = add("scenes", run_scenes, "edit success and preservation on rendered scenes", n=500,
               help="folder for scores.json and failed.png, which shows some failures")
    flag("--phrasings", choices=("held-out", "seen"), default="held-out", help="wording of the instructions")
    flag("--combinations", choices=("seen", "held-out"), default="seen", help="of things, colours and edits")
    flag("--cfg-image", type=finite, help="as in sample.py; the weights name the default")

    flag = add("captions", run_captions, "how often CLIP finds the caption of a painted picture", n=320,
               weights="nano-sd", help="folder for scores.json")
    flag("--clip", default="weights/nano-clip", help="folder or Hub name")

    flag = add("curve", curve.run, "figure 8 of the paper: the editor, and SDEdit as the baseline", n=300,
               default=Path("runs/curve"), help="folder; points in it are not measured again")
    flag("--sdedit", type=Path, metavar="WEIGHTS", help="text-to-picture model for the SDEdit baseline")
    flag("--data", default="scenes", help="as in train.py; both pictures of a pair need captions")
    flag("--split", choices=list(SPLITS), default="test", help="of the data")
    flag("--clip", help=f"folder or Hub name ({curve.PAPER['clip']}; {curve.NANO['clip']} for nano)")
    flag("--cfg-images", type=finite, nargs="+", metavar="CFG", help="(1.0 ... 2.2; 0.2 ... 2.0 for nano)")
    flag("--strengths", type=finite, nargs="+", default=curve.STRENGTHS, metavar="SHARE", help="of SDEdit")
    flag("--seed", type=at_least(0), default=0, help="edit i has seed + i")
    flag("--batch", type=at_least(1), default=30, help="edits that share a forward pass")

    flag = add("magicbrush", magicbrush.run, "MagicBrush's metrics on a local copy of it", required=True,
               help="folder for scores.json and edited/; pictures in it are not made again")
    flag("--data", type=Path, required=True,
         help="folder of a split, with edit_turns.json, global_descriptions.json and images/")
    flag("--clip", default=magicbrush.CLIP, help="folder or Hub name; MagicBrush uses the default")
    flag("--turns", choices=("single", "multi", "both"), default="both",
         help="edit the dataset's picture, or the editor's own picture of the turn before")
    flag("--cfg-image", type=finite, help="as in sample.py; the weights name the default")
    flag("--seed", type=at_least(0), default=0, help="of every edit, as in MagicBrush")
    return parser


def run_scenes(args: argparse.Namespace) -> tuple[str, dict]:
    """Scores of an editor on rendered scenes, as text and as numbers; writes failed.png to --out."""
    editor = Editor.load(args.weights, args.device)
    questions = scenes.questions(args.n, args.phrasings, args.combinations)
    settings = {key: getattr(args, key) for key in ("steps", "cfg_text", "cfg_image", "sampler")}
    rows = scenes.score_scenes(editor, questions, settings)
    failed = [row for row in rows if not row["success"]][:16]
    if args.out and failed:
        labels = [["input", row["instruction"], "right answer"] for row in failed]
        save_png(grid([list(row["pictures"]) for row in failed], labels), args.out / "failed.png", {})
    return scenes.table(rows)


def run_captions(args: argparse.Namespace) -> tuple[str, dict]:
    """Scores of a text-to-picture model on captions of rendered scenes, as text and as numbers."""
    painter = TextToImage.load(args.weights, args.device)
    judge = Judge.load(args.clip, painter.device)
    settings = {key: getattr(args, key) for key in ("steps", "cfg_text", "sampler")}
    return captions.score_captions(painter, judge, captions.captioned(args.n), settings)


def score(argv: list[str] | None) -> str:
    """Run a command, write scores.json to --out if the command gives numbers; returns the text to print."""
    args = make_parser().parse_args(argv)
    if args.out:
        check_writable(args.out / "scores.json")
    text, numbers = args.run(args)
    if args.out and numbers:
        write_json(numbers, args.out / "scores.json")
    return text


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    return cli.run(lambda: print(score(argv)), "interrupted; files in --out are complete",
                   "try a smaller --n or --device cpu")


if __name__ == "__main__":
    sys.exit(main())

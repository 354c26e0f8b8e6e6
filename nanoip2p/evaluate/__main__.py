"""Score an editor, or a text-to-picture model."""

import argparse
import sys
from pathlib import Path

from nanoip2p.clip_filter import Judge
from nanoip2p.common import cli
from nanoip2p.common.cli import at_least, finite
from nanoip2p.common.files import check_writable, write_json
from nanoip2p.editor import Editor
from nanoip2p.evaluate import curve, magicbrush
from nanoip2p.evaluate.captions import CHOICES, captioned, score_captions
from nanoip2p.evaluate.scenes import questions, rate, score_scenes, table
from nanoip2p.images import grid, save_png
from nanoip2p.samplers import SAMPLERS
from nanoip2p.text_to_image import TextToImage


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of `python -m nanoip2p.evaluate`."""
    parser = cli.make_parser(prog="python -m nanoip2p.evaluate", description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True, parser_class=cli.make_parser)
    scenes = what.add_parser("scenes", help="edit success and preservation on rendered scenes")
    scenes.add_argument("--weights", type=Path, default=Path("weights/nano-ip2p"))
    scenes.add_argument("--n", type=at_least(1), default=500, help="number of edits")
    scenes.add_argument("--phrasings", choices=("held-out", "seen"), default="held-out")
    scenes.add_argument("--combinations", choices=("seen", "held-out"), default="seen",
                        help="of things, colours and edits")
    scenes.add_argument("--cfg-image", type=finite, help="as in sample.py; by default what the weights name")
    captions = what.add_parser("captions", help="how often CLIP finds the caption of a painted picture")
    captions.add_argument("--weights", type=Path, default=Path("weights/nano-sd"))
    captions.add_argument("--clip", default="weights/nano-clip", help="the judge: folder or Hub name")
    captions.add_argument("--n", type=at_least(1), default=320, help="captions, in multiples of 32")
    for each in (scenes, captions):
        each.add_argument("--split", default="test", help="which stream of scenes; training uses 'train'")
        each.add_argument("--out", type=Path, help="folder for scores.json and failed.png, some failures")
        each.add_argument("--device")
        for name, kind in (("steps", at_least(1)), ("cfg-text", finite)):
            each.add_argument(f"--{name}", type=kind, help="as in sample.py; by default of the weights")
        each.add_argument("--sampler", choices=sorted(SAMPLERS), help="the same")
    curve.add_flags(what.add_parser("curve", help="the paper's figure 8, and SDEdit, its baseline"))
    magicbrush.add_flags(what.add_parser("magicbrush", help="MagicBrush's metrics, of a local copy of it"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Ask, score, print; with --out keep the numbers and some failures."""
    if args.what not in ("scenes", "captions"):
        print({"curve": curve, "magicbrush": magicbrush}[args.what].run(args))
        return
    if args.out:
        check_writable(args.out / "scores.json")
    rows, text, numbers, labels = (run_scenes if args.what == "scenes" else run_captions)(args)
    print(text)
    if args.out:
        failed = [row for row in rows if not row["success"]][:16]
        if failed:
            sheet = grid([list(row["pictures"]) for row in failed], [labels(row) for row in failed])
            save_png(sheet, args.out / "failed.png", {})
        write_json(numbers, args.out / "scores.json")


def run_captions(args: argparse.Namespace) -> tuple:
    """Rows, text and numbers of `captions`, and how to label a row's pictures."""
    painter = TextToImage.load(args.weights, args.device)
    judge = Judge.load(args.clip, painter.device)
    settings = {key: getattr(args, key) for key in ("steps", "cfg_text", "sampler")}
    rows = score_captions(painter, judge, captioned(args.n, args.split), settings)
    numbers, lines = {"n": len(rows)}, [f"the true caption comes first of {CHOICES}, of {len(rows)} pictures"]
    for key, kind in (("success", "painted"), ("true_success", "true renders")):
        numbers[kind], error = rate([row[key] for row in rows])
        lines.append(f"  {kind:<14}{numbers[kind]:>6.1%} ± {error:.1%}")
    return rows, "\n".join(lines), numbers, lambda row: [row["caption"], "a true picture"]


def run_scenes(args: argparse.Namespace) -> tuple:
    """The same of `scenes`."""
    editor = Editor.load(args.weights, args.device)
    asked = questions(args.n, args.phrasings, args.combinations, args.split)
    settings = {key: getattr(args, key) for key in ("steps", "cfg_text", "cfg_image", "sampler")}
    rows = score_scenes(editor, asked, settings)
    return rows, *table(rows), lambda row: ["input", row["instruction"], "true answer"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    return cli.run(lambda: run(parse(argv)), "interrupted; what is in --out is whole",
                   "try a smaller --n or --device cpu")


if __name__ == "__main__":
    sys.exit(main())

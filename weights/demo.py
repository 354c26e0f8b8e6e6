"""Draw twelve edits by the shipped nano editor as one labelled picture (`make demo`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanoip2p.common import cli
from nanoip2p.common.files import check_writable
from nanoip2p.common.grids import grid
from nanoip2p.common.saving import save_png
from nanoip2p.editor import Editor
from nanoip2p.images import open_image

SETTINGS = {"sampler": "dpmpp_2m", "steps": 4}  # as good as 20 steps of the default, see docs/results.md
WEIGHTS = Path(__file__).resolve().with_name("nano-ip2p")
EDITS = {
    "house": ("make it night", "turn the house blue", "replace the house with a tree"),
    "car": ("could you paint the automobile yellow please?", "add a pink balloon in the middle",
            "make it rainy"),
    "balloon": ("I want it to be dusk", "turn the ground into grass", "add a red car on the left"),
    "rocket": ("remove the tent", "turn the rocket into a mushroom", "make it day"),
}


def run(weights: Path, out: Path, device: str | None = None) -> None:
    """Edit the pictures in <weights>/examples, and write a grid of inputs and edits to `out`."""
    check_writable(out)
    editor = Editor.load(weights, device)
    inputs = {name: open_image(weights / "examples" / f"{name}.png") for name in EDITS}
    asked = [(inputs[name], edit) for name, edits in EDITS.items() for edit in edits]
    edited = iter(editor.edit(*map(list, zip(*asked)), seed=0, progress=True, batch=len(asked),
                              **SETTINGS))
    rows = [[inputs[name], *(next(edited) for _ in edits)] for name, edits in EDITS.items()]
    save_png(grid(rows, [["input", *edits] for edits in EDITS.values()]), out, {})
    print(f"wrote {out}: the inputs on the left, the edits on the right")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    parser = cli.make_parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the nano editor")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first that works")
    return cli.run(lambda: run(**vars(parser.parse_args(argv))),
                   "interrupted; nothing was written", "try --device cpu")


if __name__ == "__main__":
    sys.exit(main())

"""Measure what masks do to edits of the nano world, where the region that an edit changes is known.

    python weights/masks.py --n 140

Edits without a mask, with the mask that `--mask auto` finds (sharp, or blurred by 4), and with the true mask.
For each, prints how many edits succeed, and the PSNR of the pixels that must not change, as in `python -m
nanoip2p.evaluate scenes`. Also prints the IoU (intersection over union) of found and true masks.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoip2p.common import cli
from nanoip2p.editing.masks import find_masks
from nanoip2p.editor import Editor
from nanoip2p.evaluate.scenes import BATCH, choose_edits, instruct, nearest_edit, rate, unchanged_psnr
from nanoip2p.world.scenes import EDIT_KINDS


def score(editor: Editor, chosen: list) -> tuple[dict[str, list], list[tuple[str, float]]]:
    """(success, PSNR) of each edit by kind of mask; (kind of edit, IoU of the found mask) of each edit."""
    scores, overlaps = {"none": [], "auto": [], "true": [], "auto, blur 4": []}, []
    for i in tqdm(range(0, len(chosen), BATCH), desc=f"editing, {BATCH} at a time"):
        part = chosen[i : i + BATCH]
        texts, seeds = instruct([edit for _, edit in part]), list(range(i, i + len(part)))
        before = [scene.render(editor.side) for scene, _ in part]
        after = [edit.scene.render(editor.side) for _, edit in part]
        changed = [(np.asarray(a) != np.asarray(b)).any(-1) for a, b in zip(before, after)]
        auto = find_masks(editor, before, texts, seeds)
        for (_, edit), found, true in zip(part, auto, changed):
            white = np.asarray(found) > 0
            overlaps.append((edit.kind, (white & true).sum() / (white | true).sum()))
        regions = [Image.fromarray(true * np.uint8(255)) for true in changed]
        masks = {"none": None, "auto": auto, "true": regions, "auto, blur 4": auto}
        for name, rows in scores.items():
            made = editor.edit(before, texts, seed=seeds, batch=BATCH, masks=masks[name],
                               mask_blur=4 if "blur" in name else 0)
            rows += [(nearest_edit(picture, scene) == edit.scene, unchanged_psnr(picture, a, b))
                     for (scene, edit), picture, a, b in zip(part, made, before, after)]
    return scores, overlaps


def run(weights: str, n: int) -> str:
    """The table as text."""
    scores, overlaps = score(Editor.load(weights), choose_edits(n))
    lines = []
    for name, rows in scores.items():
        fraction, error = rate([success for success, _ in rows])
        psnr = np.mean([value for _, value in rows if value is not None])
        lines.append(f"mask {name:<14}{fraction:>7.1%} ± {error:.1%}   unchanged pixels {psnr:.1f} dB")
    by_kind = {kind: [value for one, value in overlaps if one == kind] for kind in EDIT_KINDS}
    return "\n".join([*lines, f"IoU of auto {np.mean([value for _, value in overlaps]):.2f}: " + ", ".join(
        f"{kind} {np.mean(values):.2f}" for kind, values in by_kind.items() if values)])


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    def work() -> None:
        parser = cli.make_parser(description=__doc__)
        parser.add_argument("--weights", default="weights/nano-ip2p")
        parser.add_argument("--n", type=cli.at_least(1), default=140, help="number of edits")
        print(run(**vars(parser.parse_args(argv))))
    return cli.run(work, "stopped; nothing was printed", "close other programs")


if __name__ == "__main__":
    sys.exit(main())

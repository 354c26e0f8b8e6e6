"""Figure 8 of the paper: how much an edit does, against how much of the input it keeps.

    python -m nanoip2p.evaluate curve --sdedit weights/nano-sd --out runs/curve
    python -m nanoip2p.evaluate curve --weights instruct-pix2pix.safetensors --data data/pairs --out runs/real

A point is a setting: the editor's cfg_image, or with --sdedit the strength of SDEdit on a text-to-picture
model. To the right, CLIP's directional similarity (Gal et al. 2021): the change of the picture against the
change of its captions. Upwards, the similarity of the edited picture and the input. Further up and to the
right is better. A line of <out>/curve.jsonl is a point, and one that is there is not made again. All points
of the same data and judge are drawn: another call, with other --weights and the same --out, adds a curve.

Pictures reach CLIP in the range it was trained on; the script of the original gives it another.
"""

import argparse
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

from nanoip2p.checkpoint import hub
from nanoip2p.clip_filter import Judge, similarities
from nanoip2p.common.cli import at_least, finite
from nanoip2p.common.files import append, check_writable, rows_of
from nanoip2p.common.plots import plot
from nanoip2p.dataset.layouts import SPLITS, Pair, load_picture, read_data
from nanoip2p.dataset.rendered import EDITS_PER_SCENE, scene_pairs
from nanoip2p.editor import Editor
from nanoip2p.samplers import SAMPLERS
from nanoip2p.text_to_image import TextToImage, steps_taken

PAPER = {"cfg_text": 7.5, "cfg_images": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2), "clip": hub.CLIP}  # section 4.1
NANO = {"cfg_text": 2.0, "cfg_images": (0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0), "clip": "weights/nano-clip"}
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
KNOBS = {"editor": "cfg_image", "SDEdit": "strength"}  # what changes along a curve
CURVE = ("method", "weights", "cfg_text")              # and what does not
LABELS_APART = 0.02  # where points crowd, some go without
AXES = {"direction": "CLIP's directional similarity", "image": "CLIP's similarity to the input"}


def examples(data: str, split: str, n: int) -> list[Pair]:
    """A pair of each of up to n items (or scenes) with captions. ValueError when there are none, or one.

    One of each, because the standard errors take them as independent.
    """
    if data == "scenes":
        return scene_pairs(n * EDITS_PER_SCENE, split)[::EDITS_PER_SCENE]
    items = read_data(data, split)
    pairs = [item[0] for item in items if item[0].captions][:n]
    if len(pairs) < 2:
        raise ValueError(f"{data} has {len(pairs) or 'no'} pairs with captions of both pictures in its "
                         f"{split} split, of two that are needed; try another --split, or see data.py")
    return pairs


def measure(pairs: list[Pair], judge: Judge, resolution: int, batch: int, seed: int, edit: Callable,
            name: str) -> dict:
    """Means and standard errors of both similarities. edit: (pictures, pairs, seeds) -> edited pictures."""
    rows = []
    for begin in tqdm(range(0, len(pairs), batch), desc=name, leave=False):
        part = pairs[begin : begin + batch]
        before = [load_picture(pair.before, resolution) for pair in part]
        after = edit(before, part, [seed + begin + i for i in range(len(part))])
        seen = judge.encode_pictures([*before, *after]).chunk(2)                       # (B, P) each
        read = [judge.encode_texts(list(texts)) for texts in zip(*(pair.captions for pair in part))]
        rows.append(similarities(*seen, *read)[:, 2:])                                 # (B, 2)
    table = torch.cat(rows).double()
    means, errors = table.mean(0).tolist(), (table.std(0) / len(table) ** 0.5).tolist()
    return dict(zip(AXES, means)) | dict(zip(("direction_error", "image_error"), errors))


def draw(rows: list[dict], axes) -> None:
    """A curve for each of the weights and cfg_text, with standard errors, points with their settings."""
    keys, curve = ("direction", "image", "image_error", "direction_error"), itemgetter(*CURVE)
    for method, weights, cfg_text in dict.fromkeys(map(curve, rows)):
        knob = KNOBS[method]
        own = sorted((row for row in rows if curve(row) == (method, weights, cfg_text)), key=itemgetter(knob))
        axes.errorbar(*([row[key] for row in own] for key in keys), marker=".", capsize=2,
                      label=f"{method}, {Path(weights).name}, cfg_text {cfg_text:g}, by {knob}")
        labelled = (-1.0, -1.0)
        for row in own:
            place = row["direction"], row["image"]
            if max(abs(a - b) for a, b in zip(place, labelled)) > LABELS_APART:
                axes.annotate(f"{row[knob]:g}", place, (4, 4), fontsize=8, textcoords="offset points")
                labelled = place


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate curve`."""
    parser.add_argument("--weights", type=Path, default=Path("weights/nano-ip2p"), help="the editor")
    parser.add_argument("--sdedit", type=Path, metavar="WEIGHTS", help="the baseline, on these")
    parser.add_argument("--data", default="scenes", help="as of train.py; it has to have captions")
    parser.add_argument("--split", choices=list(SPLITS), default="test")
    parser.add_argument("--n", type=at_least(2), default=300, help="edits for each point, at most")
    parser.add_argument("--clip", help=f"the judge ({hub.CLIP}; {NANO['clip']} for nano)")
    parser.add_argument("--cfg-text", type=finite, help="(7.5; 2 for nano)")
    parser.add_argument("--cfg-images", type=finite, nargs="+", metavar="CFG",
                        help="(1.0 ... 2.2; 0.2 ... 2.0 for nano)")
    parser.add_argument("--strengths", type=finite, nargs="+", default=list(STRENGTHS), metavar="SHARE",
                        help="of SDEdit")
    parser.add_argument("--steps", type=at_least(1), help="as in sample.py; by default of the weights")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), help="the same")
    parser.add_argument("--seed", type=at_least(0), default=0, help="picture i has seed + i")
    parser.add_argument("--batch", type=at_least(1), default=30, help="pictures that share a forward")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path("runs/curve"), help="folder; goes on in it")


def run(args: argparse.Namespace) -> str:
    """Measure the points that are missing, plot all; returns a table."""
    path = args.out / "curve.jsonl"
    check_writable(path)
    editor = Editor.load(args.weights, args.device)
    usual = NANO if editor.side < 256 else PAPER
    clip, cfg_text = args.clip or usual["clip"], usual["cfg_text"] if args.cfg_text is None else args.cfg_text
    pairs, judge = examples(args.data, args.split, args.n), Judge.load(clip, editor.device)
    common = {"data": args.data, "split": args.split, "clip": clip, "n": len(pairs), "steps": args.steps,
              "sampler": args.sampler, "seed": args.seed}
    base = {"method": "editor", "weights": str(args.weights), "networks": editor.fingerprint,
            "cfg_text": cfg_text, **common}
    points = [base | {"cfg_image": value} for value in args.cfg_images or usual["cfg_images"]]
    if args.sdedit:
        painter = TextToImage.load(args.sdedit, args.device)
        settings = painter.complete({"steps": args.steps, "cfg_text": None, "sampler": args.sampler,
                                     "resolution": editor.side})
        for value in args.strengths:  # told now, and not after the editor's points
            steps_taken(settings["steps"], value)
        base = {"method": "SDEdit", "weights": str(args.sdedit), "networks": painter.fingerprint,
                "cfg_text": settings["cfg_text"], **common}
        points += [base | {"strength": value} for value in args.strengths]

    def edit(point: dict, before: list, part: list[Pair], seeds: list[int]) -> list:
        if point["method"] == "SDEdit":
            return painter.generate([pair.captions[1] for pair in part], seed=seeds, batch=len(part),
                                    images=before, strength=point["strength"], **settings)
        return editor.edit(before, [pair.edit for pair in part], args.steps, cfg_text, point["cfg_image"],
                           seeds, args.sampler, batch=len(part))

    rows, known = [], rows_of(path)
    for point in points:
        row = next((row for row in known if point.items() <= row.items()), None)
        if row is None:
            name = f"{point['method']} {point[KNOBS[point['method']]]}"
            row = point | measure(pairs, judge, editor.side, args.batch, args.seed, partial(edit, point),
                                  name)
            append(path, row)
        rows.append(row)
    now = {point["weights"]: point["networks"] for point in points}
    drawn = [row for row in rows_of(path) if common.items() <= row.items()  # of other weights as well
             and row["networks"] == now.get(row["weights"], row["networks"])]
    is_drawn = plot(args.out / "curve.png", partial(draw, drawn), (10, 7), xlabel=AXES["direction"],
                    ylabel=AXES["image"])
    return (f"{table(rows)}\n{len(pairs)} edits; points are in {path}"
            + "; pip install matplotlib to see them drawn" * (not is_drawn))


def table(rows: list[dict]) -> str:
    """A line for each point."""
    lines = [f"{'':<8}{'setting':>16}{'direction':>18}{'image':>18}"]
    for row in rows:
        knob = KNOBS[row["method"]]
        both = "".join(f"{row[key]:>10.3f} ± {row[key + '_error']:.3f}" for key in AXES)
        lines.append(f"{row['method']:<8}{knob:>10} {row[knob]:>5g}{both}")
    return "\n".join(lines)

"""Figure 8 of the paper: how much an edit does, against how much of the input it keeps.

    python -m nanoip2p.evaluate curve --sdedit weights/nano-sd --out runs/curve
    python -m nanoip2p.evaluate curve --weights instruct-pix2pix.safetensors --data data/pairs --out runs/real

A point is one setting: a cfg_image of the editor or, with --sdedit, a strength of SDEdit on a text-to-picture
model. Its x is CLIP's directional similarity (Gal et al. 2021): the change of the pictures against the change
of their captions. Its y is CLIP's similarity of the edited picture and the input. Larger is better for both.

Each point is a line of <out>/curve.jsonl; a point with a line is not measured again. The plot shows all
points of the same data and CLIP: a second call with other --weights and the same --out adds a curve.

CLIP gets pixels in the range it was trained on; the script of the original gives it another range.
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
from nanoip2p.common.files import append, read_jsonl
from nanoip2p.common.plots import plot
from nanoip2p.dataset.layouts import Pair, load_picture, read_data
from nanoip2p.dataset.rendered import EDITS_PER_SCENE, scene_pairs
from nanoip2p.editor import Editor
from nanoip2p.text_to_image import TextToImage, steps_taken

PAPER = {"cfg_text": 7.5, "cfg_images": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2), "clip": hub.CLIP}  # section 4.1
NANO = {"cfg_text": 2.0, "cfg_images": (0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0), "clip": "weights/nano-clip"}
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
KNOBS = {"editor": "cfg_image", "SDEdit": "strength"}  # the setting that changes along a curve
AXES = {"direction": "CLIP's directional similarity", "image": "CLIP's similarity to the input"}


def examples(data: str, split: str, n: int) -> list[Pair]:
    """One pair with captions of each of up to n items or scenes: standard errors need independent pairs.

    ValueError when fewer than two items have captions.
    """
    items = zip(scene_pairs(n * EDITS_PER_SCENE, split)[::EDITS_PER_SCENE]) if data == "scenes" else (
        read_data(data, split))
    pairs = [item[0] for item in items if item[0].captions][:n]
    if len(pairs) < 2:
        raise ValueError(f"{data} has {len(pairs) or 'no'} pairs with captions in its {split} split; two are "
                         "needed, try another --split")
    return pairs


def measure(pairs: list[Pair], judge: Judge, resolution: int, batch: int, seed: int, edit: Callable,
            name: str) -> dict:
    """Means and standard errors of both similarities. edit: (pictures, pairs, seeds) -> edited pictures."""
    rows = []
    for start in tqdm(range(0, len(pairs), batch), desc=name, leave=False):
        part = pairs[start : start + batch]
        before = [load_picture(pair.before, resolution) for pair in part]
        after = edit(before, part, [seed + start + i for i in range(len(part))])
        images = judge.encode_pictures([*before, *after]).chunk(2)                     # (B, P) each
        texts = [judge.encode_texts(list(captions)) for captions in zip(*(pair.captions for pair in part))]
        rows.append(similarities(*images, *texts)[:, 2:])                              # (B, 2)
    table = torch.cat(rows).double()
    means, errors = table.mean(0).tolist(), (table.std(0) / len(table) ** 0.5).tolist()
    return dict(zip(AXES, means)) | dict(zip(("direction_error", "image_error"), errors))


def draw(rows: list[dict], axes) -> None:
    """One curve for each method, weights and cfg_text, with standard errors; both ends show their setting."""
    curves = {}
    for row in rows:
        curves.setdefault((row["method"], row["weights"], row["cfg_text"]), []).append(row)
    for (method, weights, cfg_text), curve in curves.items():
        knob = KNOBS[method]
        curve = sorted(curve, key=itemgetter(knob))
        keys = ("direction", "image", "image_error", "direction_error")
        x, y, y_error, x_error = zip(*map(itemgetter(*keys), curve))
        axes.errorbar(x, y, y_error, x_error, marker=".", capsize=2,
                      label=f"{method}, {Path(weights).name}, cfg_text {cfg_text:g}, by {knob}")
        for i in {0, len(curve) - 1}:
            axes.annotate(f"{curve[i][knob]:g}", (x[i], y[i]), (4, 4), fontsize=8, textcoords="offset points")


def run(args: argparse.Namespace) -> tuple[str, None]:
    """Measure the missing points, plot all of them; returns a table. args: flags, see __main__.py."""
    path, editor = args.out / "curve.jsonl", Editor.load(args.weights, args.device)
    usual = NANO if editor.side < 256 else PAPER
    clip, cfg_text = args.clip or usual["clip"], usual["cfg_text"] if args.cfg_text is None else args.cfg_text
    pairs, judge = examples(args.data, args.split, args.n), Judge.load(clip, editor.device)

    def by_editor(cfg_image: float, before: list, part: list[Pair], seeds: list[int]) -> list:
        return editor.edit(before, [pair.edit for pair in part], steps=args.steps, cfg_text=cfg_text,
                           cfg_image=cfg_image, seed=seeds, sampler=args.sampler, batch=len(part))

    def by_sdedit(strength: float, before: list, part: list[Pair], seeds: list[int]) -> list:
        return painter.generate([pair.captions[1] for pair in part], images=before, strength=strength,
                                seed=seeds, batch=len(part), **settings)

    curves = [("editor", args.weights, editor, cfg_text, args.cfg_images or usual["cfg_images"], by_editor)]
    if args.sdedit:
        painter = TextToImage.load(args.sdedit, args.device)
        settings = painter.complete({"steps": args.steps, "cfg_text": None, "sampler": args.sampler,
                                     "resolution": editor.side})
        for strength in args.strengths:  # a bad strength is an error before the long work
            steps_taken(settings["steps"], strength)
        curves.append(("SDEdit", args.sdedit, painter, settings["cfg_text"], args.strengths, by_sdedit))

    rows = []
    common = {"data": args.data, "split": args.split, "clip": clip, "n": len(pairs), "steps": args.steps,
              "sampler": args.sampler, "seed": args.seed}
    for method, weights, model, scale, values, edit in curves:
        for value in values:
            point = {"method": method, "weights": str(weights), "networks": model.fingerprint,
                     "cfg_text": scale, **common, KNOBS[method]: value}
            if not any(point.items() <= row.items() for row in read_jsonl(path)):
                append(path, point | measure(pairs, judge, editor.side, args.batch, args.seed,
                                             partial(edit, value), f"{method} {value}"))
            rows.append(next(row for row in read_jsonl(path) if point.items() <= row.items()))
    networks = {row["weights"]: row["networks"] for row in rows}  # leaves out points of replaced weights
    drawn = [row for row in read_jsonl(path) if common.items() <= row.items()
             and row["networks"] == networks.get(row["weights"], row["networks"])]
    is_drawn = plot(args.out / "curve.png", partial(draw, drawn), (10, 7), xlabel=AXES["direction"],
                    ylabel=AXES["image"])
    missing = "" if is_drawn else "; pip install matplotlib for a plot"
    return f"{table(rows)}\n{len(pairs)} edits; points are in {path}{missing}", None


def table(rows: list[dict]) -> str:
    """A line for each point."""
    lines = [f"{'':<8}{'setting':>16}{'direction':>18}{'image':>18}"]
    for row in rows:
        knob = KNOBS[row["method"]]
        both = "".join(f"{row[key]:>10.3f} ± {row[key + '_error']:.3f}" for key in AXES)
        lines.append(f"{row['method']:<8}{knob:>10} {row[knob]:>5g}{both}")
    return "\n".join(lines)

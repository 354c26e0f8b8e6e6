"""Figure 8 of the paper: how strong the edits are, against how well they keep the input.

Each point has one cfg_image of the editor or, with --sdedit, one strength of SDEdit. The x axis is CLIP's
directional similarity (Gal et al. 2021): the cosine between the change of the pictures and the change of
their captions. The y axis is the cosine between edited picture and input. Larger is better on both axes.

Each point is a line of <out>/curve.jsonl. Later runs do not measure it again. The plot shows all points with
the same --data, --split, CLIP, --n, --steps, --sampler and --seed. So a run with other --weights and the same
--out adds a curve.
"""

import argparse
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

from nanoip2p.checkpoint import hub
from nanoip2p.checkpoint.tensors import fingerprint
from nanoip2p.clip_filter import Judge, similarities
from nanoip2p.common.files import append
from nanoip2p.common.plots import label_of, plot
from nanoip2p.common.schema import checked, checked_rows
from nanoip2p.dataset.layouts import Pair, load_picture, read_data
from nanoip2p.dataset.rendered import EDITS_PER_SCENE, scene_pairs
from nanoip2p.editor import Editor
from nanoip2p.text_to_image import TextToImage

PAPER = {"cfg_text": 7.5, "cfg_images": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2), "clip": hub.CLIP}  # section 4.1
NANO = {"cfg_text": 2.0, "cfg_images": (0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0), "clip": "weights/nano-clip"}
KNOBS = {"editor": "cfg_image", "SDEdit": "strength"}  # the setting that changes along a curve
MEASURED = ("direction", "image", "direction_error", "image_error")
KINDS = {"method": (str,), "weights": (str,), "networks": (str,), "cfg_text": (float,),
         **dict.fromkeys(MEASURED, (float, -1.01, 1.01))}  # a point, for checked_rows


def examples(data: str, split: str, n: int) -> list[Pair]:
    """Up to n pairs with captions, one per item or scene. Raises ValueError for fewer than two pairs."""
    pairs = scene_pairs(n * EDITS_PER_SCENE, split)[::EDITS_PER_SCENE] if data == "scenes" else [
        item[0] for item in read_data(data, split) if item[0].captions]
    if len(pairs[:n]) < 2:
        raise ValueError(f"the {split} split of {data} needs two pairs with captions; change --split or --n")
    return pairs[:n]


def measure(pairs: list[Pair], judge: Judge, resolution: int, batch: int, seed: int, edit: Callable) -> dict:
    """Means and standard errors of both similarities. edit(pictures, pairs, seed) -> edited pictures."""
    rows = []
    for start in tqdm(range(0, len(pairs), batch), desc=f"{batch} edits at a time", leave=False):
        part = pairs[start : start + batch]
        before = [load_picture(pair.before, resolution) for pair in part]
        after = edit(before, part, seed + start)  # pair i of all pairs has the seed `seed + i`
        images = judge.encode_pictures([*before, *after]).chunk(2)                     # (B, P) each
        texts = [judge.encode_texts(list(captions)) for captions in zip(*(pair.captions for pair in part))]
        rows.append(similarities(*images, *texts)[:, 2:])                              # (B, 2)
    table = torch.cat(rows).double()
    means, errors = table.mean(0).tolist(), (table.std(0) / len(table) ** 0.5).tolist()
    return dict(zip(MEASURED, means + errors))


def read_points(path: Path) -> list[dict]:
    """The rows of curve.jsonl, or [] if it is missing. Raises ValueError for a row that is not a point."""
    rows = checked_rows(path, KINDS)
    for number, row in enumerate(rows, 1):
        if row["method"] not in KNOBS:
            raise ValueError(f"{path}, row {number}: method should be {' or '.join(KNOBS)}")
        knob = KNOBS[row["method"]]
        row[knob] = checked(row.get(knob), float, f"{path}, row {number}: {knob}")
    return rows


def draw(rows: list[dict], axes) -> None:
    """Draw a curve with error bars for each method, weights and cfg_text. Label both ends of each curve."""
    curves = {}
    for row in rows:
        key = row["method"], row["weights"], row["networks"], row["cfg_text"]
        curves.setdefault(key, []).append(row)
    for (method, weights, _, cfg_text), curve in curves.items():
        knob, keys = KNOBS[method], ("direction", "image", "image_error", "direction_error")
        curve.sort(key=itemgetter(knob))
        x, y, y_error, x_error = zip(*map(itemgetter(*keys), curve))
        label = f"{method}, {label_of(weights, f'cfg_text {cfg_text:g}, by {knob}')}"
        axes.errorbar(x, y, y_error, x_error, marker=".", capsize=2, label=label)
        for i in {0, len(curve) - 1}:
            axes.annotate(f"{curve[i][knob]:g}", (x[i], y[i]), (4, 4), fontsize=8, textcoords="offset points")


def run(args: argparse.Namespace) -> tuple[str, None]:
    """Measure the missing points, plot all points, and return a table. args: see __main__.py."""
    path, editor = args.out / "curve.jsonl", Editor.load(args.weights, args.device)
    usual = NANO if editor.side < 256 else PAPER
    clip, cfg_text = args.clip or usual["clip"], usual["cfg_text"] if args.cfg_text is None else args.cfg_text
    pairs, judge = examples(args.data, args.split, args.n), Judge.load(clip, editor.device)

    def edit(model: Editor | TextToImage, value: float, before: list, part: list[Pair], seed: int) -> list:
        settings = {"steps": args.steps, "sampler": args.sampler, "seed": seed, "batch": len(part)}
        if model is editor:
            edits = [pair.edit for pair in part]
            return editor.edit(before, edits, cfg_text=cfg_text, cfg_image=value, **settings)
        return model.generate([pair.captions[1] for pair in part], images=before, strength=value,
                              resolution=editor.side, **settings)

    curves = [("editor", args.weights, editor, cfg_text, args.cfg_images or usual["cfg_images"])]
    if args.sdedit:
        painter = TextToImage.load(args.sdedit, args.device)
        curves.append(("SDEdit", args.sdedit, painter, painter.defaults["cfg_text"], args.strengths))
    common = {"data": args.data, "split": args.split, "clip": clip, "n": len(pairs), "steps": args.steps,
              "sampler": args.sampler, "seed": args.seed}
    lines = [f"{'':<8}{'setting':>16}{'direction':>18}{'image':>18}"]
    for method, weights, model, scale, values in curves:
        networks = fingerprint(model.unet, model.vae, model.text_encoder)
        for value in values:
            point = {"method": method, "weights": str(weights), "networks": networks,
                     "cfg_text": scale, **common, KNOBS[method]: value}
            row = next((row for row in read_points(path) if point.items() <= row.items()), None)
            if row is None:
                row = point | measure(pairs, judge, editor.side, args.batch, args.seed,
                                      partial(edit, model, value))
                append(path, row)
            lines.append(f"{method:<8}{KNOBS[method]:>10} {value:>5g}" + "".join(
                f"{row[key]:>10.3f} ± {row[f'{key}_error']:.3f}" for key in ("direction", "image")))
    points = [row for row in read_points(path) if common.items() <= row.items()]
    is_drawn = plot(args.out / "curve.png", partial(draw, points), (10, 7),
                    xlabel="CLIP's directional similarity", ylabel="CLIP's similarity to the input")
    missing = "" if is_drawn else "; pip install matplotlib for a plot"
    return "\n".join([*lines, f"{len(pairs)} edits; the points are in {path}{missing}"]), None

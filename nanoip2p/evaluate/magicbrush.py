"""MagicBrush's benchmark (Zhang et al. 2306.10012): edited pictures against pictures that people chose.

    python -m nanoip2p.evaluate magicbrush --data MagicBrush/dev --out runs/dev

A session is a picture and one or more edits, its turns. As in MagicBrush's evaluation/image_eval.py:

    single-turn   each turn edits the dataset's picture; means over all turns
    multi-turn    each turn after the first edits the editor's own picture; means over the last turns

    L1, L2        mean absolute and mean squared difference of pixels in [0, 1], after resizing the edited
                  picture to the size of the true one
    CLIP-I        cosine of the CLIP features of the edited and the true picture
    CLIP-T        cosine of the CLIP features of the edited picture and the caption of the true one;
                  "of truth" is the same number for the true picture

The default CLIP is MagicBrush's, ViT-B/32. We compute in float32 on CUDA, where MagicBrush computes in
float16, and cut captions at 77 tokens. We leave out their DINO score.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from nanoip2p.clip_filter import Judge
from nanoip2p.dataset.layouts import SPLITS, Pair, read_data
from nanoip2p.editor import Editor
from nanoip2p.images import open_image, read_recipe, save_png, to_tensor

CLIP = "openai/clip-vit-base-patch32"
COLUMNS = {"l1": "L1", "l2": "L2", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "clip_t_truth": "of truth"}


def read_sessions(data: Path) -> dict[str, list[Pair]]:
    """The turns of each session by its name, which is also the name of its folder of pictures.

    ValueError as read_data, and for a turn without captions.
    """
    sessions = {}
    for pair in (item[0] for split in SPLITS for item in read_data(data, split)):
        if not pair.captions:
            raise ValueError(f"{data}: there is no caption of {pair.before.name} or {pair.after.name}")
        sessions.setdefault(pair.before.parent.name, []).append(pair)
    return sessions


def make(editor: Editor, source: Path, instruction: str, out: Path, names: dict, settings: dict) -> None:
    """Edit `source` into the PNG `out`, which also stores `names` and `settings` (for Editor.edit).

    Does nothing if `out` exists and stores the same; ValueError if `out` stores other values.
    """
    recipe = {"input": [source.name], "edit": [instruction], **names, **settings}
    if not out.exists():
        [picture] = editor.edit([open_image(source)], [instruction], **settings)
        save_png(picture, out, recipe)
    elif read_recipe(out) != recipe:
        raise ValueError(f"{out} was made with other weights or settings; name another --out")


def score(judge: Judge, edited: Path, truth: Path, caption: str) -> dict[str, float]:
    """The metrics of one edited picture, with the keys of COLUMNS."""
    edited, truth = open_image(edited), open_image(truth)
    resized = edited.resize(truth.size, Image.Resampling.BICUBIC)
    difference = (to_tensor(resized) - to_tensor(truth)) / 2                              # (3, H, W)
    size = judge.clip.config.vision_config.image_size
    of_edited, of_truth = judge.encode_pictures([clip_view(picture, size) for picture in (edited, truth)])
    of_caption = judge.encode_texts([caption])[0]                                         # (P,)
    numbers = (difference.abs().mean(), difference.square().mean(), of_edited @ of_truth,
               of_edited @ of_caption, of_truth @ of_caption)
    return dict(zip(COLUMNS, map(float, numbers)))


def clip_view(picture: Image.Image, size: int) -> Image.Image:
    """The short side resized to `size`, then the middle (size, size): the preprocessing of OpenAI's CLIP."""
    short = min(picture.size)
    picture = picture.resize([int(size * side / short) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def run(args: argparse.Namespace) -> tuple[str, dict]:
    """Make the missing pictures, score all: as text and as numbers. args: flags, see __main__.py."""
    sessions = dict(list(read_sessions(args.data).items())[: args.n])
    editor = Editor.load(args.weights, args.device)
    judge = Judge.load(args.clip, editor.device)
    given = {key: getattr(args, key) for key in ("steps", "cfg_text", "cfg_image", "sampler", "seed")}
    settings = editor.defaults | {key: value for key, value in given.items() if value is not None}
    names = {"weights": args.weights, "networks": editor.fingerprint}

    rows = {way: [] for way in ("single", "multi") if args.turns in (way, "both")}
    for name, pairs in tqdm(sessions.items(), desc="editing and scoring", unit="session"):
        for way in rows:
            source, scores = pairs[0].before, []
            for turn, pair in enumerate(pairs, 1):  # the names that image_eval.py expects
                suffix = "1" if turn == 1 else f"inde_{turn}" if way == "single" else f"iter_{turn}"
                out = args.out / "edited" / name / f"{name}_{suffix}.png"
                make(editor, pair.before if way == "single" else source, pair.edit, out, names, settings)
                scores.append(score(judge, out, pair.after, pair.captions[1]))
                source = out
            rows[way] += scores if way == "single" else scores[-1:]
    numbers = {"clip": args.clip, **names, **settings}
    lines = [f"{'':<12}{'n':>6}" + "".join(f"{title:>10}" for title in COLUMNS.values())]
    for way, scores in rows.items():
        means = {key: float(np.mean([row[key] for row in scores])) for key in COLUMNS}
        numbers[f"{way}-turn"] = {"n": len(scores), **means}
        lines.append(f"{way + '-turn':<12}{len(scores):>6}" + "".join(f"{x:>10.4f}" for x in means.values()))
    return "\n".join([*lines, f"CLIP: {args.clip}"]), numbers

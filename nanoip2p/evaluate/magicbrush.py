"""The MagicBrush benchmark (Zhang et al. 2306.10012): compare edited pictures to human-made target pictures.

Follows MagicBrush's evaluation/image_eval.py, but in float32 and without the DINO score. Single-turn: each
turn edits the dataset's input picture, and the scores are means over all turns. Multi-turn: each later turn
edits the output of the turn before, and the scores are means over the last turns of the sessions.

    L1, L2    mean absolute and squared difference of pixels in [0, 1], at the target's size
    CLIP-I    cosine of the CLIP features of the edited picture and the target
    CLIP-T    cosine of the CLIP features of the edited picture and the target's caption
    of truth  cosine of the CLIP features of the target and its caption
"""

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from nanoip2p.clip_filter import Judge
from nanoip2p.common.files import inside
from nanoip2p.common.saving import save_png
from nanoip2p.dataset.layouts import SPLITS, Pair, read_data
from nanoip2p.editor import Editor
from nanoip2p.images import open_image, to_tensor

COLUMNS = {"l1": "L1", "l2": "L2", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "clip_t_truth": "of truth"}


def read_sessions(data: Path) -> dict[str, list[Pair]]:
    """{folder of a session: its turns}. Raises ValueError as read_data does, and for a missing caption."""
    sessions = {}
    for pair in (item[0] for split in SPLITS for item in read_data(data, split)):
        if not pair.captions:
            raise ValueError(f"{data}: there is no caption of {pair.before.name} or {pair.after.name}")
        sessions.setdefault(pair.before.parent.name, []).append(pair)
    return sessions


def score(judge: Judge, edited: Image.Image, pair: Pair) -> list[float]:
    """The metrics of one edited picture, in the order of COLUMNS."""
    truth = open_image(pair.after)
    resized = edited.resize(truth.size, Image.Resampling.BICUBIC)
    difference = (to_tensor(resized) - to_tensor(truth)) / 2                              # (3, H, W)
    size = judge.clip.config.vision_config.image_size
    of_edited, of_truth = judge.encode_pictures([clip_view(picture, size) for picture in (edited, truth)])
    of_caption = judge.encode_texts([pair.captions[1]])[0]                                # (P,)
    numbers = (difference.abs().mean(), difference.square().mean(), of_edited @ of_truth,
               of_edited @ of_caption, of_truth @ of_caption)
    return [number.item() for number in numbers]


def clip_view(picture: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size`, then crop the centre to a square, as OpenAI's CLIP does."""
    short = min(picture.size)
    picture = picture.resize([int(size * side / short) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def run(args: argparse.Namespace) -> tuple[str, dict]:
    """Write edits to <out>/edited/, and return their scores as text and as numbers. args: see __main__.py."""
    sessions = dict(list(read_sessions(args.data).items())[: args.n])
    editor = Editor.load(args.weights, args.device)
    judge = Judge.load(args.clip, editor.device)
    given = {key: getattr(args, key) for key in ("steps", "cfg_text", "cfg_image", "sampler")}
    settings = editor.fill_defaults(given) | {"seed": args.seed}

    rows = {"single-turn": [], "multi-turn": []}
    for name, pairs in tqdm(sessions.items(), desc="editing and scoring", unit="session"):
        out = inside(args.out / "edited", name)  # image_eval.py expects these file names
        for turn, pair in enumerate(pairs, 1):
            edited = editor.edit(open_image(pair.before), pair.edit, **settings)
            save_png(edited, out / f"{name}_{f'inde_{turn}' if turn > 1 else 1}.png", settings)
            rows["single-turn"].append(score(judge, edited, pair))
            if turn == 1:
                own = edited
            else:
                own = editor.edit(own, pair.edit, **settings)
                save_png(own, out / f"{name}_iter_{turn}.png", settings)
        rows["multi-turn"].append(score(judge, own, pair))
    numbers = {"clip": args.clip, "weights": args.weights, **settings}
    lines = [f"{'':<12}{'n':>6}" + "".join(f"{title:>10}" for title in COLUMNS.values())]
    for mode, scores in rows.items():
        means = [sum(values) / len(scores) for values in zip(*scores)]
        numbers[mode] = {"n": len(scores), **dict(zip(COLUMNS, means))}
        lines.append(f"{mode:<12}{len(scores):>6}" + "".join(f"{mean:>10.4f}" for mean in means))
    return "\n".join([*lines, f"CLIP: {args.clip}"]), numbers

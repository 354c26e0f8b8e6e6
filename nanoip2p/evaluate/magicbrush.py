"""MagicBrush's benchmark (Zhang et al. 2306.10012): an editor's pictures against those that people chose.

    python -m nanoip2p.evaluate magicbrush --data MagicBrush/dev --out runs/dev

A session is a picture and some edits of it, its turns. As their code has it (evaluation/image_eval.py),

    single-turn   every turn edits the dataset's own picture; means over all turns
    multi-turn    all but the first edit what the editor made of the turn before; means over the last turns

    L1, L2        mean absolute and mean squared difference of pixels in [0, 1], the edited picture resized to
                  the true one's size
    CLIP-I        cosine of CLIP's features of the edited and of the true picture
    CLIP-T        the same of the edited picture and the caption of the true one, in global_descriptions.json;
                  "of truth" is what the true picture itself gets

Their CLIP is ViT-B/32. Ours computes in float32 on CUDA, too, where theirs has half precision, and cuts
captions of more than 77 tokens. Their DINO score is left out.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from nanoip2p.clip_filter import Judge
from nanoip2p.common.cli import at_least, finite
from nanoip2p.common.files import check_writable, read_json, remedy, write_json
from nanoip2p.editor import Editor
from nanoip2p.images import open_image, read_recipe, save_png, to_tensor

CLIP = "openai/clip-vit-base-patch32"
COLUMNS = {"l1": "L1", "l2": "L2", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "clip_t_truth": "of truth"}


@dataclass(frozen=True)
class Turn:
    """One edit, of `source` into `edited`. `truth` is the dataset's answer, and `caption` describes that."""

    source: Path
    instruction: str
    edited: Path
    truth: Path
    caption: str


def read_sessions(data: Path, edited: Path) -> list[list[Turn]]:
    """The sessions of a split's folder, as single turns, whose pictures are to be made below `edited`.

    They are named so that image_eval.py finds them, too. ValueError for what is missing or broken.
    """
    captions, sessions = read_json(data / "global_descriptions.json"), []
    for name, turns in read_json(data / "edit_sessions.json").items():
        folder, session = data / "images" / name, []
        for number, turn in enumerate(turns if isinstance(turns, list) and turns else [None], 1):
            try:
                before, instruction, after = (turn[key] for key in ("input", "instruction", "output"))
                picture = edited / name / (f"{name}_1.png" if number == 1 else f"{name}_inde_{number}.png")
                session.append(Turn(folder / before, instruction + "", picture, folder / after,
                                    captions[name][after] + ""))
            except (KeyError, TypeError):
                raise ValueError(
                    f"{data}: session {name}, turn {number}, wants texts as input, instruction and output in "
                    "edit_sessions.json, and one of that output in global_descriptions.json") from None
            for path in (session[-1].source, session[-1].truth):
                if not path.is_file():
                    raise ValueError(f"there is no picture {path}; {remedy(folder)}")
        sessions.append(session)
    if not sessions:
        raise ValueError(f"{data / 'edit_sessions.json'} holds no session")
    return sessions


def chained(session: list[Turn]) -> list[Turn]:
    """The turns of a session, each editing what the editor made of the one before."""
    turns = session[:1]
    for turn in session[1:]:
        edited = turn.edited.with_name(turn.edited.name.replace("_inde_", "_iter_"))
        turns.append(replace(turn, source=turns[-1].edited, edited=edited))
    return turns


def make(editor: Editor, turn: Turn, names: dict, settings: dict) -> None:
    """Edit with `settings` for Editor.edit. The file carries them, and `names`; one that is there stays.

    ValueError if that one was made with others.
    """
    recipe = {"input": [turn.source.name], "edit": [turn.instruction], **names, **settings}
    if not turn.edited.exists():
        [picture] = editor.edit([open_image(turn.source)], [turn.instruction], **settings)
        save_png(picture, turn.edited, recipe)
    elif read_recipe(turn.edited) != recipe:
        raise ValueError(f"{turn.edited} was made with other weights or settings; name another --out")


def score(judge: Judge, turn: Turn) -> dict[str, float]:
    """The metrics of one edited picture, by the keys of COLUMNS."""
    edited, truth = open_image(turn.edited), open_image(turn.truth)
    resized = edited.resize(truth.size, Image.Resampling.BICUBIC)
    difference = (to_tensor(resized) - to_tensor(truth)) / 2                              # (3, H, W)
    size = judge.clip.config.vision_config.image_size
    of_edited, of_truth = judge.encode_pictures([clip_view(picture, size) for picture in (edited, truth)])
    of_caption = judge.encode_texts([turn.caption])[0]                                    # (P,)
    numbers = (difference.abs().mean(), difference.square().mean(), of_edited @ of_truth,
               of_edited @ of_caption, of_truth @ of_caption)
    return dict(zip(COLUMNS, map(float, numbers)))


def clip_view(picture: Image.Image, size: int) -> Image.Image:
    """The middle (size, size) of a picture whose short side is scaled to `size`, as OpenAI's CLIP sees it."""
    short = min(picture.size)
    picture = picture.resize([int(size * side / short) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate magicbrush`."""
    parser.add_argument("--data", type=Path, required=True,
                        help="a split's folder: edit_sessions.json, global_descriptions.json and images/")
    parser.add_argument("--out", type=Path, required=True,
                        help="folder for scores.json and edited/, whose pictures are not made again")
    parser.add_argument("--weights", default="weights/nano-ip2p", help="as in sample.py")
    parser.add_argument("--clip", default=CLIP,
                        help=f"the judge: folder or Hub name ({CLIP}, as in MagicBrush; no DINO)")
    parser.add_argument("--n", type=at_least(1), help="sessions, the first ones (all)")
    parser.add_argument("--turns", choices=("single", "multi", "both"), default="both",
                        help="each turn edits the dataset's picture, or the editor's own of the turn before")
    for name, kind in (("steps", at_least(1)), ("cfg-text", finite), ("cfg-image", finite)):
        parser.add_argument(f"--{name}", type=kind, help="as in sample.py; by default of the weights")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of every picture, as in MagicBrush")
    parser.add_argument("--device")


def run(args: argparse.Namespace) -> str:
    """Edit what is missing, score, write scores.json; returns the table."""
    sessions = read_sessions(args.data, args.out / "edited")[: args.n]
    ways = {"single": sessions, "multi": [chained(session) for session in sessions]}
    ways = {name: ways[name] for name in (ways if args.turns == "both" else [args.turns])}
    check_writable(args.out / "scores.json")
    editor = Editor.load(args.weights, args.device)
    judge = Judge.load(args.clip, editor.device)
    given = {key: getattr(args, key) for key in ("steps", "cfg_text", "cfg_image", "seed")}
    settings = editor.defaults | {key: value for key, value in given.items() if value is not None}

    names = {"weights": args.weights, "networks": editor.fingerprint}
    turns = {turn.edited: turn for way in ways.values() for session in way for turn in session}
    rows = {}
    for path, turn in tqdm(turns.items(), desc="editing and scoring", unit="picture"):
        make(editor, turn, names, settings)
        rows[path] = score(judge, turn)
    numbers = {"clip": args.clip, **names, **settings}
    lines = [f"{'':<12}{'n':>6}" + "".join(f"{title:>10}" for title in COLUMNS.values())]
    for name, way in ways.items():
        scored = [rows[turn.edited] for session in way for turn in session[0 if name == "single" else -1 :]]
        means = {key: float(np.mean([row[key] for row in scored])) for key in COLUMNS}
        numbers[f"{name}-turn"] = {"n": len(scored), **means}
        lines.append(f"{name + '-turn':<12}{len(scored):>6}" + "".join(f"{x:>10.4f}" for x in means.values()))
    write_json(numbers, args.out / "scores.json")
    return "\n".join([*lines, f"CLIP: {args.clip}"])

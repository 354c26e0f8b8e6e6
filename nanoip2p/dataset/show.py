"""Statistics and a contact sheet of a folder of pairs (ours or the paper's), and heat maps of one pair."""

import random
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from nanoip2p.clip_filter import SIMILARITIES, Thresholds
from nanoip2p.common.files import inside, read_json, tidy
from nanoip2p.common.grids import grid
from nanoip2p.common.schema import checked, checked_rows
from nanoip2p.dataset.pairs import prompt_folders
from nanoip2p.images import open_image
from nanoip2p.prompt_to_prompt import PairPainter, split_words

SCORE_NAMES = dict(zip(SIMILARITIES, ("caption before", "caption after", "direction", "pictures")))
SCORES = dict.fromkeys(SIMILARITIES, (float, -1.01, 1.01))  # cosines, with room for rounding
SCORES |= {"leakage": (float | None, 0)}  # None: older files and the original's files lack it
KEPT = {"seed": (int, 0, 2**63), "p2p_threshold": (float, 0, 1)} | SCORES  # of a row of metadata.jsonl
BAR = 40  # length of the histogram's longest bar, in characters


def read_pairs(root: Path) -> list[dict]:
    """The kept pairs of each prompt, best first: texts, keys of metadata.jsonl, "folder" and "pictures"."""
    if not root.is_dir() or not prompt_folders(root):
        raise ValueError(f"{root}: there is no such folder, or no finished prompt (0000000, ...) in it")
    pairs = []
    for folder in prompt_folders(root):
        path = folder / "prompt.json"
        prompt = read_json(path)
        texts = {key: checked(prompt.get(key), str | None, f"{path}: {key}")
                 for key in ("input", "caption", "edit")}
        for row in checked_rows(folder / "metadata.jsonl", KEPT, appended=False):
            pictures = [inside(root, f"{folder.name}/{row['seed']}_{i}.jpg") for i in (0, 1)]
            pairs.append(texts | row | {"folder": folder, "pictures": pictures})
    return pairs


def statistics(root: Path, pairs: list[dict]) -> str:
    """A text: number, mean scores and p of the kept pairs; the share of candidates that pass, if known."""
    folders, with_survivors = prompt_folders(root), len({pair["folder"] for pair in pairs})
    lines = [("prompts", f"{len(folders)} finished, {with_survivors} of them with kept pairs"),
             ("kept pairs", f"{len(pairs)}, {len(pairs) / len(folders):.2f} a prompt")]
    path = root / "job.json"
    job = checked(read_json(path, missing={}).get("job"), dict | None, f"{path}: job")
    rows = [row for folder in folders for row in checked_rows(folder / "candidates.jsonl", SCORES, False)]
    if job and rows:
        kinds = {"clip_img_threshold": float, "clip_dir_threshold": float, "clip_threshold": float,
                 "leakage_threshold": float | None}
        thresholds = Thresholds(*(checked(job.get(key), kinds[key], f"{path}: {key}") for key in kinds))
        passed = sum(not thresholds.reasons(row) for row in rows)
        lines.append(("candidates", f"{len(rows)}, {passed / len(rows):.1%} pass, "
                                    f"{len(pairs) / len(rows):.1%} are kept"))
    if pairs:
        means = {name: sum(pair[key] for pair in pairs) / len(pairs) for key, name in SCORE_NAMES.items()}
        lines.append(("mean similarity", ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())))
        shares = [pair["p2p_threshold"] for pair in pairs]
        counts = Counter(min(int(share * 10), 9) for share in shares)
        lines.append(("p of kept pairs", f"mean {sum(shares) / len(shares):.3f}"))
        for bin in range(10):
            bar = "#" * round(BAR * counts[bin] / max(counts.values()))
            lines.append(("", f"{bin / 10:.1f} ... {(bin + 1) / 10:.1f} {bar:<{BAR}} {counts[bin]}"))
    return "\n".join(f"{name:<17}{text}" for name, text in lines)


def contact_sheet(pairs: list[dict], rows: int, seed: int) -> Image.Image:
    """Rows of two before | after pairs. Left: the best pairs, one per prompt. Right: random pairs."""
    best_of_prompt = {pair["folder"]: pair for pair in reversed(pairs)}.values()
    best = sorted(best_of_prompt, key=lambda pair: -pair["clip_sim_dir"])[:rows]
    pictures, labels = [], []
    for line in zip(best, random.Random(seed).sample(pairs, len(best))):
        pictures.append([open_image(path) for pair in line for path in pair["pictures"]])
        labels.append([])
        for title, pair in zip(("best", "random"), line):
            scores = ", ".join(f"{name} {pair[key]:.2f}" for key, name in SCORE_NAMES.items())
            scores += "" if pair["leakage"] is None else f", leakage {pair['leakage']:.2f}"
            labels[-1] += [tidy(f"{title}: {pair['caption'] if pair['input'] is None else pair['input']}"),
                           tidy(f"{pair['edit']} ({scores}, p {pair['p2p_threshold']:.2f})")]
    return grid(pictures, labels)


def draw_heatmaps(model: PairPainter, seed: int, share: float, cfg_text: float, bar: tqdm) -> Image.Image:
    """A row per picture: the picture, and a copy per word, bright where attention to the word is strong."""
    words = [split_words(model.painter.tokenizer, caption) for caption in model.captions]
    count = max(map(len, words))
    columns = [model.columns([tokens for _, tokens in row] + [[]] * (count - len(row))) for row in words]
    latents, heat = model.sample([seed], [share], [cfg_text], columns, bar)
    rows, labels = [], [[caption, *(word for word, _ in row)] for caption, row in zip(model.captions, words)]
    for picture, maps, row in zip(reversed(model.painter.decode(latents)), heat.flip(0), words):
        rows.append([picture])
        for map_ in maps[: len(row)]:
            # The size of the attention: --reweight can make it negative. A map of zeros is black
            light = Image.fromarray((map_.abs() / map_.abs().max() * 255).nan_to_num().byte().cpu().numpy())
            light = light.resize(picture.size, Image.Resampling.BICUBIC)
            rows[-1].append(Image.composite(picture, Image.new("RGB", picture.size), light))
    return grid(rows, labels)

"""What a folder of pairs holds, of pairs.py or the paper's own: a contact sheet and statistics."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from nanoip2p.clip_filter import SIMILARITIES, Thresholds
from nanoip2p.common.files import read_json, read_rows
from nanoip2p.dataset.pairs import prompt_folders
from nanoip2p.images import grid, open_image
from nanoip2p.prompt_to_prompt import PairPainter, split_words

WORDS = dict(zip(SIMILARITIES, ("caption before", "caption after", "direction", "pictures")))
BAR = 40  # letters of the longest bar of a histogram


@dataclass(frozen=True)
class Kept:
    """A pair that was kept: its prompt's folder, the line of its prompt, its row of metadata.jsonl."""

    folder: Path
    prompt: dict
    row: dict

    def picture(self, i: int) -> Image.Image:
        """Before (0) or after (1)."""
        return open_image(self.folder / f"{self.row['seed']}_{i}.jpg")


def read_table(path: Path) -> list[dict]:
    """The rows of a .jsonl file; none if there is no such file."""
    return [row for _, row in read_rows(path)] if path.exists() else []


def check_numbers(row: dict, keys: Iterable[str], path: Path) -> None:
    """ValueError, naming `path`, when there is not a number under each of the keys."""
    for key in keys:
        if not isinstance(row.get(key), int | float):
            raise ValueError(f"{path}: {key} = {row.get(key)!r} should be a number")


def read_pairs(root: Path) -> list[Kept]:
    """Every pair that was kept, by prompt, best first. ValueError for what is missing or broken."""
    if not root.is_dir() or not prompt_folders(root):
        raise ValueError(f"{root}: there is no such folder, or no finished prompt (0000000, ...) in it")
    pairs = []
    for folder in prompt_folders(root):
        prompt = read_json(folder / "prompt.json")
        path = folder / "metadata.jsonl"
        for row in read_table(path):
            if "seed" not in row or "edit" not in prompt:
                raise ValueError(f"{folder}: metadata.jsonl lacks seed, or prompt.json lacks edit")
            check_numbers(row, ("p2p_threshold", *SIMILARITIES), path)
            if not 0 <= row["p2p_threshold"] <= 1:
                raise ValueError(f"{path}: p2p_threshold should lie in 0 ... 1")
            pairs.append(Kept(folder, prompt, row))
    return pairs


def statistics(root: Path, pairs: list[Kept]) -> str:
    """How many survive and how good they are, as text; about others only if pairs.py wrote them."""
    folders = prompt_folders(root)
    survivors = Counter(pair.folder for pair in pairs)
    by_count = sorted(Counter(survivors[folder] for folder in folders).items())
    size = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    lines = [
        ("prompts", f"{len(folders)} finished, {len(survivors)} of them with survivors"),
        ("surviving pairs", f"{len(pairs)}, {len(pairs) / len(folders):.2f} a prompt ("
                            + ", ".join(f"{many}: {prompts}" for many, prompts in by_count) + " prompts)"),
        *candidate_lines(root, folders, len(pairs))]
    if pairs:
        means = [sum(pair.row[name] for pair in pairs) / len(pairs) for name in SIMILARITIES]
        lines.append(("mean similarity", ", ".join(
            f"{word} {mean:.3f}" for word, mean in zip(WORDS.values(), means))))
        shares = [pair.row["p2p_threshold"] for pair in pairs]
        lines.append(("p of survivors", f"mean {sum(shares) / len(shares):.3f}"))
        lines += [("", line) for line in histogram(shares)]
    lines.append(("on disk", f"{size / 1e6:.1f} MB"))
    return "\n".join(f"{name:<17}{text}" for name, text in lines)


def candidate_lines(root: Path, folders: list[Path], kept: int) -> list[tuple[str, str]]:
    """How many candidates passed and what was too small of the others; [] where only survivors are known."""
    path, keys = root / "job.json", [f"clip_{name}threshold" for name in ("img_", "dir_", "")]
    job = read_json(path, missing={}).get("job", {})
    if not isinstance(job, dict):
        raise ValueError(f"{path}: job = {job!r} should be an object")
    if not job.keys() >= {*keys}:
        return []
    check_numbers(job, keys, path)
    thresholds, tried, passed, reasons = Thresholds(*map(job.get, keys)), 0, 0, Counter()
    for folder in tqdm(folders, desc="reading", leave=False):
        path = folder / "candidates.jsonl"
        for row in read_table(path):
            check_numbers(row, SIMILARITIES, path)
            too_small = thresholds.reasons(row)
            tried, passed = tried + 1, passed + (not too_small)
            reasons.update(too_small)
    if not tried:
        return []
    failed = ", ".join(f"{word} {reasons[name] / tried:.1%}" for name, word in WORDS.items())
    return [("candidates", f"{tried}, {passed / tried:.1%} pass, {kept / tried:.1%} survive"),
            ("too small", failed)]


def histogram(values: list[float]) -> list[str]:
    """Counts in tenths of [0, 1], as bars."""
    counts = Counter(min(int(value * 10), 9) for value in values)
    longest = max(counts.values())
    return [f"{bin / 10:.1f} ... {(bin + 1) / 10:.1f} {'#' * round(BAR * counts[bin] / longest):<{BAR}} "
            f"{counts[bin]}" for bin in range(10)]


def contact_sheet(pairs: list[Kept], rows: int, seed: int) -> Image.Image:
    """Rows of before | after twice: on the left the best pairs, one of a prompt, on the right random ones."""
    first_of_prompt = {pair.folder: pair for pair in reversed(pairs)}.values()
    best = sorted(first_of_prompt, key=lambda pair: -pair.row["clip_sim_dir"])[:rows]
    drawn = random.Random(seed).sample(pairs, len(best))
    pictures, labels = [], []
    for line in zip(best, drawn):
        pictures.append([pair.picture(i) for pair in line for i in (0, 1)])
        labels.append([])
        for sort, pair in zip(("best", "random"), line):
            row, prompt = pair.row, pair.prompt
            scores = ", ".join(f"{word} {row[name]:.2f}" for name, word in WORDS.items())
            labels[-1] += [f"{sort}: {prompt.get('input', prompt.get('caption'))}",
                           f"{prompt['edit']} ({scores}, p {row['p2p_threshold']:.2f})"]
    return grid(pictures, labels)


def draw_heatmaps(model: PairPainter, seed: int, share: float, cfg_text: float,
                  bar: tqdm | None = None) -> Image.Image:
    """Both pictures of a pair, and each again for every word of its caption, lit where it was attended to."""
    tokenizer = model.painter.tokenizer
    words = [split_words(tokenizer, caption) for caption in model.captions]
    count = max(map(len, words))
    columns = [model.columns([tokens for _, tokens in row] + [[]] * (count - len(row))) for row in words]
    if model.blend:
        columns = [torch.cat(pair, dim=1) for pair in zip(columns, model.blend)]
    latents, heat = model.sample([seed], [share], [cfg_text], columns, bar)
    rows, labels = [], []
    for picture, maps, row, caption in zip(
            reversed(model.painter.decode(latents)), heat.flip(0), words, model.captions):
        rows, labels = [*rows, [picture]], [*labels, [caption]]
        for map_, (word, _) in zip(maps, row):
            light = Image.fromarray((map_ / map_.max() * 255).byte().cpu().numpy())
            light = light.resize(picture.size, Image.Resampling.BICUBIC)
            rows[-1].append(Image.composite(picture, Image.new("RGB", picture.size), light))
            labels[-1].append(word)
    return grid(rows, labels)

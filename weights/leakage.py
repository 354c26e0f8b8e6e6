"""Measure how much pairs of the nano world change outside the third of the picture that the edit is in.

    python weights/leakage.py --seed 0

Each prompt is a caption of two things with an edit of one thing ("local") or of the whole picture ("global").
Prints, for each mode of injection, without and with `--blend auto`:

    elsewhere   mean |after - before| in the other two thirds over its mean in the edit's third: mean, median
    kept        number of candidates that pass the CLIP filter of pairs.json; then, of these, the numbers with
                leakage at most 0.2, 0.3 and 0.5, each with those of unknown leakage. In brackets, the shares
                that change another third by more than 5 and by more than 8 levels of 255 on average
    rank        Spearman's correlation of `leakage` and "elsewhere", over candidates that have leakage
    region      share of candidates with a region, for local and global edits; then CPU seconds per candidate
"""

import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoip2p import TextToImage
from nanoip2p.clip_filter import Judge, Thresholds
from nanoip2p.common import cli
from nanoip2p.dataset.changes import MeasuredPainter
from nanoip2p.dataset.pairs import Prompt, candidate, pair_settings
from nanoip2p.world.scenes import random_scene

LIMITS, CANDIDATES = (0.2, 0.3, 0.5), 6
LOCAL, GLOBAL = ("recolour", "replace", "add", "remove"), ("time", "weather", "ground")
WEIGHTS = Path(__file__).resolve().parent / "nano-sd"


def draw_prompts(seed: int, n: int) -> list[tuple[Prompt, int | None]]:
    """2 n prompts of scenes with two things: n local edits with their slot, then n global edits with None."""
    rng, found, index = np.random.default_rng(seed), [], 0
    while len(found) < 2 * n:
        scene, index = random_scene(f"leakage of pairs {seed}", index), index + 1
        kind = LOCAL[len(found) % 4] if len(found) < n else GLOBAL[len(found) % 3]
        if len(scene.things) == 2:
            edits = scene.edits(kind)
            edit = edits[rng.integers(len(edits))]
            slots = [thing.slot for thing in set(scene.things) ^ set(edit.scene.things)] or [None]
            found.append((Prompt(len(found), scene.caption(), edit.caption, {}), slots[0]))
    return found


def measure(painter: TextToImage, judge: Judge, settings, prompts: list) -> str:
    """The printed row of one mode of injection."""
    rows, everywhere, began = [], [], time.process_time()
    filter = Thresholds(settings.clip_img_threshold, settings.clip_dir_threshold, settings.clip_threshold)
    for prompt, slot in prompts:
        model = MeasuredPainter(painter, prompt.source, prompt.output, settings.inject, settings.steps,
                                blend=None if settings.blend == "none" else settings.blend)
        drawn = [candidate(prompt, k, settings) for k in range(CANDIDATES if slot is not None else 2)]
        pairs, notes = model.measure(*zip(*(row.values() for row in drawn)))
        scores = judge.score(*zip(*pairs), judge.encode_texts([prompt.source, prompt.output]))
        for (before, after), note, score in zip(pairs, notes, scores):
            leak = note["leakage"]
            if slot is None:
                everywhere.append(leak is not None)
                continue
            change = np.abs(np.asarray(before, float) - np.asarray(after)).mean((0, 2))
            thirds = [part.mean() for part in np.array_split(change, 3)]
            inside = max(thirds.pop(slot), 1e-6)
            rows.append((np.mean(thirds) / inside, max(thirds), not filter.reasons(score),
                         np.nan if leak is None else leak))
    seconds = (time.process_time() - began) / (len(rows) + len(everywhere))
    truth, most, kept, leaks = map(np.array, zip(*rows))
    known = ~np.isnan(leaks)
    ranks = [values[known].argsort().argsort() for values in (truth, leaks)]
    limits = [kept & ~(leaks > limit) for limit in LIMITS]
    text = f"{settings.inject:<6}{settings.blend:<6}{truth.mean():.2f} {np.median(truth):.2f}"
    text += "".join(f"  {part.sum()} ({np.mean(most[part] > 5):.0%}, {np.mean(most[part] > 8):.0%})"
                    for part in (kept, *limits))
    text += f"  {np.corrcoef(*ranks)[0, 1]:.2f}  {known.mean():.0%} {np.mean(everywhere):.0%}"
    return f"{text}  {seconds:.2f}"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    def work() -> None:
        parser = cli.make_parser(description=__doc__)
        parser.add_argument("--seed", type=cli.at_least(0), default=0)
        parser.add_argument("--n", type=cli.at_least(1), default=24, help="number of prompts of each kind")
        args = parser.parse_args(argv)
        painter, prompts = TextToImage.load(WEIGHTS), draw_prompts(args.seed, args.n)
        settings = pair_settings({"seed": args.seed}, WEIGHTS, painter.defaults)
        judge = Judge.load(settings.clip)
        for inject, blend in product(cli.MODES, ("none", "auto")):
            print(measure(painter, judge, replace(settings, inject=inject, blend=blend), prompts), flush=True)
    return cli.run(work, "stopped", "close other programs")


if __name__ == "__main__":
    sys.exit(main())

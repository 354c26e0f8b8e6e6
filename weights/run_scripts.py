"""Runs train.py, make_dataset.py and `evaluate` in this process. make_nano.py and ablate.py use it."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import make_dataset
import train


def call(main: Callable[[list[str]], int], *words) -> None:
    """Run the `main` of a script with `words` as its arguments.

    Raises ValueError after an error (the script prints it), and KeyboardInterrupt after Ctrl-C.
    """
    code = main([str(word) for word in words])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise ValueError(f"{main.__module__} {' '.join(map(str, words))}: exit code {code}, see above")


def make_pairs(prompts: Path, count: int, out: Path, painter: Path, *flags) -> Path:
    """Write `count` triplets of the nano world to `prompts`, and make pairs from them. Returns `out`."""
    call(make_dataset.main, "captions", "--backend", "scenes", "--n", count, "--out", prompts)
    call(make_dataset.main, "pairs", "--prompts", prompts, "--out", out, "--weights", painter, *flags)
    return out


def train_run(out: Path, weights: Path, steps: int, *flags, begin: str = "--weights",
              preset: str | None = None) -> Path:
    """Train from `weights` in the run folder `out`, or resume that run. Returns the trained weights.

    begin: the flag of train.py for `weights`. preset: of a new run. train.py refuses one for a resumed run,
    which has its own settings.
    """
    begun = any(out.glob("checkpoints/[0-9]*"))
    named = ["--preset", preset] if preset else []
    start = ["--resume", out] if begun else [begin, weights, "--out", out, *named]
    call(train.main, *start, "--steps", steps, *flags)
    return out / "weights"

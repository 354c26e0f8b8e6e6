"""The ablations of the paper (section 4.2, figure 10) and further ablations, in the nano world.

    python weights/ablate.py --out runs/ablate --prompts 400 --steps 600 --seeds 3

Each variant differs from the first variant by one choice. make_dataset.py makes the data of a variant,
train.py trains one editor for each seed, and `evaluate scenes` scores the editors. Each line of
<out>/ablate.jsonl has the scores of one editor. After an interruption, the same command skips these editors.
"""

import argparse
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import run_scripts
import torch

from nanoip2p.checkpoint.load import load_model
from nanoip2p.checkpoint.save import save_parts
from nanoip2p.common import cli
from nanoip2p.common.cli import at_least
from nanoip2p.common.files import CHECKOUT, append, read_json, write_json
from nanoip2p.common.schema import checked_rows
from nanoip2p.dataset.pairs import list_seeds
from nanoip2p.evaluate import __main__ as evaluate
from nanoip2p.unet import UNet

PAINTER = CHECKOUT / "weights" / "nano-sd"
# Folder of pairs -> flags of `make_dataset.py pairs`; weights/nano-sd/pairs.json has the defaults
PAIRS = {
    "both": [], "self": ["--inject", "self"], "cross": ["--inject", "cross"], "none": ["--inject", "none"],
    "unfiltered": ["--n-samples", 4, "--clip-threshold", -1, "--clip-dir-threshold", -1,
                   "--clip-img-threshold", -1, "--leakage-threshold", 1e9],
}
SAMPLER, SAMPLING_STEPS = "dpmpp_2m", 4  # as good as the default 20 steps here, in a quarter of the time
MEASURES = {  # further flags of `evaluate scenes`
    "edits": [], "unseen combinations": ["--combinations", "held-out"], "cfg_image 1.5": ["--cfg-image", 1.5],
}
# 97.5% quantiles of Student's t distribution, for 2, 3, ... seeds (1, 2, ... degrees of freedom)
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
SEEDS = len(STUDENT) + 1  # the maximum number of editors per variant


@dataclass(frozen=True)
class Variant:
    """How to train an editor."""

    pairs: str = "both"     # a key of PAIRS, or "scenes" for rendered pairs
    share: float = 1.0      # fraction of the prompts to give to train.py, which trains on 90% of them
    start: str = "nano-sd"  # or "nothing": an untrained UNet
    flags: tuple = ()       # further flags of train.py


VARIANTS = {
    "baseline": Variant(),
    "without CLIP filter": Variant("unfiltered"),
    "a tenth of the data": Variant(share=0.1),
    "not from nano-sd": Variant(start="nothing"),
    "picture never dropped": Variant(flags=("--drop", 0.1, 0.0, 0.0)),
    "P2P: self (the paper)": Variant("self"),
    "P2P: cross": Variant("cross"),
    "P2P: none": Variant("none"),
    "rendered pairs": Variant("scenes"),
}


def make_data(variant: Variant, out: Path, prompts: int) -> str | Path:
    """Make the data of a variant, unless `out` has it. Returns the value of --data for train.py."""
    if variant.pairs == "scenes":
        return "scenes"
    folder = out / variant.pairs
    run_scripts.make_pairs(out / "prompts.jsonl", prompts, folder, PAINTER, *PAIRS[variant.pairs])
    if variant.share == 1:
        return folder
    part, seeds = out / f"{variant.pairs}-{variant.share}", list_seeds(folder)
    few = seeds[: round(variant.share * len(seeds))]
    for name, _ in few:
        shutil.copytree(folder / name, part / name, dirs_exist_ok=True)
    write_json(few, part / "seeds.json")
    return part


def untrained(out: Path) -> Path:
    """Write a copy of nano-sd with an untrained UNet to `out`."""
    if not (out / "model_index.json").exists():
        parts = load_model(PAINTER, edits=False)
        torch.manual_seed(0)
        unet = UNet(parts.unet.config)
        torch.nn.init.zeros_(unet.conv_out.weight)
        save_parts(out, unet, parts.vae, parts.text_encoder, parts.tokenizer_folder,
                   parts.schedule.to_json(), parts.defaults)
    return out


def train_editor(variant: Variant, run: Path, data: str | Path, rendered: int, steps: int, seed: int) -> Path:
    """Train an editor in the folder `run`; return its weights. rendered: number of pairs to render."""
    start = PAINTER if variant.start == "nano-sd" else untrained(run.parent / "untrained")
    micro = 32 if variant.share == 1 else 8  # a tenth of the data may have fewer than 32 prompts
    return run_scripts.train_run(
        run, start, steps, "--data", data, "--pairs", rendered,
        "--cache", run.parent / "latents" / Path(data).name, "--no-flip", "--seed", seed, "--dtype", "fp32",
        "--sample-every", 0, "--batch-size", micro, "--accumulate", 32 // micro, *variant.flags,
        preset="nano")


def score(weights: Path, n: int) -> dict:
    """Score an editor on n edits for each of MEASURES: {measure: success rate, "unchanged": PSNR in dB}."""
    scores = {}
    for number, (measure, flags) in enumerate(MEASURES.items()):
        out = weights.parent / f"scores-{number}"
        run_scripts.call(evaluate.main, "scenes", "--weights", weights, "--n", n, "--out", out,
                         "--sampler", SAMPLER, "--steps", SAMPLING_STEPS, *flags)
        total = read_json(out / "scores.json")["all"]
        scores |= {measure: total["success"]} | ({} if flags else {"unchanged": total["psnr"]})
    return scores


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% confidence interval (Student's t; inf for a single value)."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, float("inf")
    return mean, STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def read_scores(path: Path) -> list[dict]:
    """The rows of ablate.jsonl; [] if it is missing. ValueError for a row that `run` did not write."""
    kinds = dict.fromkeys(("prompts", "steps", "n", "sampling_steps"), (int, 1))
    kinds |= dict.fromkeys(MEASURES, (float, 0, 1)) | dict.fromkeys(("variant", "sampler"), (str,))
    kinds |= {"seed": (int, 0, SEEDS - 1), "unchanged": (float | None, -100, 100)}
    return checked_rows(path, kinds)


def table(rows: list[dict]) -> str:
    """A Markdown table with a line for each variant: means and confidence intervals over its editors."""
    lines = [f"| editor | seeds | {' | '.join(MEASURES)} | unchanged |", "|---" * (len(MEASURES) + 3) + "|"]
    for name in VARIANTS:
        own = {row["seed"]: row for row in rows if row["variant"] == name}.values()
        if own:
            cells = []
            for measure in (*MEASURES, "unchanged"):
                values = [row[measure] for row in own if row[measure] is not None]
                mean, half = interval(values) if values else (float("nan"), 0)
                scale, unit = (1, " dB") if measure == "unchanged" else (100, "%")
                error = f" ± {scale * half:.1f}" if len(values) > 1 else ""
                cells.append(f"{scale * mean:.1f}{error}{unit}")
            lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = cli.make_parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder for data, runs, scores")
    parser.add_argument("--prompts", type=at_least(100), default=400, help="number of captions")
    parser.add_argument("--steps", type=at_least(1), default=600, help="training steps of 32 pairs")
    parser.add_argument("--seeds", type=int, choices=range(1, SEEDS + 1), default=3, metavar="1 … 10",
                        help="editors per variant")
    parser.add_argument("--n", type=at_least(1), default=210, help="number of edits for each score")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                        help="variants to train")
    return parser


def run(args: argparse.Namespace) -> str:
    """Train and score the missing editors, and return the table of all editors with these settings."""
    out, settings = args.out.resolve(), {"prompts": args.prompts, "steps": args.steps, "n": args.n,
                                         "sampler": SAMPLER, "sampling_steps": SAMPLING_STEPS}
    path = out / "ablate.jsonl"
    home = out / f"prompts-{args.prompts}"  # runs with the same number of prompts share their data
    home.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for number, (name, variant) in enumerate(VARIANTS.items()):
            known = {"variant": name, "seed": seed, **settings}
            if name not in args.only or any(known.items() <= row.items() for row in read_scores(path)):
                continue
            print(f"\n{name}, seed {seed}", file=sys.stderr)
            data = make_data(variant, home, args.prompts)
            folder = home / f"{number}-{seed}-{args.steps}"
            weights = train_editor(variant, folder, data, 4 * args.prompts, args.steps, seed)
            append(path, known | score(weights, args.n))
    return table([row for row in read_scores(path) if settings.items() <= row.items()])


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    return cli.run(lambda: print(run(make_parser().parse_args(argv))),
                   "stopped; the same command continues", "try fewer --prompts")


if __name__ == "__main__":
    sys.exit(main())

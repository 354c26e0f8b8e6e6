"""The paper's ablations (section 4.2, figure 10) and some more, in the nano world, where edits can be scored.

    python weights/ablate.py --out runs/ablate --prompts 400 --steps 600 --seeds 3

Every variant differs from the first by one choice. Its data is made by make_dataset.py, its editors (one
for each seed) are trained by train.py, and scored by `evaluate scenes`: commands that go on where they were
stopped. A line of <out>/ablate.jsonl is one editor's scores; a line that is there is not made again.
"""

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanoip2p.checkpoint.load import load_model
from nanoip2p.checkpoint.save import save_parts
from nanoip2p.common import cli
from nanoip2p.common.cli import at_least
from nanoip2p.common.files import append, read_json, rows_of, write_json
from nanoip2p.training import run_folder as runs
from nanoip2p.unet import UNet

ROOT = Path(__file__).resolve().parent.parent
PAINTER = ROOT / "weights" / "nano-sd"
# How the pairs of a folder are made, where it is not as weights/nano-sd/pairs.json says
PAIRS = {
    "both": [], "self": ["--inject", "self"], "cross": ["--inject", "cross"], "none": ["--inject", "none"],
    "unfiltered": ["--n-samples", 4, "--clip-threshold", -1, "--clip-dir-threshold", -1,
                   "--clip-img-threshold", -1],
}
# Tables of Student's t: 97.5% of its mass is below this many standard errors, for 2, 3, ... seeds
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
MEASURES = {  # flags of `evaluate scenes`
    "edits": [], "unseen combinations": ["--combinations", "held-out"], "cfg_image 1.5": ["--cfg-image", 1.5],
}


@dataclass(frozen=True)
class Variant:
    """One editor's upbringing. pairs: of PAIRS, or "scenes" for rendered ones; share: of the prompts."""

    pairs: str = "both"
    share: float = 1.0
    start: str = "nano-sd"
    flags: tuple = ()


VARIANTS = {
    "all as it should be": Variant(),
    "without CLIP filter": Variant("unfiltered"),
    "a tenth of the data": Variant(share=0.1),
    "not from nano-sd": Variant(start="nothing"),
    "picture never dropped": Variant(flags=("--drop", 0.1, 0.0, 0.0)),
    "P2P: self (the paper)": Variant("self"),
    "P2P: cross": Variant("cross"),
    "P2P: none": Variant("none"),
    "rendered pairs": Variant("scenes"),
}


def command(*words) -> None:
    """Run a command of this repository to its end, which after Ctrl-C means until it has saved its work."""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if code:
        raise ValueError(f"{' '.join(map(str, words))} ended with exit code {code}, see above")


def make_data(variant: Variant, out: Path, prompts: int) -> str | Path:
    """What train.py's --data is given: made by make_dataset.py, unless it is there."""
    if variant.pairs == "scenes":
        return "scenes"
    listed, folder = out / "prompts.jsonl", out / variant.pairs
    command("make_dataset.py", "captions", "--backend", "scenes", "--n", prompts, "--out", listed)
    command("make_dataset.py", "pairs", "--prompts", listed, "--out", folder, "--weights", PAINTER,
            "--dtype", "bf16", *PAIRS[variant.pairs])
    if variant.share == 1:
        return folder
    part, seeds = out / f"{variant.pairs}-{variant.share}", read_json(folder / "seeds.json", kind=list)
    part.mkdir(exist_ok=True)
    few = [[f"../{variant.pairs}/{name}", kept] for name, kept in seeds[: round(variant.share * len(seeds))]]
    write_json(few, part / "seeds.json")
    return part


def untrained(out: Path) -> Path:
    """nano-sd with a UNet that has learned nothing yet."""
    if not (out / "model_index.json").exists():
        parts = load_model(PAINTER, edits=False)
        torch.manual_seed(0)
        unet = UNet(parts.unet.config)
        torch.nn.init.zeros_(unet.conv_out.weight)
        save_parts(out, unet, parts.vae, parts.text_encoder, parts.tokenizer_folder,
                   parts.schedule.to_json(), parts.defaults)
    return out


def train_editor(variant: Variant, run: Path, data: str | Path, rendered: int, steps: int,
                 seed: int) -> Path:
    """Train in folder `run`; the folder of its weights. rendered: pairs of --data scenes."""
    if runs.checkpoints(run):
        command("train.py", "--resume", run, "--steps", steps)
    else:
        start = PAINTER if variant.start == "nano-sd" else untrained(run.parent / "untrained")
        micro = 32 if variant.share == 1 else 8  # a batch may not be more than there is
        command("train.py", "--preset", "nano", "--weights", start, "--data", data, "--pairs", rendered,
                "--cache", run.parent / "latents" / Path(data).name, "--no-flip", "--out", run,
                "--steps", steps, "--seed", seed, "--dtype", "fp32", "--sample-every", 0,
                "--batch-size", micro, "--accumulate", 32 // micro, *variant.flags)
    return run / "weights"


def score(weights: Path, n: int) -> dict:
    """{measure: success, "unchanged": PSNR in dB} of an editor, by `evaluate scenes` on n edits each."""
    scores = {}
    for number, (measure, flags) in enumerate(MEASURES.items()):
        out = weights.parent / f"scores-{number}"
        command("-m", "nanoip2p.evaluate", "scenes", "--weights", weights, "--n", n, "--out", out, *flags)
        total = read_json(out / "scores.json")["all"]
        scores |= {measure: total["success"]} | ({} if flags else {"unchanged": total["psnr"]})
    return scores


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (Student's t); inf for a single value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, float("inf")
    return mean, STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def table(rows: list[dict]) -> str:
    """A line of Markdown for each variant: means and confidence intervals over its editors."""
    lines = [f"| editor | seeds | {' | '.join(MEASURES)} | unchanged |", "|---" * (len(MEASURES) + 3) + "|"]
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        if own:
            cells = []
            for measure in (*MEASURES, "unchanged"):
                mean, half = interval([row[measure] for row in own])
                form, unit = ((100, "%"), (1, " dB"))[measure == "unchanged"]
                spread = f" ± {form * half:.1f}" if len(own) > 1 else ""
                cells.append(f"{form * mean:.1f}{spread}{unit}")
            lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of data, runs, scores")
    parser.add_argument("--prompts", type=at_least(100), default=400, help="captions, 20 candidates each")
    parser.add_argument("--steps", type=at_least(1), default=600, help="of training, 32 pairs each")
    parser.add_argument("--seeds", type=int, choices=range(1, 11), default=3, metavar="1 … 10",
                        help="editors of each variant")
    parser.add_argument("--n", type=at_least(1), default=210, help="edits that each editor is scored on")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                        help="some of: " + "; ".join(VARIANTS))


def run(args: argparse.Namespace) -> str:
    """Make, train and score what is missing; returns the table."""
    out, settings = args.out.resolve(), {"prompts": args.prompts, "steps": args.steps, "n": args.n}
    path = out / "ablate.jsonl"
    home = out / f"prompts-{args.prompts}"  # nothing that other settings would make otherwise is shared
    home.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for number, (name, variant) in enumerate(VARIANTS.items()):
            known = {"variant": name, "seed": seed, **settings}
            if name not in args.only or any(known.items() <= row.items() for row in rows_of(path)):
                continue
            print(f"\n{name}, seed {seed}", file=sys.stderr)
            data = make_data(variant, home, args.prompts)
            folder = home / f"{number}-{seed}-{args.steps}"
            weights = train_editor(variant, folder, data, 4 * args.prompts, args.steps, seed)
            append(path, known | score(weights, args.n))
    return table([row for row in rows_of(path) if settings.items() <= row.items()])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    parser = cli.make_parser(description=__doc__.splitlines()[0])
    add_flags(parser)
    return cli.run(lambda: print(run(parser.parse_args(argv))), "stopped; the same command goes on from here",
                   "try fewer --prompts")


if __name__ == "__main__":
    sys.exit(main())

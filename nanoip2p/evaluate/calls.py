"""Edit success against the number of network calls, for editors and their distilled students.

A step of an editor makes one call for each guidance branch (2 or 3); a step without guidance makes one call.
Each of --weights is scored as in `scenes`, with each sampler, at its own guidance scales. Each point is a
line of <out>/calls.jsonl. Later runs do not measure it again.
"""

import argparse
from itertools import groupby, product
from operator import itemgetter

from nanoip2p.checkpoint.tensors import fingerprint
from nanoip2p.common.files import append
from nanoip2p.common.plots import label_of, plot
from nanoip2p.common.schema import checked_rows
from nanoip2p.diffusion import LCM_STEPS
from nanoip2p.editor import Editor
from nanoip2p.evaluate.scenes import choose_edits, rate, score_scenes, table

SAMPLERS = ("euler_ancestral", "dpmpp_2m", "lcm")
# The entries of a point
KINDS = {"weights": (str,), "networks": (str,), "sampler": (str,), "calls": (int, 1), "n": (int, 1),
         "success": (float, 0, 1), "error": (float, 0, 1), "psnr": (float | None,)}


def branches(cfg_text: float, cfg_image: float) -> int:
    """The number of network calls per step: one for each branch of equation 3 whose weight is not zero."""
    return sum(weight != 0 for weight in (cfg_text, cfg_image - cfg_text, 1 - cfg_image))


def run(args: argparse.Namespace) -> tuple[str, None]:
    """Measure the missing points, plot the requested points, and return a table. args: see __main__.py."""
    path, lines, points = args.out / "calls.jsonl", [], []
    for weights in dict.fromkeys(args.weights):
        editor = Editor.load(weights, args.device)
        networks = fingerprint(editor.unet, editor.vae, editor.text_encoder)
        per_step = branches(editor.defaults["cfg_text"], editor.defaults["cfg_image"])
        for sampler, steps in product(SAMPLERS, dict.fromkeys(calls // per_step for calls in args.calls)):
            if not 1 <= steps <= (LCM_STEPS if sampler == "lcm" else editor.schedule.num_train_timesteps):
                continue
            point = {"weights": str(weights), "networks": networks, "sampler": sampler,
                     "calls": steps * per_step, "n": args.n}
            row = next((row for row in checked_rows(path, KINDS) if point.items() <= row.items()), None)
            if row is None:
                rows = score_scenes(editor, choose_edits(args.n), {"steps": steps, "sampler": sampler})
                share, error = rate([row["success"] for row in rows])
                row = point | {"success": share, "error": error, "psnr": table(rows)[1]["all"]["psnr"]}
                append(path, row)
            points.append(row)
            psnr = "-" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
            lines.append(f"{weights!s:<28} {sampler:<16}{row['calls']:>5}{row['success']:>9.1%} ± "
                         f"{row['error']:.1%}{psnr:>10}")
    is_drawn = plot(args.out / "calls.png", lambda axes: draw(points, axes), (10, 6),
                    xlabel="network calls per edit", ylabel="edits that succeed")
    missing = "" if is_drawn else "; pip install matplotlib for a plot"
    heading = f"{'weights':<28} {'sampler':<16}{'calls':>5}{'success':>16}{'unchanged':>10}"
    return "\n".join([heading, *lines, f"{args.n} edits; the points are in {path}{missing}"]), None


def draw(points: list[dict], axes) -> None:
    """Draw a curve with error bars for each pair of weights and sampler."""
    for (weights, sampler), curve in groupby(points, itemgetter("weights", "sampler")):
        calls, success, error = zip(*map(itemgetter("calls", "success", "error"), curve))
        axes.errorbar(calls, success, error, marker=".", capsize=2, label=label_of(weights, sampler))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")

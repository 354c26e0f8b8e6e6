"""What injection costs: a pair of pictures with it over a pair without (p = 0), ours and with maps in memory.

    python tests/benchmarks/inject.py --width half --latents 32 --steps 3 --repeat 5

The reference is tests/hertz.py, diffusers' network with the maps of Hertz et al. formed and edited; without
injection it forms them all the same, as the authors' code does, so that it is divided by ours without.
Runs take turns in one process: medians, and (min-max) of the ratio to the run without in the same round.
Time is the clock's on CUDA, the process's own on a CPU that others use too. Memory is what lies above the
weights: on CUDA from the allocator, on a CPU by following the storages of all tensors in one run more.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hertz  # noqa: E402
from helpers import randomise  # noqa: E402
from tiny_editor import write_tiny_editor  # noqa: E402

from nanoip2p.diffusion import NoiseSchedule  # noqa: E402
from nanoip2p.live import Live  # noqa: E402
from nanoip2p.prompt_to_prompt import PairPainter  # noqa: E402
from nanoip2p.text_to_image import TextToImage  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402

WIDTHS = {"tiny": (32, 64, 128, 128), "half": (160, 320, 640, 640), "full": (320, 640, 1280, 1280)}
CAPTIONS = {  # both kinds of text injection: every token takes over a map, or some keep their own
    "self": ("a red house", "a blue house", hertz.replace),
    "replace": ("a red house", "a blue house", hertz.replace),
    "refine": ("a red house", "a red house at night", hertz.refine),
    "both": ("a red house", "a blue house", hertz.replace)}


def make_runs(folder: Path, width: str, latents: int, steps: int, device: str) -> dict:
    """A function for each case, and for each without injection; all paint the latents of one pair."""
    write_tiny_editor(folder, NoiseSchedule(steps_offset=1).to_json(), in_channels=4)
    painter, peer = TextToImage.load(folder, device), hertz.open_peer(folder, "euler_ancestral").to(device)
    config = UNetConfig(block_out_channels=WIDTHS[width], cross_attention_dim=32)
    painter.unet = randomise(UNet(config)).to(device)
    with torch.device("meta"):
        peer.unet = hertz.diffusers.UNet2DConditionModel.from_config(config.to_json()).eval()
    peer.unet.load_state_dict(painter.unet.state_dict(), assign=True)
    resolution, runs = latents * 4, {}
    for name, (source, edit, edit_text) in CAPTIONS.items():
        mode = name if name in ("self", "both") else "cross"
        model = PairPainter(painter, source, edit, mode, steps, "euler_ancestral", resolution)
        text = edit_text(peer.tokenizer, source, edit)

        def ours(p, model=model):
            PairPainter.sample.__wrapped__(model, [0], [p], [7.5])

        def maps(p, mode=mode, text=text, source=source, edit=edit):
            control = hertz.Control(mode if p else "none", p, steps, (latents // 4) ** 2, text)
            hertz.sample(peer, source, edit, 0, 7.5, resolution, control)

        runs[name] = {"without": lambda ours=ours: ours(0.0), "ours": lambda ours=ours: ours(1.1),
                      "maps": lambda maps=maps: maps(1.1)}
    return runs


@torch.no_grad()
def seconds(run, device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


@torch.no_grad()
def peak_bytes(run, device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        run()
    return live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=WIDTHS, default="tiny")
    parser.add_argument("--latents", type=int, choices=(32, 64), default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # diffusers' of its own future
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(Path(folder), args.width, args.latents, args.steps, args.device)
        cpu = f"CPU, threads: {torch.get_num_threads()}"
        where = torch.cuda.get_device_name() if args.device == "cuda" else cpu
        print(f"width {args.width}, latents {args.latents}, {args.steps} steps, {where}")
        kinds = "".join(f"{kind + ': time':>20}{'memory':>8}" for kind in ("ours", "maps"))
        print(f"{'':<8}{'without: s':>11}{'MB':>8}{kinds}")
        for name, kinds in runs.items():
            memory = {kind: peak_bytes(run, args.device) for kind, run in kinds.items()}  # warms up, too
            rounds = [{kind: seconds(run, args.device) for kind, run in kinds.items()}
                      for _ in range(args.repeat)]
            without = statistics.median(r["without"] for r in rounds)
            line = f"{name:<8}{without:>11.2f}{memory['without'] / 1e6:>8.1f}"
            for kind in ("ours", "maps"):
                ratios = sorted(r[kind] / r["without"] for r in rounds)
                spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
                line += f"{spread:>20}{memory[kind] / memory['without']:>8.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()

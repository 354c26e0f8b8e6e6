"""The cost of injection: time and memory of a pair with injection, relative to a pair without it (p = 0).

    OMP_NUM_THREADS=1 python tests/benchmarks/pair.py --width half --latents 32 --steps 1 --repeat 5

"fast" is our code with --fast. The reference is tests/helpers/hertz.py: diffusers' network, with the maps of
Hertz et al. in memory. It stores all maps even without injection, as the authors' code does, so all ratios
are relative to our run without injection. Before any run is timed, ours and fast must give the latents of the
reference. The runs alternate in one process. A ratio is the median (min-max) of the ratios within each round.
See measure.py.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "weights")]

import hertz  # noqa: E402
import measure  # noqa: E402
from comparing import randomise, relative_error  # noqa: E402
from tiny_editor import write_tiny_editor  # noqa: E402

from nanoip2p.diffusion import NoiseSchedule  # noqa: E402
from nanoip2p.prompt_to_prompt import PairPainter  # noqa: E402
from nanoip2p.speed.fast import speed_up  # noqa: E402
from nanoip2p.text_to_image import TextToImage  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402

GUIDANCE = 2.0
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
    quick = copy.copy(painter)
    quick.unet, quick.vae = copy.deepcopy(painter.unet), copy.deepcopy(painter.vae)
    speed_up(quick, True, print, injects=True)
    resolution, runs = latents * 4, {}
    for name, (source, edit, edit_text) in CAPTIONS.items():
        mode = name if name in ("self", "both") else "cross"
        plain, faster = (PairPainter(one, source, edit, mode, steps, "euler_ancestral", resolution)
                         for one in (painter, quick))
        text = edit_text(peer.tokenizer, source, edit)

        def ours(p, model):
            edits, sources = PairPainter.sample.__wrapped__(model, [0], [p], [GUIDANCE])[0].chunk(2)
            return torch.cat([sources, edits])

        def maps(p, mode=mode, text=text, source=source, edit=edit):
            control = hertz.Control(mode if p else "none", p, steps, (latents // 4) ** 2, text)
            return hertz.sample(peer, source, edit, 0, GUIDANCE, resolution, control)

        runs[name] = {"without": partial(ours, 0.0, plain), "ours": partial(ours, 1.1, plain),
                      "fast": partial(ours, 1.1, faster), "maps": partial(maps, 1.1)}
    return runs


@torch.no_grad()
def check(name: str, kinds: dict) -> None:
    """ValueError if the latents of ours are not the reference's."""
    wanted = kinds["maps"]()
    errors = {kind: relative_error(kinds[kind](), wanted) for kind in ("ours", "fast")}
    if not max(errors.values()) < 1e-4 < relative_error(kinds["without"](), wanted):
        raise ValueError(f"{name}: not the same latents, so that times would mean nothing: {errors}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=WIDTHS, default="tiny")
    parser.add_argument("--latents", type=int, choices=(8, 32, 64), default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    measure.quiet()
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(Path(folder), args.width, args.latents, args.steps, args.device)
        rate = measure.matrix_rate(args.device, torch.float32)
        print(f"width {args.width}, latents {args.latents}, {args.steps} steps, fp32, "
              f"{measure.machine(args.device)}\none large product: {rate / 1e9:.4g} GFLOP/s")
        columns = "".join(f"{kind + ': time':>20}{'memory':>8}" for kind in ("ours", "fast", "maps"))
        print(f"{'':<8}{'without: s':>11}{'matrix':>8}{'MB':>8}{columns}")
        for name, kinds in runs.items():
            check(name, kinds)
            memory = {kind: measure.peak_bytes(run, args.device) for kind, run in kinds.items()}
            times = measure.take_turns(kinds, args.device, args.repeat)
            without = statistics.median(times["without"])
            share = measure.work(kinds["without"])[0] / without / rate
            line = f"{name:<8}{without:>11.2f}{share:>8.0%}{memory['without'] / 1e6:>8.1f}"
            for kind in ("ours", "fast", "maps"):
                ratio = measure.spread(times[kind], times["without"])
                line += f"{ratio:>20}{memory[kind] / memory['without']:>8.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()

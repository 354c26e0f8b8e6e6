"""What a UNet of Stable Diffusion's width keeps in memory on a CPU, and what --fast takes to prepare.

    OMP_NUM_THREADS=1 python tests/benchmarks/resident.py

Each side opens the same file of random float32 weights (3.4 GB, in a temporary folder) in a process of its
own, and runs three steps of three guidance branches. "anonymous" and "file": GB of memory after the first
step, its own and mapped from the file. Linux takes the mapped part back when memory runs short. "prepared":
CPU seconds of loading, plus those that the first step takes longer than the others. Linux only.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from comparing import randomise  # noqa: E402

from nanoip2p.checkpoint.folder import load_network, save_network  # noqa: E402
from nanoip2p.common.device import pick_device  # noqa: E402
from nanoip2p.speed.fast import speed_up  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402

SIDES = ("diffusers", "ours", "ours, fast")


def memory() -> tuple[float, float]:
    """Anonymous and mapped memory of this process, in GB."""
    words = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(words[key].split()[0]) * 1024 / 1e9 for key in ("RssAnon", "RssFile"))


def load(side: str, folder: Path):
    if side == "diffusers":
        import diffusers
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder).eval()
        return lambda x, text: unet(x, 500, text).sample
    unet = load_network(UNet, folder)
    model = SimpleNamespace(unet=unet, vae=nn.Module(), device=pick_device("cpu"))
    speed_up(model, side == "ours, fast", print)
    return lambda x, text: unet(x, 500, text)


@torch.inference_mode()
def measure_one(side: str, folder: Path, latents: int) -> None:
    import diffusers  # noqa: F401  (the same imports on each side)
    x, text = torch.randn(3, 8, latents, latents), torch.randn(3, 77, 768)
    times, before = [time.process_time()], memory()
    run = load(side, folder)
    times.append(time.process_time())
    for step in range(3):
        run(x, text)
        times.append(time.process_time())
        if step == 0:
            anonymous, file = (now - then for now, then in zip(memory(), before))
    loading, first, *others = (b - a for a, b in zip(times, times[1:]))
    step = min(others)
    print(f"{side:<12}{anonymous:>10.2f}{file:>8.2f}{loading + first - step:>11.1f}{step:>10.1f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=320, help="channels of the first level")
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        return measure_one(args.side, args.folder, args.latents)
    with tempfile.TemporaryDirectory() as folder:
        widths = tuple(args.width * times for times in (1, 2, 4, 4))
        unet = UNet(replace(UNetConfig(8), block_out_channels=widths))
        save_network(randomise(unet), folder)
        del unet
        print(f"width {args.width}, latents {args.latents}, threads: {torch.get_num_threads()}, "
              f"torch {torch.__version__}")
        print(f"{'':<12}{'anonymous':>10}{'file':>8}{'prepared':>11}{'a step':>10}", flush=True)
        for side in SIDES:
            subprocess.run([sys.executable, __file__, "--side", side, "--folder", folder,
                            "--latents", str(args.latents)], check=True)


if __name__ == "__main__":
    main()

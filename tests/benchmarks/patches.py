"""What a product of patches saves where speed/cpu.py uses it: convolutions of tiny maps with large weights.

    OMP_NUM_THREADS=1 python tests/benchmarks/patches.py --repeat 6
    OMP_NUM_THREADS=1 python tests/benchmarks/patches.py --repeat 6 --dtype bf16

Prints GFLOP/s of single 3x3 convolutions (the best round), as oneDNN's convolution and as a product, with
several weights in turns, so that no weight stays in the cache. Then it prints the time of a step of three
branches at Stable Diffusion's width with products over the time without: median (smallest-largest).
"""

import argparse
import copy
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import measure  # noqa: E402
from comparing import randomise  # noqa: E402

from nanoip2p.checkpoint.tensors import DTYPES  # noqa: E402
from nanoip2p.common.device import pick_device  # noqa: E402
from nanoip2p.speed import cpu  # noqa: E402
from nanoip2p.unet import UNet, UNetConfig  # noqa: E402

CASES = [(3, 1280, 1280, 4), (12, 1280, 1280, 4), (3, 2560, 1280, 8), (1, 1280, 1280, 8), (3, 640, 640, 16)]
WEIGHTS = 400e6   # bytes of all weights of a case in fp32
NEVER = 1 << 60   # a weight that large does not exist, so each convolution stays one


@torch.inference_mode()
def convolutions(case: tuple, dtype: torch.dtype, rounds: int) -> None:
    batch, c_in, c_out, side = case
    x = torch.randn(batch, c_in, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    plain = [randomise(nn.Conv2d(c_in, c_out, 3, padding=1)).to(dtype)
             for _ in range(max(2, int(WEIGHTS / (c_in * c_out * 9 * 4))))]
    sides = {}
    for name, least, largest in (("convolution", NEVER, 0), ("product", 0, side * side)):
        layers = [cpu.Convolution(layer) for layer in plain]
        with patch.object(cpu, "LARGE_WEIGHT", least), patch.object(cpu, "TINY_MAP", largest):
            for layer in layers:  # the first call chooses
                layer(x)
        if {layer.product for layer in layers} != {name == "product"}:
            raise SystemExit(f"torch does not let oneDNN lay out weights in {dtype} on this CPU")
        sides[name] = lambda layers=layers: [layer(x) for layer in layers]
    work = 2 * batch * side * side * c_in * c_out * 9 * len(plain) / 1e9
    rates = "".join(f"{work / min(row):>13.0f}" for row in measure.take_turns(sides, "cpu", rounds).values())
    print(f"{batch:>2} x {c_in} to {c_out}, {side} x {side}".ljust(27) + rates, flush=True)


@torch.inference_mode()
def steps(dtype: torch.dtype, rounds: int) -> None:
    """As `speed_up` lays out a UNet, with and without products."""
    unet = randomise(UNet(UNetConfig(8))).to(dtype).eval()
    x, text = torch.randn(3, 8, 32, 32, dtype=dtype), torch.randn(3, 77, 768, dtype=dtype)
    for name, winograd in (("--no-fast", False), ("--fast", True)):
        sides = {}
        for least in (cpu.LARGE_WEIGHT, NEVER):
            net = copy.deepcopy(unet)
            cpu.lay_out(net, winograd, (*net.down_blocks[-2:], net.mid_block, net.up_blocks[0]))
            with patch.object(cpu, "LARGE_WEIGHT", least):
                net(x, 500, text)
            sides[least] = lambda net=net: net(x, 500, text)
        ratio = measure.spread(*measure.take_turns(sides, "cpu", rounds).values())
        print(f"a step, {name}: {ratio} times the time without products", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeat", type=int, default=6)
    args = parser.parse_args(argv)
    pick_device("cpu")
    print(f"{measure.machine('cpu')}, {args.dtype}\nGFLOP/s                      convolution      product")
    for case in CASES:
        convolutions(case, DTYPES[args.dtype], args.repeat)
    steps(DTYPES[args.dtype], args.repeat)


if __name__ == "__main__":
    main()

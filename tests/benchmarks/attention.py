"""Our attention kernels against torch's: every backend of SDPA, at the shapes of SD 1.5.

    python tests/benchmarks/attention.py --repeat 5      # on a CPU, where ours is speed/cpu.py's for bf16
    make bench-gpu                                       # on a GPU, where ours are speed/kernels.py's tiles

Each case draws its inputs, drops the kernels that cannot run it, and fails if an output differs from float32
by more than rounding. The kernels take turns. A time is the median of the rounds in milliseconds. The ratio
is the time of torch's fastest kernel over that of our best tile: median of the rounds and (min-max). "rate"
is our share of the rate of a large matrix product in the same run. On CUDA, our tiles are those that tune.py
tries. On a GPU, the last lines are what it chooses, and how long that takes after Triton has built the tiles.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from comparing import relative_error  # noqa: E402

from nanoip2p.attention import attention  # noqa: E402
from nanoip2p.speed import tune  # noqa: E402
from nanoip2p.speed.cpu import tiled_attention  # noqa: E402

BACKENDS = tune.BACKENDS | {"math": SDPBackend.MATH}
CASES = [  # queries, keys, d
    (4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (64, 64, 160),
    (4096, 77, 40), (1024, 77, 80), (256, 77, 160), (64, 77, 160)]
HEADS = 8


def milliseconds(run, device: str) -> float:
    """Time of a call: the GPU's own on CUDA; on a CPU that others use too, the process's."""
    if device == "cuda":
        return tune.milliseconds(run, 10)
    began = time.process_time()
    run()
    return (time.process_time() - began) * 1e3


def take_turns(runs: dict, device: str, repeat: int) -> dict[str, list[float]]:
    rounds = [{name: milliseconds(run, device) for name, run in runs.items()} for _ in range(repeat)]
    return {name: [one[name] for one in rounds] for name in runs}


def usable(runs: dict, expected: torch.Tensor, refusals: tuple) -> dict:
    """The runs that can be run, warmed up. Raises AssertionError, naming it, if one is wrong."""
    able = {}
    for name, run in runs.items():
        try:
            out = run()
        except refusals:
            continue
        error = relative_error(out, expected)
        assert error < tune.BOUNDS[out.dtype], f"{name} differs by {error}"
        able[name] = run
    return able


def on_backend(backend: SDPBackend, *inputs) -> torch.Tensor:
    with sdpa_kernel(backend):
        return attention(*inputs)


def draw(queries: int, keys: int, d: int, args) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(args.batch, tokens, HEADS * d, generator=generator).to(args.device, args.dtype)
            for tokens in (queries, keys, keys)]


def measure(queries: int, keys: int, d: int, args, rate: float, refusals: tuple) -> None:
    """Print a line."""
    device, (q, k, v) = args.device, draw(queries, keys, d, args)
    runs = {name: partial(on_backend, backend, q, k, v, HEADS) for name, backend in BACKENDS.items()}
    if device == "cuda":
        from nanoip2p.speed import kernels  # needs triton
        runs |= {tile: partial(kernels.fused_attention, q, k, v, HEADS, tile)
                 for tile in tune.tiles(d, keys, args.dtype)}
    else:
        runs["tiled",] = partial(tiled_attention, q, k, v, HEADS)
    expected = attention(q.float(), k.float(), v.float(), HEADS)
    times = take_turns(usable(runs, expected, refusals), device, args.repeat)
    median = {name: statistics.median(times[name]) for name in times}
    torchs, ours = ([name for name in median if isinstance(name, type_)] for type_ in (str, tuple))
    line = "".join(f"{median[name]:>11.3f}" if name in median else f"{'-':>11}" for name in BACKENDS)
    line = f"{queries:>5} x{keys:>5}{d:>5}{line}"
    if not ours:
        print(f"{line}  ours: not measured", flush=True)
        return
    best, tile = min(torchs, key=median.get), min(ours, key=median.get)
    ratios = sorted(a / b for a, b in zip(times[best], times[tile]))
    ratio = statistics.median(ratios)
    share = 4 * args.batch * queries * keys * HEADS * d / (median[tile] * 1e-3) / rate
    print(f"{line}{median[tile]:>11.3f}{ratio:>6.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}){share:>6.0%}  {tile}",
          flush=True)


def choose_all(args) -> None:
    """Let sample.py's own code choose for all cases, without what it remembers. Print that, and its time."""
    from nanoip2p.speed import kernels  # needs triton
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        tuner = tune.Tuner(kernels.fused_attention, False, print, True)
        inputs = [draw(*case, args) for case in CASES]
        torch.cuda.synchronize()
        began = time.perf_counter()
        for given in inputs:
            tuner(*given, HEADS)
        print(f"chosen in {time.perf_counter() - began:.2f} s")


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found)
    parser.add_argument("--batch", type=int, default=6, help="rows; 6 are the three branches of two edits")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--shrink", type=int, help="divide the numbers of positions by this (CPU: 8)")
    args = parser.parse_args(argv)
    args.dtype, cuda = getattr(torch, args.dtype), args.device == "cuda"
    shrink, refusals = args.shrink or (1 if cuda else 8), (RuntimeError,)
    if cuda:
        import triton
        refusals += (triton.TritonError,)  # a tile that needs more shared memory than the card has
    side = 8192 if cuda else 1024
    matrix = torch.randn(side, side).to(args.device, args.dtype)
    product = take_turns({"": lambda: matrix @ matrix}, args.device, args.repeat)[""]
    rate = 2 * side**3 / (statistics.median(product) * 1e-3)
    where = torch.cuda.get_device_name() if cuda else f"CPU, threads: {torch.get_num_threads()}"
    print(f"{where}, torch {torch.__version__}, {args.dtype}, batch {args.batch}, {rate / 1e12:.3g} TFLOP/s")
    heading = "".join(f"{name:>11}" for name in (*BACKENDS, "ours"))
    print(f"{'positions':>12}{'d':>5}{heading}{'torch over ours':>18}{'rate':>6}  tile")
    for queries, keys, d in CASES:
        keys = keys if keys == 77 else max(1, keys // shrink)
        measure(max(1, queries // shrink), keys, d, args, rate, refusals)
    if cuda:
        choose_all(args)


if __name__ == "__main__":
    main()

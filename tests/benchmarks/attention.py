"""Our attention kernels over torch's: every backend of SDPA, at the shapes of SD 1.5; and our other kernels.

    python tests/benchmarks/attention.py --batch 6 --repeat 20

Each case draws its inputs, drops whatever cannot run it, and refuses any output that differs from float32 by
more than rounding. What is left takes turns, so that all see the same machine; a time is the median of the
rounds in milliseconds. Under two values by one map ("twice") stand torch's two calls instead. The ratio is
the time of torch's fastest over that of our best tile, the median of the rounds and (min-max); "rate" is our
share of the rate of a large matrix product in the same run. Where the ratio is at least MARGIN, the line to
commit to attention.FASTER is printed, for this --batch. On a CPU, ours does not run.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from comparing import relative_error  # noqa: E402

from nanoip2p.attention import attention, attention_twice, case  # noqa: E402

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
TILES = [(64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 4), (128, 64, 4, 2), (128, 64, 4, 3),
         (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)]
CASES = [  # kind, queries, keys, d; the last level of 8 x 8 attends with the kernel for few keys
    ("long", 4096, 4096, 40), ("long", 1024, 1024, 80), ("long", 256, 256, 160),
    ("short", 4096, 77, 40), ("short", 1024, 77, 80), ("short", 256, 77, 160), ("short", 64, 77, 160),
    ("short", 64, 64, 160),
    ("twice", 4096, 4096, 40), ("twice", 1024, 1024, 80), ("twice", 256, 256, 160)]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MARGIN = 1.1
HEADS = 8


def milliseconds(run, device: str, calls: int) -> float:
    """A call's time: the card's own on CUDA, the process's on a CPU that others use too."""
    if device == "cpu":
        began = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - began) * 1e3 / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def take_turns(runs: dict, device: str, repeat: int) -> dict[str, list[float]]:
    calls = 10 if device == "cuda" else 1
    rounds = [{name: milliseconds(run, device, calls) for name, run in runs.items()} for _ in range(repeat)]
    return {name: [one[name] for one in rounds] for name in runs}


def spread(slow: list[float], fast: list[float]) -> str:
    ratios = sorted(a / b for a, b in zip(slow, fast))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def usable(runs: dict, expected: torch.Tensor, refusals: tuple) -> dict:
    """The runs that can be run; this warms them up, too. An AssertionError names one that is wrong."""
    able = {}
    for name, run in runs.items():
        try:
            out = run()
            out = torch.cat(out) if isinstance(out, tuple) else out
        except refusals:
            continue
        error = relative_error(out, expected)
        assert error < BOUNDS[out.dtype], f"{name} differs by {error}"
        able[name] = run
    return able


def on_backend(run, backend: SDPBackend):
    with sdpa_kernel(backend):
        return run()


def runs_of(kind: str, q, k, v, device: str) -> tuple[dict, torch.Tensor]:
    """A function for each backend of torch and, on CUDA, for each tile of ours; and what they must give."""
    values = (v, v.flip(0)) if kind == "twice" else (v,)

    def one_call(q, k, *values):
        return (attention_twice if kind == "twice" else attention)(q, k, *values, HEADS, kernel="sdpa")

    def two_calls():
        return tuple(attention(q, k, v, HEADS, kernel="sdpa") for v in values)

    runs = {name: partial(on_backend, partial(one_call, q, k, *values), backend)
            for name, backend in BACKENDS.items()}
    if kind == "twice":
        runs |= {f"2 {name}": partial(on_backend, two_calls, backend) for name, backend in BACKENDS.items()}
    if device == "cuda":
        from nanoip2p.speed import kernels
        for tile in TILES:
            if kind != "short":
                runs[tile] = partial(kernels.long_attention, q, k, v, HEADS, tile, None, *values[1:])
            else:  # whose keys are one block
                runs[tile] = partial(kernels.short_attention, q, k, v, HEADS, tile)
    expected = one_call(*(x.float() for x in (q, k, *values)))
    return runs, torch.cat(expected) if kind == "twice" else expected


def measure(kind: str, queries: int, keys: int, d: int, args, rate: float, refusals: tuple) -> str | None:
    """Print a line; returns the entry for attention.FASTER, if there is one."""
    generator, device = torch.Generator().manual_seed(0), args.device
    q, k, v = (torch.randn(args.batch, tokens, HEADS * d, generator=generator).to(device, args.dtype)
               for tokens in (queries, keys, keys))
    runs, expected = runs_of(kind, q, k, v, device)
    times = take_turns(usable(runs, expected, refusals), device, args.repeat)
    median = {name: statistics.median(times[name]) for name in times}
    torchs, ours = ([name for name in median if isinstance(name, type_)] for type_ in (str, tuple))
    best = min(torchs, key=median.get)
    line, two = ("".join(f"{median[n + name]:>11.3f}" if n + name in median else f"{'-':>11}"
                         for name in BACKENDS) for n in ("", "2 "))
    line = f"{kind:<7}{queries:>5} x{keys:>5}{d:>5}{line}"
    two = f"\n{'  two calls':<24}{two}" if kind == "twice" else ""
    if not ours:
        print(f"{line}  ours: not measured{two}", flush=True)
        return None
    tile = min(ours, key=median.get)
    work = 2 * args.batch * queries * keys * HEADS * d * (3 if kind == "twice" else 2)
    share = work / (median[tile] * 1e-3) / rate
    ratio = spread(times[best], times[tile])
    print(f"{line}{median[tile]:>11.3f}{ratio:>19}{share:>6.0%}  {tile}{two}", flush=True)
    wins = statistics.median(a / b for a, b in zip(times[best], times[tile])) >= MARGIN
    return f"    {case(kind, HEADS, q, k, v)!r}: {tile},".replace("'", '"') if wins else None


def measure_fused(args, refusals: tuple) -> None:
    """GroupNorm + SiLU and GEGLU against torch, eager and compiled: a line each."""
    from nanoip2p.speed import kernels
    print(f"\n{'':<24}{'eager':>9}{'compiled':>10}{'ours':>9}{'compiled over ours':>22}")
    x = torch.randn(args.batch, 320, 64, 64).to(args.device, args.dtype)
    weight, bias, wide = x[0, :, 0, 0], x[0, :, 0, 1], torch.randn(args.batch, 4096, 2560).to(x)
    for name, ours, plain, inputs in [
        ("group norm + silu", kernels.group_norm_silu, kernels.group_norm_silu_reference,
         (x, 32, weight.contiguous(), bias.contiguous(), 1e-5)),
        ("  channels last", kernels.group_norm_silu, kernels.group_norm_silu_reference,
         (x.to(memory_format=torch.channels_last), 32, weight.contiguous(), bias.contiguous(), 1e-5)),
        ("geglu", kernels.geglu, kernels.geglu_reference, (wide,)),
    ]:
        compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs")
        runs = {"eager": plain, "compiled": compiled, "ours": ours}
        exact = plain(*(i.float() if isinstance(i, torch.Tensor) else i for i in inputs))
        runs = usable({key: partial(run, *inputs) for key, run in runs.items()}, exact, refusals)
        times = take_turns(runs, args.device, args.repeat)
        medians = "".join(f"{statistics.median(times[key]):>10.3f}" for key in runs)
        print(f"{name:<23}{medians}{spread(times['compiled'], times['ours']):>22}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found)
    parser.add_argument("--batch", type=int, default=6, help="rows, as the three branches of two edits")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--shrink", type=int, help="divide the numbers of positions by this (CPU: 8)")
    args = parser.parse_args()
    args.dtype, cuda = getattr(torch, args.dtype), args.device == "cuda"
    shrink, refusals = args.shrink or (1 if cuda else 8), (RuntimeError,)
    if cuda:
        import triton
        refusals += (triton.TritonError,)  # more shared memory than the card has
    side = 8192 if cuda else 1024
    matrix = torch.randn(side, side).to(args.device, args.dtype)
    product = take_turns({"": lambda: matrix @ matrix}, args.device, args.repeat)[""]
    rate = 2 * side**3 / (statistics.median(product) * 1e-3)
    where = torch.cuda.get_device_name() if cuda else f"CPU, threads: {torch.get_num_threads()}"
    print(f"{where}, torch {torch.__version__}, {args.dtype}, batch {args.batch}, {rate / 1e12:.2f} TFLOP/s")
    heading = "".join(f"{name:>11}" for name in (*BACKENDS, "ours"))
    print(f"{'kind':<7}{'positions':>12}{'d':>5}{heading}{'torch over ours':>19}{'rate':>6}  tile")
    entries = []
    for kind, queries, keys, d in CASES:
        keys = keys if kind == "short" and keys == 77 else max(1, keys // shrink)
        entries.append(measure(kind, max(1, queries // shrink), keys, d, args, rate, refusals))
    if cuda:
        measure_fused(args, refusals)
        print("\nfor attention.FASTER:", *filter(None, entries), sep="\n")
    else:
        print("ours, the rest of the table, GroupNorm + SiLU and GEGLU need CUDA: not measured")


if __name__ == "__main__":
    main()

"""Attention that chooses its kernel: the first call of a case checks and times kernels on its own tensors.

A case is a head width, sizes and a dtype, with map_from or without. Its kernels are torch's own choice
("default"), torch's backends, and ours with several tiles. ~/.cache/nanoip2p/attention.json stores the
fastest kernel for this card and these versions. Later processes do not measure, and round as the first did.
"""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanoip2p import __version__
from nanoip2p.attention import attention, attention_reference
from nanoip2p.common.files import locked, read_json, write_json

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}
TILES = {  # (queries per block, keys per block, num_warps, num_stages), the likeliest first
    "fp32": [(32, 32, 4, 2)],
    "text": [(64, 32, 4, 2), (128, 32, 4, 2), (64, 128, 4, 2)],  # few keys
    "wide": [(64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2)],  # heads that fill the shared memory
    "long": [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)]}
KERNELS = {"default": None} | BACKENDS | {str(tile): tile for some in TILES.values() for tile in some}
# The largest `error` allowed; or twice the error of torch's own choice, if that is larger
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MARGIN = 1.03    # a kernel has to be this many times as fast as the best kernel before it
HOPELESS = 1.25  # times the fastest: such a kernel is not timed again; if it is ours, no later tile is tried
SHORT = 0.03     # ms: about the time in which Python calls a Triton kernel, so ours cannot be faster
ROUNDS = 4       # how often each kernel is timed again
DRIVER = Path("/proc/driver/nvidia/version")


def tiles(d: int, keys: int, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
    """Our candidates for heads of width d. Triton builds each once, in about a second, and keeps it."""
    kind = "fp32" if dtype.itemsize > 2 else "text" if keys <= 128 else "wide" if d > 96 else "long"
    return [] if d % 8 or not 8 <= d <= 160 else TILES[kind]


class Tuner:
    """`attention` by the fastest kernel that is correct. With gradients, by torch's choice.

    ours: kernels.fused_attention. only_ours: by our first tile that is correct, without timing or a file.
    say: called with a line about an unusable file and, if `verbose`, about each decision.
    """

    def __init__(self, ours: Callable, only_ours: bool, say: Callable[[str], None], verbose: bool = False):
        self.ours, self.only_ours, self.say = ours, only_ours, say
        self.note = say if verbose else lambda line: None
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.path = None if only_ours else Path(caches, "nanoip2p", "attention.json")
        self.table = read(self.path, say)
        # Otherwise torch.compile watches the table, and recompiles all old cases for each new case
        torch.compiler.assume_constant_result(Tuner.recall)  # not as a decorator: imports a lot of torch

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, map_from: Tensor | None = None) -> Tensor:
        inputs, d, keys = (q, k, v, heads, map_from), q.shape[2] // heads, k.shape[1]
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return self.run("default", *inputs)
        rows = f"{len(v)} rows" if map_from is None else f"{len(v)} rows, maps of {len(q)}"
        case = f"{rows}, {heads} heads of {d}, {q.shape[1]} x {keys}, {q.dtype}"
        ours = [str(tile) for tile in tiles(d, keys, q.dtype)]
        half = q.dtype.itemsize == 2  # in float32, ours has no tensor cores and takes seconds to build
        kernels = (*ours, "default") if self.only_ours else ("default", *BACKENDS, *ours * half)
        kernel = self.recall(case, kernels, q.device)
        # No measuring while torch.compile or a CUDA graph records; fast.py runs the network once before that
        if not (kernel or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()):
            kernel = self.choose(case, kernels, inputs)
        return self.run(kernel or "default", *inputs)

    def recall(self, case: str, kernels: tuple[str, ...], device: torch.device) -> str | None:
        """The kernel that is remembered for a case, if it is one of `kernels`."""
        kernel = self.table.get(card(device), {}).get(case)
        return kernel if kernel in kernels else None

    def run(self, kernel: str, q: Tensor, k: Tensor, v: Tensor, heads: int, map_from: Tensor | None):
        """Attention by one of KERNELS."""
        if isinstance(how := KERNELS[kernel], tuple):
            return self.ours(q, k, v, heads, how, map_from)
        with sdpa_kernel(how) if how else nullcontext():
            return attention(q, k, v, heads, map_from=map_from)

    def choose(self, case: str, kernels: tuple[str, ...], inputs: tuple) -> str | None:
        """Check and time the kernels; remember and return the best. None if the inputs are not finite."""
        wanted, runs, times = reference(*inputs), {}, {}
        limit = max(2 * error(self.run("default", *inputs), wanted), BOUNDS[inputs[0].dtype])
        if not limit < float("inf"):
            return None
        for kernel in kernels:
            run = partial(self.run, kernel, *inputs)
            try:
                with warnings.catch_warnings():  # torch explains at length why a backend refuses a case
                    warnings.simplefilter("ignore")
                    off = error(run(), wanted)
                if not off <= limit:
                    raise ArithmeticError(f"wrong by {off:.1e}; rounding is {limit:.1e}")
            except Exception as problem:  # compilers fail in many ways
                self.note(f"attention, {case}: not {kernel}: {problem!r}")
                continue
            runs[kernel], times[kernel] = run, 0.0 if self.only_ours else milliseconds(run)
            lost = kernel not in BACKENDS and times[kernel] > HOPELESS * min(times.values())
            if self.only_ours or lost or times.get("default", 1) < SHORT:
                break
        for kernel in list(runs) * ROUNDS * (len(runs) > 1):
            if times[kernel] < HOPELESS * min(times.values()):
                times[kernel] = min(times[kernel], milliseconds(runs[kernel]))
        best = next(iter(times), "default")
        for kernel in times:
            best = kernel if MARGIN * times[kernel] < times[best] else best
        self.note(f"attention, {case}: {best} of " + ", ".join(f"{k} {t:.3f} ms" for k, t in times.items()))
        return self.remember(case, kernels, inputs[0].device, best)

    def remember(self, case: str, kernels: tuple[str, ...], device: torch.device, kernel: str) -> str:
        """Store a choice, in the file too, and return it. A choice stored first by another process wins."""
        try:
            with locked(self.path.with_suffix(".lock"), wait=True) if self.path else nullcontext():
                there = read(self.path)
                cases = there.setdefault(card(device), {})
                cases[case] = kernel = cases[case] if cases.get(case) in kernels else kernel
                if self.path:
                    write_json(there, self.path)
        except (OSError, ValueError) as problem:
            self.say(f"{problem}; the next run measures attention again")
            self.path = None
        self.table.setdefault(card(device), {})[case] = kernel
        return kernel


def error(out: Tensor, wanted: Tensor) -> float:
    """The largest difference between `out` and `wanted`, divided by the root mean square of `wanted`."""
    return ((out - wanted).abs().max() / wanted.square().mean().sqrt().clamp_min(1e-30)).item()


def reference(q: Tensor, k: Tensor, v: Tensor, heads: int, map_from: Tensor | None) -> Tensor:
    """Attention in float32, some queries at a time: the maps of all queries can take gigabytes."""
    k, v, at_once = k.float(), v.float(), max(1, 2**24 // (len(v) * heads * k.shape[1]))
    return torch.cat([attention_reference(some.float(), k, v, heads, False, map_from)
                      for some in q.split(at_once, dim=1)], dim=1)


def milliseconds(run: Callable[[], Tensor], calls: int = 3) -> float:
    """Time of a call on the GPU. For a small kernel, it includes the GPU's waits for Python."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


@cache
def card(device: torch.device) -> str:
    """The card and the versions, on which a measurement depends too."""
    import triton  # here, because the benchmark runs on a CPU without triton
    driver = re.findall(r"\d+\.[\d.]+", DRIVER.read_text())[:1] if DRIVER.exists() else "?"
    return (f"{torch.cuda.get_device_name(device)}, driver {''.join(driver)}, torch {torch.__version__}, "
            f"triton {triton.__version__}, nanoip2p {__version__}")


def read(path: Path | None, say: Callable[[str], None] = lambda line: None) -> dict[str, dict[str, str]]:
    """{card: {case: kernel}} from the file. Calls `say` and returns {} if the file holds anything else."""
    with suppress(ValueError, AttributeError):  # no JSON; not of this shape
        table = read_json(path, missing={}) if path else {}
        if all(kernel in list(KERNELS) for cases in table.values() for kernel in cases.values()):
            return table
    say(f"{path} does not hold kernels of attention; it is ignored and written anew")
    return {}

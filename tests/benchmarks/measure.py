"""Helpers of the benchmarks: time, memory, and the peak rates of this machine.

Time is wall-clock time on CUDA, and CPU time of the process on a CPU (use one thread). Memory is the peak
beyond the weights: from the allocator on CUDA, from a further run (live.py) on a CPU.
"""

import platform
import statistics
import time
import warnings

import diffusers
import torch
import transformers
from live import Live
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

MATRIX = {"cuda": 8192, "mps": 2048, "cpu": 2048}  # rows and columns of a large matrix
COPIED = 1 << 28  # bytes of a large copy
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # torch counts CUDA's only
                 lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}


def quiet() -> None:
    """Peers warn of their own future, and draw bars."""
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


class Touched(TorchDispatchMode):
    """Bytes of all tensors that operations read or wrote: what a machine without caches would move."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if not function.is_view:
            flat = [*args, *(kwargs or {}).values(), made]
            self.total += sum(one.nbytes for value in flat for one in
                              (value if isinstance(value, (list, tuple)) else [value])
                              if isinstance(one, torch.Tensor))
        return made


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


@torch.no_grad()
def work(run) -> tuple[int, int]:
    """Operations of matrix products, and bytes touched, of a run in eager mode."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, Touched() as touched:
        run()
    return counter.get_total_flops(), touched.total


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of one large product, the best of six."""
    side = MATRIX[device]
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / min(seconds(lambda: a @ a, device) for _ in range(6))


def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of a copy that no cache holds; the best of six."""
    a = torch.empty(COPIED, dtype=torch.uint8, device=device)
    b = a.clone()
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a), device) for _ in range(6))


def take_turns(runs: dict, device: str, repeat: int) -> dict[str, list[float]]:
    """Seconds of each run in each round; they have to be warm."""
    rounds = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(repeat)]
    return {name: [one[name] for one in rounds] for name in runs}


def spread(values: list[float], over: list[float] | None = None) -> str:
    """The median and (min-max), of the ratios in each round where there is something to divide by."""
    values = sorted(a / b for a, b in zip(values, over)) if over else sorted(values)
    return f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"


def machine(device: str) -> str:
    here = torch.cuda.get_device_name() if device == "cuda" else cpu()
    return f"{here}, threads: {torch.get_num_threads()}, torch {torch.__version__}"


def cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""Choose the device, and the dtype that is fast on it."""

import ctypes
import sys
import timeit
from functools import cache, partial

import torch


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device `name`. If `name` is None: the first of CUDA, MPS and CPU that works here.

    Raises ValueError for a name that torch does not know or this machine does not have.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} does not work here ({reason}); omit it for the default") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let this process keep up to 64 MB of freed memory, which glibc returns to Linux at once by default.

    torch frees and allocates a feature map at each step of a network. Linux clears every page that it hands
    out again, which takes about a tenth of the time of a small network on a CPU.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc's malloc.h
        libc.mallopt(-1, 64 * 2**20)  # M_TRIM_THRESHOLD: free bytes at the top of the heap
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: the heap holds smaller tensors. 32 MB is its maximum


def pick_dtype(name: str | None, device: torch.device) -> str:
    """The dtype `name`; if it is None: "bf16" if `device` computes faster in bf16, else "fp32"."""
    if name is not None:
        return name
    on_cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    on_cpu = device.type == "cpu" and bf16_is_fast_on_this_cpu()
    return "bf16" if on_cuda or on_cpu else "fp32"


@cache
@torch.inference_mode()
def bf16_is_fast_on_this_cpu() -> bool:
    """Whether a small convolution takes less time in bf16 than in fp32.

    Measured once, in at most 0.1 s. torch has no flag: `mkldnn._is_mkldnn_bf16_supported()` is True on every
    AVX-512 CPU, but without bf16 instructions, bf16 takes twice the time of fp32, and on AVX2 30 times.
    """
    def seconds(dtype: torch.dtype) -> float:
        x, weight = (torch.ones(shape, dtype=dtype) for shape in ((2, 128, 16, 16), (128, 128, 3, 3)))
        work = partial(torch.nn.functional.conv2d, x, weight, padding=1)
        return min(timeit.repeat(work, number=1, repeat=4)[1:])  # the first run loads the library

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)

"""Without --dtype, nanoip2p chooses the precision in which the device computes faster."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoip2p.common import device
from nanoip2p.common.device import pick_dtype

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_a_named_dtype_is_taken_unmeasured(monkeypatch):
    monkeypatch.setattr(device, "bf16_is_fast_on_this_cpu", lambda: pytest.fail("measured"))
    assert [pick_dtype(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize("fast, dtype", [(True, "bf16"), (False, "fp32")])
def test_the_measurement_decides_on_a_cpu(fast, dtype, monkeypatch):
    monkeypatch.setattr(device, "bf16_is_fast_on_this_cpu", lambda: fast)
    assert pick_dtype(None, CPU) == dtype and pick_dtype(None, torch.device("mps")) == "fp32"


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_a_cpu_without_bf16_arithmetic_gets_fp32(isa):
    """A setting of oneDNN forbids newer instructions, so that it computes as on such a CPU."""
    code = ("import torch; from nanoip2p.common.device import pick_dtype;"
            "print(pick_dtype(None, torch.device('cpu')))")
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "fp32\n", done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_cpu_keeps_the_memory_of_freed_tensors():
    """Else Linux hands out, and clears, every page of a feature map at each use."""
    code = """if True:
        import resource, torch
        from nanoip2p.common.device import pick_device
        pick_device("cpu")
        x, y = torch.randn(2, 24, 176, 16, 16)
        for count in (10, 100):  # the first tensors make the heap grow
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(count):
                a = torch.nn.functional.silu(x)
                b = a - y
                del a
                c = torch.nn.functional.group_norm(b, 16)
                del b, c
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's first choice. It may change by chance
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True)
    assert int(done.stdout) < 20_000  # 300 tensors have 300,000 pages

#!/usr/bin/env bash
# torch on a CPU: bf16 is accepted everywhere, and slower than fp32 wherever the CPU has no bf16 instructions.
#
# Expected: torch.autocast("cpu") defaults to bf16, so bf16 should cost no more than fp32, or torch should say so.
# Seen with torch 2.13.0: one 3x3 convolution and one linear layer, fp32 against bf16, one thread. oneDNN is told
# (ONEDNN_MAX_CPU_ISA) to use no instruction newer than AVX2, as on CPUs that have nothing newer. On such a CPU, bf16
# takes several times as long as fp32, without a warning. torch.backends.cpu.get_cpu_capability() has no word for bf16
# instructions: "AVX512" stands for CPUs with and without them.
# Consequence for nanoip2p: it measures whether bf16 is faster (nanoip2p/common/device.py), because torch does not say.
# Needs an x86-64 Linux machine with AVX2. Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/time.py" <<'PY'
import time

import torch
from torch import nn

torch.set_num_threads(1)


def ratio(layer, x):
    """Time in bf16 over time in fp32."""
    def seconds(dtype):
        run, given = layer.to(dtype), x.to(dtype)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            run(given)
            times.append(time.perf_counter() - began)
        return min(times[1:])

    with torch.inference_mode():
        fp32 = seconds(torch.float32)
        return seconds(torch.bfloat16) / fp32


conv = ratio(nn.Conv2d(128, 128, 3, padding=1), torch.ones(4, 128, 16, 16))
linear = ratio(nn.Linear(512, 512), torch.ones(1024, 512))
print(f"torch {torch.__version__}: bf16 takes {conv:.1f} x the time of fp32 (convolution), "
      f"{linear:.1f} x (linear layer)")
PY
as_is=$("$folder/venv/bin/python" "$folder/time.py")
limited=$(ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/time.py")
echo "this CPU:     $as_is"
echo "up to AVX2:   $limited"
"$folder/venv/bin/python" - "$limited" <<'PY'
import re
import sys

conv, linear = map(float, re.findall(r"([\d.]+) x", sys.argv[1]))
assert conv > 1.5 and linear > 1.5, "bf16 is no longer slow without bf16 instructions"
PY
echo "as described: bf16 is slow without bf16 instructions"

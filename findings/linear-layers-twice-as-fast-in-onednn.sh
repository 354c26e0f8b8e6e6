#!/usr/bin/env bash
# torch on an AMD CPU with AVX-512: in fp32, the same linear layer takes about half the time once oneDNN computes it.
#
# Expected: nn.Linear uses the fastest matrix product that torch contains.
# Seen with torch 2.13.0 on a busy AMD EPYC with AVX-512, one thread, 2048 rows of 2048 channels: nn.Linear, which uses
# MKL, takes 165 ms; after torch.utils.mkldnn.to_mkldnn, it takes 90 ms, with the conversions of input and output. The
# results agree to 4e-6. Restricted to AVX2 (ONEDNN_MAX_CPU_ISA), both take 165 ms. Convolutions use oneDNN anyway.
# Consequence for nanoip2p: on a CPU, its faster linear layers and Winograd's products use oneDNN, by torch's operators
# for laid out weights (nanoip2p/speed/cpu.py). While Winograd's products used MKL, the method gained nothing on this CPU.
# Needs x86-64 Linux and an AMD CPU with AVX-512. Exit code 1: the behaviour has changed.
set -eu
if ! grep -q -w avx512f /proc/cpuinfo || ! grep -q AuthenticAMD /proc/cpuinfo; then
    echo "this is no AMD CPU with AVX-512, so there is nothing to see"; exit 0; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/time.py" <<'PY'
import copy
import time

import torch
from torch import nn
from torch.utils import mkldnn

torch.set_num_threads(1)
torch.manual_seed(0)
linear, x = nn.Linear(2048, 2048).eval(), torch.randn(2048, 2048)
blocked = mkldnn.to_mkldnn(copy.deepcopy(linear))


def seconds(run):
    times = []
    for _ in range(8):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times[1:])


with torch.inference_mode():
    apart = (linear(x) - blocked(x.to_mkldnn()).to_dense()).abs().max().item()
    plain, own = seconds(lambda: linear(x)), seconds(lambda: blocked(x.to_mkldnn()).to_dense())
print(f"torch {torch.__version__}: nn.Linear {1e3 * plain:.1f} ms, by oneDNN {1e3 * own:.1f} ms, "
      f"ratio {plain / own:.2f}, largest difference {apart:.1e}")
assert apart < 1e-4
PY
as_is=$("$folder/venv/bin/python" "$folder/time.py")
limited=$(ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/time.py")
echo "this CPU:     $as_is"
echo "up to AVX2:   $limited"
"$folder/venv/bin/python" - "$as_is" "$limited" <<'PY'
import re
import sys

as_is, limited = (float(re.search(r"ratio ([\d.]+)", text)[1]) for text in sys.argv[1:])
assert as_is > 1.4 and limited < 1.2, "nn.Linear is no longer slower than oneDNN"
PY
echo "as described: oneDNN computes a linear layer in about half the time of nn.Linear"

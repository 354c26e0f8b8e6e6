#!/usr/bin/env bash
# torch on a CPU with bf16 instructions: scaled_dot_product_attention takes as long in bf16 as in fp32.
#
# Expected: like linear layers, fused attention uses these instructions, and takes about half the time of fp32.
# Seen with torch 2.13.0 on an AMD EPYC with avx512_bf16, one thread, 8 heads of 80, 1024 positions: the fused kernel
# takes 1.0 times its own time in fp32. Softmax between two matrix products, one head at a time, takes 0.3 times its own
# time in fp32, and in bf16 it is 2.7 times as fast as the fused kernel. There is no warning. The fused kernel takes a
# quarter of a bf16 step of Stable Diffusion's UNet on such a CPU.
# Consequence for nanoip2p: on such a CPU, it computes bf16 attention by products (tiled_attention in
# nanoip2p/speed/cpu.py).
# Needs x86-64 Linux and a CPU with avx512_bf16, without AMX. Exit code 1: the behaviour has changed.
set -eu
grep -q -w avx512_bf16 /proc/cpuinfo || { echo "this CPU has no avx512_bf16, so there is nothing to see"; exit 0; }
if grep -q -w amx_bf16 /proc/cpuinfo; then echo "this CPU has AMX, where the behaviour was not seen"; exit 0; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/time.py" <<'PY'
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
q, k, v = torch.randn(3, 1, 8, 1024, 80, generator=torch.Generator().manual_seed(0)).unbind()


def seconds(run):
    times = []
    for _ in range(8):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times[1:])


def products(q, k, v):
    """Softmax between two products, one head at a time."""
    return [(q[0, i] @ k[0, i].T * q.shape[-1] ** -0.5).softmax(-1) @ v[0, i] for i in range(8)]


with torch.inference_mode():
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype) for x in (q, k, v)]
        taken[dtype] = [seconds(lambda: F.scaled_dot_product_attention(*given)), seconds(lambda: products(*given))]
fused, own = (half / full for full, half in zip(taken[torch.float32], taken[torch.bfloat16]))
ahead = taken[torch.bfloat16][0] / taken[torch.bfloat16][1]
print(f"torch {torch.__version__}, time in bf16 over time in fp32: fused attention {fused:.2f}, "
      f"softmax between two products {own:.2f}")
print(f"in bf16, the fused kernel takes {ahead:.2f} times as long as softmax between two products")
assert fused > 0.8 and own < 0.6 and ahead > 1.2, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/time.py"
echo "as described: fused attention gains nothing from bf16 instructions"

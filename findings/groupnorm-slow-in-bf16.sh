#!/usr/bin/env bash
# torch on a CPU: GroupNorm in channels_last takes several times as long in bf16 as in fp32, on small feature maps.
#
# Expected: half as many bytes take at most as long, and GroupNorm computes in fp32 inside either way.
# Seen with torch 2.13.0 on one core of an AMD EPYC with AVX-512 and bf16 instructions, in channels_last, times the time
# of fp32: 8.3 for (24, 64, 16, 16) in 16 groups, 5.3 for (3, 640, 16, 16) in 32 groups. On a map of 32 x 32 it is 0.9.
# A contiguous map of 16 x 16 takes 1.4 to 1.5. By way of fp32, it takes 1.2 to 1.5. The U-Nets of Stable Diffusion
# have most of their norms on maps below 32 x 32 at 256 pixels.
# Consequence for nanoip2p: the faster layers for CPUs compute norms of such maps in fp32 (nanoip2p/speed/cpu.py).
# Needs x86-64 Linux. Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/norm.py" <<'PY'
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
print(f"torch {torch.__version__}, CPU time of group_norm in bf16 over fp32:")
print("                    size   groups   contiguous   channels_last   channels_last, by way of fp32")


def fastest(run):
    """The smallest CPU time of twenty rounds of ten calls."""
    times = []
    for _ in range(20):
        began = time.process_time()
        for _ in range(10):
            run()
        times.append(time.process_time() - began)
    return min(times)


ratios = {}
for size, groups in (((24, 64, 16, 16), 16), ((3, 640, 16, 16), 32), ((3, 640, 32, 32), 32)):
    row = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(size).contiguous(memory_format=layout)
        half, base = x.bfloat16(), fastest(lambda: F.group_norm(x, groups))
        row.append(fastest(lambda: F.group_norm(half, groups)) / base)
    row.append(fastest(lambda: F.group_norm(half.float(), groups).bfloat16()) / base)
    ratios[size] = row
    print(f"{size!s:>24} {groups:8}   {row[0]:10.1f}   {row[1]:13.1f}   {row[2]:29.1f}")
for size in ((24, 64, 16, 16), (3, 640, 16, 16)):
    contiguous, channels_last, converted = ratios[size]
    assert channels_last > 2 * max(contiguous, converted), "bf16 is no longer slow in channels_last"
assert ratios[3, 640, 32, 32][1] < 2, "larger maps are slow too"
PY
# Otherwise glibc returns freed memory to Linux after each call, and page faults take most of the time
MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=33554432 "$folder/venv/bin/python" "$folder/norm.py"
echo "as described: GroupNorm of small maps in channels_last is slow in bf16"

#!/usr/bin/env bash
# torch on a CPU: GroupNorm in channels_last is inexact if a group's mean is many standard deviations from 0.
#
# Expected: memory_format changes the speed, and the last digit at most.
# Seen with torch 2.13.0: the same tensor, contiguous and in channels_last, against double precision. At a mean of 10
# standard deviations, the largest error is 2e-4 in channels_last and 2e-6 contiguous; at 100 it is 2e-2 and 2e-5; at
# 1000 it is 2 and 8e-5. Outputs are about 1 in size. There is no warning. The growth with the square of the mean is that of a
# variance computed as the mean of the squares less the square of the mean.
# Consequence for nanoip2p: on a CPU, faster layers return feature maps in channels_last, and the mean of each group is
# subtracted before each norm (nanoip2p/speed/cpu.py). In the nano UNet, flat pictures reach a ratio of 2.6.
# Needs x86-64 Linux. Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/norm.py" <<'PY'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
print(f"torch {torch.__version__}, group_norm of (3, 640, 32, 32) in 32 groups, largest error:")
print("mean / spread   contiguous   channels_last")
errors = {}
for mean in (0, 1, 10, 100, 1000):
    x = torch.randn(3, 640, 32, 32, generator=generator) + mean
    exact = F.group_norm(x.double(), 32)
    errors[mean] = [(F.group_norm(x.contiguous(memory_format=layout), 32) - exact).abs().max().item()
                    for layout in (torch.contiguous_format, torch.channels_last)]
    print(f"{mean:13}   {errors[mean][0]:10.0e}   {errors[mean][1]:13.0e}")
assert all(plain < 1e-3 for plain, _ in errors.values()), "contiguous is inexact too"
assert errors[100][1] > 100 * errors[100][0], "channels_last is as exact as contiguous now"
PY
"$folder/venv/bin/python" "$folder/norm.py"
echo "as described: GroupNorm loses digits in channels_last"

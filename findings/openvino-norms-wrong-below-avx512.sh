#!/usr/bin/env bash
# OpenVINO on a CPU with AVX-512, limited to AVX2 by oneDNN's own variable: norms come out wrong, without a warning.
#
# Expected: oneDNN documents ONEDNN_MAX_CPU_ISA as a limit on the instructions that it uses. It is the usual way to try
# on a newer CPU how a program does on an older one. Results should differ by rounding at most.
# Seen with openvino 2026.4.0: MVN, the operation that GroupNorm and LayerNorm become, is off by more than 1 where all
# values are below 5. The model runs without a message. The runtime model says why: MVN still names the kernel
# jit_avx512_f32, while its neighbours became jit_avx2_f32. Convolutions, linear layers and attention stay correct.
# Without the variable, MVN agrees with numpy to 1e-5.
# Consequence for nanoip2p: its benchmarks compare the pictures of all sides first, so a run with this limit shows
# OpenVINO's picture as wrong. tests/benchmarks/RESULTS.md compares with OpenVINO only without the limit.
# Needs an x86-64 Linux machine with AVX-512. Exit code 1: the behaviour has changed.
set -eu
grep -qw avx512f /proc/cpuinfo || { echo "this needs a CPU with AVX-512"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.0 numpy==2.2.6 2>/dev/null
cat > "$folder/norm.py" <<'PY'
import numpy as np
import openvino as ov
from openvino import opset13 as op

x = np.random.default_rng(0).standard_normal((2, 4, 320), dtype=np.float32)
given = op.parameter(x.shape, np.float32)
norm = op.mvn(op.multiply(given, np.float32(2)), np.array([2]), True, 1e-5, "INSIDE_SQRT")
run = ov.Core().compile_model(ov.Model([norm], [given]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
got, y = run([x])[0], 2 * x
want = (y - y.mean(2, keepdims=True)) / np.sqrt(y.var(2, keepdims=True) + 1e-5)
wrong = not np.abs(got - want).max() < 1e-5  # NaN counts as wrong
kernels = [str(node.get_rt_info()["primitiveType"].value) for node in run.get_runtime_model().get_ops()
           if node.get_rt_info()["layerType"].value == "MVN"]
print(f"openvino {ov.__version__.split('-')[0]}: MVN by {', '.join(kernels)},",
      "off by more than 1" if not np.abs(got - want).max() < 1 else "wrong" if wrong else "correct to 1e-5")
PY
as_is=$("$folder/venv/bin/python" -W ignore "$folder/norm.py")
limited=$(ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" -W ignore "$folder/norm.py")
echo "this CPU:     $as_is"
echo "up to AVX2:   $limited"
case "$as_is/$limited" in
*"correct to 1e-5/"*"jit_avx512_f32, off by more than 1") echo "as described: the norm ignores the limit, and is wrong" ;;
*) echo "the behaviour has changed"; exit 1 ;;
esac

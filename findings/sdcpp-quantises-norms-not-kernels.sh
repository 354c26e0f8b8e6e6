#!/usr/bin/env bash
# stable-diffusion.cpp's converter quantises the scales of norms and leaves the 3x3 kernels as they are.
#
# Expected: the conversion to Q8_0 shrinks the large weights, and does not change the few numbers of norms, which are
# sensitive to errors. So a file of Q8_0 should be about half as large as one of F16.
# Seen with stable-diffusion.cpp in cyllama 0.2.18, on weights with the names and shapes of Stable Diffusion 1.x in
# float32: a kernel (320, 320, 3, 3) stays F32, because a row of 3 numbers is no block of 32, while the scales of
# GroupNorm and LayerNorm, one row of 320, become Q8_0, with errors of 0.005 at values near 1. With F16, both are F16. So
# the file of Q8_0 is larger than the file of F16, and its norms are less exact.
# Consequence for nanoip2p: a GGUF file mixes kinds, and tensors of one dimension are quantised, too; the line that
# describes the file names all kinds (nanoip2p/checkpoint/ggufs.py).
# Needs Linux. Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check cyllama==0.2.18 gguf==0.19.0 safetensors==0.8.0 \
    numpy==2.2.6 2>/dev/null
cat > "$folder/convert.py" <<'PY'
import os

import gguf
import numpy as np
from cyllama.sd.stable_diffusion import SDType, convert_model
from safetensors.numpy import save_file

random, block = np.random.default_rng(0), "model.diffusion_model.input_blocks.1."
given = {
    block + "0.in_layers.0.weight": 1 + random.normal(0, 0.1, 320),
    block + "0.in_layers.2.weight": random.normal(0, 0.03, (320, 320, 3, 3)),
    block + "1.transformer_blocks.0.norm1.weight": 1 + random.normal(0, 0.1, 320),
    block + "1.transformer_blocks.0.attn1.to_q.weight": random.normal(0, 0.03, (320, 320)),
}
given = {name: numbers.astype(np.float32) for name, numbers in given.items()}
save_file(given, "given.safetensors")
kinds = {}
for kind in ("F16", "Q8_0"):
    convert_model("given.safetensors", f"{kind}.gguf", getattr(SDType, kind), tensor_type_rules="no-such-tensor=f32")
    for tensor in gguf.GGUFReader(f"{kind}.gguf").tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        error = abs(numbers - given[tensor.name]).max()
        kinds[kind, tensor.name.removeprefix(block)] = tensor.tensor_type.name
        print(f"RESULT {kind}: {tensor.name.removeprefix(block):<42}{tensor.tensor_type.name:<6}error {error:.4f}")
    print(f"RESULT {kind}: {os.path.getsize(f'{kind}.gguf'):,} bytes")
assert kinds["Q8_0", "0.in_layers.2.weight"] == "F32", "the kernel is converted now"
assert kinds["Q8_0", "0.in_layers.0.weight"] == "Q8_0", "the norm is left alone now"
assert os.path.getsize("Q8_0.gguf") > os.path.getsize("F16.gguf"), "the quantised file is the smaller one now"
PY
cd "$folder"
"$folder/venv/bin/python" convert.py > out.txt 2> err.txt || { tail -n 3 err.txt; exit 1; }
grep -o "RESULT.*" out.txt | sed "s/RESULT/cyllama 0.2.18,/"
echo "as described: norms are quantised, kernels are not"

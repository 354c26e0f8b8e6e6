#!/usr/bin/env bash
# torch.optim.AdamW on bf16 parameters: the average of squared gradients can rise, but never fall.
#
# Expected: bf16 keeps two to three digits, so the average follows the gradients to two or three digits.
# Seen with torch 2.13.0: 1,000 steps with gradients of size 1, then 7,000 steps with gradients of size 0.01. In fp32
# the second moment falls a thousandfold. In bf16 it keeps its value to the last bit, for all three implementations
# (for-loop, foreach, fused). Each step multiplies it by beta2 = 0.999, and the nearest bf16 number of the product is
# the old number. So after a time of large gradients the steps stay too small, here 30 times, for the rest of the run.
# There is no warning.
# Consequence for nanoip2p: weights, their average and Adam's state stay in fp32; --dtype bf16 of train.py concerns
# matrix products only. Every fine-tuning with unet.to(torch.bfloat16) and AdamW is affected.
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/adamw.py" <<'PY'
import torch

torch.set_num_threads(1)


def moments(dtype, **how):
    """The mean of AdamW's second moments after 1,000 and after 8,000 steps."""
    weights = torch.nn.Parameter(torch.zeros(1024, dtype=dtype))
    optimizer, generator = torch.optim.AdamW([weights], weight_decay=0.0, **how), torch.Generator().manual_seed(0)
    for step in range(8000):
        size = 1 if step < 1000 else 0.01
        weights.grad = (size * torch.randn(1024, generator=generator)).to(dtype)
        optimizer.step()
        if step in (999, 7999):
            yield optimizer.state[weights]["exp_avg_sq"].double().mean().item()


print(f"torch {torch.__version__}, AdamW, second moment after 1,000 large and 7,000 small gradients:")
_, exact = moments(torch.float32)
for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
    (before, after), (high, low) = moments(torch.bfloat16, **how), moments(torch.float32, **how)
    print(f"{how}: bf16 {before:.4f} -> {after:.4f}, fp32 {high:.4f} -> {low:.4f}; "
          f"steps {(after / low) ** 0.5:.0f} times too small")
    assert low < 0.01 * high, "fp32 does not fall"
    assert after == before, "the second moment in bf16 falls now"
PY
"$folder/venv/bin/python" "$folder/adamw.py"
echo "as described: AdamW's second moment never falls in bf16"

#!/usr/bin/env bash
# torch on a CPU: once a network in training is set to channels_last, fused AdamW gives weights the moments of others.
#
# Expected: memory_format changes the speed, and the last digit at most. So it is with foreach and with the for-loop. On
# CUDA, users report that the fused form refuses unlike strides ("must have same dtype, device, and layout").
# Seen with torch 2.13.0: a network takes steps with fused=True, then network.to(memory_format=torch.channels_last), as
# diffusers' guide to speed says for the UNet of a pipeline. Weights and gradients get another order in memory; the
# moments keep theirs. The fused form walks through all of them in the order of memory, so in 3x3 kernels it pairs each
# weight with the moments of another one. The cosine of the next step with the right one is 0.13 for Adam and AdamW,
# 0.08 for SGD with momentum, 0.99 for Adagrad. There is no error and no warning. A resumed training meets it, too, if
# its network is in channels_last and the saved one was not: load_state_dict keeps the order of the saved moments.
# Consequence for nanoip2p: it trains by fused AdamW, sets the layout before the first step, and gives each moment that
# it loads the layout of its weight (nanoip2p/training/trainer.py, load). Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/fused.py" <<'PY'
import copy
import io

import torch
from torch import nn

print(f"torch {torch.__version__}; the cosine of step 51 with that of the for-loop in the contiguous layout")
torch.manual_seed(0)
start = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1))
pictures, targets = torch.randn(51, 4, 8, 12, 12), torch.randn(51, 4, 4, 12, 12)
KINDS = {"AdamW": {}, "Adam": {}, "SGD": {"momentum": 0.9}, "Adagrad": {}}
FORMS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def optimizer_of(network, kind, form):
    return getattr(torch.optim, kind)(network.parameters(), 1e-3, **KINDS[kind], **FORMS[form])


def step(network, optimizer, i):
    optimizer.zero_grad()
    (network(pictures[i]) - targets[i]).square().mean().backward()
    optimizer.step()


def last_step(kind, form, change=None):
    """The change of the first kernel in step 51. change: what happens before this step."""
    network = copy.deepcopy(start)
    optimizer = optimizer_of(network, kind, form)
    for i in range(50):
        step(network, optimizer, i)
    if change:
        network.to(memory_format=torch.channels_last)
    if change == "resume":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        optimizer = optimizer_of(network, kind, form)
        optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    before = network[0].weight.detach().clone()
    step(network, optimizer, 50)
    return (network[0].weight.detach() - before).contiguous().flatten()


wrong = set()
for kind in KINDS:
    right = last_step(kind, "for-loop")
    for form in FORMS:
        found = {}
        for change in (None, "switch", "resume"):
            found[change] = torch.cosine_similarity(last_step(kind, form, change), right, dim=0).item()
            if found[change] < 0.999:
                wrong.add((kind, form, change))
        print(f"{kind}, {form}: contiguous {found[None]:.2f}, switched to channels_last {found['switch']:.2f}, "
              f"resumed in channels_last {found['resume']:.2f}")
assert wrong == {(kind, "fused", change) for kind in KINDS for change in ("switch", "resume")}, \
    "the layout matters in other cases now"
PY
"$folder/venv/bin/python" -W ignore "$folder/fused.py"
echo "as described: in another layout, the fused forms pair weights with the moments of others"

#!/usr/bin/env bash
# torch: some initialisers, called on the meta device, import torch._dynamo, sympy and FSDP: seconds, and 100 MB.
#
# Expected: a network on the meta device costs next to nothing to build, because no numbers are drawn.
# Seen with torch 2.13.0: nn.Linear and nn.Conv2d import nothing. One nn.Embedding, whose weight is drawn by
# nn.init.normal_, imports 823 modules: torch._dynamo, sympy, torch.distributed.fsdp. The first such layer of a process
# took 2.3 CPU s, where `import torch` took 1.9. On the CPU, nn.Embedding imports one module.
# Consequence for nanoip2p: a checkpoint's networks are built without initial values (nanoip2p/checkpoint/folder.py),
# and a test says which modules an edit must not import. An edit of one step starts in half the time.
# Needs x86-64 Linux. Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/build.py" <<'PY'
import sys
import time

import torch
from torch import nn

imported = time.process_time()
before, heavy = set(sys.modules), ("torch._dynamo", "sympy", "torch.distributed.fsdp")
print(f"torch {torch.__version__}: {imported:.1f} CPU s until `import torch` is done")


def build(name, make, device):
    known, began = set(sys.modules), time.process_time()
    with torch.device(device):
        make()
    new = set(sys.modules) - known
    print(f"{name:<34}{len(new):5} modules more, {time.process_time() - began:5.2f} CPU s, "
          f"heavy ones: {', '.join(one for one in heavy if one in new) or 'none'}")
    return new


build("nn.Embedding(10, 10) on the CPU", lambda: nn.Embedding(10, 10), "cpu")
build("nn.Linear(10, 10) on meta", lambda: nn.Linear(10, 10), "meta")
build("nn.Conv2d(10, 10, 3) on meta", lambda: nn.Conv2d(10, 10, 3), "meta")
assert not set(heavy) & set(sys.modules), "others import them as well"
new = build("nn.Embedding(10, 10) on meta", lambda: nn.Embedding(10, 10), "meta")
assert set(heavy) <= new, "nn.Embedding no longer imports them"
PY
"$folder/venv/bin/python" "$folder/build.py"
echo "as described: an initialiser on the meta device imports torch._dynamo"

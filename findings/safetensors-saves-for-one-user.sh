#!/usr/bin/env bash
# safetensors 0.8: a saved file can be read by its owner only, whatever the umask says.
#
# Expected: as with every older version (0.4.5 to 0.7.0 were tried), and as all other files that a model's
# save_pretrained writes, a new file gets the rights that the umask leaves: 644 with the usual umask of 022.
# Seen with safetensors 0.8.0: the file has the rights 600. It is written under another name and then renamed. So
# save_pretrained of diffusers and transformers leaves a folder whose config.json everyone can read, and whose weights
# only their owner can: a colleague, a service under another user, or a container cannot open a model from a shared disk.
# The rename also changes what happens to links: 0.7.0 writes through a symbolic link, into the model that it points
# to; 0.8.0 replaces the link by a file, and the other model stays as it was.
# Consequence for nanoip2p: it writes safetensors itself, with the umask's rights; shared weights of weights/ are links.
# Exit code 1: the behaviour has changed.
set -eu
umask 022
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/save.py" <<'PY'
import os
import sys

import numpy
import safetensors
from safetensors.numpy import save_file

os.chdir(sys.argv[1])
save_file({"w": numpy.zeros(4, numpy.float32)}, "model")
with open("config.json", "w") as file:
    file.write("{}")
rights = [f"{os.stat(name).st_mode & 0o777:o}" for name in ("model", "config.json")]
os.symlink("model", "link")
before = open("model", "rb").read()
save_file({"w": numpy.ones(4, numpy.float32)}, "link")
through = open("model", "rb").read() != before
print(f"safetensors {safetensors.__version__}: weights {rights[0]}, config.json {rights[1]}; "
      f"saving to a link {'changes the file it points to' if through else 'replaces the link'}")
old = safetensors.__version__ == "0.7.0"
assert rights == ["644" if old else "600", "644"], rights
assert through == old == os.path.islink("link")
PY
for version in 0.7.0 0.8.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==$version numpy==2.2.6 2>/dev/null
    mkdir "$folder/$version"
    "$folder/venv/bin/python" "$folder/save.py" "$folder/$version"
done
echo "as described: safetensors 0.8.0 takes the right to read from everyone but the owner"

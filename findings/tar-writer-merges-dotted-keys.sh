#!/usr/bin/env bash
# webdataset: the writer accepts keys with a dot; the reader cuts them at the dot and merges several samples into one.
#
# Expected: what TarWriter writes, WebDataset reads back, or the writer refuses the key. Names of pictures have dots:
# "house.1", "2024.05.01-tree", "photo_1.5x".
# Seen with webdataset 1.0.2, three samples: house.1, house.2 and tree, each with the members input.jpg and edit.txt.
# The writer says nothing. The reader gives two samples: tree, and one called "house" with the fields 1.input.jpg,
# 1.edit.txt, 2.input.jpg, 2.edit.txt. If a pipeline leaves out samples that lack a field, as is usual with shards from
# the web (handler=ignore_and_continue), both houses are lost without a message. One sample of three is left.
# A dot in a folder's name does no harm.
# Consequence for nanoip2p: it splits names as webdataset does, and names each key without a pair, with the fields
# found (nanoip2p/dataset/tables.py); --skip-bad counts them. Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.2.6 pillow==13.0.0 \
    2>/dev/null
cat > "$folder/dots.py" <<'PY'
import io
import sys
from importlib.metadata import version

import webdataset
from PIL import Image

file = io.BytesIO()
Image.new("RGB", (8, 8)).save(file, "JPEG")


def read_back(keys):
    """(the keys of the samples and their fields, the edits that a pipeline yields)"""
    path = f"{sys.argv[1]}/shard.tar"
    with webdataset.TarWriter(path) as writer:
        for key in keys:
            writer.write({"__key__": key, "input.jpg": file.getvalue(), "edit.txt": f"edit of {key}"})
    samples = {sample["__key__"]: sorted(name for name in sample if not name.startswith("__"))
               for sample in webdataset.WebDataset(path, shardshuffle=False)}
    pairs = webdataset.WebDataset(path, shardshuffle=False).decode("pil").to_tuple(
        "input.jpg", "edit.txt", handler=webdataset.ignore_and_continue)
    return samples, [edit for _, edit in pairs]


print("webdataset", version("webdataset"))
for keys in (["house-1", "house-2", "tree"], ["v1.5/house", "v1.5/tree"], ["house.1", "house.2", "tree"]):
    samples, edits = read_back(keys)
    print(f"written: {keys}\n    read: {samples}\n    edits that come through: {edits}")
    if keys[0] != "house.1":
        assert [*samples] == keys and len(edits) == len(keys), "other keys are cut"
assert [*samples] == ["house", "tree"] and len(samples["house"]) == 4, "dotted keys are kept apart now"
assert edits == ["edit of tree"], "more than one sample comes through"
PY
"$folder/venv/bin/python" -W ignore "$folder/dots.py" "$folder"
echo "as described: samples whose keys have a dot are merged, and lost"

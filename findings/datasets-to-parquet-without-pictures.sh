#!/usr/bin/env bash
# datasets: Dataset.to_parquet of an image folder writes a parquet file without the pictures.
#
# Expected: a parquet file with the bytes of the pictures, or a warning.
# Seen with datasets 5.2.0: the column is struct<bytes, path>, as with bytes, but `bytes` is null in each row, and
# `path` is the absolute path of the picture on this machine. There is no warning. The file reads well until the
# folder is moved, or the file is copied elsewhere; then the first access raises FileNotFoundError. A relative path
# in such a column is looked for in the working folder, not beside the parquet file.
# Consequence for nanoip2p: a cell without bytes is read from its path, if that is in the folder of the file
# (nanoip2p/dataset/tables.py). Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.0.0 2>/dev/null
cat > "$folder/run.py" <<'PY'
import json
import os
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

datasets.disable_progress_bars()
root = Path(sys.argv[1])
(root / "edits").mkdir()
for name in "ab":
    Image.new("RGB", (64, 64)).save(root / f"edits/{name}.png")
(root / "edits/metadata.jsonl").write_text(json.dumps({
    "before_file_name": "a.png", "after_file_name": "b.png", "edit": "make it night"}) + "\n")
edits = datasets.load_dataset("imagefolder", data_dir=str(root / "edits"))["train"]
assert edits[0]["before"].size == (64, 64)
edits.to_parquet(root / "edits.parquet")
cell = pq.read_table(root / "edits.parquet").to_pylist()[0]["before"]
print(f"datasets {datasets.__version__}: to_parquet of an image folder wrote the cell {cell}")
assert cell["bytes"] is None and os.path.isabs(cell["path"]), "the pictures are in the file now"

back = datasets.load_dataset("parquet", data_files=str(root / "edits.parquet"))["train"]
assert back[0]["before"].size == (64, 64)
(root / "edits").rename(root / "moved")
try:
    back[0]
    sys.exit("the pictures are found after a move")
except FileNotFoundError as error:
    print(f"after the folder was moved: {type(error).__name__}: {error}")

table = pq.read_table(root / "edits.parquet")
cells = [{"bytes": None, "path": "a.png"}]
kind = table.schema.field("before").type
pq.write_table(pa.table({"before": pa.array(cells, kind), "edit": ["make it night"]}),
               root / "moved/relative.parquet")
for place in (root, root / "moved"):
    os.chdir(place)
    given = datasets.load_dataset("parquet", data_files=str(root / "moved/relative.parquet"))["train"]
    given = given.cast_column("before", datasets.Image())
    try:
        given[0]
        found = True
    except FileNotFoundError:
        found = False
    print(f"relative path beside the file, working folder {place.name}: {'found' if found else 'not found'}")
    assert found == (place.name == "moved"), "relative paths are looked for elsewhere now"
PY
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/run.py" "$folder"
echo "as described: the parquet file holds no pictures"

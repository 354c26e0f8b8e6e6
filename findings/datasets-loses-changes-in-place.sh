#!/usr/bin/env bash
# datasets: what map draws into a picture, or shrinks in place, is lost if the picture is a file of an image folder.
#
# Expected: Dataset.map keeps what the function returns. It does so with a picture that resize() returns, and with
# pictures whose bytes are in the table, as in a parquet file.
# Seen with datasets 5.2.0 and Pillow 12.3.0, for JPEG and PNG: a function shrinks row["image"] by thumbnail(), paints
# on it by ImageDraw or paste(), and returns it. The function sees the changed picture, the new table has the old one,
# also in a column of another name. There is no warning. Such a picture remembers the file from which it was opened, and
# map writes the name of this file, not the pixels. So masks that are painted into the inputs of a dataset of edits
# vanish. A copy() before the change helps.
# Consequence for nanoip2p: its own pictures are written without this library. A table made by such a map is read as it
# is, without the change (nanoip2p/dataset/tables.py). Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0 2>/dev/null
mkdir "$folder/pictures"
cat > "$folder/change.py" <<'PY'
import sys
from pathlib import Path

import datasets
import PIL
from PIL import Image, ImageDraw

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
print("datasets", datasets.__version__, "Pillow", PIL.__version__)
for name in ("house.jpg", "tree.png"):
    Image.new("RGB", (64, 48), "navy").save(folder / "pictures" / name)
files = datasets.load_dataset("imagefolder", data_dir=str(folder / "pictures"), split="train",
                              cache_dir=str(folder / "cache"))
cells = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted((folder / "pictures").iterdir())]
table = datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image()}))


def shrink(row):
    row["image"].thumbnail((16, 16))
    return row


def draw(row):
    ImageDraw.Draw(row["image"]).rectangle((0, 0, 40, 40), fill="white")
    return {"image": row["image"]}


def paste(row):
    row["image"].paste("white", (0, 0, 41, 41))
    return {"masked": row["image"]}


def copy_and_draw(row):
    return draw({"image": row["image"].copy()})


def resize(row):
    return {"image": row["image"].resize((16, 12))}


def kept(rows, change):
    """Whether the pictures of the new table, JPEG and PNG, are those that the function returned."""
    new, column = rows.map(change, load_from_cache_file=False), "masked" if change is paste else "image"
    wanted = [change(rows[i])[column] for i in range(2)]
    return [picture.size == want.size and abs(picture.getpixel((5, 5))[0] - want.getpixel((5, 5))[0]) < 20
            for picture, want in zip(new[column], wanted)]


found = {(source, change.__name__): kept(rows, change)
         for source, rows in (("image folder", files), ("table with bytes", table))
         for change in (shrink, draw, paste, copy_and_draw, resize)}
for (source, change), both in found.items():
    print(f"{source}, {change}: {' and '.join('kept' if it else 'LOST' for it in both)} (JPEG and PNG)")
lost = {key for key, both in found.items() if both == [False, False]}
assert lost == {("image folder", change) for change in ("shrink", "draw", "paste")}, "other changes are lost now"
assert all(both == [True, True] for key, both in found.items() if key not in lost), "other changes are lost now"
PY
HF_DATASETS_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/change.py" "$folder"
echo "as described: pictures of an image folder that map changes in place stay as they were"

#!/usr/bin/env bash
# datasets: a map that looks at a JPEG to measure it compresses the picture in the new table again, at quality 75.
#
# Expected: a function that returns one number, for instance {"width": row["image"].width}, adds a column. The pictures
# stay as they are, bit for bit. So they do if the function looks at the text only.
# Seen with datasets 5.2.0 and Pillow 12.3.0, on a table with the bytes of the pictures, as in parquet files of the Hub:
# each JPEG is written anew, at quality 75 and with a quarter of the colour samples, though the source had quality 100
# and all samples. Further maps add to the error. A thumbnail() of the picture, made for a quick measurement, goes into
# the table in place of the picture. batched=True does the same. There is no warning, and PNG keeps its pixels.
# A picture that was decoded replaces the bytes in the row, and map writes the row by Pillow's save, without a quality.
# filter, and input_columns=["image"], keep the bytes. So a column of scores can cost a dataset its smallest edits.
# Consequence for nanoip2p: it writes and scores its pairs without this library, at quality 100
# (nanoip2p/dataset/pairs.py). Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0 2>/dev/null
cat > "$folder/again.py" <<'PY'
import io

import datasets
import numpy as np
import PIL
from PIL import Image, JpegImagePlugin

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "Pillow", PIL.__version__)
coarse = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
photo = Image.fromarray(coarse).resize((256, 256))


def encoded(**settings):
    file = io.BytesIO()
    photo.save(file, **settings)
    return file.getvalue()


cells = [{"bytes": encoded(format="JPEG", quality=100, subsampling="4:4:4"), "path": "a.jpg"},
         {"bytes": encoded(format="PNG"), "path": "a.png"}]
table = datasets.Dataset.from_dict(
    {"image": cells, "edit": ["make it red", "add a cat"]},
    datasets.Features({"image": datasets.Image(), "edit": datasets.Value("string")}))


def add(rows, column, **how):
    return rows.map(column, load_from_cache_file=False, **how)


def length(row):
    return {"length": len(row["edit"])}


def width(row):
    return {"width": row["image"].width}


def widths(rows):
    return {"width": [picture.width for picture in rows["image"]]}


def brightness(row):
    row["image"].thumbnail((64, 64))
    return {"brightness": float(np.asarray(row["image"]).mean())}


tables = {
    "length of the text": add(table, length), "width": add(table, width), "width, twice": add(add(table, width), width),
    "width, batched": add(table, widths, batched=True), "brightness of a thumbnail": add(table, brightness),
    "width, input_columns": add(table, lambda image: {"width": image.width}, input_columns=["image"]),
    "filter by width": table.filter(lambda row: row["image"].width > 1, load_from_cache_file=False)}
standard, kept, sizes = Image.open(io.BytesIO(encoded(format="JPEG", quality=75))), [], {}
for name, rows in tables.items():
    jpeg, png = (cell["bytes"] for cell in rows.cast_column("image", datasets.Image(decode=False))["image"])
    picture, pixels = Image.open(io.BytesIO(jpeg)), np.asarray(Image.open(io.BytesIO(png)))
    sizes[name] = picture.size
    said = f"{name}: JPEG of {len(jpeg)} bytes, {picture.width} x {picture.height}"
    if jpeg == cells[0]["bytes"]:
        kept.append(name)
        print(said + ", unchanged")
    else:
        assert picture.quantization == standard.quantization, "JPEG is written at another quality now"
        assert JpegImagePlugin.get_sampling(picture) == 2, "JPEG is written with more colour samples now"
        error = np.abs(np.asarray(picture.resize(photo.size)) - np.asarray(photo, dtype=float)).mean()
        print(f"{said}, mean error {error:.2f} of 255")
    assert picture.width < 256 or (pixels == np.asarray(photo)).all(), "PNG loses pixels now"
assert kept == ["length of the text", "width, input_columns", "filter by width"], "other tables keep the bytes now"
assert {name for name in sizes if sizes[name] != photo.size} == {"brightness of a thumbnail"}, "other sizes change now"
PY
HF_DATASETS_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/again.py"
echo "as described: to measure a JPEG in map compresses it again"

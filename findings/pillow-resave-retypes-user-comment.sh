#!/usr/bin/env bash
# Pillow: a JPEG or WebP saved with the EXIF of another keeps the bytes of UserComment, but with a type readers reject.
#
# Expected: image.save(..., exif=Image.open("a.jpg").getexif()) copies the tags. The web UIs keep a picture's settings in
# UserComment, which EXIF defines as type UNDEFINED (7).
# Seen with Pillow 13.0.0 and piexif 1.1.3, in both formats: the copy's UserComment has the same bytes, but type BYTE (1).
# piexif, with which the web UIs write and read, then gives a tuple of numbers instead of bytes, and its
# helper.UserComment.load raises "unable to determine appropriate encoding". The copy that keeps the raw block,
# exif=image.info["exif"], keeps the type.
# Consequence for nanoip2p: it writes the EXIF block by hand (nanoip2p/common/web_ui.py, to_exif).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 piexif==1.1.3 2>/dev/null
cat > "$folder/resave.py" <<'PY'
import io

import piexif
import piexif.helper
import PIL
from PIL import Image

TEXT = "make it night\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 1, Size: 8x8"
TAG = piexif.ExifIFD.UserComment


def saved(kind, exif):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind, exif=exif)
    return Image.open(io.BytesIO(file.getvalue()))


def comment(image):
    """(the bytes, what piexif makes of them)"""
    raw = piexif.load(image.info["exif"])["Exif"][TAG]
    try:
        text = piexif.helper.UserComment.load(raw)
    except ValueError as error:
        text = f"ValueError: {error}"
    return bytes(raw), type(raw).__name__, text


print("Pillow", PIL.__version__)
for kind in ("JPEG", "WEBP"):
    original = saved(kind, piexif.dump({"Exif": {TAG: piexif.helper.UserComment.dump(TEXT, "unicode")}}))
    first, tags, block = (comment(image) for image in (
        original, saved(kind, original.getexif()), saved(kind, original.info["exif"])))
    print(f"{kind}: written by piexif: {first[1]}; exif=getexif(): {tags[1]}, {tags[2]}; exif=info['exif']: {block[1]}")
    assert first == block and first[1:] == ("bytes", TEXT), "it has changed"
    assert tags[0] == first[0] and tags[1] == "tuple" and tags[2].startswith("ValueError"), "it has changed"
PY
"$folder/venv/bin/python" "$folder/resave.py"
echo "as described: the bytes stay, the type changes, and piexif cannot read the comment"

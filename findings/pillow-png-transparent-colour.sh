#!/usr/bin/env bash
# Pillow: the transparent colour of a PNG (chunk tRNS) stays visible in grey of 2, 4 and 16 bits, and in RGB of 16.
#
# Expected: tRNS names one grey, or one colour, in the depth of the file. Pixels of this colour are transparent, so
# convert("RGBA") gives them the alpha 0, as it does in grey of 1 and 8 bits and in RGB of 8 bits.
# Seen with Pillow 13.0.0: grey of 2 and 4 bits is scaled to 8 bits, the transparent grey is not. So the named grey
# stays opaque: level 1 of 2 bits becomes 85, and is compared with 1. RGB of 16 bits keeps only its high bytes, which
# are compared with the 16 bits of the colour. Grey of 16 bits is "I;16", whose conversion leaves tRNS out.
# No warning; image.info["transparency"] looks right in every case.
# Consequence for nanoip2p: open_image scales the colour itself (nanoip2p/common/colours.py).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 2>/dev/null
cat > "$folder/alpha.py" <<'PY'
import io
import struct
import sys
import zlib

import PIL
from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def alpha_of_the_named_colour(depth, samples):
    """One pixel of a grey (1 sample) or a colour (3 samples), which tRNS names as transparent."""
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    bits += "0" * (-len(bits) % 8)
    header = struct.pack(">IIBBBBB", 1, 1, depth, 0 if len(samples) == 1 else 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))
    content += chunk(b"IDAT", zlib.compress(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")))
    with Image.open(io.BytesIO(content + chunk(b"IEND", b""))) as image:
        mode, named = image.mode, image.info["transparency"]
        try:
            alpha = image.convert("RGBA").getpixel((0, 0))[3]
        except ValueError as error:
            alpha = str(error)
    kind = "grey" if len(samples) == 1 else "RGB"
    print(f"{kind} of {depth:2} bits (mode {mode}), transparent colour {named}: alpha {alpha}")
    return alpha


print(f"Pillow {PIL.__version__}; 0 is transparent")
sound = [alpha_of_the_named_colour(1, [1]), alpha_of_the_named_colour(8, [7]),
         alpha_of_the_named_colour(8, [1, 2, 3])]
odd = [alpha_of_the_named_colour(2, [1]), alpha_of_the_named_colour(4, [1]),
       alpha_of_the_named_colour(16, [0x1234]), alpha_of_the_named_colour(16, [0x1234, 0x5678, 0x9ABC])]
sys.exit(not (set(sound) == {0} and 0 not in odd))
PY
"$folder/venv/bin/python" "$folder/alpha.py"
echo "as described: in these depths the transparent colour stays visible"

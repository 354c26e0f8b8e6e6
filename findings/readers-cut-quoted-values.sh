#!/usr/bin/env bash
# Readers of Stable Diffusion's PNG texts: a value that AUTOMATIC1111's web UI quotes is cut at its first comma.
#
# Expected: the web UI writes its settings as "Key: value, Key: value". A value with a comma or a colon is written in
# quotes, as JSON, and the web UI reads the whole value back. Programs that read this text should do the same.
# Seen with sd-parsers 0.6 and sd-prompt-reader 1.3.5, on a PNG whose text ends in  Model: "night, v2: final"
# Both programs report success, and the model  "night  with its opening quote. The rest is lost.
# Consequence for nanoip2p: web_text (nanoip2p/common/web_ui.py) drops commas, colons and quotes from model names.
# sd-prompt-reader pins an old Pillow and needs Tk for its window; its reader runs without both.
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@" 2>/dev/null; }
pip pillow==13.0.0 sd-parsers==0.6 piexif==1.1.3
pip --no-deps sd-prompt-reader==1.3.5
cat > "$folder/read.py" <<'PY'
import re
import sys

from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager
from sd_prompt_reader.image_data_reader import ImageDataReader

SETTINGS = 'Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 1, Size: 64x64, Model: "night, v2: final"'
text = PngImagePlugin.PngInfo()
text.add_text("parameters", f"a house\n{SETTINGS}")
path = sys.argv[1]
Image.new("RGB", (64, 64)).save(path, pnginfo=text)

# The pattern of the web UI's own reader (modules/infotext_utils.py, re_param)
pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
whole = dict(re.findall(pattern, SETTINGS))["Model"]
[sampler] = ParserManager().parse(path).samplers
reader = ImageDataReader(path)
print("web UI's pattern:", whole)
print("sd-parsers:", sampler.model and sampler.model.name)
print("sd-prompt-reader:", reader.parameter["model"], f"({reader.status.name})")
found = sampler.model and sampler.model.name, reader.parameter["model"]
sys.exit(not (whole == '"night, v2: final"' and found == ('"night', '"night')))
PY
"$folder/venv/bin/python" "$folder/read.py" "$folder/picture.png"
echo "as described: the model's name ends at its first comma"

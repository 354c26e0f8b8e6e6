#!/usr/bin/env bash
# pip, gradio: beside pillow 13, pip installs gradio 3.36.1 of July 2023, three major versions back, without a warning.
#
# Expected: pip takes the newest gradio (6.31.0), or says that this gradio forbids pillow 13.0.0 ("pillow<13.0").
# Seen with pip 23.2.1: pip goes back through all releases of gradio 6, 5, 4 and 3 that set an upper bound for pillow, for
# minutes, until 3.36.1, which sets none, and takes it. Its exit code is 0. gradio 3 has other names for most of what
# a page of gradio 5 or 6 uses (no ImageEditor, no ImageSlider), so the page fails at its first line.
# Consequence for nanoip2p: the extra `app` asks for gradio>=6.31, and constraints.txt pins pillow 12.3.0. With the lower
# bound, pip names the conflict at once.
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pip==23.2.1 2>/dev/null
pip=("$folder/venv/bin/pip" --disable-pip-version-check install --quiet --dry-run)
"$folder/venv/bin/pip" --version | cut -d' ' -f1-2
"${pip[@]}" --report "$folder/report.json" 'gradio<=6.31.0' pillow==13.0.0 2>/dev/null
"$folder/venv/bin/python" - "$folder/report.json" <<'PY'
import json
import sys

with open(sys.argv[1]) as file:
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.load(file)["install"]}
print({name: found[name] for name in ("gradio", "pillow")})
assert found["gradio"] == "3.36.1", "it has changed"
PY
if "${pip[@]}" 'gradio>=6.31,<=6.31.0' pillow==13.0.0 2> "$folder/log"; then echo "it has changed"; exit 1; fi
grep -m1 "conflicting dependencies" "$folder/log"
echo "as described: without a lower bound, gradio 3.36.1"

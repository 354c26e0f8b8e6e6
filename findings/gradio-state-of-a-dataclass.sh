#!/usr/bin/env bash
# gradio: State(function) gives each visitor a fresh state, but State(SomeDataclass) ends in a TypeError of dataclasses.
#
# Expected: gr.State takes "a callable" as its value and calls it when the page loads. A class is a callable; a dataclass
# with defaults is the usual shape of a visitor's state. gr.State(dict) works.
# Seen with gradio 6.31.0: leaving the `with gr.Blocks()` block raises "asdict() should be called on dataclass
# instances": the class passes dataclasses.is_dataclass, so gradio takes it for a value to convert. A lambda that
# returns such an object works, and so does an ordinary class.
# Consequence for nanoip2p: the state of the page is an ordinary class (nanoip2p/app/work.py, Visit).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gradio==6.31.0 pillow==12.3.0 2>/dev/null
cat > "$folder/state.py" <<'PY'
from dataclasses import dataclass

import gradio as gr


@dataclass
class Visit:
    name: str = ""


class Plain:
    pass


def outcome(value):
    try:
        with gr.Blocks(analytics_enabled=False):
            gr.State(value)
        return "works"
    except TypeError as error:
        return f"TypeError: {error}"


found = {"dict": outcome(dict), "a class": outcome(Plain), "a dataclass": outcome(Visit),
         "a lambda that makes one": outcome(lambda: Visit())}
print("gradio", gr.__version__, found)
assert [text.partition(":")[0] for text in found.values()] == ["works", "works", "TypeError", "works"], "it has changed"
PY
"$folder/venv/bin/python" "$folder/state.py"
echo "as described: a dataclass is taken for a value"

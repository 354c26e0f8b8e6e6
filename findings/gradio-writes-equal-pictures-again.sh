#!/usr/bin/env bash
# gradio: a picture that is shown twice is written twice, into the same file, also while a browser is reading it.
#
# Expected: the cache names a file by the hash of its content, so a second picture of the same content finds its file
# there and leaves it alone. Gradio does so with files that a function returns by their path.
# Seen with gradio 6.31.0 and Pillow 12.3.0: a PIL picture (or an array) is encoded and written again at each return.
# The file is emptied first, in place. The server has then promised a length that it cannot send: the answer breaks off,
# the browser shows a broken picture, and the log has "Too little data for declared Content-Length" with a traceback.
# Every function that yields previews beside an unchanged picture can meet this. Returning paths avoids it.
# Consequence for nanoip2p: the page writes its pictures itself and returns paths (nanoip2p/app/page.py, Page.stored).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gradio==6.31.0 pillow==12.3.0 2>/dev/null
export GRADIO_TEMP_DIR="$folder/cache" GRADIO_ANALYTICS_ENABLED=False
cat > "$folder/twice.py" <<'PY'
import http.client
import os
import sys
import threading
import urllib.request
from pathlib import Path

import gradio as gr
from PIL import Image

picture = Image.effect_noise((1200, 1200), 90)
by_path = Path(sys.argv[1]) / "own.png"
picture.save(by_path)


def written_again(value):
    """Whether showing `value` for the second time writes its file."""
    part = gr.Image(format="png")
    first = Path(part.postprocess(value).path)
    os.utime(first, (0, 0))
    assert Path(part.postprocess(value).path) == first
    return first.stat().st_mtime > 0


def broken_answers(value):
    """How many of 300 answers break off while a thread shows `value` again and again."""
    with gr.Blocks() as page:
        part = gr.Image(format="png")
    page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, allowed_paths=[sys.argv[1]])
    path, done, broken = part.postprocess(value).path, threading.Event(), 0

    def show():
        while not done.is_set():
            part.postprocess(value)
    thread = threading.Thread(target=show)
    thread.start()
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{page.local_url}gradio_api/file={path}", timeout=60) as answer:
                answer.read()
        except (http.client.HTTPException, OSError):
            broken += 1
    done.set()
    thread.join()
    page.close(verbose=False)
    return broken


print("gradio", gr.__version__)
again = {"PIL picture": written_again(picture), "path": written_again(str(by_path))}
print("the second time, the file is written again:", again)
count = broken_answers(picture)
print("answers that broke off meanwhile, of 300:", count)
assert again == {"PIL picture": True, "path": False} and count, "it has changed"
PY
"$folder/venv/bin/python" "$folder/twice.py" "$folder" 2> "$folder/log"
grep -m1 -o "Too little data for declared Content-Length" "$folder/log"
echo "as described: equal pictures are written again, in place"

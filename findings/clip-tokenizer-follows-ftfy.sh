#!/usr/bin/env bash
# transformers 4: one class, one folder and one text give other token ids when the package ftfy is installed.
#
# Expected: the ids depend on the text and on the files of the tokenizer. The slow and the fast class agree.
# Seen with transformers 4.57.3 and ftfy 6.3.1: CLIPTokenizer (slow) straightens curly quotes and unescapes &amp;
# where ftfy is installed. CLIPTokenizerFast never does, nor does CLIPTokenizer without ftfy. No warning is shown.
# OpenAI's own tokenizer always calls ftfy. transformers 5 has the fast class only.
# Consequence for nanoip2p: a table of its own does what ftfy did (nanoip2p/tokenizer.py: clean); a test compares them.
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@" 2>/dev/null; }
pip transformers==4.57.3
cat > "$folder/ids.py" <<'PY'
import importlib.util
import json
import sys
from pathlib import Path

import transformers
from transformers.models.clip.tokenization_clip import bytes_to_unicode

folder = Path(sys.argv[1])
letters = list(bytes_to_unicode().values())
names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
(folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
ftfy = "with" if importlib.util.find_spec("ftfy") else "without"
for cls in (transformers.CLIPTokenizer, transformers.CLIPTokenizerFast):
    tokenizer = cls.from_pretrained(folder)
    typed, plain = tokenizer(["it\u2019s &amp;", "it's &"]).input_ids
    said = "the same ids as the plain text" if typed == plain else "other ids"
    print(f"transformers {transformers.__version__} {ftfy} ftfy, {cls.__name__}: {said}")
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
mkdir "$folder/tokenizer"
without=$("$folder/venv/bin/python" "$folder/ids.py" "$folder/tokenizer" 2>/dev/null)
pip ftfy==6.3.1
with=$("$folder/venv/bin/python" "$folder/ids.py" "$folder/tokenizer" 2>/dev/null)
printf '%s\n' "$without" "$with"
said=$(printf '%s\n' "$without" "$with" | sed 's/.*: //' | tr '\n' ',')
[ "$said" = "other ids,other ids,the same ids as the plain text,other ids," ]
echo "as described: only the slow class follows ftfy"

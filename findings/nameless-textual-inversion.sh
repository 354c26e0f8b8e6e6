#!/usr/bin/env bash
# diffusers: a textual inversion of the web UIs in safetensors gets the word "emb_params", whatever its file is called.
#
# Expected: after pipe.load_textual_inversion("badhands.safetensors"), the word is "badhands", as in the web UIs that
# write these files: there the name of the file is the word, and the file holds one tensor called emb_params.
# Seen with diffusers 0.42.1 and transformers 5.23.0: the call succeeds without a warning and adds the tokens
# emb_params and emb_params_1. "badhands" stays a word of plain letters, so a prompt with it ignores the vectors. The
# next file of this kind is refused: "Token emb_params already in tokenizer vocabulary". token="badhands" helps.
# Consequence for nanoip2p: such a file's word is the name of the file (nanoip2p/checkpoint/embeddings.py).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.2.6 diffusers==0.42.1 transformers==5.23.0 2>/dev/null
cat > "$folder/load.py" <<'PY'
import sys

import diffusers
import torch
import transformers
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

folder = sys.argv[1]
letters = sorted(ByteLevel.alphabet())
names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]


class Pipeline(TextualInversionLoaderMixin):
    """The parts of a pipeline that load_textual_inversion uses."""

    components, hf_device_map = {}, None
    tokenizer = transformers.CLIPTokenizer({name: number for number, name in enumerate(names)}, [])
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(names), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))


for name in ("badhands", "badfaces"):
    save_file({"emb_params": torch.randn(2, 8)}, f"{folder}/{name}.safetensors")
pipe = Pipeline()
pipe.load_textual_inversion(f"{folder}/badhands.safetensors")
added = sorted(set(pipe.tokenizer.get_vocab()) - set(names))
print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}: badhands.safetensors adds {added}")
print("badhands is", pipe.tokenizer.tokenize("badhands"))
try:
    pipe.load_textual_inversion(f"{folder}/badfaces.safetensors")
    second = "loaded"
except ValueError as error:
    second = str(error).partition(".")[0]
print("badfaces.safetensors:", second)
assert added == ["emb_params", "emb_params_1"] and second.startswith("Token emb_params already"), "it has changed"
PY
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" "$folder/load.py" "$folder" 2>"$folder/log" ||
    { cat "$folder/log"; exit 1; }
echo "as described: the file's name is not the word"

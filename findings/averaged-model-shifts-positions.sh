#!/usr/bin/env bash
# torch: AveragedModel with use_buffers=True changes the position numbers of a text encoder.
#
# Expected: the average of equal copies of a model is this model. CLIP's text encoder in transformers has a buffer
# position_ids of whole numbers: 0, 1, 2, ..., 76.
# Seen with torch 2.13.0 and transformers 5.23.0: the average with decay 0.9999 of weights that never change has other
# positions after a few updates, for instance 10 instead of 11. So two neighbours share a position, and the states of
# the text are wrong. There is no warning. Whole numbers are averaged as floats, and 10.999999 is then cut to 10. The
# default decay, 0.999, happens to change nothing. state_dict() does not have this buffer, so an average that was saved
# and loaded is right again, while the validation during the training used the wrong positions.
# Consequence for nanoip2p: it averages the trained weights by name, and no buffers (nanoip2p/training/trainer.py).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 numpy==2.2.6 2>/dev/null
cat > "$folder/average.py" <<'PY'
import torch
import transformers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.set_num_threads(1)
torch.manual_seed(0)
text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
    vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    bos_token_id=0, eos_token_id=1)).eval()
with torch.no_grad():  # the initial values are so small that the positions would hardly matter
    text.get_submodule("embeddings.position_embedding").weight.normal_()
ids = torch.arange(77)[None]
print(f"torch {torch.__version__}, transformers {transformers.__version__}; weights that never change")
changed = {}
for decay in (0.99, 0.999, 0.9995, 0.9999):
    average = AveragedModel(text, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(100):
        average.update_parameters(text)
    positions = dict(average.module.named_buffers())["embeddings.position_ids"][0]
    changed[decay] = (positions != ids[0]).sum().item()
    with torch.no_grad():
        right = text(ids).last_hidden_state
        error = (average.module(ids).last_hidden_state - right).abs().max().item()
    print(f"decay {decay}: {changed[decay]} of 77 positions changed, largest error of the states {error:.2f} "
          f"(their size {right.std().item():.2f}); positions 8 to 16 are {positions[8:17].tolist()}")
assert not any("position_ids" in name for name in average.state_dict()), "the positions are saved now"
assert changed[0.999] == 0 and changed[0.9999] > 0, "whole numbers are averaged in another way now"
PY
"$folder/venv/bin/python" -W ignore "$folder/average.py"
echo "as described: the average of equal models has other positions"

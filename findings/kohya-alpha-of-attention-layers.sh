#!/usr/bin/env bash
# diffusers: in a kohya LoRA whose alpha differs from layer to layer, attention layers get the commonest alpha.
#
# Expected: load_lora_weights and fuse_lora add alpha / rank * up @ down to each layer, with the layer's own alpha,
# as kohya's sd-scripts and the web UIs do. LoRAs with an alpha per layer or block are common (LyCORIS, resizing).
# Seen with diffusers 0.42.1 and peft 0.21.2: the convolutions get their own alpha. The attention layers to_q, to_k,
# to_v, to_out get the alpha that most layers have, here 8 times too much. In diffusers, the key of their alpha keeps
# ".processor.to_q_lora.down.weight", so it matches no layer; peft only warns of unused alpha_pattern keys.
# Consequence for nanoip2p: it reads the alpha of each layer, and so differs from diffusers in such files.
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.2.6 pillow 2>/dev/null
cat > "$folder/alpha.py" <<'PY'
import diffusers
import peft
import torch

diffusers.logging.set_verbosity_error()
print("diffusers", diffusers.__version__, "peft", peft.__version__)
torch.manual_seed(0)
unet = diffusers.UNet2DConditionModel(
    sample_size=64, in_channels=4, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4)
attention = "mid_block.attentions.0.transformer_blocks.0.attn1."
alphas = {f"{attention}to_q": 1.0, f"{attention}to_k": 8.0, f"{attention}to_v": 8.0,
          "mid_block.resnets.0.conv1": 1.0, "mid_block.resnets.0.conv2": 8.0}
file, expected = {}, {}
for name, alpha in alphas.items():
    weight = unet.get_submodule(name).weight.detach()
    down = torch.randn(4, *weight.shape[1:])
    up = torch.randn(32, 4, *[1] * (weight.ndim - 2))
    base = "lora_unet_" + name.replace(".", "_")
    file |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up, f"{base}.alpha": torch.tensor(alpha)}
    expected[name] = weight.clone(), (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * alpha / 4
state, alphas_found = diffusers.StableDiffusionPipeline.lora_state_dict(file)
diffusers.StableDiffusionPipeline.load_lora_into_unet(state, alphas_found, unet)
unet.fuse_lora()
unet.unload_lora()
found = {}
for name, (before, change) in expected.items():
    added = unet.get_submodule(name).weight.detach() - before
    found[name] = (added.norm() / change.norm()).item()
    print(f"{name}: alpha {alphas[name]:g} in the file, {found[name]:.2f} of the change was added")
conv, query = found["mid_block.resnets.0.conv1"], found[f"{attention}to_q"]
assert abs(conv - 1) < 0.01, "convolutions do not get their own alpha"
assert abs(query - 8) < 0.1, "attention layers get their own alpha now"
PY
"$folder/venv/bin/python" -W ignore "$folder/alpha.py"
echo "as described: to_q with alpha 1 gets alpha 8, the alpha of most layers"

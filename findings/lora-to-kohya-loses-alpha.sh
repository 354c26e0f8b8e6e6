#!/usr/bin/env bash
# diffusers: a LoRA whose alpha differs from its rank gets another strength in kohya's layout, without a warning.
#
# Expected: save_lora_weights keeps what the training knew, and convert_state_dict_to_kohya, which diffusers offers for
# the web UIs, writes a file that acts as the LoRA did. kohya's layout has an alpha for each layer.
# Seen with diffusers 0.42.1 and peft 0.21.2, r=4 and lora_alpha=16: the converter writes alpha 4, the rank, so the LoRA
# acts with a quarter of its strength in every program that reads the file. The converter takes a dictionary of tensors,
# which does not contain alpha, and has no argument for alpha. save_lora_weights(folder, unet_lora_layers=...) loses
# alpha too. Only its argument unet_lora_adapter_metadata keeps alpha, as metadata, which the converter does not read.
# Consequence for nanoip2p: its LoRAs say their alpha in both layouts (nanoip2p/checkpoint/lora.py, write_lora).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.2.6 pillow==13.0.0 \
    safetensors==0.8.0 2>/dev/null
cat > "$folder/strength.py" <<'PY'
import copy
import sys

import diffusers
import peft
import torch
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

diffusers.logging.set_verbosity_error()
folder, Pipeline = sys.argv[1], diffusers.StableDiffusionInstructPix2PixPipeline
print("diffusers", diffusers.__version__, "peft", peft.__version__)
torch.manual_seed(0)
base = diffusers.UNet2DConditionModel(
    sample_size=64, in_channels=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4)
trained = copy.deepcopy(base)
config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "conv1"], init_lora_weights=False)
trained.add_adapter(config)
layers = get_peft_model_state_dict(trained)
Pipeline.save_lora_weights(f"{folder}/told", unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict())
Pipeline.save_lora_weights(f"{folder}/plain", unet_lora_layers=layers)
saved = load_file(f"{folder}/told/pytorch_lora_weights.safetensors")
kohya = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(saved))
alphas = {int(tensor) for name, tensor in kohya.items() if name.endswith(".alpha")}
print("lora_alpha 16, rank 4; alphas in kohya's layout:", alphas)
save_file(kohya, f"{folder}/kohya.safetensors")


def changes(unet):
    """The change of a convolution and of an attention layer."""
    unet.fuse_lora()
    for name in ("mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"):
        layer = unet.get_submodule(name)
        yield getattr(layer, "base_layer", layer).weight.detach() - base.get_submodule(name).weight.detach()


whole, strengths = list(changes(trained)), {}
for given in ("told", "plain", "kohya.safetensors"):
    unet = copy.deepcopy(base)
    state, alphas_of, metadata = Pipeline.lora_state_dict(f"{folder}/{given}", return_lora_metadata=True)
    Pipeline.load_lora_into_unet(state, alphas_of, unet, metadata=metadata)
    strengths[given] = [(new.norm() / old.norm()).item() for new, old in zip(changes(unet), whole)]
    print(f"{given}: {', '.join(f'{strength:.2f}' for strength in strengths[given])} of the trained change")
assert all(abs(strength - 1) < 0.01 for strength in strengths["told"]), "the metadata are not used"
assert alphas == {4} and all(abs(strength - 0.25) < 0.01 for strength in strengths["kohya.safetensors"]), \
    "kohya's layout keeps alpha now"
assert all(abs(strength - 0.25) < 0.01 for strength in strengths["plain"]), "the plain file keeps alpha now"
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/strength.py" "$folder"
echo "as described: in kohya's layout the LoRA has a quarter of its strength"

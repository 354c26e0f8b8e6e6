#!/usr/bin/env bash
# diffusers, peft: a LoRA with convolutions, trained in channels_last, cannot be saved when the training ends.
#
# Expected: memory_format=torch.channels_last, which diffusers' guide to speed recommends, changes no result. The UNet
# itself can be saved in this layout.
# Seen with diffusers 0.42.1 and peft 0.21.2: save_lora_weights and save_lora_adapter raise "You are trying to save a
# non contiguous tensor" of safetensors, and write no file, though the training ran well. A LoRA of the attention
# layers alone, without 3x3 kernels, is saved. So "conv1" in target_modules loses the training if the script saves only
# at the end. It helps to make each tensor of the dictionary contiguous.
# Consequence for nanoip2p: it trains in channels_last on CUDA, and its writer makes each tensor contiguous
# (nanoip2p/checkpoint/tensors.py, write_tensors). Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.2.6 pillow==13.0.0 \
    safetensors==0.8.0 2>/dev/null
cat > "$folder/save.py" <<'PY'
import sys

import diffusers
import peft
import torch
from peft.utils import get_peft_model_state_dict

diffusers.logging.set_verbosity_error()
print("diffusers", diffusers.__version__, "peft", peft.__version__)
folder, Pipeline = sys.argv[1], diffusers.StableDiffusionInstructPix2PixPipeline


def outcome(save):
    try:
        save()
        return "saved"
    except ValueError as error:
        return str(error).partition(":")[0]


found = {}
for layout in (torch.contiguous_format, torch.channels_last):
    for layers in (["to_q"], ["to_q", "conv1"]):
        unet = diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4)
        unet.requires_grad_(False)
        unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers))
        unet.to(memory_format=layout)
        noise = unet(torch.randn(1, 8, 16, 16).to(memory_format=layout), 5, torch.randn(1, 77, 32)).sample
        noise.square().mean().backward()  # a step of training
        torch.optim.AdamW(weight for weight in unet.parameters() if weight.requires_grad).step()
        name = f"{str(layout).partition('.')[2]}, LoRA of {' and '.join(layers)}"
        state = get_peft_model_state_dict(unet)
        found[layout, len(layers)] = {
            "save_lora_weights": outcome(lambda: Pipeline.save_lora_weights(f"{folder}/a", unet_lora_layers=state)),
            "save_lora_adapter": outcome(lambda: unet.save_lora_adapter(f"{folder}/b")),
            "contiguous tensors": outcome(lambda: Pipeline.save_lora_weights(
                f"{folder}/c", unet_lora_layers={key: tensor.contiguous() for key, tensor in state.items()})),
            "save_pretrained of the UNet": outcome(lambda: unet.save_pretrained(f"{folder}/d"))}
        for how, said in found[layout, len(layers)].items():
            print(f"{name}; {how}: {said}")
refused = [said for said in found.pop((torch.channels_last, 2)).values() if said != "saved"]
assert len(refused) == 2, "LoRAs in channels_last are saved now"
assert {said for outcomes in found.values() for said in outcomes.values()} == {"saved"}, "another one is refused"
PY
"$folder/venv/bin/python" -W ignore "$folder/save.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
echo "as described: in channels_last, a LoRA with convolutions is refused by the writer"

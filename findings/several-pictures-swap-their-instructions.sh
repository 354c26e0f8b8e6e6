#!/usr/bin/env bash
# diffusers: if several pictures have an instruction each, num_images_per_prompt=2 mixes the instructions up.
#
# Expected: StableDiffusionInstructPix2PixPipeline edits picture A by instruction 1 twice, then B by 2 twice. Without
# num_images_per_prompt, it edits A by 1 and B by 2.
# Seen with diffusers 0.42.1: the results are A by 1, B by 1, A by 2, B by 2, so half of them belong to no given pair.
# The pipeline repeats each instruction in place (1 1 2 2) and the list of pictures as a whole (A B A B). A warning
# says that the pictures are duplicated to match the number of prompts. It does not say in which order.
# Repeating both lists in the call, without num_images_per_prompt, works.
# Consequence for nanoip2p: Editor.edit takes one instruction and one seed for each picture, and never repeats a list.
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffusers==0.42.1 transformers==5.23.0 torch==2.13.0 numpy==2.2.6 pillow==13.0.0 2>/dev/null
cat > "$folder/swap.py" <<'PY'
import diffusers
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

diffusers.logging.set_verbosity_error()
print("diffusers", diffusers.__version__)
torch.manual_seed(0)
unet = diffusers.UNet2DConditionModel(
    sample_size=64, in_channels=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4)
text = CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                    num_attention_heads=4, bos_token_id=0, eos_token_id=1))
pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
    vae=diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32), text_encoder=text, tokenizer=None,
    unet=unet, scheduler=diffusers.EulerDiscreteScheduler(), safety_checker=None, feature_extractor=None,
    requires_safety_checker=False)
pipeline.set_progress_bar_config(disable=True)
pictures = {"A": Image.new("RGB", (32, 32), "navy"), "B": Image.new("RGB", (32, 32), "orange")}
instructions = {"1": torch.randn(77, 32), "2": torch.randn(77, 32)}  # hidden states of two texts
noise = torch.randn(1, 4, 32, 32)


def edit(pictures, instructions, **how):
    """The latents of the results. All begin with the same noise."""
    states = torch.stack(instructions)
    latents = noise.repeat(len(states) * how.get("num_images_per_prompt", 1), 1, 1, 1)
    return pipeline(image=pictures, prompt_embeds=states, negative_prompt_embeds=0 * states, latents=latents,
                    num_inference_steps=3, output_type="latent", **how).images


alone = {picture + " by " + text: edit([pictures[picture]], [instructions[text]])[0]
         for picture in pictures for text in instructions}


def names(results):
    return [min(alone, key=lambda name: (alone[name] - result).abs().max()) for result in results]


once = names(edit([*pictures.values()], [*instructions.values()]))
twice = names(edit([*pictures.values()], [*instructions.values()], num_images_per_prompt=2))
both = names(edit([*pictures.values()] * 2, [*instructions.values()] * 2))
print(f"one result each: {once}\nnum_images_per_prompt=2: {twice}\nboth lists repeated: {both}")
assert once == ["A by 1", "B by 2"] and both == once * 2, "batches are mixed up now"
assert twice == ["A by 1", "B by 1", "A by 2", "B by 2"], "num_images_per_prompt keeps the pairs now"
PY
"$folder/venv/bin/python" -W ignore "$folder/swap.py"
echo "as described: with num_images_per_prompt, half of the results belong to no given pair"

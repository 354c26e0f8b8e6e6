#!/usr/bin/env bash
# tomesd on InstructPix2Pix: an edit alone can be repeated; in a batch of two it is another one, and new in each call.
#
# Expected: a picture with its instruction, start noise and seed gives one result, alone or beside others, as it does
# without tomesd. apply_patch(pipe, use_rand=True), the default, draws at random which tokens are merged.
# Seen with tomesd 0.1.3 and diffusers 0.42.1: the pipeline runs three branches, so one picture is a batch of 3, two are
# a batch of 6. In an odd batch tomesd leaves the random choice out, without a word: use_rand changes nothing for one or
# three pictures. For two it draws, from a generator of its own that goes on from call to call: the same call twice
# gives two results, also after torch.manual_seed and with generator= of the pipeline. With the two branches of text to
# image, all batches are even. use_rand=False gives one result for each picture, in any batch.
# Consequence for nanoip2p: it merges no tokens; one seed makes one picture in any batch (nanoip2p/samplers.py,
# draw_noise). Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tomesd==0.1.3 \
    diffusers==0.42.1 transformers==5.23.0 torch==2.13.0 numpy==2.2.6 pillow==13.0.0 2>/dev/null
cat > "$folder/merge.py" <<'PY'
from importlib.metadata import version

import diffusers
import numpy as np
import tomesd
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

diffusers.logging.set_verbosity_error()
print("tomesd", version("tomesd"), "diffusers", diffusers.__version__)
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
pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
states, noise = torch.randn(3, 77, 32), torch.randn(3, 4, 32, 32)  # of three instructions; the start noise


def edit(count):
    """The latents of the first picture, edited in a batch of `count` pictures with an instruction each."""
    torch.manual_seed(0)
    return pipeline(image=[Image.fromarray(picture) for picture in pixels[:count]], prompt_embeds=states[:count],
                    negative_prompt_embeds=0 * states[:count], latents=noise[:count], num_inference_steps=5,
                    generator=torch.Generator().manual_seed(0), output_type="latent").images[0]


def changes():
    """How far the first result is from the one alone: in repeated calls, and in larger batches."""
    alone, two = edit(1), edit(2)
    found = {"alone again": edit(1) - alone, "in a batch of three": edit(3) - alone, "in a batch of two": two - alone,
             "the same batch of two again": edit(2) - two}
    return alone, {name: (change.norm() / alone.norm()).item() for name, change in found.items()}


found = {"without tomesd": changes()}
for random in (True, False):
    tomesd.apply_patch(pipeline, ratio=0.5, use_rand=random)
    found[f"use_rand={random}"] = changes()
    tomesd.remove_patch(pipeline)
for name, (_, differences) in found.items():
    print(f"{name}:", ", ".join(f"{case} {difference:.3%} away" for case, difference in differences.items()))
alone = found["use_rand=True"][0], found["use_rand=False"][0]
print("for one picture, use_rand=True and use_rand=False are equal:", torch.equal(*alone))
assert torch.equal(*alone), "use_rand matters for one picture now"
assert not torch.allclose(alone[0], found["without tomesd"][0], rtol=1e-3), "tomesd merges nothing"
drawn = {(name, case) for name, (_, differences) in found.items()
         for case, difference in differences.items() if difference > 1e-3}
assert drawn == {("use_rand=True", "in a batch of two"), ("use_rand=True", "the same batch of two again")}, drawn
PY
"$folder/venv/bin/python" -W ignore "$folder/merge.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
echo "as described: in batches of two, tomesd draws anew in each call; alone, it never draws"

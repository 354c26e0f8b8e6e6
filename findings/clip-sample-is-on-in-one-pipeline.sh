#!/usr/bin/env bash
# diffusers: one scheduler folder with clip_sample: true is clipped in the InstructPix2Pix pipeline, not in others.
#
# Expected: two pipelines of Stable Diffusion 1.x that open the same scheduler_config.json take the same steps.
# Seen with diffusers 0.42.1: StableDiffusionPipeline (as the image-to-image pipeline) sets clip_sample to false
# when it is built. StableDiffusionInstructPix2PixPipeline keeps it, so its DDIM clips the latents of every step to
# [-1, 1], although latents go beyond this range. By default, DDIMScheduler() writes clip_sample: true.
# Consequence for nanoip2p: it never clips latents. If a folder asks for it, a line says so (docs/differences.md).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffusers==0.42.1 transformers==5.23.0 torch==2.13.0 numpy==2.2.6 pillow 2>/dev/null
cat > "$folder/clip.py" <<'PY'
import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

diffusers.logging.set_verbosity_error()
print("diffusers", diffusers.__version__)
torch.manual_seed(0)
vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
text = CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                    num_attention_heads=4, bos_token_id=0, eos_token_id=1))
states = torch.zeros(1, 77, 32)
found = {}
for cls, channels in ((diffusers.StableDiffusionPipeline, 4), (diffusers.StableDiffusionInstructPix2PixPipeline, 8)):
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, in_channels=channels, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4)
    with torch.no_grad():
        unet.conv_out.weight.mul_(8)  # latents beyond 1
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = cls(vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=scheduler,
                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": torch.zeros(1, 3, 64, 64)} if channels == 8 else {"height": 64, "width": 64}
    latents = pipeline(prompt_embeds=states, negative_prompt_embeds=states, num_inference_steps=4, output_type="latent",
                       generator=torch.Generator().manual_seed(0), **given).images
    found[cls] = pipeline.scheduler.config.clip_sample, latents.abs().max().item()
    print(f"{cls.__name__}: clip_sample {found[cls][0]}, largest latent {found[cls][1]:.2f}")
(text_clips, text_most), (edit_clips, edit_most) = found.values()
assert not text_clips and text_most > 1, "the text-to-image pipeline clips now"
assert edit_clips and edit_most <= 1, "the InstructPix2Pix pipeline does not clip any more"
PY
"$folder/venv/bin/python" -W ignore "$folder/clip.py"
echo "as described: the editor's pipeline clips latents, the text-to-image pipeline does not"

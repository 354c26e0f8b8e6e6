#!/usr/bin/env bash
# DeepCache, diffusers: with the Heun scheduler and cache_interval=2, all steps use the deep features of the first.
#
# Expected: interval N computes the whole UNet in each N-th step and reuses its deep features in the steps between.
# Seen with DeepCache 0.1.1 and diffusers 0.42.1, 20 steps of the InstructPix2Pix pipeline: Euler computes the deep part
# 10 times in 20 calls. Heun calls the UNet 39 times and computes the deep part once, in the first call, as with an
# interval of 100. Interval 3 computes it 13 times, and its latents are nearer to the exact ones. There is no warning.
# DeepCache finds the number of a call by looking its timestep up in the scheduler's list. Heun's list has each timestep
# but the first twice. The look-up returns the first of the two places: 0, 1, 1, 3, 3, 5, ... No number after 0 is even.
# Consequence for nanoip2p: --deep-every counts the calls (nanoip2p/guidance.py, make_denoiser).
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@" 2>/dev/null; }
pip diffusers==0.42.1 transformers==5.23.0 torch==2.13.0 numpy==2.2.6 pillow==13.0.0
pip --no-deps deepcache==0.1.1
cat > "$folder/heun.py" <<'PY'
import diffusers
import torch
from DeepCache import DeepCacheSDHelper
from transformers import CLIPTextConfig, CLIPTextModel

diffusers.logging.set_verbosity_error()
print("DeepCache 0.1.1, diffusers", diffusers.__version__)
torch.manual_seed(0)
unet = diffusers.UNet2DConditionModel(
    sample_size=16, in_channels=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=4)
text = CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                    num_attention_heads=4, bos_token_id=0, eos_token_id=1))
vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
states, noise, picture = torch.randn(1, 77, 32), torch.randn(1, 4, 16, 16), torch.full((1, 3, 16, 16), 0.3)
calls = []
unet.register_forward_hook(lambda *_: calls.append("unet"))
unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append("deep"))
computed, errors = {}, {}
for cls in (diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler):
    scheduler = cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    for interval in (1, 2, 3, 100):
        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(cache_interval=interval)
        helper.enable()
        calls.clear()
        latents = pipeline(image=picture, prompt_embeds=states, negative_prompt_embeds=0 * states, latents=noise,
                           num_inference_steps=20, output_type="latent").images
        helper.disable()
        exact = latents if interval == 1 else exact
        computed[cls, interval] = calls.count("deep")
        errors[cls, interval] = ((latents - exact).norm() / exact.norm()).item()
        print(f"{cls.__name__}, interval {interval}: {calls.count('unet')} calls of the UNet, "
              f"{computed[cls, interval]} of them whole; {errors[cls, interval]:.0%} from the exact latents")
assert computed[diffusers.EulerDiscreteScheduler, 2] == 10, "Euler has changed"
assert computed[diffusers.HeunDiscreteScheduler, 2] == 1, "Heun computes the deep part again now"
PY
"$folder/venv/bin/python" -W ignore "$folder/heun.py"
echo "as described: Heun with interval 2 computes the deep part of the UNet once"

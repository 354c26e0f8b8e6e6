#!/usr/bin/env bash
# diffusers: with zero terminal SNR and epsilon-prediction, DDIM returns NaN without a word; Euler works.
#
# Expected: schedulers that read the same scheduler_config.json start from the same noise level, or one refuses.
# Seen with diffusers 0.42.1, rescale_betas_zero_snr=True and timestep_spacing="trailing": the Euler and DPM-Solver
# schedulers put 2**-24 in place of the last alpha, 0. DDIM and DDPM keep 0. DDIM divides by the square root of 0:
# every number of its result is NaN or infinite, and there is no warning. With v_prediction DDIM is right, because
# v needs no division.
# Consequence for nanoip2p: `ddim` and `lcm` refuse epsilon there (nanoip2p/diffusion.py: plan); others equal diffusers.
# Exit code 1: the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffusers==0.42.1 torch==2.13.0 numpy==2.2.6 pillow 2>/dev/null
cat > "$folder/snr.py" <<'PY'
import warnings

import diffusers
import torch

print("diffusers", diffusers.__version__)
finite = {}
for prediction in ("epsilon", "v_prediction"):
    for cls in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        scheduler = cls.from_config({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
            "prediction_type": prediction, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
        scheduler.set_timesteps(20)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        with warnings.catch_warnings(record=True) as said:
            for t in scheduler.timesteps:
                x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x).prev_sample
        assert not said, said
        finite[prediction, cls] = x.isfinite().float().mean().item()
        print(f"{prediction:<13}{cls.__name__:<28} last alpha {scheduler.alphas_cumprod[-1]:.0e}, "
              f"{finite[prediction, cls]:.0%} of the latents are finite")
assert finite.pop(("epsilon", diffusers.DDIMScheduler)) == 0, "DDIM is finite now"
assert set(finite.values()) == {1.0}, "another scheduler is not finite any more"
PY
"$folder/venv/bin/python" "$folder/snr.py"
echo "as described: of these, only DDIM with epsilon is not finite"

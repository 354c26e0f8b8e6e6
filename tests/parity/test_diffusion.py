"""The noise schedule against diffusers' own."""

import json

import diffusers
import pytest
import torch

from nanoip2p.diffusion import NoiseSchedule, add_noise, plan

SCHEDULERS = {
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}


SOLVERS = ["DDPMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "DEISMultistepScheduler",
           "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
           "KDPM2AncestralDiscreteScheduler", "SASolverScheduler", "TCDScheduler",
           "UniPCMultistepScheduler", "PNDMScheduler"]  # we have none of these samplers
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize("config", [
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, {},
    {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "linear", "num_train_timesteps": 400}], ids=str)
def test_alphas_and_added_noise(config):
    scheduler = diffusers.DDIMScheduler(**config)
    a = NoiseSchedule.from_config(config).alphas_cumprod()
    torch.testing.assert_close(a, scheduler.alphas_cumprod, rtol=1e-6, atol=0)
    latents, noise = torch.randn(2, 3, 4, 6, 5)
    timestep = torch.tensor([0, 120, len(a) - 1])
    noised = add_noise(latents, noise, timestep, a)
    torch.testing.assert_close(noised, scheduler.add_noise(latents, noise, timestep))
    velocity = diffusers.DDPMScheduler(**config).get_velocity(latents, noise, timestep)
    torch.testing.assert_close(add_noise(noise, -latents, timestep, a), velocity)


@pytest.mark.parametrize("betas", [STABLE, {}, {"num_train_timesteps": 2}], ids=str)
def test_zero_terminal_snr(betas):
    theirs = diffusers.DDPMScheduler(**betas, rescale_betas_zero_snr=True).alphas_cumprod
    a = NoiseSchedule.from_config(betas | {"rescale_betas_zero_snr": True}).alphas_cumprod()
    assert a[-1] == theirs[-1] == 0 and a.dtype == torch.float32
    torch.testing.assert_close(a[:-1], theirs[:-1], rtol=1e-4, atol=0)  # diffusers rounds 1,000 times
    with pytest.raises(ValueError, match="above 0, and lower than at the first"):
        NoiseSchedule(num_train_timesteps=1, rescale_betas_zero_snr=True).alphas_cumprod()


def test_the_defaults_are_stable_diffusions():
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    assert NoiseSchedule() == NoiseSchedule.from_config(config)
    assert NoiseSchedule.from_config({}).steps_offset == diffusers.DDIMScheduler().config.steps_offset == 0


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", [None, "linspace", "leading", "trailing"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_timesteps_and_start_for_many_numbers_of_steps(sampler, spacing, offset):
    schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=offset)
    config = {key: value for key, value in schedule.to_json().items() if not key.startswith("_")}
    scheduler = SCHEDULERS[sampler].from_config(config)
    assert not scheduler.config.get("clip_sample")  # True is the default of diffusers' DDIM
    for steps in range(1, 51) if sampler == "lcm" else [*range(1, 151), 333, 500, 666, 999 - offset]:
        scheduler.set_timesteps(steps)
        ours = plan(schedule, sampler, steps)
        # With "trailing", diffusers' arange sometimes gives one timestep too many, -1, by rounding
        assert ours.timesteps == scheduler.timesteps[:steps].tolist()
        start = float(scheduler.init_noise_sigma)
        if sampler in ("ddim", "dpmpp_2m", "lcm"):  # these start at z = sqrt(a) x
            start = start * (ours.sigmas[0, 0].item() ** 2 + 1) ** 0.5
        assert ours.start_scale == pytest.approx(start, rel=1e-6)


@pytest.mark.parametrize("name", [*(scheduler.__name__ for scheduler in SCHEDULERS.values()), *SOLVERS])
def test_reads_what_diffusers_saves(name, tmp_path):
    """From any scheduler's file, we read the noise schedule. The steps are those of our own samplers."""
    for settings in ({}, {"prediction_type": "v_prediction"}):
        getattr(diffusers, name).from_config(STABLE | settings).save_config(tmp_path)
        config = json.loads((tmp_path / "scheduler_config.json").read_text())
        schedule = NoiseSchedule.from_config(config)
        config.pop("algorithm_type", None)  # DPM-Solver refuses that of DEIS and SA-Solver
        for sampler, cls in SCHEDULERS.items():
            scheduler = cls.from_config(config)
            scheduler.set_timesteps(20)
            ours = plan(schedule, sampler, 20)
            assert ours.timesteps == scheduler.timesteps.tolist()
            assert scheduler.config.prediction_type == schedule.prediction_type
            if sampler not in ("ddim", "lcm"):
                torch.testing.assert_close(ours.sigmas[:, 0], scheduler.sigmas[:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("setting", [
    {"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}, {"solver_type": "heun"},
    {"clip_sample": True}, {"disable_corrector": [0, 1]}, {"variance_type": "fixed_large"},
    {"euler_at_final": True}], ids=str)
def test_settings_of_another_solver_change_nothing(setting):
    assert NoiseSchedule.from_config(STABLE | setting) == NoiseSchedule()


def test_reads_the_published_instruct_pix2pix_file():
    """timbrooks/instruct-pix2pix has PNDM's settings under the name of Euler ancestral, without a spacing."""
    schedule = NoiseSchedule.from_config({
        "_class_name": "EulerAncestralDiscreteScheduler", "_diffusers_version": "0.12.0.dev0",
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None})
    assert schedule == NoiseSchedule(set_alpha_to_one=False, steps_offset=1)
    assert plan(schedule, "euler_ancestral", 2).timesteps == [999, 0]
    assert plan(schedule, "ddim", 2).timesteps == [501, 1]


@pytest.mark.parametrize("setting", [
    {"prediction_type": "sample"}, {"prediction_type": "flow_prediction"}, {"trained_betas": [0.1]},
    {"beta_schedule": "squaredcos_cap_v2"}, {"timestep_spacing": "quadratic"}, {"rescale_betas_zero_snr": 1},
    {"thresholding": True}, {"lambda_min_clipped": -5.1}, {"timestep_type": "continuous"},
    {"use_flow_sigmas": True}, {"use_beta_sigmas": True},
    {"use_lu_lambdas": True}, {"use_exponential_sigmas": True}, {"final_sigmas_type": "one"},
    {"interpolation_type": "log_linear"}, {"sigma_max": 14.0}, {"shift": 3.0},
    {"original_inference_steps": 100}, {"timestep_scaling": 1.0}], ids=str)
def test_refuses_by_name_what_it_does_not_compute(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        NoiseSchedule.from_config(setting)


@pytest.mark.parametrize("sampler, steps, settings", [
    ("euler", 0, {}), ("ddim", 1001, {}), ("dpmpp_2m", 1000, {}),
    ("dpmpp_2m", 1000, {"timestep_spacing": "leading"}), ("lcm", 0, {}), ("lcm", 51, {}),
    ("ddim", 1000, {"timestep_spacing": "leading", "steps_offset": 1})])
def test_too_many_or_too_few_steps_are_a_value_error(sampler, steps, settings):
    with pytest.raises(ValueError, match="steps"):
        plan(NoiseSchedule(**settings), sampler, steps)


def test_a_thousand_steps_where_there_is_room():
    for sampler in ("euler", "euler_ancestral", "ddim"):
        assert plan(NoiseSchedule(steps_offset=0), sampler, 1000).timesteps == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_sigmas_are_close_to_k_diffusions(steps):
    """k-diffusion, which the paper's code uses, interpolates log sigma; we and diffusers, sigma."""
    alphas = NoiseSchedule().alphas_cumprod().double()
    logs = ((1 - alphas) / alphas).sqrt().log()
    timesteps = torch.linspace(999, 0, steps, dtype=torch.float64)
    low = timesteps.floor().long().clamp(max=998)
    theirs = torch.lerp(logs[low], logs[low + 1], timesteps - low).exp()
    ours = plan(NoiseSchedule(timestep_spacing="linspace"), "euler_ancestral", steps).sigmas[:, 0].double()
    assert 0 < ((ours - theirs) / theirs).abs().max() <= 8.7e-5

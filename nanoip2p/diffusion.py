"""The noise schedule: how training adds noise, and at which noise levels a sampler calls the UNet.

Training adds noise to clean latents z_0 (`add_noise`), with a_t = prod_{s<=t} (1 - beta_s). Samplers work on
x = z_t / sqrt(a_t) = z_0 + sigma eps, with sigma = sqrt((1 - a_t) / a_t) (Karras et al. 2022).
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoip2p.common.config import FIXED, IGNORED, read_config

CHOICES = {"beta_schedule": ("scaled_linear", "linear"), "final_sigmas_type": ("zero", "sigma_min"),
           "prediction_type": ("epsilon", "v_prediction"),
           "timestep_spacing": (None, "linspace", "leading", "trailing")}

LCM_STEPS = 50  # a consistency model learns the timesteps of this many DDIM steps: 19, 39, ... 999 of 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """Settings, named as in diffusers' scheduler_config.json; the default betas are those of SD 1.5."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"     # the UNet predicts eps, or v (see add_noise) for "v_prediction"
    rescale_betas_zero_snr: bool = False  # zero terminal SNR: z_t is noise alone at the last timestep
    timestep_spacing: str | None = None  # None: diffusers' default, "leading" for ddim, else "linspace"
    steps_offset: int = 1                # added to the timesteps, only with "leading". lcm ignores both
    set_alpha_to_one: bool = True        # True: ddim ends at sigma = 0. False: at the sigma of timestep 0
    use_karras_sigmas: bool = False      # only euler and dpmpp_2m use it, as in diffusers
    final_sigmas_type: str = "zero"      # for euler and dpmpp_2m. "sigma_min": end at timestep 0's sigma

    def __post_init__(self):
        for key, choices in CHOICES.items():
            if (value := getattr(self, key)) not in choices:
                raise ValueError(f"NoiseSchedule: {key} = {value!r} is not supported, only {choices}")

    @classmethod
    def from_config(cls, config: dict) -> "NoiseSchedule":
        """Build from any scheduler's scheduler_config.json. Raises ValueError for unsupported settings."""
        defaults = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 0}
        return read_config(cls, defaults | config, FIXED["scheduler"], IGNORED["scheduler"])

    def to_json(self) -> dict:
        """The scheduler_config.json from which any scheduler of diffusers takes the same steps."""
        config = {key: value for key, value in asdict(self).items() if value is not None}
        return {"_class_name": "EulerAncestralDiscreteScheduler",
                "clip_sample": False} | config  # diffusers' DDIM clips by default

    def alphas_cumprod(self) -> Tensor:
        """a_t at each timestep, the share of the signal in the variance: (num_train_timesteps,) float32."""
        p = 0.5 if self.beta_schedule == "scaled_linear" else 1  # linear in sqrt(beta), as in LDM
        betas = torch.linspace(self.beta_start**p, self.beta_end**p, self.num_train_timesteps) ** (1 / p)
        a = torch.cumprod(1.0 - betas, dim=0)
        usable = a[-1] > 0
        if self.rescale_betas_zero_snr:  # Lin et al. 2023 (arXiv 2305.08891), algorithm 1
            root = a.sqrt()
            a = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
            a = torch.cumprod(torch.cat([a[:1], a[1:] / a[:-1]]), dim=0)  # rounds as diffusers does
            usable &= a.isfinite().all()
        if not usable:
            raise ValueError(f"beta_start = {self.beta_start}, beta_end = {self.beta_end}: the signal at the "
                             f"last of num_train_timesteps = {self.num_train_timesteps} must be above 0, and "
                             "lower than at the first")
        return a


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps (Ho et al. 2020, equation 4).

    Called with (eps, -z_0), it returns v = sqrt(a_t) eps - sqrt(1 - a_t) z_0 (Salimans & Ho 2022).
    latents, noise, z_t: (B, C, h, w). timestep: (B,) integers. alphas_cumprod: of the NoiseSchedule.
    """
    a = alphas_cumprod[timestep].to(latents.dtype)[:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


class Plan(NamedTuple):
    """The steps that a sampler takes."""

    timesteps: list[float]  # n, decreasing: the timestep that the UNet gets at each step
    sigmas: Tensor          # (n, 3) float32: noise levels before and after each step, and its timestep
    start_scale: float      # standard deviation of the noise with which the sampler starts
    prediction_type: str = "epsilon"  # of the NoiseSchedule

    def timestep_of(self, device: torch.device | str = "cpu") -> dict[float, Tensor]:
        """{sigma: timestep (1,)} for each noise level at which a sampler calls `denoise`."""
        return dict(zip(self.sigmas[:, 0].tolist(), torch.tensor(self.timesteps, device=device).split(1)))


def plan(schedule: NoiseSchedule, sampler: str, steps: int) -> Plan:
    """Noise levels for `steps` steps of a sampler. sampler: a key of samplers.SAMPLERS.

    The values equal those of diffusers' schedulers. A DDIM step from timestep t ends at t - n_train // steps,
    but the next step can start elsewhere, so a row of `sigmas` need not begin where the row before it ended.
    Raises ValueError for too many steps, and for ddim and lcm with epsilon prediction if the first timestep
    is noise alone: eps then does not determine z_0.
    """
    n_train = schedule.num_train_timesteps
    if not 1 <= steps <= n_train:
        raise ValueError(f"cannot take {steps} steps: choose 1 to {n_train} (training timesteps)")
    a = schedule.alphas_cumprod().numpy()
    timesteps = _spaced(schedule, sampler, steps)                               # (n,) decreasing
    if a[-1] == 0:
        in_z = sampler in ("ddim", "lcm")  # diffusers computes these in z, not in x
        if in_z and timesteps[0] == n_train - 1 and schedule.prediction_type == "epsilon":
            raise ValueError(f"{sampler} cannot begin at zero terminal SNR with epsilon; use another sampler")
        a[a == 0] = 1e-16 if in_z else 2.0**-24  # sigma = 1e8 or 4096; in diffusers, infinity or 4096
    table = np.sqrt((1 - a) / a)                                                # (n_train,) increasing
    sigmas = np.interp(timesteps, np.arange(n_train), table)                    # (n,)
    if schedule.use_karras_sigmas and sampler in ("euler", "dpmpp_2m"):
        ends = sigmas[[0, -1]] if sampler == "euler" else table[[-1, 0]]
        first, last = (sigma ** (1 / 7.0) for sigma in ends)
        sigmas = (first + np.linspace(0, 1, steps) * (last - first)) ** 7.0     # Karras et al., equation 5
        timesteps = np.interp(np.log(sigmas), np.log(table), np.arange(n_train))
        timesteps = timesteps.round() if sampler == "dpmpp_2m" else timesteps
    elif timesteps[0] > n_train - 1 or len(set(timesteps)) < steps:
        raise ValueError(f"no room for {steps} steps of {sampler} with timestep_spacing = "
                         f"{schedule.timestep_spacing!r}, steps_offset = {schedule.steps_offset}: take fewer")
    if sampler == "ddim":
        target = timesteps.astype(int) - n_train // steps
        last = 0.0 if schedule.set_alpha_to_one else table[0]
        following = np.where(target >= 0, table[target], last)
    else:
        ends_clean = sampler in ("euler_ancestral", "lcm") or schedule.final_sigmas_type == "zero"
        following = np.append(sigmas[1:], 0.0 if ends_clean else table[0])
    # Start noise: scaled by sigma for both Euler samplers, unless "leading"; else by sqrt(sigma^2 + 1)
    only_noise = sampler in ("euler", "euler_ancestral") and schedule.timestep_spacing != "leading"
    start_scale = float(sigmas[0]) if only_noise else float(np.sqrt(sigmas[0] ** 2 + 1))
    rows = torch.from_numpy(np.stack([sigmas, following, timesteps], axis=1)).float()      # (n, 3)
    return Plan(rows[:, 2].tolist(), rows, start_scale, schedule.prediction_type)


def _spaced(schedule: NoiseSchedule, sampler: str, steps: int) -> np.ndarray:
    """Timesteps (n,) float64, decreasing: Table 2 of Lin et al. 2023 (arXiv 2305.08891)."""
    n_train = schedule.num_train_timesteps
    if sampler == "lcm":
        if not steps <= LCM_STEPS <= n_train:
            raise ValueError(f"lcm cannot take {steps} steps: steps <= {LCM_STEPS} <= timesteps is needed")
        places = np.linspace(0, LCM_STEPS, steps, endpoint=False).astype(int)
        return ((LCM_STEPS - places) * (n_train // LCM_STEPS) - 1).astype(float)
    spacing = schedule.timestep_spacing or ("leading" if sampler == "ddim" else "linspace")
    points = steps + 1 if sampler == "dpmpp_2m" else steps  # DPM-Solver also counts sigma = 0
    if spacing == "trailing":
        return np.arange(n_train, 0, -n_train / steps)[:steps].round() - 1
    if spacing == "leading":
        return (np.arange(points)[::-1][:steps] * (n_train // points) + schedule.steps_offset).astype(float)
    timesteps = np.linspace(0, n_train - 1, points)[::-1][:steps]
    return timesteps.astype(np.float32).astype(float) if sampler.startswith("euler") else timesteps.round()

"""Consistency distillation: the loss against diffusers' UNet, DDIM and LCM schedulers, and whole runs."""

import json
import shutil

import diffusers
import pytest
import torch
from comparing import randomise, relative_error
from tiny_configs import tiny_unet
from tiny_editor import write_tiny_editor, write_tiny_painter
from train_runs import state, words

import train
from nanoip2p.checkpoint import hub
from nanoip2p.diffusion import NoiseSchedule, plan
from nanoip2p.editor import Editor
from nanoip2p.training import trainer
from nanoip2p.training.config import PRESETS
from nanoip2p.training.distill import STUDENT_DEFAULTS, Teacher, on_grid
from nanoip2p.unet import UNet

LATENTS, TEXT = (6, 4, 6, 10), (6, 5, 12)
pytestmark = pytest.mark.usefixtures("quick_runs")


def networks(in_channels):
    """Teacher, student and average, each with its twin of diffusers."""
    config = tiny_unet(in_channels=in_channels)
    for seed in range(3):
        ours = randomise(UNet(config), seed)
        twin = diffusers.UNet2DConditionModel.from_config(config.to_json())
        twin.load_state_dict(ours.state_dict())
        yield ours, twin.eval()


@pytest.fixture(scope="module")
def trios():
    """The networks by `in_channels`. No test changes them."""
    return {in_channels: list(networks(in_channels)) for in_channels in (8, 4)}


def tensors(in_channels):
    g = torch.Generator().manual_seed(3)
    z_in = torch.randn(LATENTS[0], in_channels, *LATENTS[2:], generator=g)
    context, null = torch.randn(TEXT, generator=g), torch.randn(TEXT[1:], generator=g)
    return z_in, context, null, torch.tensor([19, 39, 199, 499, 979, 999]), torch.rand(6, generator=g)


@pytest.mark.parametrize("in_channels", [8, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cfg_text, cfg_image", [
    ((3, 9), (1.2, 1.8)), ((7.5, 7.5), (1, 1)), ((1, 1), (1, 1))])
@torch.no_grad()
def test_the_loss_is_that_of_diffusers_parts(trios, prediction, cfg_text, cfg_image, in_channels):
    """Guided DDIM step of the teacher, consistency functions of student and average, their distance."""
    if in_channels == 4:
        cfg_image = (1, 1)  # a text-to-image model has no picture to be guided by
    (teacher, peer), (student, peer_student), (average, peer_average) = trios[in_channels]
    z_in, context, null, timestep, share = tensors(in_channels)
    schedule = NoiseSchedule(prediction_type=prediction)
    ours = Teacher(teacher, null, schedule.alphas_cumprod(), prediction, cfg_text, cfg_image, torch.float32)
    losses = ours.losses(student, average, z_in, timestep, context, share)

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ddim = diffusers.DDIMScheduler(**settings, prediction_type=prediction, clip_sample=False,
                                   set_alpha_to_one=False)
    ddim.set_timesteps(50)  # a step of 20 timesteps
    lcm = diffusers.LCMScheduler(**settings, prediction_type=prediction)

    def consistency(unet, z_in, t, text):
        lcm.set_timesteps(1)
        lcm._step_index = 0
        output = unet(z_in, t, text).sample
        return lcm.step(output, t, z_in[:, :4], return_dict=False)[1]

    wanted = []
    for i, t in enumerate(timestep.tolist()):
        z, text, z_t = z_in[i : i + 1], context[i : i + 1], z_in[i : i + 1, :4]
        blank = torch.cat([z_t, torch.zeros_like(z[:, 4:])], dim=1)
        s_t, s_i = (low + share[i] * (high - low) for low, high in (cfg_text, cfg_image))
        full, image, none = (peer(a, t, b).sample for a, b in (
            (z, text), (z, null[None]), (blank, null[None])))
        guided = none + s_i * (image - none) + s_t * (full - image)
        z_s = ddim.step(guided, t, z_t).prev_sample
        target = consistency(peer_average, torch.cat([z_s, z[:, 4:]], dim=1), max(t - 20, 0), text)
        wanted.append((consistency(peer_student, z, t, text) - target).square().mean())
    assert relative_error(losses, torch.stack(wanted)) < 1e-5
    assert (losses > 1e-4).all() and losses.unique().numel() == 6


def test_only_the_student_learns():
    (teacher, _), (student, _), (average, _) = networks(8)
    z_in, context, null, timestep, share = tensors(8)
    alphas = NoiseSchedule().alphas_cumprod()
    ours = Teacher(teacher, null, alphas, "epsilon", (7, 7), (1.5, 1.5), torch.float32)
    ours.losses(student, average, z_in, timestep, context, share).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert not any(p.grad is not None for network in (teacher, average) for p in network.parameters())


@pytest.mark.parametrize("n_train", [50, 130, 1000])
def test_every_timestep_of_the_sampler_is_drawn_equally_often(n_train):
    drawn, counts = on_grid(torch.arange(n_train), n_train).unique(return_counts=True)
    schedule = NoiseSchedule(num_train_timesteps=n_train)
    assert drawn.flip(0).tolist() == plan(schedule, "lcm", 50).timesteps
    assert counts.max() - counts.min() <= (n_train % 50 > 0)


def test_a_network_that_is_consistent_has_no_loss():
    """If the teacher predicts no noise, z_s and z_t lie on one path, and both networks know its end."""
    class Silent(torch.nn.Module):
        config = tiny_unet(in_channels=8)

        def forward(self, z_in, timestep, context, recompute=False):
            return torch.zeros_like(z_in[:, :4])

    z_in, context, null, timestep, share = tensors(8)
    ours = Teacher(Silent(), null, NoiseSchedule().alphas_cumprod(), "epsilon", (3, 3), (1, 1), torch.float32)
    losses = ours.losses(Silent(), Silent(), z_in, timestep, context, share)
    # At timestep 0, f is the identity, so f(z_0, 0) still has the noise of timestep 0
    assert (losses[1:] < 1e-6).all() and losses[0] < 1e-5 * z_in[0, :4].square().mean() + 1e-2


def distilled(teacher, out, *more):
    argv = words(teacher, out, "--lr", 1e-3, "--cfg-text", 2, 5, *more)
    argv[argv.index("--weights")] = "--distill"
    return train.main(argv)


def test_a_run_resumes_exactly_and_writes_an_editor_of_four_steps(start, tmp_path, capsys, monkeypatch):
    shares, usual = [], trainer.model_input
    monkeypatch.setattr(trainer, "model_input", lambda *given: shares.append(given[4]) or usual(*given))
    assert distilled(start, tmp_path / "whole", "--steps", 4) == 0
    assert {*map(tuple, shares)} == {(0, 0, 0)}  # no condition is dropped
    assert distilled(start, tmp_path / "run", "--steps", 2) == 0
    half = state(tmp_path / "run")
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    for flags, from_the_file in ([], {str(start)}), (["--distill", str(start)], set()):
        train.parse(["--resume", str(tmp_path / "run"), *flags])
        assert hub.cache_only - {None} == from_the_file  # a teacher that the user names may be downloaded
    wanted = state(tmp_path / "whole")
    assert state(tmp_path / "run") == wanted != half
    folder = tmp_path / "whole" / "weights"
    defaults = json.loads((folder / "defaults.json").read_text())
    assert defaults == json.loads((start / "defaults.json").read_text()) | STUDENT_DEFAULTS
    editor = Editor.load(folder, device="cpu")
    peer = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    assert type(peer.scheduler) is diffusers.LCMScheduler
    assert editor.defaults["sampler"] == "lcm"
    capsys.readouterr()
    assert train.main(["--check", "--data", "scenes", "--weights", str(folder), "--resolution", "32"]) == 0
    assert "loses its ability to edit in few steps" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_with_a_teacher(preset):
    config = train.parse(["--distill", "w", "--preset", preset, "--data", "d", "--out", "o"])
    assert (config.ema_device, config.snr_gamma, config.ema_decay) == ("same", 0, 0.95)


def test_a_text_to_image_model_is_distilled_too(tmp_path):
    teacher = write_tiny_painter(tmp_path / "teacher")
    argv = words(teacher, tmp_path / "run", "--steps", 1, "--text-to-image")
    argv[argv.index("--weights")] = "--distill"
    assert train.main(argv) == 0


@pytest.mark.parametrize("more, named", [
    (["--snr-gamma", 5], "--snr-gamma"), (["--ema-device", "cpu"], "--ema-device"),
    (["--cfg-text", "much", 2], "much"), (["--cfg-image", "nan", 2], "nan"),
    (["--cfg-image", 2, 1], "--cfg-image 2.0 1.0"), (["--drop", 0.5, 0.1, 0.1], "--drop has no effect")])
def test_what_does_not_go_with_a_teacher_is_told(start, tmp_path, capsys, more, named):
    assert distilled(start, tmp_path / "run", *more) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_teacher_takes_pictures(tmp_path, capsys):
    assert distilled(write_tiny_painter(tmp_path / "painter"), tmp_path / "run", "--steps", 1) == 2
    assert "text-to-image model" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--lora", 2]])
@pytest.mark.parametrize("changed", ["weights", "scales"])
def test_a_run_does_not_go_on_with_another_teacher(start, tmp_path, capsys, changed, more):
    teacher, out = shutil.copytree(start, tmp_path / "teacher"), tmp_path / "run"
    argv = words(teacher, out, "--steps", 1, "--validate-every", 0, *more)
    argv[argv.index("--weights")] = "--distill"
    assert train.main(argv) == 0
    before = state(out) if not more else None
    if changed == "weights":
        other = write_tiny_editor(tmp_path / "other", seed=9)  # another cache would be refused
        shutil.copytree(other / "unet", teacher / "unet", dirs_exist_ok=True)
    else:
        defaults = json.loads((teacher / "defaults.json").read_text())
        (teacher / "defaults.json").write_text(json.dumps(defaults | {"cfg_text": 9.0}))
    assert train.main(["--resume", str(out), "--steps", "2"]) == 2
    assert "have changed since" in capsys.readouterr().err
    assert more or state(out) == before

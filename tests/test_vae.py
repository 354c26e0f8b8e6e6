"""nanoip2p.vae against diffusers' AutoencoderKL: same weights in, same numbers out."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import randomise, relative_error

from nanoip2p.vae import VAE, VAEConfig

CONFIGS = {
    "tiny": VAEConfig.tiny(),
    "one-level": VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=2),
    "odd": VAEConfig(1, 2, 5, (6, 12, 12, 24, 24), 3, 3, 0.3),
    "sd-1.5": VAEConfig(),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def twins(config: VAEConfig) -> tuple[VAE, AutoencoderKL]:
    """Our network and diffusers' with the same random weights."""
    theirs = randomise(AutoencoderKL.from_config(config.to_json()))
    ours = VAE.from_config(dict(theirs.config)).eval()
    assert ours.config == config
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
    config = CONFIGS[name]
    ours, theirs = twins(config)
    image = torch.randn(2, config.in_channels, 4 * ours.downsampling, 6 * ours.downsampling)
    mean, logvar = ours.encode(image)
    posterior = theirs.encode(image).latent_dist
    assert mean.shape == (2, config.latent_channels, 4, 6)
    assert relative_error(mean, posterior.mean) <= 1e-5
    assert relative_error(logvar, posterior.logvar) <= 1e-5
    assert relative_error(theirs.encode(image.flip(0)).latent_dist.mean, posterior.mean) > 0.1

    latents = torch.randn(2, config.latent_channels, 4, 6)
    reference = theirs.decode(latents).sample
    assert relative_error(ours.decode(latents), reference) <= 1e-5
    assert relative_error(theirs.decode(latents.flip(0)).sample, reference) > 0.1


@torch.no_grad()
def test_sizes_that_do_not_divide_equal_diffusers():
    ours, theirs = twins(VAEConfig.tiny())
    image = torch.randn(1, 3, 21, 35)
    assert relative_error(ours.encode(image)[0], theirs.encode(image).latent_dist.mean) <= 1e-5


def test_gradients_equal_diffusers():
    ours, theirs = twins(VAEConfig.tiny())
    image = torch.randn(2, 3, 8, 12)
    ours.decode(ours.encode(image)[0]).square().mean().backward()
    theirs.decode(theirs.encode(image).latent_dist.mean).sample.square().mean().backward()
    reference = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad.norm() > 1e-6:  # a key's bias has gradient zero but for rounding
            assert relative_error(parameter.grad, reference[name].grad) <= 1e-4, name
            compared += 1
    assert compared >= len(reference) - 2


@torch.no_grad()
def test_log_variance_is_clamped():
    ours, theirs = twins(VAEConfig.tiny())
    for vae in (ours, theirs):
        vae.quant_conv.weight.mul_(100)
    image = torch.randn(2, 3, 8, 8)
    logvar = ours.encode(image)[1]
    assert logvar.min() == -30 and logvar.max() == 20
    assert torch.allclose(logvar, theirs.encode(image).latent_dist.logvar, atol=1e-3)


@torch.no_grad()
def test_loads_the_attention_names_of_2022():
    ours, _ = twins(VAEConfig.tiny())
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in ours.state_dict().items():
        for new_part, old_part in names.items():
            name = name.replace(new_part, old_part)
        old[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in old and len(old.keys() - ours.state_dict()) == 16

    again = VAE(ours.config)
    again.load_state_dict(old, strict=True)
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(again.decode(latents), ours.decode(latents))


def test_reads_what_diffusers_writes(tmp_path):
    AutoencoderKL.from_config(VAEConfig.tiny().to_json()).save_config(tmp_path)
    assert VAE.from_config(json.loads((tmp_path / "config.json").read_text())).config == VAEConfig.tiny()


@pytest.mark.parametrize(
    "setting",
    [
        {"act_fn": "relu"},
        {"mid_block_add_attention": False},
        {"use_quant_conv": False},
        {"latents_mean": [0.1, 0.1, 0.1, 0.1]},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]},
        {"block_out_channels": [8, 16]},
        {"norm_num_groups": 3},
        {"use_tiny_decoder": True},
    ],
)
def test_refuses_by_name_what_it_does_not_compute(setting):
    (key,) = setting
    with pytest.raises(ValueError, match=key if key != "block_out_channels" else "down_block_types"):
        VAE.from_config(VAEConfig.tiny().to_json() | setting)


def test_wrong_weights_are_not_taken():
    weights = VAE(VAEConfig.tiny()).state_dict()
    weights.pop("quant_conv.bias")
    with pytest.raises(RuntimeError, match="quant_conv.bias"):
        VAE(VAEConfig.tiny()).load_state_dict(weights)

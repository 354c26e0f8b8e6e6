"""nanoip2p.vae against diffusers' AutoencoderKL: same weights in, same numbers out."""

import json
from pathlib import Path

import pytest
import torch
from comparing import randomise, relative_error
from diffusers import AutoencoderKL
from PIL import Image
from tiny_configs import TINY_VAE

import nanoip2p.vae
from nanoip2p.checkpoint.folder import load_network
from nanoip2p.images import to_tensor
from nanoip2p.vae import OVERLAP, TILE, VAE, VAEConfig, in_tiles, tile_starts

CONFIGS = {
    "tiny": TINY_VAE,
    "one-level": VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=2),
    "odd": VAEConfig(1, 2, 5, (6, 12, 12, 24, 24), 3, 3, 0.3),
    "sd-1.5": VAEConfig(),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def twins(config: VAEConfig) -> tuple[VAE, AutoencoderKL]:
    """Our network and diffusers' with the same random weights, which they share."""
    with torch.device("meta"):  # drawing initial weights would take as long as the comparison
        theirs = AutoencoderKL.from_config(config.to_json())
    randomise(theirs.to_empty(device="cpu"))
    with torch.device("meta"):
        ours = VAE.from_config(dict(theirs.config)).eval()
    assert ours.config == config
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
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
    assert relative_error(posterior.mean.flip(0), posterior.mean) > 0.1

    latents = torch.randn(2, config.latent_channels, 4, 6)
    reference = theirs.decode(latents).sample
    assert relative_error(ours.decode(latents), reference) <= 1e-5
    assert relative_error(reference.flip(0), reference) > 0.1


@torch.no_grad()
def test_sizes_that_do_not_divide_equal_diffusers():
    ours, theirs = twins(TINY_VAE)
    image = torch.randn(1, 3, 21, 35)
    assert relative_error(ours.encode(image)[0], theirs.encode(image).latent_dist.mean) <= 1e-5


def test_gradients_equal_diffusers():
    ours, theirs = twins(TINY_VAE)
    image = torch.randn(2, 3, 8, 12)
    ours.decode(ours.encode(image)[0]).square().mean().backward()
    theirs.decode(theirs.encode(image).latent_dist.mean).sample.square().mean().backward()
    reference = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad.norm() > 1e-6:  # the gradient of a key's bias is zero, up to rounding
            assert relative_error(parameter.grad, reference[name].grad) <= 1e-4, name
            compared += 1
    assert compared >= len(reference) - 2


@torch.no_grad()
def test_log_variance_is_clamped():
    ours, theirs = twins(TINY_VAE)
    theirs.quant_conv.weight.mul_(100)  # `ours` shares this weight
    image = torch.randn(2, 3, 8, 8)
    logvar = ours.encode(image)[1]
    assert logvar.min() == -30 and logvar.max() == 20
    assert torch.allclose(logvar, theirs.encode(image).latent_dist.logvar, atol=1e-3)


@torch.no_grad()
def test_loads_the_attention_names_of_2022():
    ours, _ = twins(TINY_VAE)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in ours.state_dict().items():
        for new_part, old_part in names.items():
            name = name.replace(new_part, old_part)
        old[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in old and len(old.keys() - ours.state_dict()) == 16

    again = VAE(ours.config)
    again.load_state_dict(VAE.published_names(old), strict=True)
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(again.decode(latents), ours.decode(latents))


def test_reads_what_diffusers_writes(tmp_path):
    AutoencoderKL.from_config(TINY_VAE.to_json()).save_config(tmp_path)
    assert VAE.from_config(json.loads((tmp_path / "config.json").read_text())).config == TINY_VAE


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
    named = {"block_out_channels": "down_block_types", "norm_num_groups": "num_groups"}.get(key, key)
    with pytest.raises(ValueError, match=named):
        VAE.from_config(TINY_VAE.to_json() | setting)


def test_wrong_weights_are_not_taken():
    weights = VAE(TINY_VAE).state_dict()
    weights.pop("quant_conv.bias")
    with pytest.raises(RuntimeError, match="quant_conv.bias"):
        VAE(TINY_VAE).load_state_dict(weights)


@torch.no_grad()
def test_little_memory_is_exact_up_to_a_size():
    vae, _ = twins(TINY_VAE)
    latents, image = torch.randn(3, 4, 10, 7), torch.randn(3, 3, 40, 28)
    rows = []
    vae.decoder.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    assert relative_error(vae.decode_low_memory(latents), vae.decode(latents)) < 1e-5
    assert rows == [1, 1, 1, 3]
    assert relative_error(vae.encode_low_memory(image), vae.encode(image)[0]) < 1e-5


@pytest.fixture
def small_tiles(monkeypatch):
    for name, value in (("MAX_UNTILED", 30), ("TILE", 24), ("OVERLAP", 8)):
        monkeypatch.setattr(nanoip2p.vae, name, value)


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(40, 33), (50, 17), (21, 64)])
def test_tiles_are_exact_for_what_looks_no_farther(small_tiles, h, w):
    sizes, enlarge = [], torch.nn.Upsample(scale_factor=4)
    latents = torch.randn(2, 4, h, w)
    made = in_tiles(lambda x: (sizes.append(tuple(x.shape)), enlarge(x))[1], latents, 1, 4)
    assert relative_error(made, enlarge(latents)) < 1e-6
    assert len(sizes) > 2 and max(max(size[2:]) for size in sizes) == 24
    assert {size[0] for size in sizes} == {1}
    assert relative_error(in_tiles(torch.nn.AvgPool2d(4), made, 4, 1), latents) < 1e-6
    assert in_tiles(torch.nn.Identity(), latents.bfloat16(), 1, 1).dtype == torch.bfloat16


@torch.no_grad()
def test_tiles_of_a_trained_autoencoder_are_close_and_leave_no_seam(small_tiles):
    nano = Path(__file__).parents[2] / "weights" / "nano-ip2p"
    vae = load_network(VAE, nano / "vae")
    image = to_tensor(Image.open(nano / "examples" / "balloon.png").convert("RGB").resize((128, 128)))[None]
    mean = vae.encode(image)[0]
    whole, tiled = vae.decode(mean), vae.decode_low_memory(mean)
    assert 1e-4 < relative_error(vae.encode_low_memory(image), mean) < 0.06
    assert 1e-4 < relative_error(tiled, whole) < 0.08
    for dim in (2, 3):  # a seam would be a row or column of large steps
        steps = (tiled - whole).diff(dim=dim).abs().mean(dim=(0, 1, 5 - dim))
        assert steps.max() < whole.diff(dim=dim).abs().mean()


def test_tiles_cover_everything_and_overlap():
    for length in range(1, 400):
        starts = tile_starts(length)
        assert starts[0] == 0 and max(starts[-1] + TILE, TILE) >= length
        assert all(0 < b - a <= TILE - OVERLAP for a, b in zip(starts, starts[1:]))
        assert len(starts) == 1 or starts[-1] + TILE == length

"""The names of 2022: the published lists, diffusers' conversion, other families, and the README's picture."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils
from helpers import randomise

from nanoip2p.clip import CLIPTextConfig
from nanoip2p.original import (
    CLASSES,
    IGNORED,
    UNET_WORDS,
    find_networks,
    find_vae,
    theirs,
    to_original,
    to_ours,
    unet_places,
    vae_places,
)
from nanoip2p.unet import UNetConfig
from nanoip2p.vae import VAEConfig

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT.parent / "shared" / "checkpoint-keys"
FULL = {"unet": UNetConfig(), "vae": VAEConfig(), "text_encoder": CLIPTextConfig()}


def published(name):
    """The tensors of a famous file, as shapes without memory."""
    path = LISTS / f"{name}-single-file.tsv"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return {key: torch.empty([int(n) for n in size.split("x") if n], device="meta") for key, size in rows}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def empty(config):
    with torch.device("meta"):
        return CLASSES[type(config)](config)


@pytest.mark.parametrize("name, channels, ema", [
    ("stable-diffusion-v1", 4, False), ("instruct-pix2pix", 8, True)])
def test_published_lists_fit_with_nothing_missing_and_nothing_left_over(name, channels, ema):
    tensors = published(name)
    found, parts = find_networks(tensors, Path(name))
    assert f"{channels} input channels" in found and ("EMA" in found) and ("EMA weights" in found) == ema
    assert {part: config for part, (config, _) in parts.items()} == FULL | {"unet": UNetConfig(channels)}
    again = {}
    for config, ours in parts.values():
        assert shapes(ours) == shapes(empty(config).state_dict())
        again |= to_original(config, ours)
    if ema:
        again |= to_original(*parts["unet"], ema=True)
    assert shapes(again) == {key: size for key, size in shapes(tensors).items() if not IGNORED.fullmatch(key)}


CONFIGS = [
    UNetConfig.tiny(8), UNetConfig(4, 4, (8, 8, 16), ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                                   ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), 3, 2, 12, 4),
    UNetConfig(4, 4, (8,), ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",), 1, 2, 12, 4),
    VAEConfig.tiny(), VAEConfig(block_out_channels=(8, 16), layers_per_block=3, norm_num_groups=4),
    CLIPTextConfig.tiny(),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back_is_bit_exact(config):
    ours = randomise(CLASSES[type(config)](config)).state_dict()
    for ema in (False, True) if isinstance(config, UNetConfig) else (False,):
        there = to_original(config, ours, ema)
        assert len(there) == len(ours) and not set(there) & set(ours)
        back = to_ours(config, there, ema)
        assert list(back) == list(ours) and all(torch.equal(back[name], ours[name]) for name in ours)


def test_configs_are_read_off_the_shapes():
    unet = UNetConfig(8, 4, (32, 64, 64), ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                      ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), 1, 8, 48)
    vae = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
    text = CLIPTextConfig(500, 128, 96, 3, 2, 20, projection_dim=128)
    tensors = {}
    for config in (unet, vae, text):
        tensors |= to_original(config, empty(config).state_dict())
    assert {config for config, _ in find_networks(tensors, Path("x"))[1].values()} == {unet, vae, text}
    nested = {f"state_dict.{name}": tensor for name, tensor in tensors.items()}
    shorter = {name.replace("text_model.", ""): tensor for name, tensor in tensors.items()}
    for spelling in (nested, shorter):
        assert find_networks(spelling, Path("x"))[1].keys() == {"unet", "vae", "text_encoder"}
    alone = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()
             if name.startswith("first_stage")}
    assert find_vae(alone, Path("x"))[0] == find_vae(tensors, Path("x"))[0] == vae
    assert find_vae(alone, Path("x"))[1].keys() == empty(vae).state_dict().keys()


def marked(config):
    """Our tensors, each filled with its own number."""
    return {name: torch.full_like(tensor, i, device="cpu") for i, (name, tensor)
            in enumerate(CLASSES[type(config)](config).state_dict().items())}


@pytest.mark.parametrize("config", CONFIGS[:5])
def test_diffusers_translates_the_same_way(config):
    ours = marked(config)
    if isinstance(config, UNetConfig):
        converted = single_file_utils.convert_ldm_unet_checkpoint(
            to_original(config, ours), {**config.to_json(), "class_embed_type": None})
    else:
        converted = single_file_utils.convert_ldm_vae_checkpoint(to_original(config, ours), config.to_json())
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], ours[name]) for name in ours)


def test_diffusers_takes_the_averaged_weights_from_where_we_put_them():
    config = UNetConfig.tiny(8)
    tensors = to_original(config, marked(config)) | to_original(config, marked(config), ema=True)
    tensors = {name: tensor + 1000 * name.startswith("model_ema") for name, tensor in tensors.items()}
    tensors |= {f"filler{i}": torch.zeros(1) for i in range(101)}  # it looks into large files only
    converted = single_file_utils.convert_ldm_unet_checkpoint(
        tensors, {**config.to_json(), "class_embed_type": None}, extract_ema=True)
    assert all((tensor >= 1000).all() for tensor in converted.values()) and len(converted) > 50


UNET = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
OTHERS = {
    "SDXL": UNET | {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.zeros(1)},
    "Stable Diffusion 2.x": UNET | {"cond_stage_model.model.ln_final.bias": torch.zeros(1)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)},
    "Flux": {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)},
    "LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(1)},
    "a LoRA": {"unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight": torch.zeros(1)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": torch.zeros(1)},
    "a ControlNet": {"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)},
    "textual inversion": {"emb_params": torch.zeros(1)},
    "diffusers folder": {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)},
    "autoencoder alone": {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)},
    "no Stable Diffusion checkpoint": {"fc1.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_said_by_name(family):
    with pytest.raises(ValueError, match=family) as caught:
        find_networks(OTHERS[family], Path("file.safetensors"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("file.safetensors")


@pytest.mark.parametrize("config, family", [
    (UNetConfig(9), "an inpainting model"), (UNetConfig(cross_attention_dim=1024), "a Stable Diffusion 2.x")])
def test_other_widths_are_said_by_name(config, family):
    tensors = {}
    for part in (config, VAEConfig(), CLIPTextConfig()):
        tensors |= to_original(part, empty(part).state_dict())
    with pytest.raises(ValueError, match=f"x: this is {family}"):
        find_networks(tensors, Path("x"))


def test_the_readmes_picture_is_true():
    picture = (ROOT / "README.md").read_text().split("The two naming schemes")[1].split("```")[1]
    places = unet_places(UNetConfig())
    drawn = re.findall(r"^   [|v^]   (\S+) +(\S+)", picture, re.MULTILINE)
    assert len(drawn) >= 20 and {ours: places[ours] for ours, _ in drawn} == dict(drawn)
    inside = picture.split("inside a residual block:")[1].split("the autoencoder:")[0].split()
    assert dict(zip(inside[::2], inside[1::2])) == UNET_WORDS
    for ours, original in re.findall(r"(decoder\.up_blocks\S+) (decoder\S+)", picture):
        assert vae_places(VAEConfig())[ours] == original
    raw, averaged = re.findall(r"averaged weights: +(\S+) (\S+)", picture)[0]
    table = {name: ours for ours, name in theirs(UNetConfig()).items()}
    assert to_original(UNetConfig(), {table[raw]: torch.zeros(4)}, ema=True).keys() == {averaged}



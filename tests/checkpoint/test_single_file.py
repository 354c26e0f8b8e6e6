"""Tensor names of single files: published lists, diffusers' conversion, other models, docs/weights.md."""

import re
from pathlib import Path

import pytest
import torch
from comparing import randomise
from diffusers.loaders import single_file_utils
from tiny_configs import TINY_TEXT, TINY_VAE, tiny_unet

from nanoip2p.checkpoint.folder import build_without_memory
from nanoip2p.checkpoint.single_file import (
    IGNORED,
    PARTS,
    UNET_LAYERS,
    find_networks,
    find_vae,
    from_original,
    original_names,
    to_original,
    unet_places,
    vae_name,
)
from nanoip2p.clip import CLIPTextConfig, TextEncoder
from nanoip2p.unet import UNet, UNetConfig
from nanoip2p.vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parents[2]
LISTS = ROOT.parent / "shared" / "checkpoint-keys"
CLASSES = {UNetConfig: UNet, VAEConfig: VAE, CLIPTextConfig: TextEncoder}
FULL = {"unet": UNetConfig(), "vae": VAEConfig(), "text_encoder": CLIPTextConfig()}


def published(name):
    """The tensors of a published file, on the meta device."""
    path = LISTS / f"{name}-single-file.tsv"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return {key: torch.empty([int(n) for n in size.split("x") if n], device="meta") for key, size in rows}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def empty(config):
    return build_without_memory(CLASSES[type(config)], config.to_json(), Path("x"))


def holding(config, tensors):
    """The network with these tensors as weights."""
    model = empty(config)
    model.load_state_dict(tensors, assign=True)
    return model


def named(config, tensors, ema=False):
    """Our tensors under the original's names."""
    return to_original(holding(config, tensors), ema)


def open_networks(tensors, raw_weights=False, configs=()):
    """Open a file of these tensors: its description, configs and tensors."""
    configs = {part: config.to_json() for part, config in zip(PARTS, configs)}
    found, networks = find_networks(lambda *_: tensors, Path("x"), raw_weights, configs)
    return found, {part: (network.model.config, network.read()) for part, network in networks.items()}


def open_vae(tensors):
    network = find_vae(lambda *_: tensors, Path("x"), SMALL[1].to_json())
    return network.model.config, network.read()


def single(*configs):
    """The tensors of a file of 2022 with these networks, on the meta device."""
    return {name: tensor for config in configs for name, tensor in to_original(empty(config)).items()}


@pytest.mark.parametrize("name, channels, ema", [
    ("stable-diffusion-v1", 4, False), ("instruct-pix2pix", 8, True)])
def test_published_lists_fit_with_nothing_missing_and_nothing_left_over(name, channels, ema):
    tensors = published(name)
    found, parts = open_networks(tensors)
    assert f"{channels} input channels" in found and ("EMA" in found) and ("EMA weights" in found) == ema
    assert {part: config for part, (config, _) in parts.items()} == FULL | {"unet": UNetConfig(channels)}
    again = {}
    for config, ours in parts.values():
        assert shapes(ours) == shapes(empty(config).state_dict())
        again |= named(config, ours)
    if ema:
        again |= named(*parts["unet"], ema=True)
    assert shapes(again) == {key: size for key, size in shapes(tensors).items() if not IGNORED.fullmatch(key)}


CONFIGS = [
    tiny_unet(8), UNetConfig(4, 4, (8, 8, 16), ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                                   ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), 3, 2, 12, 4),
    UNetConfig(4, 4, (8,), ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",), 1, 2, 12, 4),
    TINY_VAE, VAEConfig(block_out_channels=(8, 16), layers_per_block=3, norm_num_groups=4),
    TINY_TEXT,
]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back_is_bit_exact(config):
    ours = randomise(CLASSES[type(config)](config)).state_dict()
    for ema in (False, True) if isinstance(config, UNetConfig) else (False,):
        there = named(config, ours, ema)
        assert len(there) == len(ours) and not set(there) & set(ours)
        assert all(tensor.ndim == 4 for name, tensor in there.items()
                   if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name))
        back = from_original(empty(config), there, ema)
        assert list(back) == list(ours) and all(torch.equal(back[name], ours[name]) for name in ours)
        assert all(back[name].data_ptr() == ours[name].data_ptr() for name in ours), "copied"


SMALL = (
    UNetConfig(8, 4, (32, 64, 64), ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
               ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), 1, 8, 48),
    VAEConfig(2, 5, 3, (32, 64), 1), CLIPTextConfig(500, 128, 96, 3, 2, 20, projection_dim=128))


@pytest.mark.parametrize("channels, kind", [(4, "a Stable Diffusion 1.x"), (8, "an InstructPix2Pix")])
def test_a_file_without_configs_is_stable_diffusion_15_or_its_editor(channels, kind):
    configs = UNetConfig(channels), VAEConfig(), CLIPTextConfig()
    found, parts = open_networks(single(*configs))
    assert [config for config, _ in parts.values()] == [*configs]
    assert found.startswith(kind) and f"{channels} input channels" in found


@pytest.mark.parametrize("unet, message", [
    (SMALL[0], "has unknown"), (UNetConfig(cross_attention_dim=512), "does not fit its configuration:")])
def test_a_file_of_other_shapes_without_configs_is_one_line(unet, message):
    with pytest.raises(ValueError, match=f"^x {message} ") as caught:
        find_networks(lambda *_: single(unet, *SMALL[1:]), Path("x"))[1]["unet"].load(None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("first", [None, torch.zeros(()), torch.zeros(3), torch.zeros(0, 3, 3, 3)])
def test_a_first_weight_that_is_missing_or_misshapen_is_one_line(first):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors = {key: tensor for key, tensor in (single(*SMALL) | {name: first}).items() if tensor is not None}
    configs = {part: config.to_json() for part, config in zip(PARTS, SMALL)}
    networks = find_networks(lambda *_: tensors, Path("x"), configs=configs)[1]
    with pytest.raises(ValueError, match="^x (lacks|does not fit .*:) conv_in.weight") as caught:
        networks["unet"].load(None)
    assert "\n" not in str(caught.value)


def test_spellings_of_others_are_understood():
    tensors = single(*SMALL)
    nested = {f"state_dict.{name}": tensor for name, tensor in tensors.items()}
    shorter = {name.replace("text_model.", ""): tensor for name, tensor in tensors.items()}
    scalars = tensors | {name: torch.zeros(()) for name in ("null_token", "cond_stage_model.x.logit_scale")}
    parts = open_networks(tensors, configs=SMALL)[1]
    tables = tensors | {name: torch.zeros(1000) for name in ("lvlb_weights", "logvar", "posterior_x")}
    for spelling in (nested, shorter, scalars, tables):
        again = open_networks(spelling, configs=SMALL)[1]
        assert all(shapes(again[part][1]) == shapes(tensors) for part, (_, tensors) in parts.items())


@pytest.mark.parametrize("name, again", [
    ("model.diffusion_model.out.0.bias", "state_dict.model.diffusion_model.out.0.bias"),
    ("cond_stage_model.transformer.text_model.final_layer_norm.bias",
     "cond_stage_model.transformer.final_layer_norm.bias"),
])
def test_a_weight_in_two_spellings_is_refused(name, again):
    tensors = single(*SMALL)
    for doubled in (tensors | {again: tensors[name]}, {again: tensors[name]} | tensors):
        with pytest.raises(ValueError, match=f"^x: {re.escape(name)} comes twice, .*$"):
            open_networks(doubled, configs=SMALL)


@pytest.mark.parametrize("raw_weights, offset, said", [
    (False, 1000, "EMA weights"), (True, 0, "raw weights")])
def test_averaged_weights_go_before_raw_ones(raw_weights, offset, said):
    config, ours = SMALL[0], marked(SMALL[0])
    averaged = {name: tensor + 1000 for name, tensor in ours.items()}
    file = single(*SMALL) | named(config, ours) | named(config, averaged, ema=True)
    found, parts = open_networks(file, raw_weights, SMALL)
    assert said in found and parts["unet"][1].keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name] + offset) for name, tensor in parts["unet"][1].items())


@pytest.mark.parametrize("spelling", [
    "prefixed", "bare", "trained", "whole", "nested", "diffusers", "diffusers of 2022"])
def test_an_autoencoder_alone_in_every_spelling(spelling):
    config, ours = SMALL[1], marked(SMALL[1])
    prefixed = named(config, ours)
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in prefixed.items()}
    file = {
        "prefixed": prefixed, "bare": bare, "whole": single(*SMALL) | prefixed, "diffusers": ours,
        "trained": bare | {"loss.logvar": torch.zeros(()), "loss.net.weight": torch.zeros(2, 2),
                           "model_ema.decay": torch.zeros(())},
        "nested": {f"state_dict.{name}": tensor for name, tensor in bare.items()},
        "diffusers of 2022": {name.replace("to_q", "query"): tensor for name, tensor in ours.items()},
    }[spelling]
    found, tensors = open_vae(file)
    assert found == config and tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[name], ours[name]) for name in ours)


@pytest.mark.parametrize("extra, message", [
    ({"wings.weight": torch.zeros(2)}, "x has unknown .*wings.weight"),
    ({"conditioner.embedders.0.bias": torch.zeros(2)}, "x: this is an SDXL checkpoint")])
def test_what_is_no_autoencoder_of_ours_is_refused(extra, message):
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in single(SMALL[1]).items()}
    config = SMALL[1].to_json()
    with pytest.raises(ValueError, match=message):
        find_vae(lambda *_: bare | extra, Path("x"), config).load(None)
    with pytest.raises(ValueError, match="x lacks encoder.conv_in.weight"):
        find_vae(lambda *_: {"fc1.weight": torch.zeros(2)}, Path("x"), config).load(None)


def test_a_wide_kernel_is_no_matrix():
    config, name = SMALL[1], "encoder.mid_block.attentions.0.to_q.weight"
    tensors = to_original(empty(config))
    tensors = {key: torch.zeros(64, 64, 3, 3) if ".attn_1.q.weight" in key else tensor
               for key, tensor in tensors.items()}
    assert from_original(empty(config), tensors)[name].shape == (64, 576)  # check_tensors refuses this


def marked(config):
    """Our tensors: the tensor with index i is filled with i, and needs memory for one number only."""
    return {name: torch.tensor(float(i)).expand(tensor.shape)
            for i, (name, tensor) in enumerate(empty(config).state_dict().items())}


@pytest.mark.parametrize("config", [*CONFIGS, *FULL.values(), UNetConfig(8)])
def test_diffusers_translates_the_same_way(config):
    ours = marked(config)
    if isinstance(config, UNetConfig):
        converted = single_file_utils.convert_ldm_unet_checkpoint(
            named(config, ours), {**config.to_json(), "class_embed_type": None})
    elif isinstance(config, VAEConfig):
        converted = single_file_utils.convert_ldm_vae_checkpoint(named(config, ours), config.to_json())
    else:
        converted = single_file_utils.convert_ldm_clip_checkpoint(named(config, ours))
    assert shapes(converted) == shapes(ours)
    assert all(converted[name][(0,) * ours[name].ndim] == i for i, name in enumerate(ours))


def test_diffusers_takes_the_averaged_weights_from_where_we_put_them():
    config = tiny_unet(8)
    tensors = named(config, marked(config)) | named(config, marked(config), ema=True)
    tensors = {name: tensor + 1000 * name.startswith("model_ema") for name, tensor in tensors.items()}
    tensors |= {f"filler{i}": torch.zeros(1) for i in range(101)}  # diffusers finds EMA in large files only
    converted = single_file_utils.convert_ldm_unet_checkpoint(
        tensors, {**config.to_json(), "class_embed_type": None}, extract_ema=True)
    assert all((tensor >= 1000).all() for tensor in converted.values()) and len(converted) > 50


UNET = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
OTHERS = {
    "SDXL": UNET | {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.zeros(1)},
    "an SDXL checkpoint": UNET | {"model.diffusion_model.label_emb.0.0.bias": torch.zeros(1)},
    "Stable Diffusion 2.x": UNET | {"cond_stage_model.model.ln_final.bias": torch.zeros(1)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)},
    "Flux": {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)},
    "LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(1)},
    "a LoRA": {"unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight": torch.zeros(1)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": torch.zeros(1)},
    "a ControlNet": {"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)},
    "textual inversion": {"emb_params": torch.zeros(1)},
    "a textual inversion": {"<cat-toy>": torch.zeros(768)},
    "this is a LoRA": {"unet.mid_block.attn1.processor.to_q_lora.up.weight": torch.zeros(1)},
    "this is a ControlNet": {"input_hint_block.0.weight": torch.zeros(1)},
    "this is a Stable Diffusion 2.x": UNET | {"model.diffusion_model.label_emb.0.0.bias": torch.zeros(1),
                                              "cond_stage_model.model.ln_final.bias": torch.zeros(1)},
    "diffusers folder": {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)},
    "autoencoder alone": {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)},
    "no Stable Diffusion checkpoint": {"fc1.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_said_by_name(family):
    with pytest.raises(ValueError, match=family) as caught:
        find_networks(lambda *_: OTHERS[family], Path("file.safetensors"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("file.safetensors")


@pytest.mark.parametrize("config, family", [
    (UNetConfig(9), "an inpainting model"), (UNetConfig(cross_attention_dim=1024), "a Stable Diffusion 2.x")])
def test_other_widths_are_said_by_name(config, family):
    with pytest.raises(ValueError, match=f"x: this is {family}"):
        open_networks(single(config, *SMALL[1:]))


def test_the_readmes_picture_is_true():
    picture = (ROOT / "docs" / "weights.md").read_text().split("The two naming schemes")[-1].split("```")[1]
    places = unet_places(UNetConfig())
    drawn = re.findall(r"^   [|v^]   (\S+) +(\S+)", picture, re.MULTILINE)
    assert len(drawn) >= 20 and {ours: places[ours] for ours, _ in drawn} == dict(drawn)
    inside = picture.split("inside a residual block:")[1].split("the autoencoder:")[0].split()
    assert dict(zip(inside[::2], inside[1::2])) == UNET_LAYERS
    for ours, original in re.findall(r"(decoder\.up_blocks\S+) (decoder\S+)", picture):
        assert vae_name(ours, VAEConfig()) == original
    raw, averaged = re.findall(r"averaged weights: +(\S+) (\S+)", picture)[0]
    table = {name: ours for ours, name in original_names(empty(UNetConfig())).items()}
    assert table[raw] in from_original(empty(UNetConfig()), {averaged: torch.zeros(4)}, ema=True)



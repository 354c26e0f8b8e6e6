"""LoRA files, against load_lora_weights and fuse_lora of diffusers, and against the formula."""

import dataclasses
import json
import re
from itertools import cycle

import diffusers
import pytest
import torch
from comparing import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_editor import write_tiny_editor
from torch import nn

from nanoip2p import Editor, TextToImage
from nanoip2p.checkpoint.folder import build_without_memory
from nanoip2p.checkpoint.load import open_checkpoint
from nanoip2p.checkpoint.lora import apply_loras, file_hash, split, write_lora
from nanoip2p.checkpoint.single_file import unet_name
from nanoip2p.clip import TextEncoder

PEERS = {4: diffusers.StableDiffusionPipeline, 8: diffusers.StableDiffusionInstructPix2PixPipeline}
CONV, LINEAR = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return {channels: write_tiny_editor(root / str(channels), in_channels=channels) for channels in PEERS}


@pytest.fixture
def editor(folders):
    return Editor.load(folders[8], device="cpu")


@pytest.fixture(scope="module")
def untouched(folders):
    """For files that are refused: each test with it sees that no weight changes."""
    return Editor.load(folders[8], device="cpu")


def layers_of(model, only=""):
    """{("unet" or "text_encoder", our name): layer}: the names of diffusers and of transformers 4."""
    return {(part, name): layer for part in ("unet", "text_encoder")
            for name, layer in getattr(model, part).named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and re.search(only, name)}


def draw(model, only="", ranks=(2, 3, 4), alphas=(2.0,), seed=0):
    """A random LoRA: (part, name) -> (down, up, alpha). The standard deviation is 1 / sqrt(fan-in)."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for (place, layer), rank, alpha in zip(layers_of(model, only).items(), cycle(ranks), cycle(alphas)):
        down = torch.randn(rank, *layer.weight.shape[1:], generator=generator)
        up = torch.randn(len(layer.weight), rank, *[1] * (down.ndim - 2), generator=generator)
        drawn[place] = down / down[0].numel() ** 0.5, up / rank**0.5, alpha
    return drawn


def kohya(lora, config=None):
    """Name a LoRA as kohya. config: the UNet's config, if its layers have their original names."""
    tensors = {}
    for (part, name), (down, up, alpha) in lora.items():
        if config and part == "unet":
            name = unet_name(f"{name}.weight", config).removesuffix(".weight")
        base = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{name}".replace(".", "_")
        tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up,
                    f"{base}.alpha": torch.tensor(alpha)}
    return tensors


def named(lora, rename=lambda part, name: name, kinds=("lora_A", "lora_B")):
    """Name a LoRA as diffusers or its older versions, without alpha."""
    tensors = {}
    for (part, name), (down, up, _) in lora.items():
        base = rename(part, f"{part}.{name}")
        old = "." if base.endswith("_lora") else ".lora." if part == "unet" else ".lora_linear_layer."
        a, b = (f".{kind}" for kind in kinds) if kinds[0] == "lora_A" else (old + kind for kind in kinds)
        tensors |= {f"{base}{a}.weight": down, f"{base}{b}.weight": up}
    return tensors


def processors(part, name):
    """The names of diffusers before 0.20."""
    if part == "unet":
        return re.sub(r"(attn\d)\.to_(\w+?)(\.0)?$", r"\1.processor.to_\2_lora", name)
    return re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1_lora", name)


def open_peer(folders, channels):
    pytest.importorskip("peft")
    return PEERS[channels].from_pretrained(folders[channels], torch_dtype=torch.float32)


def open_ours(folders, channels):
    return (Editor if channels == 8 else TextToImage).load(folders[channels], device="cpu")


def states(model):
    """Copies of all weights of the UNet and the text encoder, under our names."""
    found = dict(model.unet.state_dict()) | TextEncoder.published_names(model.text_encoder.state_dict())
    return {name: weight.clone() for name, weight in found.items()}


def assert_equal(ours, theirs):
    a, b = states(ours), states(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert relative_error(a[name], b[name]) < 1e-5, name


@torch.no_grad()
def outputs(model, channels):
    z = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    text = model.text_encoder(torch.arange(20).reshape(2, 10))
    text = text if isinstance(text, torch.Tensor) else text[0]
    noise = model.unet(z, torch.tensor(5.0), text)
    return noise if isinstance(noise, torch.Tensor) else noise.sample


LAYOUTS = {
    "kohya": kohya,
    "diffusers": named,
    "names of transformers 5": lambda lora: named(lora, lambda part, name: name.replace("text_model.", "")),
    "before 0.20": lambda lora: named(lora, processors, ("down", "up")),
    "since 0.20": lambda lora: named(lora, kinds=("down", "up")),
}


@pytest.mark.parametrize("layout, channels", [*zip([*LAYOUTS, "kohya, original names"], cycle(PEERS))])
def test_weights_and_outputs_are_diffusers(layout, channels, folders, tmp_path):
    ours, peer, path = open_ours(folders, channels), open_peer(folders, channels), tmp_path / "l.safetensors"
    before, config = outputs(ours, channels), ours.unet.config
    write = LAYOUTS.get(layout, lambda lora: kohya(lora, config))
    save_file(write(draw(ours)), path)
    [line] = apply_loras(ours, [f"{path}:-0.7"])
    assert ("no alpha for" in line) == ("kohya" not in layout) and "rank 2 to 4" in line and "-0.7" in line
    # diffusers finds original names only with the UNet's config
    peer.load_lora_weights(str(path), **({"unet_config": peer.unet.config} if "original" in layout else {}))
    peer.fuse_lora(lora_scale=-0.7)
    peer.unload_lora_weights()
    assert_equal(ours, peer)
    assert relative_error(outputs(ours, channels), outputs(peer, channels)) < 1e-5
    assert relative_error(outputs(ours, channels), before) > 0.1


@pytest.mark.parametrize("merged", [False, True])
def test_a_pipeline_saved_with_a_lora_is_refused_until_it_is_merged(folders, tmp_path, merged):
    """diffusers saves the layers that peft wraps as X.base_layer, and later opens the folder without them."""
    peer, lora = open_peer(folders, 8), draw(Editor.load(folders[8], device="cpu"))
    save_file(named({place: lora[place] for place in lora if place[0] == "unet"}), tmp_path / "l.safetensors")
    peer.load_lora_weights(str(tmp_path / "l.safetensors"))
    if merged:
        peer.fuse_lora()
        peer.unload_lora_weights()
    peer.save_pretrained(tmp_path / "saved")
    if merged:
        assert_equal(Editor.load(tmp_path / "saved", device="cpu"), peer)
    else:
        with pytest.raises(ValueError, match=r"has a LoRA; .*_weights merge it: \S+\.base_layer\."):
            Editor.load(tmp_path / "saved", device="cpu")


@pytest.mark.parametrize("layout", ["metadata", "peft's folder"])
def test_alphas_ranks_and_rank_stabilised_scales_of_peft(layout, folders, tmp_path):
    peft = pytest.importorskip("peft")
    unet = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "conv1", "ff.net.0.proj"],
                           rank_pattern={"conv1": 6}, init_lora_weights=False, alpha_pattern={
                               "attn2.to_k": 3.0, "to_k": 5, "^mid_block.resnets.0.conv1": 7.0})
    peer, maker, ours = open_peer(folders, 8), open_peer(folders, 8), open_ours(folders, 8)
    if layout == "metadata":
        text = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "fc1"], use_rslora=True,
                               init_lora_weights=False)
        maker.unet.add_adapter(unet)
        maker.text_encoder.add_adapter(text)
        networks = {"unet": maker.unet, "text_encoder": maker.text_encoder}
        weights = [peft.get_peft_model_state_dict(network) for network in networks.values()]
        metadata = diffusers.training_utils._collate_lora_metadata(networks)
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, *weights, **metadata)
        path = tmp_path / "pytorch_lora_weights.safetensors"
        peer.load_lora_weights(str(path))
        peer.fuse_lora()
        peer.unload_lora_weights()
    else:
        peft.get_peft_model(maker.unet, unet).save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        peer.unet = peft.PeftModel.from_pretrained(peer.unet, tmp_path).merge_and_unload()
    [line] = apply_loras(ours, [str(path)])
    assert "rank 2 to 6" in line or layout != "metadata"
    assert_equal(ours, peer)


@pytest.mark.parametrize("kohya_layout", [False, True])
def test_what_we_write_is_read_by_diffusers_and_by_us(kohya_layout, folders, tmp_path):
    ours, peer, path = open_ours(folders, 8), open_peer(folders, 8), tmp_path / "l.safetensors"
    drawn = {name: (down, up.flatten(1))
             for (part, name), (down, up, _) in draw(ours, ranks=(3, 5)).items() if part == "unet"}
    write_lora(path, drawn, 6.0, kohya_layout)
    [line] = apply_loras(ours, [str(path)])
    assert line.endswith(f"LoRA of {len(drawn)} layers, rank 3 to 5, alpha 6")
    peer.load_lora_weights(str(path))
    peer.fuse_lora()
    peer.unload_lora_weights()
    assert_equal(ours, peer)


@pytest.mark.parametrize("kohya_layout", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_written_tensors_come_back(kohya_layout, seed, folders, tmp_path):
    ours, path = open_ours(folders, 4), tmp_path / "l.safetensors"
    before = states(ours)
    drawn = {name: x for (part, name), x in draw(ours, ranks=(1, 2, 7), seed=seed).items() if part == "unet"}
    write_lora(path, {name: (down, up) for name, (down, up, _) in drawn.items()}, 3, kohya_layout)
    apply_loras(ours, [str(path)])
    after = states(ours)
    for name, (down, up, _) in drawn.items():
        change = (up.flatten(1) @ down.flatten(1)).reshape(before[f"{name}.weight"].shape) * 3 / len(down)
        assert relative_error(after[f"{name}.weight"], before[f"{name}.weight"] + change) < 1e-6
    with safe_open(path, "pt") as file:
        assert ("lora_adapter_metadata" in file.metadata()) != kohya_layout


@pytest.mark.parametrize("only", ["", r"to_|[qkv]_proj"])
def test_alpha_of_each_layer_counts_and_no_layer_is_needed(only, folders, tmp_path):
    """diffusers 0.42.1 gives all attention layers of a kohya file the commonest alpha.

    diffusers refuses text encoders without out_proj, or ignores their attention if they have an mlp.
    """
    ours, path = open_ours(folders, 4), tmp_path / "l.safetensors"
    before, drawn = states(ours), draw(ours, only, alphas=(1.0, 2.0, 8.0, 0.5))
    save_file(kohya(drawn), path)
    apply_loras(ours, [str(path)])
    after = states(ours)
    for (_, name), (down, up, alpha) in drawn.items():
        change = (up.flatten(1) @ down.flatten(1)).reshape(before[f"{name}.weight"].shape) * alpha / len(down)
        assert relative_error(after[f"{name}.weight"] - before[f"{name}.weight"], change) < 1e-5


def test_opposite_weights_cancel_and_order_does_not_matter(folders, tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    first, second = open_ours(folders, 8), open_ours(folders, 8)
    before = states(first)
    for seed, path in enumerate(paths):
        save_file(kohya(draw(first, seed=seed)), path)
    apply_loras(first, [f"{paths[0]}:0.8"])
    apply_loras(first, [f"{paths[0]}:-0.8"])
    for name, weight in states(first).items():
        assert relative_error(weight, before[name]) < 1e-6
    apply_loras(first, [f"{paths[0]}:0.3", str(paths[1])])
    apply_loras(second, [str(paths[1]), f"{paths[0]}:0.3"])
    other = states(second)
    for name, weight in states(first).items():
        assert relative_error(weight, other[name]) < 1e-6
    lines = apply_loras(second, [str(paths[1])] * 2)
    assert ["once more" in line for line in lines] == [False, True]


def test_a_lora_of_four_channels_touches_the_first_four_of_conv_in(editor, folders, tmp_path):
    path, before = tmp_path / "l.safetensors", states(editor)["conv_in.weight"]
    lora = draw(open_ours(folders, 4), "^conv_in$")
    save_file(kohya(lora), path)
    [line] = apply_loras(editor, [str(path)])
    assert line.endswith("conv_in: the first 4 of 8 channels")
    change = editor.unet.conv_in.weight.detach() - before
    [(down, up, alpha)] = lora.values()
    expected = torch.einsum("orkl,rihw->oihw", up, down) * alpha / len(down)
    assert relative_error(change[:, :4], expected) < 1e-5 and change[:, 4:].abs().max() == 0


def test_a_mid_tensor_is_the_kernel_between_two_projections(editor, tmp_path):
    """LoCon with CP: the three tensors are three convolutions, one after the other."""
    path, layer = tmp_path / "l.safetensors", editor.unet.get_submodule(CONV)
    down, mid, up = torch.randn(3, 16, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(16, 3, 1, 1)
    base, x = f"lora_unet_{CONV.replace('.', '_')}", torch.randn(1, 16, 8, 8)
    save_file({f"{base}.lora_down.weight": down, f"{base}.lora_mid.weight": mid, f"{base}.lora_up.weight": up,
               f"{base}.alpha": torch.tensor(6)}, path)
    with torch.no_grad():
        before = layer(x)
        apply_loras(editor, [str(path)])
        conv = nn.functional.conv2d
        expected = before + 2 * conv(conv(conv(x, down), mid, padding=1), up)
        assert relative_error(layer(x), expected) < 1e-5


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_names_of_adapters_bare_processors_and_pickles(suffix, editor, folders, tmp_path):
    lora = draw(editor, r"attn\d")
    old = named(lora, processors, ("down", "up"))
    variants = [named(lora), {name[:-7] + ".default.weight": x for name, x in named(lora).items()},
                {name.removeprefix("unet."): x for name, x in old.items()}]
    found = []
    for i, tensors in enumerate(variants):
        model, path = open_ours(folders, 8), tmp_path / f"{i}{suffix}"
        save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
        apply_loras(model, [str(path)])
        found.append(states(model))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_matrices_and_kernels_of_one_pixel_are_the_same(editor, folders, tmp_path):
    lora = draw(editor, "proj_in|to_q")
    save_file(kohya({place: tuple(x[:2]) + x[2:] for place, x in lora.items()}), tmp_path / "a.safetensors")
    swapped = {place: (*(x.flatten(1) if x.ndim == 4 else x[:, :, None, None] for x in (down, up)), alpha)
               for place, (down, up, alpha) in lora.items()}
    save_file(kohya(swapped), tmp_path / "b.safetensors")
    other = open_ours(folders, 8)
    apply_loras(editor, [str(tmp_path / "a.safetensors")])
    apply_loras(other, [str(tmp_path / "b.safetensors")])
    found = states(other)
    assert all(torch.equal(weight, found[name]) for name, weight in states(editor).items())


def test_every_spelling_of_a_layer_is_its_own_at_the_size_of_stable_diffusion():
    """No two layers share a spelling, so that the map holds for every config."""
    from nanoip2p.checkpoint.lora import _spellings
    from nanoip2p.clip import CLIPTextConfig
    from nanoip2p.unet import UNet, UNetConfig
    for blocks in (1, 2, 3):
        configs = {UNet: UNetConfig(layers_per_block=blocks), TextEncoder: CLIPTextConfig()}
        model = dataclasses.make_dataclass("M", ["unet", "text_encoder"])(
            *(build_without_memory(cls, config.to_json(), "x") for cls, config in configs.items()))
        found, layers = _spellings(model), layers_of(model)
        assert len(set(found.values())) == len(layers)
        for (part, name) in layers:
            assert found[name.removeprefix("text_model.").replace(".", "_")] == (getattr(model, part), name)
        for weight in model.unet.state_dict():  # the original name leads to the same layer
            name = weight.removesuffix(".weight")
            if ("unet", name) in layers:
                original = unet_name(weight, model.unet.config).removesuffix(".weight").replace(".", "_")
                assert found[original] == (model.unet, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype, folders, tmp_path):
    path, exact = tmp_path / "l.safetensors", open_ours(folders, 8)
    half = Editor.load(folders[8], "cpu", dtype)
    save_file({name: x.to(dtype) for name, x in kohya(draw(exact)).items()}, path)
    weight = half.unet.conv_in.weight.detach().float()
    apply_loras(half, [str(path)])
    tensors = load_file(path)
    down, up = (tensors[f"lora_unet_conv_in.lora_{kind}.weight"].float() for kind in ("down", "up"))
    expected = (weight + torch.einsum("orkl,rihw->oihw", up, down)).to(dtype)  # rank 2, alpha 2
    assert half.unet.conv_in.weight.dtype == dtype
    assert relative_error(half.unet.conv_in.weight.detach().float(), expected.float()) < 1e-4


def test_the_file_of_the_weights_is_not_changed(folders, tmp_path):
    """load(None) leaves the weights mapped from the file."""
    checkpoint, model = open_checkpoint(folders[8]), open_ours(folders, 8)
    model.unet = checkpoint.networks["unet"].load(None)
    before = {name: x.clone() for name, x in model.unet.state_dict().items()}
    save_file(kohya(draw(model)), tmp_path / "l.safetensors")
    apply_loras(model, [str(tmp_path / "l.safetensors")])
    assert not torch.equal(model.unet.conv_in.weight, before["conv_in.weight"])
    again = open_checkpoint(folders[8]).networks["unet"].load(None).state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)


def one(name=LINEAR, down=(2, 32), up=(32, 2), **more):
    base = f"lora_unet_{name.replace('.', '_')}"
    return {f"{base}.lora_down.weight": torch.ones(down), f"{base}.lora_up.weight": torch.ones(up)} | {
        f"{base}.{key}": value for key, value in more.items()}


BAD = {  # what -> (tensors, a part of the message)
    "of SDXL, by its encoders": ({"lora_te2_text_model_x.lora_down.weight": torch.ones(1)}, "a LoRA of SDXL"),
    "of SDXL, by the first encoder": ({"lora_te1_text_model_x.alpha": torch.ones(1)}, "a LoRA of SDXL"),
    "of SDXL, diffusers": ({"text_encoder_2.x.lora_A.weight": torch.ones(1)}, "a LoRA of SDXL"),
    "of SDXL, by width": (one(LINEAR.replace("attn1.to_q", "attn2.to_k"), (2, 2048)), "a LoRA of SDXL"),
    "of SD 2.x": (one(LINEAR.replace("attn1.to_q", "attn2.to_v"), (2, 1024)), "of Stable Diffusion 2.x"),
    "of SD 2.x, by its encoder": (
        {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 1024)},
        "of Stable Diffusion 2.x"),
    "of Flux": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1)}, "Flux"),
    "of Flux, kohya": ({"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.ones(1)}, "Flux"),
    "of SD 3": ({"lora_unet_joint_blocks_0_x.lora_down.weight": torch.ones(1)}, "Stable Diffusion 3"),
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "this is a LoHa, LoKr or IA3"),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(1)}, "this is a LoHa, LoKr or IA3"),
    "IA3": ({"lora_unet_conv_in.on_input": torch.ones(1)}, "this is a LoHa, LoKr or IA3"),
    "DoRA": (one(dora_scale=torch.ones(1)), "this is a DoRA"),
    "DoRA of peft": (named({("unet", LINEAR): (torch.ones(2, 32), torch.ones(32, 2), 0)})
                     | {f"unet.{LINEAR}.lora_magnitude_vector.weight": torch.ones(1)}, "this is a DoRA"),
    "ControlNet-LoRA": ({"lora_controlnet": torch.ones(1), "input_blocks.0.0.weight": torch.ones(1)},
                        "a ControlNet-LoRA"),
    "ControlNet-LLLite": ({"lllite_unet_input_blocks_4_1.down.0.weight": torch.ones(1)}, "ControlNet-LoRA"),
    "full differences": (one(diff=torch.ones(1)), "full differences"),
    "other layers": (one() | {f"unet.new.{i}.lora_A.weight": torch.ones(1) for i in range(5)},
                     "no LoRA of a layer of this model: unet.new.0, unet.new.1, unet.new.2 and 2 more"),
    "a bias": (one() | {f"unet.{LINEAR}.lora_B.bias": torch.ones(1)}, "has tensors that are no LoRA"),
    "no LoRA": ({"conv_in.weight": torch.ones(1)}, "no LoRA of a layer of this model: conv_in.weight"),
    "nothing": ({}, "no tensor at all"),
    "NaN": ({name: x * float("nan") for name, x in one().items()}, "has NaN or infinity in down of"),
    "whole numbers": ({name: x.int() for name, x in one().items()}, "needs floating-point numbers"),
    "alpha 0": (one(alpha=torch.tensor(0.0)), f"alpha of {LINEAR} = 0.0 should be a number from 1e-09"),
    "alpha -1": (one(alpha=torch.tensor(-1)), f"alpha of {LINEAR} = -1"),
    "alpha NaN": (one(alpha=torch.tensor(float("nan"))), f"alpha of {LINEAR} = nan"),
    "alpha infinite": (one(alpha=torch.tensor(float("inf"))), f"alpha of {LINEAR} = inf"),
    "two alphas": (one(alpha=torch.ones(2)), f"alpha of {LINEAR} = [1.0, 1.0]"),
    "ranks that differ": (one(up=(32, 3)), f"does not fit {LINEAR} (32, 32): down of"),
    "rank 0": (one(down=(0, 32), up=(32, 0)), f"does not fit {LINEAR} (32, 32): down of {LINEAR} (0, 32)"),
    "another width": (one(down=(2, 16)), f"does not fit {LINEAR} (32, 32): down of {LINEAR} (2, 16)"),
    "another kernel": (one(CONV, (2, 16, 1, 1), (16, 2, 1, 1)), f"does not fit {CONV} (16, 16, 3, 3)"),
    "four channels elsewhere": (one(CONV, (2, 4, 3, 3), (16, 2, 1, 1)), f"does not fit {CONV}"),
    "too large": ({name: x * 1e25 for name, x in one().items()}, f"has NaN or infinity in {LINEAR}"),
    "no up": ({name: x for name, x in one().items() if "up" not in name}, f"(32, 32): down of {LINEAR}"),
    "only alpha": ({name: x for name, x in one(alpha=torch.ones(1)).items() if "alpha" in name},
                   f"does not fit {LINEAR} (32, 32): neither down nor up"),
    "two spellings": (one() | named({("unet", LINEAR): (torch.ones(2, 32), torch.ones(32, 2), 0)}),
                      f"{LINEAR} comes twice, in two spellings"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named_and_change_nothing(what, untouched, tmp_path):
    (tensors, message), good = BAD[what], tmp_path / "good.safetensors"
    path, before = tmp_path / "bad.safetensors", states(untouched)
    save_file(one("conv_out", (2, 16, 3, 3), (4, 2, 1, 1)), good)
    save_file({name: x.clone() for name, x in tensors.items()}, path)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        apply_loras(untouched, [str(good), str(path)])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in states(untouched).items())


METADATA = {"no JSON": "{", "a list": "[]", "deep": "[" * 100_000,
            "alpha as text": {"unet.lora_alpha": "8"}, "alpha 0": {"unet.lora_alpha": 0},
            "a pattern": {"unet.alpha_pattern": {"(.*)*x": 1}},
            "10,001 patterns": {"unet.alpha_pattern": dict.fromkeys(map(str, range(10_001)), 1)},
            "patterns": {"unet.alpha_pattern": [1]}}


@pytest.mark.parametrize("what", METADATA)
def test_bad_metadata_is_refused(what, untouched, tmp_path):
    text, path = METADATA[what], tmp_path / "bad.safetensors"
    text = text if isinstance(text, str) else json.dumps(text)
    save_file(named({("unet", LINEAR): (torch.ones(2, 32), torch.ones(32, 2), 0)}), path,
              {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=r"bad\.safetensors.*(metadata|alpha)") as caught:
        apply_loras(untouched, [str(path)])
    assert ("may have 10,000 layer names" in str(caught.value)) == ("pattern" in what and what != "patterns")


def test_a_truncated_file_is_refused(editor, tmp_path):
    path = tmp_path / "l.safetensors"
    save_file(one(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        apply_loras(editor, [str(path)])


def test_weights_behind_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").write_bytes(b"x")
    assert [str(x) for x in split("a:0.5")] == ["a:0.5", "1.0"]
    assert [str(x) for x in split("a:0.5:-2")] == ["a:0.5", "-2.0"]
    assert [str(x) for x in split("b")] == ["b", "1.0"]
    assert file_hash("a:0.5:2") == "2d711642b7"  # sha256sum: 2d711642b726b04401627ca9fbac32f5...
    for bad in ("b:", "b:strong", "b:nan", "b:inf", r"C:\b"):
        with pytest.raises(ValueError, match="is no weight; write FILE or FILE:weight"):
            split(bad)

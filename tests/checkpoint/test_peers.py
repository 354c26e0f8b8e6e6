"""Weights as other programs leave them: merged, averaged, of 8 bits, in GGUF, with leftovers."""

import shutil
import struct
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tiny_editor import write_tiny_editor

from nanoip2p.checkpoint import ggufs
from nanoip2p.checkpoint.hub import needed_files
from nanoip2p.checkpoint.load import load_model, open_checkpoint, widen
from nanoip2p.checkpoint.save import convert
from nanoip2p.checkpoint.single_file import ema_name, find_networks, is_average
from nanoip2p.checkpoint.tensors import read_metadata, read_tensors
from nanoip2p.common.schema import shown

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("peers") / "tiny", small=True)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The tensors of a single file, and its metadata."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    convert(open_checkpoint(folder), path)
    return load_file(path), read_metadata(path)


@pytest.fixture(scope="module")
def raw(folder):
    """The weights of the UNet."""
    return unet_of(folder)


@pytest.fixture
def written(whole, tmp_path):
    """Write tensors as a single file; returns its path."""
    def write(tensors, name="x.safetensors"):
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, tmp_path / name,
                  whole[1])
        return tmp_path / name
    return write


@pytest.fixture
def base(folder, tmp_path):
    """A copy of the folder to change."""
    return shutil.copytree(folder, tmp_path / "base")


def ema_of(tensors, change):
    return {ema_name(name): change(tensor) for name, tensor in tensors.items() if name.startswith(PREFIX)}


def noise(tensor, size):
    generator = torch.Generator().manual_seed(tensor.numel())
    return size * torch.randn(tensor.shape, generator=generator)


def unet_of(path, **flags):
    return open_checkpoint(path, **flags).networks["unet"].read()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


AVERAGES = {  # (function of raw weights w, whether its result can be their average)
    "our --ema-copy": (lambda w: w, True), "near": (lambda w: w + noise(w, 0.003), True),
    "half precision": (lambda w: w.half(), True), "a tenth smaller": (lambda w: 0.9 * w, True),
    "zeros": (torch.zeros_like, False), "another network": (lambda w: noise(w, 0.2), False),
    "turned round": (lambda w: -w, False), "NaN": (lambda w: w * torch.nan, False),
    "a parent of the merge": (lambda w: w + noise(w, 0.1), False)}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_ema_that_is_no_average_is_left_out(whole, raw, written, kind):
    change, fits = AVERAGES[kind]
    tensors = whole[0]
    path = written(tensors | ema_of(tensors, change))
    opened = open_checkpoint(path)
    found = opened.description
    assert ("EMA weights" in found) == fits and ("raw weights" in found) != fits
    assert ("no average of them; --no-raw-weights uses it" in found) != fits
    assert same(unet_of(path, raw_weights=True), raw)
    averaged = unet_of(path, raw_weights=False)
    assert kind in ("NaN", "our --ema-copy") or not same(averaged, raw)
    assert kind == "NaN" or same(opened.networks["unet"].read(), averaged if fits else raw)


@pytest.mark.parametrize("lr", [1e-4, 1e-3])
@pytest.mark.parametrize("decay", [0.98, 0.9999])
@pytest.mark.parametrize("warm", [True, False])
def test_averages_of_trainings_are_accepted(lr, decay, warm):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    optimizer, average = torch.optim.AdamW(layer.parameters(), lr), layer.weight.detach().clone()
    for n in range(1, 101):
        x = torch.randn(16, 64)
        (layer(x) - x.roll(1, 1) - torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        share = 1 - (min(decay, (1 + n) / (10 + n)) if warm else decay)
        average.lerp_(layer.weight.detach(), share)
        if n in (1, 10, 100) and (warm or lr * n <= 0.01):  # else the EMA is still the random start
            assert is_average({"w": layer.weight.detach()}, {"w": average}), n
    assert not is_average({"w": layer.weight.detach()}, {"w": torch.zeros(64, 64)})


def test_small_weights_may_be_a_paper_s_lag_away():
    raw = {"w": noise(torch.zeros(64, 64), 0.02)}
    assert is_average(raw, {"w": raw["w"] + noise(torch.zeros(64, 65), 0.0065)[:, 1:]})
    assert not is_average(raw, {"w": raw["w"] + noise(torch.zeros(64, 65), 0.009)[:, 1:]})
    assert not is_average({"w": 0.1 * raw["w"]}, {"w": torch.zeros(64, 64)})


def test_an_ema_of_other_shapes_is_no_average(whole, written):
    path = written(whole[0] | ema_of(whole[0], lambda w: torch.ones(3)))
    assert "raw weights (the EMA copy is no average" in open_checkpoint(path).description
    with pytest.raises(ValueError, match="does not fit"):
        open_checkpoint(path, raw_weights=False).networks["unet"].load(None)


def test_a_file_with_ema_weights_only_and_one_with_a_part_of_them(whole, raw, written):
    tensors = whole[0]
    averaged = ema_of(tensors, lambda w: 1.1 * w)
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    only = written(others | averaged)
    assert "8 input channels, EMA weights" in open_checkpoint(only).description
    assert same(unet_of(only), unet_of(written(tensors | averaged, "both.safetensors"), raw_weights=False))
    with pytest.raises(ValueError, match="has EMA weights only; leave out --raw-weights"):
        open_checkpoint(only, raw_weights=True)
    first = next(name for name in tensors if name.startswith(PREFIX))
    torn = written({first: torch.zeros_like(tensors[first])} | others | averaged, "torn.safetensors")
    assert same(unet_of(torn), unet_of(only))
    part = written(tensors | dict(list(averaged.items())[:-1]), "part.safetensors")
    assert "raw weights (the EMA copy is incomplete)" in open_checkpoint(part).description
    assert same(unet_of(part), raw)


STRAYS = ["lora_unet_x.lora_up.weight", "control_model.input_blocks.0.0.weight", "emb_params", "<cat-toy>",
          "wings.weight", "conditioner.embedders.0.bias", "decoder.conv_norm_out.bias", "\x1b[31mred"]


@pytest.mark.parametrize("stray", STRAYS)
def test_a_whole_checkpoint_with_a_leftover_opens_and_says_so(whole, raw, written, stray):
    tensors = whole[0]
    found = open_checkpoint(written(tensors | {stray: torch.ones(3)}))
    assert f"ignoring {shown(stray)}" in found.description
    assert same(found.networks["unet"].read(), raw)
    lacking = dict(list(tensors.items())[1:])
    with pytest.raises(ValueError, match="this is|has unknown"):
        open_checkpoint(written(lacking | {stray: torch.ones(3)}))


def test_leftovers_are_counted_and_those_inside_a_network_are_refused(whole, written):
    tensors = whole[0]
    many = {f"wings.{i}": torch.ones(1) for i in range(5)}
    assert "ignoring 'wings.0', 'wings.1', 'wings.2' and 2 more" in open_checkpoint(
        written(tensors | many)).description
    for name, message in [("model.diffusion_model.wings", "has unknown model.diffusion_model.wings"),
                          ("model.diffusion_model.lora_up", "this is a LoRA"),
                          ("model_ema.diffusion_modelwings", "has unknown model_ema")]:
        with pytest.raises(ValueError, match=message):
            open_checkpoint(written(tensors | {name: torch.ones(3)}))


def test_an_autoencoder_comes_out_of_a_checkpoint_with_leftovers(whole, written, folder):
    path = written(whole[0] | {"lora_unet_x.lora_up.weight": torch.ones(3)})
    found = open_checkpoint(folder, vae=path).networks["vae"].read()
    assert same(found, open_checkpoint(folder).networks["vae"].read())


def test_a_unet_alone_is_called_one(whole, written):
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in whole[0].items() if name.startswith(PREFIX)}
    with pytest.raises(ValueError, match="this is a UNet alone"):
        open_checkpoint(written(bare))


def save_average(base, target):
    """Write three steps of diffusers' EMA to `target`. Returns the averaged weights."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    average = EMAModel(unet.parameters(), decay=0.9999, model_cls=diffusers.UNet2DConditionModel,
                       model_config=unet.config)
    for _ in range(3):
        with torch.no_grad():
            [parameter.add_(0.01) for parameter in unet.parameters()]
        average.step(unet.parameters())
    average.save_pretrained(target)
    return load_file(target / "diffusion_pytorch_model.safetensors")


def test_the_average_of_diffusers_training_goes_before_the_raw_weights(base, raw):
    averaged = save_average(base, base / "unet_ema")
    assert "optimization_step" in (base / "unet_ema" / "config.json").read_text()
    assert not same(averaged, raw)
    for flags in ({}, {"raw_weights": False}):
        assert same(unet_of(base, **flags), averaged)
    assert "averaged weights of unet_ema/" in open_checkpoint(base).description
    assert same(unet_of(base, raw_weights=True), raw)
    assert "raw weights" in open_checkpoint(base, raw_weights=True).description


def test_the_average_of_diffusers_training_opens_in_place_of_the_unet(base):
    averaged = save_average(base, base / "unet")
    assert same(unet_of(base), averaged)
    load_model(base)


@pytest.mark.parametrize("safe", [True, False])
def test_the_variant_non_ema_of_diffusers(base, safe):
    averaged = unet_of(base)
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    with torch.no_grad():
        unet.conv_in.bias.add_(1)
    unet.save_pretrained(base / "unet", variant="non_ema", safe_serialization=safe)
    assert [path.name for path in (base / "unet").glob("*.non_ema.*")]
    assert same(unet_of(base), averaged) and "raw" not in open_checkpoint(base).description
    raw = open_checkpoint(base, raw_weights=True)
    assert torch.equal(raw.networks["unet"].read()["conv_in.bias"], averaged["conv_in.bias"] + 1)
    assert "raw weights" in raw.description
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    alone = open_checkpoint(base)
    assert "raw weights" in alone.description
    assert same(alone.networks["unet"].read(), raw.networks["unet"].read())


def test_the_variant_non_ema_is_fetched_only_when_asked_for():
    names = ["model_index.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
             "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.non_ema.bin",
             "unet/diffusion_pytorch_model.non_ema.safetensors"]
    assert set(needed_files(names)) == {*names[:4]}
    assert set(needed_files(names, raw=True)) == {*names[:3], names[5]}
    assert set(needed_files(names[:4], raw=True)) == {*names[:4]}


FLOAT8 = {torch.float8_e4m3fn: "fp8 (E4M3, read as fp16)", torch.float8_e5m2: "fp8 (E5M2, read as fp16)"}


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_read_as_the_same_numbers_in_float16(whole, written, base, tmp_path, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every.float().isfinite()
    assert torch.equal(every.half().float()[finite], every.float()[finite]), "float16 lacks some"
    small = {name: tensor.to(dtype) if name.startswith(PREFIX) else tensor.half()
             for name, tensor in whole[0].items()}
    path = written(small)
    right = written({name: tensor.half() for name, tensor in small.items()}, "right.safetensors")
    assert f"fp16 and {FLOAT8[dtype]}" in open_checkpoint(path).description
    found, wanted = open_checkpoint(path).networks["unet"], open_checkpoint(right).networks["unet"]
    for precision in (None, torch.float32, torch.bfloat16):
        assert same(found.load(precision).state_dict(), wanted.load(precision).state_dict())
    convert(open_checkpoint(path, tokenizer=str(base / "tokenizer")), tmp_path / "new")
    assert "fp16" in open_checkpoint(tmp_path / "new").description

    named = {name: tensor.to(dtype) for name, tensor in unet_of(base).items()}
    save_file(named, base / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    theirs = diffusers.UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    assert same(open_checkpoint(base).networks["unet"].load(torch.float32).state_dict(), theirs.state_dict())


def test_float8_can_be_widened_and_is_checked(tmp_path):
    painter = write_tiny_editor(tmp_path / "painter", in_channels=4, small=True)
    path = painter / "unet" / "diffusion_pytorch_model.safetensors"
    named = {name: tensor.to(torch.float8_e5m2) for name, tensor in load_file(path).items()}
    save_file(named, path)
    assert widen(open_checkpoint(painter)).networks["unet"].load(None).conv_in.weight.shape[1] == 8
    save_file(named | {"conv_in.bias": torch.full((32,), torch.nan).to(torch.float8_e5m2)}, path)
    with pytest.raises(ValueError, match="NaN or infinity in conv_in.bias"):
        open_checkpoint(painter).networks["unet"].load(None)


def write_gguf(path, tensors, kind, **settings):
    """As stable-diffusion.cpp writes it: the original's names, Q8_0 where rows have whole blocks of 32."""
    gguf = pytest.importorskip("gguf")
    writer, wanted = gguf.GGUFWriter(path, "sd1"), gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    for name, tensor in tensors.items():
        fits = tensor.shape[-1] % block == 0
        data = gguf.quantize(tensor.numpy(), wanted) if fits else tensor.numpy()
        writer.add_tensor(name, data, raw_dtype=wanted if fits else None)
    for name, value in settings.items():
        writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_gguf(path, folder, **flags):
    configs = {part: network.model.config.to_json()
               for part, network in open_checkpoint(folder).networks.items()}
    return find_networks(lambda prefix="": read_tensors(path, prefix), path, configs=configs, **flags)


@pytest.mark.parametrize("kind, said, bits", [
    ("F32", "fp32", 24), ("F16", "fp16", 11), ("BF16", "bf16", 8), ("Q8_0", "Q8_0 (read as fp32)", 7)])
def test_gguf_holds_the_three_networks(folder, whole, tmp_path, kind, said, bits):
    path = write_gguf(tmp_path / "x.gguf", whole[0], kind)
    found, networks = open_gguf(path, folder)
    assert found.startswith("an InstructPix2Pix checkpoint") and said in found
    for part, network in open_checkpoint(folder).networks.items():
        stored = network.read()
        for name, tensor in networks[part].load(torch.float32).state_dict().items():
            wanted = stored[name]
            assert (tensor - wanted).abs().max() <= wanted.abs().max() * 2.0**-bits, name
    assert path.stat().st_size < 4.5 * 1.1 * sum(tensor.numel() for tensor in whole[0].values())


def test_an_ema_in_gguf(folder, whole, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", whole[0] | ema_of(whole[0], lambda w: w), "Q8_0")
    for flags, said in (({}, "EMA weights"), ({"raw_weights": True}, "raw weights")):
        found, networks = open_gguf(path, folder, **flags)
        assert said in found
        networks["unet"].load(None)


def test_quantised_numbers_are_those_of_the_library(whole, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", whole[0], "Q8_0")
    gguf = pytest.importorskip("gguf")
    theirs = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    ours = read_tensors(path)
    assert ours.keys() == theirs.keys() == whole[0].keys()
    assert all(np.array_equal(ours[name].numpy(), theirs[name]) for name in ours)
    packed = read_tensors(path, None)
    assert {name: tensor.shape for name, tensor in packed.items()} == {
        name: tensor.shape for name, tensor in ours.items()}
    assert any(tensor.is_meta for tensor in packed.values())


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q4_K", "IQ4_XS"])
def test_other_quantisations_are_refused_by_name(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sd1")
    wanted = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("a", np.zeros((2, gguf.GGML_QUANT_SIZES[wanted][1]), np.uint8), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=f"holds {kind}; nanoip2p reads F32, F16, BF16, Q8_0"):
        read_tensors(tmp_path / "x.gguf")


def raw_gguf(*parts, tensors=0, values=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + b"".join(parts)


def text(word):
    return struct.pack("<Q", len(word)) + word


def tensor(name, shape, kind, offset):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "cut": raw_gguf(tensors=1), "empty": b"GGUF", "version": b"GGUF" + bytes(40),
    "endless array": raw_gguf(text(b"k"), struct.pack("<IIQ", 9, 0, 2**62), bytes(200), values=1),
    "endless bytes": raw_gguf(text(b"k"), struct.pack("<IIQ", 9, 0, 10**6), bytes(10**6), values=1),
    "endless name": raw_gguf(struct.pack("<Q", 2**63), values=1),
    "nested": raw_gguf(text(b"k"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 5000, values=1),
    "many tensors": raw_gguf(tensors=2**60), "many values": raw_gguf(values=2**60),
    "beyond the end": raw_gguf(tensor(b"a", [64], 0, 2**40), bytes(64), tensors=1),
    "huge": raw_gguf(tensor(b"a", [2**40, 2**20], 0, 0), bytes(64), tensors=1),
    "overflow": raw_gguf(tensor(b"a", [2**32, 2**32, 2], 0, 0), bytes(64), tensors=1),
    "twice": raw_gguf(*[tensor(b"a", [1], 0, 0)] * 2, bytes(64), tensors=2),
    "overlap": raw_gguf(*[tensor(bytes([97 + i]), [4096], 8, 0) for i in range(9)], bytes(4400), tensors=9),
    "kind": raw_gguf(tensor(b"a", [1], 99, 0), bytes(64), tensors=1),
    "other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_gguf_is_one_line(tmp_path, name):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match="x.gguf is damaged or no GGUF file .*; fetch it again") as caught:
        read_tensors(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_without_the_package_a_gguf_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(raw_gguf())
    with pytest.raises(ValueError, match="pip install gguf"):
        ggufs.read_gguf(tmp_path / "x.gguf")

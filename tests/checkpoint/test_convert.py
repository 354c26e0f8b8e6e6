"""Conversion between all layouts: no weight changes, and diffusers opens the result."""

import json
import os
import re
import shutil
import signal
import sys
import types
import weakref

import diffusers
import numpy as np
import pytest
import torch
from comparing import randomise, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_editor import write_tiny_editor
from train_tokenizer import train_tokenizer

from nanoip2p.checkpoint.__main__ import main
from nanoip2p.checkpoint.folder import build_without_memory, load_network, save_network
from nanoip2p.checkpoint.load import load_model, open_checkpoint, widen
from nanoip2p.checkpoint.save import convert, save_parts
from nanoip2p.checkpoint.single_file import PARTS, SD15, find_networks, from_original, to_original
from nanoip2p.checkpoint.tensors import read_metadata, read_tensors
from nanoip2p.clip import CLIPTextConfig
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.editor import Editor
from nanoip2p.unet import UNet, UNetConfig
from nanoip2p.vae import VAE, VAEConfig

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny editor in diffusers' layout."""
    return write_tiny_editor(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """The same editor as a single file, with its tokenizer beside it."""
    target = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    convert(open_checkpoint(folder), target)
    shutil.copytree(folder / "tokenizer", target.parent / "tokenizer")
    return target


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_checkpoint(a, b):
    a, b = (load_model(path) for path in (a, b))
    assert (a.defaults, a.schedule) == (b.defaults, b.schedule)
    for part in PARTS:
        ours, theirs = getattr(a, part), getattr(b, part)
        assert ours.config == theirs.config and same(ours.state_dict(), theirs.state_dict()), part


def test_folder_to_file_to_folder_is_bit_exact(folder, single, tmp_path):
    convert(open_checkpoint(single), tmp_path / "again")
    assert_same_checkpoint(single, folder)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes(), file
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    convert(open_checkpoint(tmp_path / "again"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == single.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversion_rounds_once(dtype, folder, tmp_path):
    convert(open_checkpoint(folder), tmp_path / "half.safetensors", dtype)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    convert(open_checkpoint(tmp_path / "half.safetensors"), tmp_path / "half")  # keeps the dtype
    whole, half = load_model(folder), load_model(tmp_path / "half")
    for part in PARTS:
        weights = getattr(whole, part).state_dict()
        assert same(getattr(half, part).state_dict(),
                    {name: tensor.to(dtype).float() for name, tensor in weights.items()})
    assert load_file(tmp_path / "half" / UNET_FILE)["conv_in.weight"].dtype == dtype


@pytest.mark.parametrize("name", ["new.SAFETENSORS", "New.SafeTensors"])
def test_a_target_may_end_in_capitals(single, tmp_path, name):
    convert(open_checkpoint(single), tmp_path / name)
    assert (tmp_path / name).read_bytes() == single.read_bytes()
    for kind in (".CKPT", ".Pt", ".BIN"):
        with pytest.raises(ValueError, match="is neither a folder nor a .safetensors file"):
            convert(open_checkpoint(single), tmp_path / f"new{kind}")


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_a_half_precision_file_is_let_go_before_the_next_network(layout, folder, tmp_path, monkeypatch):
    """A mapped file fills memory until the last reference to the mapping is gone."""
    path, opened = tmp_path / ("new" if layout == "folder" else "new.safetensors"), []
    convert(open_checkpoint(folder), path, torch.float16)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    checkpoint = open_checkpoint(path)
    monkeypatch.setattr("nanoip2p.checkpoint.tensors.load_file", lambda path: watched(load_file(path)))

    def watched(tensors):
        assert not any(reference() is not None for reference in opened)
        opened.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    parts = load_model(checkpoint)
    assert len(opened) > 100 and not any(reference() is not None for reference in opened)
    assert parts.unet.conv_in.weight.dtype == torch.float32 and checkpoint.description.endswith("fp16")


def test_a_lightning_file_of_2022(tmp_path, monkeypatch):
    """A pickle of averaged weights, noise tables, counters, and callbacks whose class is not installed."""
    class ModelCheckpoint:
        best = 3

    configs = {
        "unet": UNetConfig(8, 4, (32, 64), ("DownBlock2D", "CrossAttnDownBlock2D"),
                           ("CrossAttnUpBlock2D", "UpBlock2D"), 1, 8, 64),
        "vae": VAEConfig(block_out_channels=(32, 32, 32), layers_per_block=1),
        "text_encoder": CLIPTextConfig(600, 64, 64, 2, 1, projection_dim=64)}
    for part, config in configs.items():
        monkeypatch.setitem(SD15, part, config.to_json())  # at SD15's widths, the file would take 4 GB
    models = {part: randomise(PARTS[part](config)) for part, config in configs.items()}
    names = to_original(models["unet"], ema=True)
    for part, model in models.items():
        names |= {name: -tensor if part == "unet" else tensor for name, tensor in to_original(model).items()}
    names |= {"betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9),
              "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = "lightning_of_2022", "ModelCheckpoint"
    sys.modules["lightning_of_2022"] = types.SimpleNamespace(ModelCheckpoint=ModelCheckpoint)
    try:
        torch.save({"epoch": 7, "state_dict": names, "callbacks": {"best": ModelCheckpoint()}},
                   tmp_path / "model.ckpt")
    finally:
        del sys.modules["lightning_of_2022"]
    train_tokenizer(["make it night"] * 3, 600, tmp_path)
    save_parts(tmp_path / "folder", *models.values(), tmp_path, NoiseSchedule().to_json(), {})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    averaged, folder, raw = (
        Editor.load(open_checkpoint(tmp_path / name, raw_weights=raw), "cpu").edit(
            image, "night", steps=3, resolution=32, seed=0)
        for name, raw in (("model.ckpt", False), ("folder", False), ("model.ckpt", True)))
    assert np.array_equal(averaged, folder) and not np.array_equal(averaged, raw)


def test_the_same_picture_from_every_layout(folder, single):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    pictures = [Editor.load(path, "cpu").edit(image, "make it night", resolution=48, seed=0)
                for path in (folder, single)]
    one, other = (np.asarray(picture).astype(int) for picture in pictures)
    assert np.abs(one - other).max() <= 1  # equal weights; their alignment in memory changes the last bits
    assert np.asarray(pictures[0]).std() > 1


def test_a_pickle_opens_like_the_safetensors(single, tmp_path):
    tensors = load_file(single)
    torch.save({"state_dict": tensors, "global_step": 22000}, tmp_path / "model.ckpt")
    configs = {part: network.model.config.to_json()
               for part, network in open_checkpoint(single).networks.items()}
    found, parts = find_networks(
        lambda *_: read_tensors(tmp_path / "model.ckpt"), tmp_path, configs=configs)
    for part, network in open_checkpoint(single).networks.items():
        assert same(parts[part].read(), network.read())
    assert found.startswith("an InstructPix2Pix checkpoint")


def with_ema(single, tmp_path):
    """A file with EMA weights, a little larger than its raw weights, and with the counters of an EMA."""
    convert(open_checkpoint(single), tmp_path / "ema.safetensors", ema=True)
    metadata = read_metadata(tmp_path / "ema.safetensors")
    tensors = {name: 1.125 * tensor if name.startswith("model_ema.") else tensor
               for name, tensor in load_file(tmp_path / "ema.safetensors").items()}
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3),
                "betas": torch.ones(1000)}
    save_file(tensors, tmp_path / "ema.safetensors", metadata=metadata)
    return tmp_path / "ema.safetensors"


def test_averaged_weights_are_used_and_said(single, tmp_path):
    path = with_ema(single, tmp_path)
    raw = open_checkpoint(single).networks["unet"].read()
    averaged, plain = open_checkpoint(path), open_checkpoint(path, raw_weights=True)
    assert same(averaged.networks["unet"].read(), {name: 1.125 * tensor for name, tensor in raw.items()})
    assert same(plain.networks["unet"].read(), raw)
    assert "EMA weights" in averaged.description and "raw weights" in plain.description
    assert same(averaged.networks["vae"].read(), plain.networks["vae"].read())


def test_another_autoencoder(folder, tmp_path):
    other = write_tiny_editor(tmp_path / "other", seed=7)
    expected = open_checkpoint(other).networks["vae"].read()
    convert(open_checkpoint(other), tmp_path / "other.safetensors")
    for source in (other, other / "vae", tmp_path / "other.safetensors"):
        checkpoint = open_checkpoint(folder, vae=source)
        assert same(checkpoint.networks["vae"].read(), expected) and str(source) in checkpoint.description
        assert same(checkpoint.networks["unet"].read(), open_checkpoint(folder).networks["unet"].read())
    with pytest.raises(ValueError, match="absent is missing; "):
        open_checkpoint(folder, vae=tmp_path / "absent")


@torch.no_grad()
def test_diffusers_opens_our_folder_and_our_single_file(folder, single, tmp_path, capsys):
    convert(open_checkpoint(single), tmp_path / "folder")
    ours = load_model(single)
    cls = diffusers.StableDiffusionInstructPix2PixPipeline
    ids = ours.tokenizer(["make it night"])
    z, context = torch.randn(1, 8, 12, 12), torch.randn(1, 77, 32)
    capsys.readouterr()
    for pipeline in (cls.from_pretrained(tmp_path / "folder"),
                     cls.from_single_file(str(single), config=str(folder), local_files_only=True)):
        assert relative_error(ours.unet(z, 7, context), pipeline.unet(z, 7, context).sample) <= 1e-5
        assert relative_error(ours.vae.decode(z[:, :4]), pipeline.vae.decode(z[:, :4]).sample) <= 1e-5
        assert relative_error(ours.text_encoder(ids), pipeline.text_encoder(ids).last_hidden_state) <= 1e-5
    complaints = capsys.readouterr().err
    assert "not used" not in complaints and "newly initialized" not in complaints, complaints


def test_we_open_what_diffusers_saves(folder, tmp_path):
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "plain")
    pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    pipeline.unet.save_pretrained(tmp_path / "shards" / "unet", max_shard_size="100KB")
    ours = load_model(folder)
    for name in ("plain", "variant", "pickled"):
        theirs = load_model(tmp_path / name)
        for part in PARTS:
            assert same(getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()), (name, part)
    shards = tmp_path / "shards" / "unet"
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert same(load_network(UNet, shards).state_dict(), ours.unet.state_dict())


@torch.no_grad()
def test_widened_network_is_the_old_one_whatever_the_picture(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    config = UNetConfig(**{**vars(load_model(folder).unet.config), "in_channels": 4})
    old = randomise(UNet(config))
    save_network(old, base / "unet")
    with pytest.raises(ValueError, match="takes 4 channels, an editor 8.* train.py"):
        load_model(base)
    new = load_model(widen(open_checkpoint(base))).unet
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    for image in (torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8, 8)):
        assert relative_error(new(torch.cat([z, image], 1), 9, context), old(z, 9, context)) <= 1e-6
    assert new.config.in_channels == 8 and relative_error(old(z, 9, context), old(-z, 9, context)) > 0.1
    editor = open_checkpoint(folder)
    assert widen(editor) is editor
    for wrong in ({}, {"conv_in.weight": torch.ones(4)}):
        bad = shutil.copytree(base, tmp_path / f"bad{len(wrong)}")
        tensors = {name: tensor for name, tensor in load_file(bad / UNET_FILE).items()
                   if name != "conv_in.weight"}
        save_file(tensors | wrong, bad / UNET_FILE, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="conv_in.weight"):
            load_model(widen(open_checkpoint(bad)))
    convert(open_checkpoint(base), tmp_path / "base.safetensors")
    assert "a Stable Diffusion 1.x checkpoint" in open_checkpoint(tmp_path / "base.safetensors").description
    convert(open_checkpoint(base), tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def edit(change, source, target):
    tensors = load_file(source)
    save_file(change(tensors), target, metadata=read_metadata(source))


UNET = "model.diffusion_model."
BIAS = UNET + "out.2.bias"
FAULTS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != BIAS}, "lacks conv_out.bias"),
    "shape": (lambda t: t | {BIAS: torch.zeros(3)}, r"conv_out.bias of \(3,\) for \(4,\)"),
    "NaN": (lambda t: t | {BIAS: torch.full((4,), torch.nan)}, "NaN or infinity in conv_out.bias"),
    "unknown": (lambda t: t | {UNET + "wings": torch.ones(1)}, f"unknown {UNET}wings"),
    "no vae": (lambda t: {k: v for k, v in t.items() if "first" not in k}, "lacks encoder.conv_in.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_one_line_and_leaves_nothing(fault, single, tmp_path, capsys):
    change, message = FAULTS[fault]
    path = tmp_path / "bad.safetensors"
    edit(change, single, path)
    shutil.copytree(single.parent / "tokenizer", tmp_path / "tokenizer")
    before = sorted(tmp_path.rglob("*"))
    for targets in ([], ["new"], ["new.safetensors"])[: 3 if fault == "NaN" else 2]:
        assert main([str(path), *(str(tmp_path / target) for target in targets)]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and str(path) in error
        assert re.search(message, error), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("metadata, message", [
    ("{", "metadata is broken"), ("[1]", "metadata is broken"),
    ('{"unet": 3}', ": its metadata is broken: unet = 3 should be an object"),
    ('{"defaults": 3}', "metadata is broken"), ('{"defaults": {"stepps": 1}}', "unknown setting stepps"),
    ('{"unet": {"act_fn": "gelu"}}', "act_fn"),
])
def test_what_a_file_says_of_itself_is_not_trusted(metadata, message, single, tmp_path):
    save_file(load_file(single), tmp_path / "x.safetensors", metadata={"nanoip2p": metadata})
    with pytest.raises(ValueError, match=f"x.safetensors.*{message}") as caught:
        open_checkpoint(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_looking_and_converting_on_the_command_line(folder, tmp_path, capsys):
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "a diffusers folder, 8 input channels, fp32" in printed and printed.count("\n") == 4
    target = tmp_path / "half.safetensors"
    assert main([str(folder), str(target), "--dtype", "fp16", "--ema-copy"]) == 0
    assert "as --tokenizer" in capsys.readouterr().out
    assert "EMA weights, fp16" in open_checkpoint(target).description
    written = target.read_bytes()
    assert main([str(target), str(target), "--tokenizer", str(folder / "tokenizer")]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err and target.read_bytes() == written
    for wrong in (str(folder), str(tmp_path / "x.ckpt"), str(target.parent)):
        assert main([str(folder), wrong]) == 2
        assert "name a new one" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.safetensors"]


def test_a_conversion_that_fails_half_way_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match=f"^{tmp_path}/new cannot be .*: No space .*; make room in {tmp_path}$"):
        convert(open_checkpoint(folder), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["new", "new.safetensors"])
def test_after_a_kill_the_next_conversion_clears_up(name, folder, tmp_path, monkeypatch):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = open_checkpoint(folder)
    if not (child := os.fork()):
        monkeypatch.setattr("nanoip2p.checkpoint.tensors.cast", kill)
        try:
            convert(checkpoint, tmp_path / name)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    left, = tmp_path.iterdir()
    assert left.name.startswith(f".{name}.")
    foreign = [tmp_path / left.name.replace(str(child), other) for other in (str(os.getppid()), "mine")]
    for path in foreign:
        path.mkdir()
    convert(checkpoint, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / name, *foreign])


@pytest.mark.parametrize("name", ["new", "new.safetensors"])
def test_sigterm_clears_up_at_once(name, folder, tmp_path, monkeypatch, capsys):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        monkeypatch.setattr("nanoip2p.checkpoint.tensors.cast",
                            lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main([str(folder), str(tmp_path / name)]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == "interrupted; nothing was written\n"


def test_every_name_of_the_full_size_there_and_back_is_bit_exact(folder, tmp_path):
    """A narrow network with the names, levels and blocks of Stable Diffusion 1.5 passes both layouts."""
    full = {"unet": UNetConfig(in_channels=8), "vae": VAEConfig(), "text_encoder": CLIPTextConfig()}
    widths = (32, 64, 128, 128)
    slim = {"unet": UNetConfig(8, block_out_channels=widths, cross_attention_dim=64),
            "vae": VAEConfig(block_out_channels=widths),
            "text_encoder": CLIPTextConfig(600, 64, 128, 12, 1, projection_dim=64)}
    models = {}
    for part, config in slim.items():
        models[part] = randomise(PARTS[part](config))
        large = build_without_memory(PARTS[part], full[part].to_json(), part)
        assert list(large.state_dict()) == list(models[part].state_dict())
        back = from_original(large, to_original(large))
        assert {name: tensor.shape for name, tensor in back.items()} == {
            name: tensor.shape for name, tensor in large.state_dict().items()}
    save_parts(tmp_path / "folder", *models.values(), folder / "tokenizer", NoiseSchedule().to_json(), {})
    convert(open_checkpoint(tmp_path / "folder"), tmp_path / "single.safetensors")
    checkpoint = open_checkpoint(tmp_path / "single.safetensors")
    for part, network in checkpoint.networks.items():
        assert network.model.config == slim[part] and same(network.read(), models[part].state_dict())


def rewrite(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def shorter_vocabulary(base):
    rewrite(base / "text_encoder" / "config.json", vocab_size=300)
    path = base / "text_encoder" / "model.safetensors"
    name = "text_model.embeddings.token_embedding.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:300].clone()}, path, metadata={"format": "pt"})


MISFITS = {
    "no tokenizer": (lambda base: shutil.rmtree(base / "tokenizer"), "vocab.json"),
    "another tokenizer": (shorter_vocabulary, "the text encoder reads 77, ids below 300"),
    "schedule of words": (lambda base: rewrite(base / "scheduler/scheduler_config.json", beta_start="x"),
                          "noise schedule"),
    "inpainting": (lambda base: rewrite(base / "unet/config.json", in_channels=9), "9 input and 4 out"),
    "architectures": (lambda base: rewrite(base / "text_encoder/config.json", architectures=5), "tures = 5"),
    "no heads": (lambda base: rewrite(base / "text_encoder/config.json", num_attention_heads=0), "json"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_belong_together_is_told_before_anything_is_written(misfit, folder, tmp_path, capsys):
    base = shutil.copytree(folder, tmp_path / "base")
    change, message = MISFITS[misfit]
    change(base)
    assert main([str(base), str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error) and "\n" not in error
    with pytest.raises(ValueError, match=message):
        load_model(base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_flags_without_effect_are_refused(folder, tmp_path, capsys):
    for words, named in ((["--raw-weights"], "--raw-weights"),
                         ([str(tmp_path / "new"), "--ema-copy"], "--ema-copy")):
        assert main([str(folder), *words]) == 2 and named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_for_weights_that_have_none(folder, single, tmp_path):
    expected = open_checkpoint(folder).networks["vae"].read()
    base = shutil.copytree(folder, tmp_path / "base")
    shutil.rmtree(base / "vae")
    edit(lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage")}, single,
         tmp_path / "x.safetensors")
    for source in (base, tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match="vae|encoder.conv_in"):
            open_checkpoint(source).networks["vae"].load(None)
        assert same(open_checkpoint(source, vae=folder).networks["vae"].read(), expected)


def test_an_autoencoder_of_another_depth(single, tmp_path):
    config = VAEConfig(block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4)
    other = randomise(VAE(config))
    save_network(other, tmp_path / "vae")
    nested = tmp_path / "nested.safetensors"
    edit(lambda tensors: {f"state_dict.{name}": tensor for name, tensor in tensors.items()}, single, nested)
    shutil.copytree(single.parent / "tokenizer", tmp_path / "tokenizer")
    for path in (single, nested):
        parts = load_model(open_checkpoint(path, vae=tmp_path / "vae"))
        assert parts.vae.config == config and same(parts.vae.state_dict(), other.state_dict())


def test_conversion_touches_nothing_else(folder, tmp_path):
    (tmp_path / ".new.tmp").mkdir()
    (tmp_path / ".new.tmp" / "mine").write_text("precious")
    base = shutil.copytree(folder, tmp_path / "base")
    rewrite(base / "scheduler" / "scheduler_config.json", _class_name=...)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    convert(open_checkpoint(base), tmp_path / "new")
    convert(open_checkpoint(base), tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.tmp", "base", "empty", "link", "new"]
    assert (tmp_path / ".new.tmp" / "mine").exists() and (tmp_path / "empty" / "unet").is_dir()
    assert_same_checkpoint(tmp_path / "new", folder)

"""Merges equal merged networks of diffusers, change no bit without need, and hold one tensor at a time."""

import json
import re
import shutil
import warnings
import weakref

import diffusers
import pytest
import torch
from comparing import relative_error
from safetensors.torch import load_file, save_file
from tiny_editor import write_tiny_editor

from nanoip2p.checkpoint import merge as merging
from nanoip2p.checkpoint.__main__ import main
from nanoip2p.checkpoint.load import load_model, open_checkpoint
from nanoip2p.checkpoint.save import convert
from nanoip2p.checkpoint.single_file import PARTS
from nanoip2p.checkpoint.tensors import read_metadata

CONV_IN = "conv_in.weight"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WHOLE = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: an editor A, a painter B, its base C, another editor E; a single file of each beside it."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, channels) in enumerate({"A": 8, "B": 4, "C": 4, "E": 8}.items()):
        write_tiny_editor(root / name, seed=10 * seed, in_channels=channels, small=True)
        convert(open_checkpoint(root / name), root / f"{name}.safetensors")
    shutil.copytree(root / "A" / "tokenizer", root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def peers(models):
    """(model, network) -> the network's weights, as diffusers reads them from the folders."""
    return {(name, part): weights for name in "ABCE"
            for part, weights in weights_of_peer(models / name).items()}


def weights_of_peer(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    return {part: getattr(pipeline, part).state_dict() for part in PARTS}


def tensors_of(path):
    return {(part, name): tensor for part, network in open_checkpoint(path).networks.items()
            for name, tensor in network.read().items()}


def bits(tensors):
    return {name: tensor.view(WHOLE[tensor.dtype]) for name, tensor in tensors.items()}


def same_bits(a, b):
    a, b = bits(a), bits(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def merge(target, *words):
    assert main(["merge", *map(str, words), str(target)]) == 0


def merged(target, *words):
    merge(target, *words)
    return tensors_of(target)


@pytest.mark.parametrize("kind, layout", [
    ("difference", ""), ("sum", ".safetensors"), ("sum of editors", "")])
def test_equals_the_arithmetic_on_the_networks_of_diffusers(kind, layout, models, peers, tmp_path, capsys):
    """diffusers also reads the result, without a warning about the merge's metadata."""
    other = "E" if kind == "sum of editors" else "B"
    flags = ["--with", models / f"{other}{layout}", "--weight", 0.3]
    if kind == "difference":
        flags = ["--add", models / f"B{layout}", "--minus", models / f"C{layout}", "--weight", 0.7]
    merge(tmp_path / "out", models / f"A{layout}", *flags)
    capsys.readouterr()
    result = weights_of_peer(tmp_path / "out")
    assert "_merged_from" not in capsys.readouterr().err
    for part in PARTS:
        a, b, c = (peers[name, part] for name in ("A", other, "C"))
        assert len(a) > 10
        for name, tensor in result[part].items():
            n = b[name].shape[1] if name == CONV_IN else None
            here, there = (a[name][:, :n], b[name]) if n else (a[name], b[name])
            expected = here + 0.7 * (there - c[name]) if kind == "difference" else 0.7 * here + 0.3 * there
            if n and n < 8:
                assert torch.equal(tensor[:, 4:], a[name][:, 4:])
                tensor = tensor[:, :4]
            assert relative_error(tensor, expected) <= 1e-6, name
            assert relative_error(tensor, here) > 1e-3, name


def with_zeros_and_extremes(folder):
    """Both zeros, and numbers of such different sizes that (A + B) - B is not A."""
    for path in folder.rglob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        for tensor in tensors.values():
            some = torch.tensor([0.0, -0.0, 1e-7, -3e4, 1.0])[: tensor.numel()].to(tensor.dtype)
            tensor.view(-1)[: len(some)] = some
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


NEUTRAL = {  # dtype -> merges that change nothing. The arithmetic is the same for all, and then rounds
    "fp32": (["--add", "B", "--minus", "B"], ["--with", "B", "--weight", 0],
             ["--with", "E", "--weight", -0.0]),
    "fp16": (["--add", "E", "--minus", "E", "--weight", -1.7], ["--with", "A", "--weight", 0.3]),
    "bf16": (["--add", "A", "--minus", "A"], ["--add", "B", "--minus", "C", "--weight", 0]),  # C: fp32
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_changes_where_nothing_should(dtype, models, tmp_path, monkeypatch):
    for name in "ABE":
        convert(open_checkpoint(models / name), tmp_path / name, DTYPES[dtype])
    shutil.copytree(models / "C", tmp_path / "C")
    monkeypatch.chdir(tmp_path)
    a, b = tmp_path / "A", tmp_path / "B"
    before = tensors_of(with_zeros_and_extremes(a))
    assert {tensor.dtype for tensor in before.values()} == {DTYPES[dtype]}
    for i, flags in enumerate(NEUTRAL[dtype]):
        assert same_bits(merged(tmp_path / f"same{i}", a, *flags), before), flags
    other = tensors_of(b)
    for name, tensor in merged(tmp_path / "one", a, "--with", b, "--weight", 1).items():
        expected = torch.cat([other[name], before[name][:, 4:]], 1) if name[1] == CONV_IN else other[name]
        assert torch.equal(tensor, expected) and not torch.equal(tensor, before[name]), name
        assert tensor.dtype == DTYPES[dtype]


def test_double_precision_is_kept():
    a, b = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    assert torch.equal(merging.merge_tensors("x", 0.3, [a, b], torch.float64), 0.7 * a + 0.3 * b)
    assert torch.equal(merging.merge_tensors("x", 0.3, [a, b, b], torch.float64), a)


def test_half_precision_is_merged_in_single(models, tmp_path):
    """From fp16 sources to an fp32 result, only the sources are rounded."""
    for name in "ABC":
        convert(open_checkpoint(models / name), tmp_path / name, torch.float16)
    a, b, c = (tensors_of(tmp_path / name) for name in "ABC")
    exact = merged(tmp_path / "out", *(tmp_path / "A", "--add", tmp_path / "B", "--minus", tmp_path / "C"),
                   "--dtype", "fp32")
    rounded = merged(tmp_path / "half", *(tmp_path / "A", "--add", tmp_path / "B", "--minus", tmp_path / "C"))
    for name, tensor in exact.items():
        expected = a[name].float() + (b[name].float() - c[name].float()) if name[1] != CONV_IN else tensor
        assert torch.equal(tensor, expected) and tensor.dtype == torch.float32
        assert torch.equal(rounded[name], tensor.half())


def test_merging_and_converting_commute(models, tmp_path):
    """Folders and single files, in and out, have the same bits."""
    folder, single, end = tmp_path / "folder", tmp_path / "single.safetensors", ".safetensors"
    written = merged(folder, models / "A", "--add", models / f"B{end}", "--minus", models / "C")
    assert same_bits(written, merged(single, models / f"A{end}", "--add", models / "B",
                                     "--minus", models / f"C{end}"))
    convert(open_checkpoint(folder), tmp_path / "again.safetensors")
    assert same_bits(tensors_of(tmp_path / "again.safetensors"), written)
    assert load_model(folder).defaults == load_model(models / "A").defaults
    assert load_file(single).keys() == load_file(models / "A.safetensors").keys()


def test_one_tensor_at_a_time_is_in_memory(models, tmp_path, monkeypatch):
    alive, most, plain = weakref.WeakSet(), [], merging.merge_tensors

    def watched(*recipe):
        result = plain(*recipe)
        alive.add(result)
        most.append(sum(tensor.nbytes for tensor in alive))
        return result

    monkeypatch.setattr(merging, "merge_tensors", watched)
    largest = max(tensor.nbytes for tensor in tensors_of(models / "A").values())
    total = sum(tensor.nbytes for tensor in tensors_of(models / "A").values())
    for name in ("out", "out.safetensors"):
        merge(tmp_path / name, models / "A", "--with", models / "E")
        views = 8 * 16 * 16 * 4  # of the VAE's attention as convolutions, for a single file
        assert len(most) > 250 and max(most) <= largest + views < total / 5, (max(most), largest, total)
        assert not alive
        most.clear()


def test_each_source_has_its_own_rule_for_ema_and_the_line_says_so(models, tmp_path, capsys):
    convert(open_checkpoint(models / "B.safetensors"), tmp_path / "B.safetensors", ema=True)
    tensors = {name: 1.125 * tensor if name.startswith("model_ema.") else tensor
               for name, tensor in load_file(tmp_path / "B.safetensors").items()}
    save_file(tensors, tmp_path / "B.safetensors", metadata=read_metadata(tmp_path / "B.safetensors"))
    words = models / "A", "--with", tmp_path / "B.safetensors", "--weight", 1
    averaged = merged(tmp_path / "averaged", *words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{models}/A: a diffusers folder, 8 input channels") and "EMA" not in lines[0]
    assert lines[1].startswith(f"{tmp_path}/B.safetensors: ") and "EMA weights" in lines[1]
    assert lines[2] == "merged: 0 A + 1 B.safetensors"
    raw = tensors_of(models / "B")
    for (part, name), tensor in averaged.items():
        if name != CONV_IN or part != "unet":
            assert torch.equal(tensor, (1.125 if part == "unet" else 1) * raw[part, name])


def test_the_result_says_of_what_it_was_merged(models, tmp_path, monkeypatch):
    odd = shutil.copytree(models / "B", tmp_path / "my \n “model”")
    monkeypatch.chdir(models / "C")
    words = models / "A.safetensors", "--add", odd, "--minus", ".", "--weight", 0.5
    merge(tmp_path / "out", *words)
    merge(tmp_path / "out.safetensors", *words, "--ema-copy")
    formula = "A.safetensors + 0.5 (my “model” - C)"
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_merged_from"] == formula
    assert read_metadata(tmp_path / "out.safetensors")["modelspec.merged_from"] == formula
    assert str(tmp_path) not in (tmp_path / "out" / "model_index.json").read_text()
    for plain in ("A", "A.safetensors"):
        convert(open_checkpoint(models / plain), tmp_path / f"plain{plain}")
    assert "_merged" not in (tmp_path / "plainA" / "model_index.json").read_text()
    assert "modelspec.merged_from" not in read_metadata(tmp_path / "plainA.safetensors")


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(part, **changes):
    file = "scheduler/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
    return lambda folder: rewrite(folder / file, **changes)


def grow_vocabulary(folder):
    path, name = folder / "text_encoder/model.safetensors", "text_model.embeddings.token_embedding.weight"
    tensors = load_file(path)
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, path, metadata={"format": "pt"})
    rewrite(folder / "text_encoder/config.json", vocab_size=len(tensors[name]))


def break_weights(folder):
    path, nan = folder / "unet/diffusion_pytorch_model.safetensors", torch.full((4,), torch.nan)
    save_file(load_file(path) | {"conv_out.bias": nan}, path, metadata={"format": "pt"})


MISFITS = {
    "heads": (change("unet", attention_head_dim=4), r"attention_head_dim of the unet is 4, not 2"),
    "latents": (change("vae", scaling_factor=0.13025), "scaling_factor of the vae is 0.13025, not 0.18215"),
    "words": (grow_vocabulary, "vocab_size of the text_encoder is 601, not 600"),
    "v": (change("scheduler", prediction_type="v_prediction"), "prediction_type is 'v_prediction', not 'eps"),
    "noise": (change("scheduler", beta_end=0.02), "noise levels is"),
    "length": (change("scheduler", num_train_timesteps=500), "noise levels is"),
    "NaN": (break_weights, "other/unet has NaN or infinity in conv_out.bias"),
    "text": (change("text_encoder", hidden_act="gelu"), "hidden_act of the text_encoder is 'gelu'"),
}


PLACES = ("--with", "--add", "--minus")


@pytest.mark.parametrize("misfit, place", [  # each misfit, each place, and two misfits in all places
    *zip(MISFITS, PLACES * 3), ("heads", "--add"), ("heads", "--minus"),
    ("NaN", "--add"), ("NaN", "--minus")])
def test_what_does_not_fit_is_one_line_and_leaves_nothing(misfit, place, models, tmp_path, capsys):
    spoil, message = MISFITS[misfit]
    spoil(other := shutil.copytree(models / "B", tmp_path / "other"))
    flags = {"--with": ["--with", other], "--add": ["--add", other, "--minus", models / "C"],
             "--minus": ["--add", models / "C", "--minus", other]}[place]
    for target in ("out", "out.safetensors")[: 2 if misfit == "NaN" else 1]:  # found while it is written
        assert main(["merge", str(models / "A"), *map(str, flags), str(tmp_path / target)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(message, error) and "other" in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_settings_without_effect_may_differ(models, tmp_path):
    """Settings of samplers and of the pooled text embedding, which differ between files of one family."""
    other = shutil.copytree(models / "C", tmp_path / "other")
    rewrite(other / "text_encoder/config.json", projection_dim=16, eos_token_id=599)
    rewrite(other / "scheduler/scheduler_config.json", timestep_spacing="leading", steps_offset=0,
            _class_name="PNDMScheduler", skip_prk_steps=True)
    result = merged(tmp_path / "out", models / "A", "--add", models / "B", "--minus", other)
    assert same_bits(result, merged(tmp_path / "same", models / "A", "--add", models / "B",
                                    "--minus", models / "C"))
    ours, theirs = (open_checkpoint(path).schedule for path in (tmp_path / "out", models / "A"))
    assert ours == theirs


@pytest.mark.parametrize("words, message", [
    (["B", "--with", "A"], r"A does not fit B: in_channels of the unet is 8, not 4; put the editor first"),
    (["B", "--add", "A", "--minus", "C"], "put the editor first"),
    (["B", "--add", "C", "--minus", "A"], "put the editor first"),
    (["A", "--minus", "C"], "one of the arguments --add --with is required"),
    (["A", "--add", "B"], "--add and --minus need each other"),
    (["A", "--with", "B", "--minus", "C"], "--add and --minus need each other"),
    (["A", "--with", "B", "--add", "C", "--minus", "C"], "not allowed with"),
    (["A", "--with", "B", "--weight", "much"], "'much' is not a number"),
    (["A", "--with", "B", "--weight", "nan"], "'nan' is not a number"),
    (["A", "--with", "B", "--weight=-inf"], "'-inf' is not a number"),
    (["A", "--with", "nowhere"], "nowhere"),
    (["A", "--with", "B", "--weight", "1e39"], r"-1e\+39 A \+ 1e\+39 B has NaN or infinity in conv_in.w"),
    (["A", "--add", "B", "--minus", "C", "--weight", "1e7", "--dtype", "fp16"],
     "conv_in.weight holds numbers beyond the range of fp16; use bf16 or fp32"),
])
def test_bad_words_are_one_line_and_leave_nothing(words, message, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(models)
    for target in ("out", "out.safetensors")[: 2 if "conv_in" in message else 1]:  # found while it is written
        assert main(["merge", *words, str(tmp_path / target)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_merge_replaces_nothing(models, tmp_path, capsys):
    kept = shutil.copy(models / "B.safetensors", tmp_path / "kept.safetensors")
    shutil.copytree(models / "B", tmp_path / "kept")
    for target in ("kept", "kept.safetensors", "new.ckpt"):
        assert main(["merge", str(models / "A"), "--with", str(models / "B"), str(tmp_path / target)]) == 2
        assert "exists, or is neither" in capsys.readouterr().err
    assert kept.read_bytes() == (models / "B.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept.safetensors"]


def test_a_folder_called_merge_is_still_inspected(models, tmp_path, monkeypatch, capsys):
    shutil.copytree(models / "A", tmp_path / "merge")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["./merge"]) == 0
    assert "./merge: a diffusers folder, 8 input channels" in capsys.readouterr().out


def test_another_autoencoder_for_all(models, tmp_path):
    result = merged(tmp_path / "out", models / "A", "--with", models / "E", "--vae", models / "B")
    expected = tensors_of(models / "B")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in result.items() if key[0] == "vae")

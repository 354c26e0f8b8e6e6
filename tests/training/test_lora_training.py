"""train.py --lora: the steps are those of diffusers and peft, resume is exact, diffusers reads the files."""

import json
import shutil
import signal
from itertools import repeat

import diffusers
import numpy as np
import pytest
import torch
from comparing import randomise, relative_error
from safetensors.torch import load_file, save_file
from tiny_configs import tiny_unet
from tiny_editor import DEFAULTS, write_tiny_painter
from train_runs import STATE, rows, state, words

import train
from nanoip2p.checkpoint.load import load_model, open_checkpoint, widen
from nanoip2p.checkpoint.lora import apply_loras
from nanoip2p.checkpoint.save import save_parts
from nanoip2p.editor import Editor
from nanoip2p.objective import model_input, predict
from nanoip2p.training import low_rank
from nanoip2p.training import run_folder as runs
from nanoip2p.training.config import TrainConfig
from nanoip2p.training.ranks import Ranks
from nanoip2p.training.samples import draw
from nanoip2p.training.trainer import Trainer
from nanoip2p.unet import UNet
from nanoip2p.world.scenes import random_scene

FILES = ("lora.safetensors", "lora-kohya.safetensors")
LAYERS = ("attention", "all")
pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return write_tiny_painter(tmp_path_factory.mktemp("painter"))


@pytest.fixture(scope="module")
def wide(painter, tmp_path_factory):
    """The editor from which training begins if --weights is the text-to-image model."""
    model, folder = load_model(widen(open_checkpoint(painter))), tmp_path_factory.mktemp("wide")
    save_parts(folder, model.unet, model.vae, model.text_encoder, model.tokenizer_folder,
               model.schedule.to_json(), DEFAULTS)
    return folder


def run(start, out, *more):
    return train.main(words(start, out, "--lora", 3, "--lr", 0.02, *more))


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def everything(out):
    """The bytes of `state` and of the LoRA files."""
    return state(out) | {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def made(start, painter, tmp_path_factory):
    """Runs of four steps from an editor (8) and from a text-to-image model (4), for both sets of layers."""
    root, made = tmp_path_factory.mktemp("made"), {}
    for layers in LAYERS:
        for channels, base in ((8, start), (4, painter)):
            out = made[layers, channels] = root / f"{layers}{channels}"
            assert run(base, out, "--steps", 4, "--lora-layers", layers, "--validate-every", 2) == 0
    return made


def a_batch(count, side, width, text=77):
    """A micro-batch as the loader yields it, with cached latents and texts."""
    g = torch.Generator().manual_seed(1)
    drawn = [draw(0, number, (4, side, side), 1000) for number in range(count)]
    batch = {key: torch.stack([torch.as_tensor(one[key]) for one in drawn]) for key in drawn[0]}
    return batch | {"before": torch.randn(count, 8, side, side, generator=g), "name": ["a"] * count,
                    "after": torch.randn(count, 8, side, side, generator=g), "skipped": [],
                    "text": torch.randn(count, text, width, generator=g)}


# The same as in diffusers and peft

@pytest.mark.parametrize("layers", LAYERS)
def test_steps_are_those_of_diffusers_and_peft(start, tmp_path, layers):
    peft = pytest.importorskip("peft")
    config = TrainConfig(lora=["3"], lora_layers=layers, accumulate=2, batch_size=4, dtype="fp32", lr=1e-3,
                         cache=tmp_path, drop=(0, 0, 0), snr_gamma=1)
    trainer = Trainer(config, load_model(start), Ranks(0, 1, torch.device("cpu")), 4)
    assert all(weight.any() == ("lora_up" not in name) for name, weight in trainer.trained.items())
    with torch.no_grad():
        for name, weight in trainer.trained.items():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)

    peer = diffusers.UNet2DConditionModel.from_pretrained(start / "unet").requires_grad_(False)
    names = {name.rpartition(".")[0] for name in trainer.trained}
    targets = [name for name, layer in peer.named_modules()
               if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))] if layers == "all" else [
                   "to_q", "to_k", "to_v", "to_out.0"]
    peer.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets))
    theirs = {name: weight for name, weight in peer.named_parameters() if weight.requires_grad}

    def twins():
        for name, weight in trainer.trained.items():
            layer, _, role = name.rpartition(".lora_")
            yield weight, theirs[f"{layer}.lora_{'A' if role == 'down' else 'B'}.default.weight"]

    assert len(theirs) == len(trainer.trained) == 2 * len(names)
    with torch.no_grad():
        for ours, other in twins():
            other.copy_(ours.view_as(other))
    optimizer = torch.optim.AdamW(theirs.values(), 1e-3, weight_decay=1e-2)
    batch = a_batch(4, 8, 32)
    snr = trainer.alphas[batch["timestep"]] / (1 - trainer.alphas[batch["timestep"]])
    assert snr.max() > 1 > snr.min()
    for step in range(2):
        loss = trainer.step(repeat(batch), step)
        given = model_input(batch, trainer.null, trainer.model.vae.scaling_factor, trainer.alphas, (0, 0, 0))
        wanted = (peer(given["z_in"], batch["timestep"], given["context"]).sample - given["target"]).square()
        (wanted.mean((1, 2, 3)) * (1 / snr).clamp(max=1)).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(wanted.mean().item(), rel=1e-5)
        assert trainer.norm == pytest.approx(norm, rel=1e-4)
        assert all(relative_error(ours, other.view_as(ours)) < 1e-5 for ours, other in twins())


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("channels", [8, 4])
def test_the_files_are_the_change_of_the_weights(made, start, wide, channels, layers, file):
    """Base + file = <out>/weights. From a text-to-image model, conv_in has learned to see."""
    base, out = wide if channels == 4 else start, made[layers, channels]
    wanted = load_model(out / "weights").unet.state_dict()
    editor = load_model(base)
    before = {name: tensor.clone() for name, tensor in editor.unet.state_dict().items()}
    [line] = apply_loras(editor, [str(out / file)])
    for name, tensor in editor.unet.state_dict().items():
        assert (tensor - wanted[name]).abs().max() < 1e-5, name
    changed = {name for name in wanted if not torch.equal(wanted[name], before[name])}
    assert "no alpha" not in line and len(changed) > 10 and ("conv_in.weight" in changed) == (
        channels == 4 or layers == "all")
    assert all(name.endswith(".weight") for name in changed)
    assert wanted["conv_in.weight"][:, 4:].abs().amin() > 0


@pytest.fixture(scope="module")
def pipes(start, wide):
    """The pipelines of diffusers for the two bases of `made`."""
    load = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained
    return {8: load(start), 4: load(wide)}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("channels", [8, 4])
def test_diffusers_reads_the_files(made, pipes, channels, layers, file):
    """And predicts what the run's weights predict."""
    pytest.importorskip("peft")
    pipe, out = pipes[channels], made[layers, channels]
    latents, text = torch.randn(2, 8, 8, 8), torch.randn(2, 5, 32)
    with torch.no_grad():
        unchanged = pipe.unet(latents, 500, text).sample
        pipe.load_lora_weights(out, weight_name=file)
        theirs = pipe.unet(latents, 500, text).sample
        pipe.unload_lora_weights()
        ours = load_model(out / "weights").unet(latents, 500, text)
    assert relative_error(ours, theirs) < 1e-5 < 0.01 < relative_error(unchanged, theirs)


def test_the_pictures_of_base_and_file_are_those_of_the_run(made, start):
    out, picture = made["attention", 8], random_scene("test", 1).render(48)
    merged, editor, plain = (Editor.load(folder, "cpu") for folder in (out / "weights", start, start))
    apply_loras(editor, [str(out / FILES[0])])
    a, b, c = (np.asarray(model.edit(picture, "make it night", seed=1), int)
               for model in (merged, editor, plain))
    assert abs(a - b).max() <= 1 < abs(a - c).max()


def a_unet(dtype, layers="all", rank=4):
    unet = low_rank.freeze(randomise(UNet(tiny_unet(8))), dtype)
    low_rank.attach(unet, rank, layers, seed=3)
    return unet.train()


@pytest.mark.parametrize("layers", LAYERS)
def test_frozen_weights_in_bf16_give_the_bits_of_autocast(layers):
    """Losses and gradients are those of frozen weights in float32, which need twice the memory."""
    def gradients(dtype):
        unet = a_unet(dtype, layers)
        with torch.no_grad():
            for name, weight in unet.named_parameters():
                if "lora_up" in name:
                    weight.fill_(0.03)
        batch = a_batch(4, 8, 12, 5)
        given = model_input(batch, torch.zeros(5, 12), 1.0, torch.linspace(1, 0.01, 1000), (0, 0, 0))
        output = predict(unet, given["z_in"], batch["timestep"], given["context"], torch.bfloat16)
        (output - given["target"]).square().mean().backward()
        return [output, *(weight.grad for weight in unet.parameters() if weight.requires_grad)]

    half, full = gradients(torch.bfloat16), gradients(torch.float32)
    assert len(half) == len(full) > 20 and all(torch.equal(a, b) for a, b in zip(half, full))
    assert all(grad.dtype == torch.float32 and grad.any() for grad in half)


# As for full training

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_sheet_shows_what_the_weights_do(made, start, tmp_path, dtype):
    """The sheet uses the thin matrices beside frozen weights, maybe in bf16; <out>/weights are merged."""
    config = TrainConfig(lora=["3"], accumulate=1, dtype=dtype, resolution=48, out=made["attention", 8])
    trainer = Trainer(config, load_model(start), Ranks(0, 1, torch.device("cpu")), 4)
    trainer.load()
    column = random_scene("test", 1).render(48), "make it night", random_scene("test", 2).render(48)
    sheet = np.asarray(trainer.sample_sheet([column]), int)
    wanted = Editor.load(config.out / "weights", "cpu").edit(*column[:2], seed=0)
    trainer.model.edit = lambda *_, **__: [wanted]
    error = abs(sheet - np.asarray(trainer.sample_sheet([column])))
    assert error.max() <= {"fp32": 1, "bf16": 60}[dtype] and error.mean() < 1


def test_a_resumed_run_steps_alike_in_each_layout(made, start, tmp_path):
    """Fused AdamW pairs by the place in memory (findings/fused-optimizers-mix-memory-formats.sh)."""
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        config = TrainConfig(lora=["3"], lora_layers="all", accumulate=1, dtype="fp32", lr=0.02,
                             cache=tmp_path, drop=(0, 0, 0), out=made["all", 8])
        trainer = Trainer(config, load_model(start), Ranks(0, 1, torch.device("cpu")), 4)
        trainer.unet.to(memory_format=layout)
        count = trainer.load()
        before = {name: weight.detach().clone() for name, weight in trainer.trained.items()}
        trainer.step(repeat(a_batch(4, 8, 32)), count)
        steps.append({name: weight.detach() - before[name] for name, weight in trainer.trained.items()})
    kernels = [name for name, change in steps[0].items() if change.ndim == 4 and change.shape[-1] == 3]
    assert kernels and all(relative_error(steps[1][name], steps[0][name]) < 1e-2 for name in steps[0])


def test_a_step_moves_the_weights_at_the_rate_of_the_warmup(start, tmp_path):
    """Adam's first step changes a weight by at most the learning rate, and most weights by nearly as much."""
    config = TrainConfig(lora=["3"], accumulate=1, dtype="fp32", lr=0.02, warmup=10, cache=tmp_path,
                         drop=(0, 0, 0), out=tmp_path)
    trainer = Trainer(config, load_model(start), Ranks(0, 1, torch.device("cpu")), 4)
    before = {name: weight.detach().clone() for name, weight in trainer.trained.items()}
    trainer.step(repeat(a_batch(4, 8, 32)), 4)
    moved = max((weight - before[name]).abs().max().item() for name, weight in trainer.trained.items())
    assert trainer.lr == 0.01 and moved == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("more", [
    ["--accumulate", 2, "--ema-device", "cpu", "--recompute"],
    ["--dtype", "bf16", "--snr-gamma", 5, "--lora-layers", "all", "--compile"],
    ["--text-to-image"], ["--distill"]], ids=lambda more: more[-1])
def test_a_resumed_run_equals_one_that_never_stopped(start, painter, tmp_path, monkeypatch, more):
    base, taught = painter if more[0] == "--text-to-image" else start, more == ["--distill"]
    monkeypatch.setattr(torch, "compile", lambda network: network)  # compiling takes seconds
    argv = words(base, "", "--lora", 3, "--lr", 0.02, *([] if taught else more))
    argv[0] = "--distill" if taught else "--weights"
    place = argv.index("--out") + 1

    def start_run(out, steps):
        assert train.main([*argv[:place], str(out), *argv[place + 1 :], "--steps", str(steps)]) == 0

    start_run(tmp_path / "whole", 4)
    start_run(tmp_path / "run", 2)
    half = everything(tmp_path / "run")
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    wanted = everything(tmp_path / "whole")
    assert everything(tmp_path / "run") == wanted
    assert all(half[part] != wanted[part] for part in half) and wanted["unet"] != wanted["ema"]


@pytest.mark.parametrize("way", [["--recompute"], ["--ema-device", "cpu"]], ids=" ".join)
def test_ways_to_save_memory_change_no_bit(made, start, tmp_path, way):
    assert run(start, tmp_path / "run", "--steps", 4, "--validate-every", 2, *way) == 0
    assert everything(tmp_path / "run") == everything(made["attention", 8])
    assert rows(tmp_path / "run")[-1]["validation"] == rows(made["attention", 8])[-1]["validation"]


def test_checkpoints_hold_what_is_trained_and_nothing_else(made):
    for (layers, channels), out in made.items():
        newest, _ = runs.newest_checkpoint(out)
        files = [load_file(newest / f"{part}.safetensors") for part in STATE]
        assert all(file.keys() == files[0].keys() for file in files)
        whole = {name for name in files[0] if ".lora_" not in name}
        assert whole == ({"conv_in.weight"} if channels == 4 else set())
        exported = load_model(out / "weights").unet.state_dict()
        assert all(torch.allclose(exported[name], files[1][name], 0, 1e-6) for name in whole)
        layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_down"
        assert files[0][layer].shape == (3, 32) and ("conv_out.lora_up" in files[0]) == (layers == "all")


def test_the_average_and_the_teacher_share_the_frozen_weights(start, tmp_path):
    model = load_model(start)
    config = TrainConfig(lora=["3"], accumulate=1, dtype="bf16", cache=tmp_path, distill="x")
    trainer = Trainer(config, model, Ranks(0, 1, torch.device("cpu")), 4)
    of_average, of_teacher = (dict(unet.named_parameters())
                              for unet in (trainer.average, trainer.teacher.unet))
    for name, weight in trainer.unet.named_parameters():
        assert (of_average[name] is weight) == (name not in trainer.trained)
        assert of_teacher.get(name) is (None if name in trainer.trained else weight)
        exact = "norm" in name or name in trainer.trained
        assert weight.dtype == (torch.float32 if exact else torch.bfloat16)


@pytest.mark.parametrize("dtype, close", [("fp32", 1e-5), ("bf16", 0.1)])
def test_ranks_train_what_one_would(start, launch, tmp_path, dtype, close):
    told = tmp_path / "told"
    jobs = [{"argv": words(start, tmp_path / name, "--steps", 3, "--lora", 3, "--accumulate", accumulate,
                           "--dtype", dtype), "ranks": ranks, "err": str(told)}
            for name, ranks, accumulate in (("one", 1, 2), ("two", 2, 1))]
    assert launch(*jobs) == [[0], [0, 0]], told.read_text()[-3000:]
    for part in STATE:
        one, two = (load_file(runs.newest_checkpoint(tmp_path / name)[0] / f"{part}.safetensors")
                    for name in ("one", "two"))
        assert all(relative_error(two[name], one[name]) < close for name in one)


def test_ctrl_c_loses_nothing(made, start, tmp_path, monkeypatch):
    step = Trainer.step

    def signalled(self, batches, n, stop):
        if n == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batches, n, stop)

    monkeypatch.setattr(Trainer, "step", signalled)
    assert run(start, tmp_path / "run", "--steps", 4, "--validate-every", 2) == 130
    assert (tmp_path / "run" / FILES[0]).exists() and runs.newest_checkpoint(tmp_path / "run")[1]["step"] == 2
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert everything(tmp_path / "run") == everything(made["attention", 8])


# --lora FILE

def test_files_are_added_before_training(made, start, tmp_path, capsys):
    """A second LoRA upon a first: base + both files = <out>/weights."""
    first, out = shutil.copy(made["attention", 8] / FILES[0], tmp_path), tmp_path / "run"
    argv = words(start, out, "--steps", 2, "--lora", f"{first}:0.5", "--lora", 2, "--lr", 0.02)
    assert train.main(argv) == 0
    assert f"added {first} at weight 0.5" in capsys.readouterr().out
    editor, wanted = load_model(start), load_model(out / "weights").unet.state_dict()
    apply_loras(editor, [f"{first}:0.5", str(out / FILES[1])])
    assert all(torch.allclose(tensor, wanted[name], 0, 1e-5)
               for name, tensor in editor.unet.state_dict().items())
    assert train.main(["--resume", str(out), "--steps", "3"]) == 0
    full = tmp_path / "full"  # all weights are trained, from base and file
    assert train.main(words(start, full, "--steps", 1, "--lora", first)) == 0
    assert runs.newest_checkpoint(full)[1]["settings"]["lora"] == [str(first)]
    assert not (full / FILES[0]).exists()
    shutil.copy(out / FILES[0], first)
    assert train.main(["--resume", str(out), "--steps", "4"]) == 2
    assert "have changed since" in errors(capsys)[0]


def test_a_run_does_not_go_on_from_other_weights(start, tmp_path, capsys):
    base = shutil.copytree(start, tmp_path / "base")
    assert run(base, tmp_path / "run", "--steps", 1) == 0
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    before = everything(tmp_path / "run")
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 2
    assert "have changed since" in errors(capsys)[0] and everything(tmp_path / "run") == before


BAD = {"0": "one rank, from 1 to 1024", "-3": "one rank, from 1 to 1024", "1025": "one rank, from 1 to 1024",
       "4 5": "give one rank", "9" * 12: "one rank, from 1 to 1024", "9" * 5000: "99",
       "absent.safetensors": "absent.safetensors", "4.5": "4.5", "": "", "x:0.5": "x"}


@pytest.mark.parametrize("given", BAD)
def test_what_is_no_rank_and_no_file_is_one_line(start, tmp_path, capsys, given):
    flags = [word for one in given.split(" ") for word in ("--lora", one)]
    assert train.main(words(start, tmp_path / "run", *flags)) == 2
    [error] = errors(capsys)
    assert BAD[given] in error and not (tmp_path / "run" / runs.CHECKPOINTS).exists()


@pytest.mark.parametrize("lora", [[0], "16", [["4"]], ["--out"], ["2", "3"], [None], {"a": 1}, ["--"]])
def test_a_strangers_state_is_checked(made, tmp_path, capsys, lora):
    out = shutil.copytree(made["attention", 8], tmp_path / "run")
    path = runs.checkpoints(out)[0] / "state.json"
    about = json.loads(path.read_text())
    about["settings"]["lora"] = lora
    path.write_text(json.dumps(about))
    assert train.main(["--resume", str(out), "--steps", "5"]) == 2 and len(errors(capsys)) == 1


def test_layers_without_a_rank_and_another_rank_are_refused(made, start, tmp_path, capsys):
    assert train.main(words(start, tmp_path / "run", "--lora-layers", "all")) == 2
    assert "--lora-layers is for --lora RANK" in errors(capsys)[0]
    assert train.main(["--resume", str(made["attention", 8]), "--lora", "5"]) == 2
    assert "--lora cannot change" in errors(capsys)[0]

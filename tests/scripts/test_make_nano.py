"""The recipe of the shipped weights runs from nothing, and goes on where it was stopped."""

import importlib.util
import json
from pathlib import Path

import four_steps
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanoip2p.common.files import read_json
from nanoip2p.dataset.layouts import read_data
from nanoip2p.dataset.rendered import draw_scenes
from nanoip2p.editor import Editor
from nanoip2p.images import open_image
from nanoip2p.text_to_image import TextToImage
from nanoip2p.unet import UNetConfig
from nanoip2p.world.scenes import KINDS

SCRIPT = Path(__file__).resolve().parents[2] / "weights" / "make_nano.py"


@pytest.fixture(scope="module")
def make_nano():
    spec = importlib.util.spec_from_file_location("make_nano", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_nothing_to_folders_that_edit(make_nano, tmp_path, monkeypatch):
    folder = tmp_path / "ship" / "nano-ip2p"
    least = {f"clip_{name}threshold": -1.0 for name in ("", "dir_", "img_")}  # nothing is learned in a step
    monkeypatch.setattr(make_nano, "PAIRS", make_nano.PAIRS | least | {"n_samples": 1, "steps": 1})
    few = ["--batch-size", 2, "--sample-every", 0, "--validate-every", 0]
    monkeypatch.setattr(make_nano, "RECIPE", [*make_nano.RECIPE, *few])
    monkeypatch.setattr(make_nano, "DISTILL_RUN", [*make_nano.DISTILL_RUN, *few])
    for name, widths in (("UNET", (16, 32, 32)), ("SD_UNET", (16, 16, 16))):
        monkeypatch.setattr(make_nano, name, getattr(make_nano, name) | {"block_out_channels": widths})
    monkeypatch.setattr(make_nano, "TOKENIZER_SCENES", 100)
    monkeypatch.setattr("train.VALIDATION_SAMPLES", 2)
    monkeypatch.setattr("train_vae.SCALE_PICTURES", 16)
    monkeypatch.setattr(make_nano.demo, "EDITS", {"house": ("make it night",)})

    def make(*editor_steps):
        code = make_nano.main([str(word) for word in (
            "--out", tmp_path / "runs", "--ship", folder.parent, "--vae-steps", 2, "--decoder-steps", 1,
            "--clip-steps", 1, "--wording-steps", 1, "--sd-steps", 1, 1, "--captions", 4, "--editor-steps",
            *editor_steps, "--pairs", 4, "--prompts", 40, "--local-prompts", 3, "--new-prompts", 2,
            "--paper-steps", 1, "--distill-steps", 1, "--device", "cpu")])
        assert code == 0
        return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")

    def written():
        stages = ("vae/diffusion_pytorch_model.safetensors", "clip/model.safetensors", "tokenizer/vocab.json")
        return [(tmp_path / "runs" / stage).stat().st_mtime_ns for stage in stages]

    first, before = make(2, 1), written()
    begun, sharp = (load_file(tmp_path / "runs" / name / "diffusion_pytorch_model.safetensors")
                    for name in ("vae", "vae-sharp"))
    changed = {name.split(".")[0] for name in begun if (begun[name] != sharp[name]).any()}
    assert changed == {"decoder", "post_quant_conv"}  # the latents stay the same
    again = make(2, 2)
    assert written() == before and any((again[name] != first[name]).any() for name in first)

    assert {tensor.dtype for tensor in first.values()} == {torch.float16}
    start = load_file(tmp_path / "runs" / "start" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not start["conv_out.weight"].any() and start["conv_in.weight"].any()
    for file in ("nano-sd/pairs.json", "nano-sd/defaults.json", "nano-ip2p/defaults.json",
                 "nano-ip2p-paper/defaults.json"):
        wanted = make_nano.PAIRS if "pairs" in file else read_json(SCRIPT.parent / file)
        assert read_json(folder.parent / file) == wanted, file

    image = open_image(folder / "examples" / "house.png")
    for part in ("vae", "text_encoder"):
        [shared] = (folder / part).glob("*.safetensors")
        links = [folder.parent / name / part / shared.name for name in ("nano-sd", "nano-ip2p-paper")]
        assert not shared.is_symlink() and all(link.is_symlink() and link.samefile(shared) for link in links)
    four_steps.merge(folder.parent / "student", folder.parent / "nano-ip2p-4step.safetensors", folder)
    for name in ("nano-ip2p", "student", "nano-ip2p-paper"):
        editor = Editor.load(folder.parent / name, "cpu")
        assert editor.edit(image, "make it night", steps=1).size == image.size
    painter = TextToImage.load(folder.parent / "nano-sd", "cpu")
    assert painter.generate(["a red house in the middle, on sand, clear day"], steps=1)[0].size == (64, 64)
    assert (folder / "demo.png").exists()
    vocabularies = [folder / "tokenizer" / "vocab.json", folder.parent / "nano-clip" / "vocab.json"]
    assert vocabularies[0].read_text() == vocabularies[1].read_text()


def test_the_last_prompts_only_edit_things(make_nano, tmp_path):
    rows = [json.loads(line) for line in make_nano.paper_prompts(tmp_path / "p.jsonl", 40, 30, 20).open()]
    rest = [[row[key].split(", ", 1)[1] for key in ("input", "output")] for row in rows]
    assert len(rows) == 90 and all(before == after for before, after in rest[40:])
    assert {before == after for before, after in rest[:40]} == {True, False}
    assert rows[:40] == draw_scenes(40, 0) and len({tuple(row.values()) for row in rows}) == 90
    things = [[{word for word in row[key].split() if word in KINDS} for key in ("input", "output")]
              for row in rows]
    assert all(after - before for before, after in things[70:])
    assert {bool(after - before) for before, after in things[40:70]} == {True, False}
    assert {len(after) - len(before) for before, after in things[70:]} == {0, 1}  # both kinds of edits


def test_a_pair_job_in_more_wordings(make_nano, tmp_path):
    prompts, pairs = draw_scenes(40, 0), tmp_path / "pairs"
    for i, prompt in enumerate(prompts):
        (pairs / f"{i:07d}").mkdir(parents=True)
        (pairs / f"{i:07d}" / "prompt.json").write_text(json.dumps(prompt))
        for j in "01":
            Image.new("RGB", (64, 64), (5 * i, 0, 100 * int(j))).save(pairs / f"{i:07d}" / f"7_{j}.jpg")
    (pairs / "seeds.json").write_text(json.dumps([[f"{i:07d}", ["7"]] for i in range(len(prompts))]))
    for _ in range(2):  # a second run finds the first one's copies
        out = make_nano.in_wordings(pairs, tmp_path / "out")
    found = [item for split in ("train", "validation", "test") for item in read_data(out, split)]
    assert len(found) == 3 * len(prompts)
    folders = sorted(path.parent for path in out.glob("*/prompt.json"))
    records = [read_json(folder / "prompt.json") for folder in folders]
    assert len({record["edit"] for record in records}) > len(prompts)
    for folder, record in zip(folders, records):
        source = pairs / folder.name.partition("-")[0]
        assert record | {"edit": 0} == read_json(source / "prompt.json") | {"edit": 0}
        assert all((folder / f"7_{j}.jpg").samefile(source / f"7_{j}.jpg") for j in "01")
    for prompt in prompts:
        assert prompt["edit"] in make_nano.seen_wordings(prompt)


def test_a_stage_stopped_half_way_ends_in_the_same_weights(make_nano, tmp_path):
    def fit(folder, steps, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)

        def loss_of_step(generator):
            if stop is not None and generator.initial_seed() == stop:
                raise KeyboardInterrupt
            return model(torch.randn(4, 3, generator=generator)).square().mean(), ""

        make_nano.fit("probe", model, loss_of_step, steps, 1e-2, folder)
        return model.state_dict()

    (tmp_path / "whole").mkdir(), (tmp_path / "halves").mkdir()
    whole = fit(tmp_path / "whole", 500)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "halves", 500, stop=300)
    halves = fit(tmp_path / "halves", 500)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_shipped_settings_are_those_of_the_recipe(make_nano):
    shipped = SCRIPT.parent
    assert read_json(shipped / "nano-sd/pairs.json") == make_nano.PAIRS
    for name, wanted in (("nano-ip2p", make_nano.DEFAULTS), ("nano-sd", make_nano.SD_DEFAULTS),
                         ("nano-ip2p-paper", make_nano.PAPER_EDITOR_DEFAULTS)):
        assert read_json(shipped / name / "defaults.json") == wanted, name
        settings = make_nano.SD_UNET if name == "nano-sd" else make_nano.UNET
        if name == "nano-ip2p-paper":  # starts from nano-sd
            settings = make_nano.SD_UNET | {"in_channels": 8}
        config = json.loads(json.dumps(UNetConfig(**settings).to_json()))  # lists for tuples
        assert {key: value for key, value in read_json(shipped / name / "unet/config.json").items()
                if key in config} == config


def test_the_shipped_examples_are_those_of_the_recipe(make_nano):
    for name, scene in make_nano.EXAMPLES.items():
        shipped = open_image(SCRIPT.parent / "nano-ip2p" / "examples" / f"{name}.png")
        differs = np.abs(np.asarray(shipped, float) - np.asarray(scene.render(64)))
        assert differs.mean() < 0.1, name


def test_the_default_steps_are_one_number_for_each_run(make_nano, monkeypatch):
    asked = []
    monkeypatch.setattr(make_nano, "make", asked.append)
    assert make_nano.main([]) == 0
    for name in ("sd", "editor"):
        assert len(getattr(asked[0], f"{name}_steps")) == len(getattr(make_nano, f"{name.upper()}_RUNS"))

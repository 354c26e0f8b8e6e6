"""Marks of v-prediction in single files, each in the form in which other programs write it."""

import json
import shutil

import numpy as np
import pytest
import torch
import train_runs
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_editor import write_tiny_editor

import train
from nanoip2p import objective
from nanoip2p.checkpoint.load import load_model, open_checkpoint
from nanoip2p.checkpoint.marks import marked_schedule
from nanoip2p.checkpoint.save import convert
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.training import trainer

V = NoiseSchedule(prediction_type="v_prediction")
ZERO_SNR = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                         timestep_spacing="trailing")
EMPTY, SCALAR = torch.empty(0), torch.tensor(1.0)
KIND = "modelspec.prediction_type"
MARKS = {  # metadata, tensors, .yaml -> the schedule
    "none": ({}, {}, None, NoiseSchedule()),
    "sd-scripts": ({KIND: "v"}, {}, None, V),
    "sd-scripts, epsilon": ({KIND: "epsilon", "ss_v_parameterization": "False"}, {}, None, NoiseSchedule()),
    "sd-scripts, options": ({"ss_v_parameterization": "True"}, {}, None, V),
    "zero SNR": ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, {}, None, ZERO_SNR),
    "an option without value": ({"ss_v_parameterization": "None", KIND: "v"}, {}, None, V),
    "ComfyUI, metadata": ({"modelspec.predict_key": "v"}, {}, None, V),
    "ComfyUI": ({"modelspec.predict_key": "v"}, {"v_pred": EMPTY}, None, V),
    "ComfyUI, zero SNR": ({}, {"v_pred": EMPTY, "ztsnr": EMPTY}, None, ZERO_SNR),
    "scalars": ({}, {"v_pred": SCALAR, "ztsnr": torch.tensor(1)}, None, ZERO_SNR),
    "nested": ({}, {"state_dict.v_pred": EMPTY}, None, V),
    "zero SNR of epsilon": ({}, {"ztsnr": EMPTY}, None, NoiseSchedule()),  # as in ComfyUI
    "yaml": ({}, {}, 'model:\n  params:\n    parameterization: "v"\n', V),
    "yaml decides": ({KIND: "v"}, {"v_pred": EMPTY}, "parameterization: eps  # my own", NoiseSchedule()),
    "yaml of v1": ({KIND: "v"}, {}, "model:\n  params:\n    linear_start: 0.00085\n", V),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tensors of a tiny editor in one file, its metadata, and its tokenizer."""
    folder = write_tiny_editor(tmp_path_factory.mktemp("weights") / "tiny")
    convert(open_checkpoint(folder), folder / "whole.safetensors")
    with safe_open(folder / "whole.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["nanoip2p"])
    return load_file(folder / "whole.safetensors"), metadata, folder


def write(whole, path, metadata, tensors, text=None):
    """A file as another program writes it, except that its networks are small."""
    parts = {key: value for key, value in whole[1].items() if key != "schedule"}
    save_file(whole[0] | tensors, path, {"format": "pt", "nanoip2p": json.dumps(parts)} | metadata)
    shutil.copytree(whole[2] / "tokenizer", path.parent / "tokenizer", dirs_exist_ok=True)
    if text is not None:
        path.with_suffix(".yaml").write_text(text)
    return path


@pytest.mark.parametrize("name", MARKS)
def test_every_mark_is_read(name, whole, tmp_path):
    *given, wanted = MARKS[name]
    opened = open_checkpoint(write(whole, tmp_path / "marked.safetensors", *given))
    assert ("v-prediction" in opened.description) == (wanted.prediction_type == "v_prediction")
    assert ("zero terminal SNR" in opened.description) == wanted.rescale_betas_zero_snr
    assert NoiseSchedule.from_config(opened.schedule) == wanted


@pytest.mark.parametrize("name", ["none", "sd-scripts", "ComfyUI, zero SNR"])
def test_every_schedule_is_kept(name, whole, tmp_path):
    """Through a folder and a new file. These depend on the schedule that was read, not on its mark."""
    *given, wanted = MARKS[name]
    opened = open_checkpoint(write(whole, tmp_path / "marked.safetensors", *given))
    assert load_model(opened).schedule == wanted
    convert(opened, tmp_path / "folder")
    convert(open_checkpoint(tmp_path / "folder"), tmp_path / "again.safetensors")
    for copy in (tmp_path / "folder", tmp_path / "again.safetensors"):
        assert load_model(copy).schedule == wanted
    # Other programs read these marks in our file; the last line: after a merge that drops the metadata
    tensors = load_file(tmp_path / "again.safetensors")
    assert ("v_pred" in tensors, "ztsnr" in tensors) == (wanted != NoiseSchedule(), wanted == ZERO_SNR)
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata().get(KIND) == ("v" if wanted != NoiseSchedule() else None)
    assert marked_schedule(tmp_path / "x", tensors, {}) == wanted


@pytest.mark.parametrize("metadata, tensors, text, message", [
    ({KIND: "epsilon"}, {"v_pred": EMPTY}, None, "says .*'epsilon', the tensor v_pred = 'v'; .* marked.yaml"),
    ({KIND: "v", "ss_v_parameterization": "False"}, {}, None, "'v', ss_v_parameterization = 'False'; it"),
    ({KIND: "rf"}, {}, None, "says modelspec.prediction_type = 'rf'; it should"),
    ({}, {"edm_vpred.sigma_max": SCALAR}, None, "edm_vpred.sigma_max"),
    ({}, {}, "parameterization: x0", "parameterization in marked.yaml = 'x0'"),
    ({}, {}, "parameterization:\n  v", "parameterization in marked.yaml = ''"),
    ({}, {}, f"parameterization: {'x' * 10**6}", "parameterization in marked.yaml = 'xxx"),
], ids=str)
def test_what_is_unclear_is_refused_in_one_line(metadata, tensors, text, message, whole, tmp_path):
    path = write(whole, tmp_path / "marked.safetensors", metadata, tensors, text)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", [
    "parameterization: v", "model: {params: {parameterization: v, timesteps: 1000}}",
    "parameterization : 'v'",
    "#parameterization: v\nparameterization: eps", "'parameterization': \"v\" # yes",
    "parameterization: v\r\n",
    "note: no parameterization here\nuse: 1  # parameterization: v", "v_parameterization: v",
    "a:\n    parameterization:   eps\n    first_stage_key: image\n"])
def test_yaml_is_read_as_pyyaml_reads_it(text, tmp_path):
    def leaves(node):
        for key, value in node.items():
            yield from leaves(value) if isinstance(value, dict) else [(key, value)]

    wanted = dict(leaves(yaml.safe_load(text))).get("parameterization", "eps")
    (tmp_path / "x.yaml").write_text(text)
    schedule = marked_schedule(tmp_path / "x.safetensors", (), {})
    assert schedule.prediction_type == {"v": "v_prediction", "eps": "epsilon"}[wanted]


def test_a_marked_file_edits_as_the_folder_that_says_so(whole, tmp_path):
    folder = shutil.copytree(whole[2], tmp_path / "folder")
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(V.to_json()))
    marked = write(whole, tmp_path / "marked.safetensors", {KIND: "v"}, {})
    before = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    given = {"images": before, "instructions": "make it night", "seed": 1}
    edited, wanted, epsilon = (load_model(path).edit(**given) for path in (marked, folder, whole[2]))
    assert edited == wanted and np.abs(np.asarray(edited, int) - np.asarray(epsilon)).max() > 30


@pytest.mark.parametrize("name, settings, said", [
    ("UniPCMultistepScheduler", {}, ", sampler euler_ancestral in place of 'UniPCMultistepScheduler'"),
    ("DDIMScheduler", {"clip_sample": True}, ", sampler euler_ancestral in place of 'DDIMScheduler', latents "
     "not clipped (clip_sample)"),
    ("EulerAncestralDiscreteScheduler", {}, "")])
def test_the_line_says_which_sampler_stands_in(name, settings, said, whole, tmp_path):
    folder = shutil.copytree(whole[2], tmp_path / "folder")
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name} | settings))
    assert open_checkpoint(folder).description == f"a diffusers folder, 8 input channels, fp32{said}"


def test_training_from_a_v_model_keeps_the_mark(whole, tmp_path, monkeypatch):
    targets, kinds = [], []

    def model_input(batch, *given):
        inputs = objective.model_input(batch, *given)
        targets.append((inputs["target"], batch["noise"]))
        return inputs

    def loss_weight(*given):
        kinds.append(given[3])
        return objective.loss_weight(*given)

    monkeypatch.setattr(trainer, "model_input", model_input)
    monkeypatch.setattr(trainer, "loss_weight", loss_weight)
    marked = write(whole, tmp_path / "marked.safetensors", {}, {"v_pred": EMPTY, "ztsnr": EMPTY})
    assert train.main(train_runs.words(marked, tmp_path / "run", "--steps", 1, "--tokenizer",
                                       whole[2] / "tokenizer")) == 0
    assert load_model(tmp_path / "run" / "weights").schedule == ZERO_SNR
    assert targets and not any(torch.equal(target, noise) for target, noise in targets)
    assert set(kinds) == {"v_prediction"}

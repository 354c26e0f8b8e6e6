"""The LoRA that makes the student of nano-ip2p: how it is cut, written and merged, and diffusers with it."""

from pathlib import Path

import diffusers
import four_steps
import numpy as np
import pytest
import torch
from comparing import randomise
from tiny_editor import write_tiny_editor

from nanoip2p.checkpoint.load import load_model
from nanoip2p.checkpoint.lora import apply_loras
from nanoip2p.common.files import read_json
from nanoip2p.editor import Editor
from nanoip2p.images import open_image
from nanoip2p.training.distill import STUDENT_DEFAULTS

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of a tiny teacher and of a student with the same config."""
    home = tmp_path_factory.mktemp("models")
    for name in ("teacher", "student"):
        write_tiny_editor(home / name)
    student = load_model(home / "student")
    randomise(student.unet, seed=5)
    four_steps.save_parts(home / "student", student.unet, student.vae, student.text_encoder,
                          student.tokenizer_folder, student.schedule.to_json(), student.defaults)
    return home / "teacher", home / "student"


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_each_change_is_cut_as_well_as_its_rank_allows(models, rank):
    before, after = (load_model(folder).unet for folder in models)
    layers = four_steps.low_rank(before, after, rank)
    old, new = before.state_dict(), after.state_dict()
    assert {f"{name}.weight" for name in layers} == {name for name in new if new[name].ndim > 1}
    for name, (down, up) in layers.items():
        change = (new[f"{name}.weight"] - old[f"{name}.weight"]).flatten(1)
        left = change - up.float() @ down.float().flatten(1)
        smaller = torch.linalg.svdvals(change)[rank:].square().sum().sqrt()  # the least left
        assert len(down) == up.shape[1] == rank
        assert smaller <= left.norm() * 1.001 and left.norm() - smaller < 2e-3 * change.norm(), name


def test_a_whole_lora_makes_the_student(models, tmp_path, capsys):
    (teacher, student), out = models, tmp_path / "whole.safetensors"
    assert four_steps.main([str(student), "--teacher", str(teacher), "--rank", "300", "--out", str(out)]) == 0
    assert "rank 300" in capsys.readouterr().out
    merged = ["--teacher", str(teacher), "--lora", str(out), "--out", str(tmp_path / "merged")]
    assert four_steps.main(merged) == 0 and "rank 300" in capsys.readouterr().out
    merged, wanted, plain = (load_model(folder) for folder in (tmp_path / "merged", student, teacher))
    for name, weight in merged.unet.state_dict().items():
        whole = wanted if weight.ndim > 1 else plain  # biases and norms stay the teacher's
        assert (weight - whole.unet.state_dict()[name]).norm() < 2e-3 * weight.norm() + 1e-6, name
    assert read_json(tmp_path / "merged" / "defaults.json") == plain.defaults | STUDENT_DEFAULTS


def test_bad_input_is_one_line(tmp_path, capsys):
    for words in (["none/here", "--out", str(tmp_path / "l.safetensors")],
                  [str(WEIGHTS / "nano-ip2p-paper"), "--out", str(tmp_path / "l.safetensors")],
                  ["--teacher", "none/here", "--out", str(tmp_path / "folder")]):
        assert four_steps.main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not list(tmp_path.iterdir()), said


def test_diffusers_makes_our_picture_with_the_shipped_lora():
    image = open_image(WEIGHTS / "nano-ip2p" / "examples" / "house.png")
    editor = Editor.load(WEIGHTS / "nano-ip2p", "cpu")
    plain = editor.edit(image, "make it night", seed=7, **STUDENT_DEFAULTS)
    apply_loras(editor, [str(four_steps.LORA)])
    calls = []
    editor.unet.register_forward_hook(lambda unet, given, out: calls.append(len(out)))
    ours = editor.edit(image, "make it night", seed=7, **STUDENT_DEFAULTS)
    assert calls == [1, 1, 1, 1]  # one branch in each of four steps

    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(WEIGHTS / "nano-ip2p")
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(WEIGHTS, weight_name=four_steps.LORA.name)
    theirs = pipeline("make it night", image, num_inference_steps=4, guidance_scale=1.0,
                      generator=torch.Generator().manual_seed(7)).images[0]
    ours, theirs, plain = (np.asarray(picture, int) for picture in (ours, theirs, plain))
    assert np.abs(ours - theirs).max() <= 1 and np.abs(ours - plain).max() > 20

"""The shipped nano weights: their size, opening by diffusers and transformers, the README's edits."""

from functools import partialmethod
from pathlib import Path

import demo
import diffusers
import four_steps
import masks
import numpy as np
import pytest
import round_trip
import torch
import transformers
from comparing import relative_error
from PIL import Image

from nanoip2p.checkpoint.folder import load_network
from nanoip2p.checkpoint.lora import apply_loras
from nanoip2p.clip import CLIP, TextEncoder
from nanoip2p.dataset.pairs import pair_settings
from nanoip2p.editor import Editor
from nanoip2p.evaluate import __main__ as evaluate
from nanoip2p.evaluate import captions
from nanoip2p.evaluate.captions import distinct_scenes
from nanoip2p.evaluate.scenes import choose_edits, score_scenes, table
from nanoip2p.images import to_tensor
from nanoip2p.text_to_image import TextToImage
from nanoip2p.tokenizer import load_tokenizer
from nanoip2p.training.distill import STUDENT_DEFAULTS
from nanoip2p.world.scenes import random_scene

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


def test_small_enough():
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*")
             if path.is_file() and not path.is_symlink() and path.parent.name != "__pycache__"]
    assert 30e6 < sum(sizes) < 45e6


def test_nano_sd_paints_what_nano_clip_reads_and_what_diffusers_paints():
    painter = TextToImage.load(WEIGHTS / "nano-sd", "cpu")
    chosen = pair_settings({}, WEIGHTS / "nano-sd", painter.defaults)
    scenes = distinct_scenes(32)
    args = evaluate.make_parser().parse_args(
        ["captions", "--clip", str(chosen.clip), "--n", "32", "--steps", "4", "--sampler", "dpmpp_2m",
         "--device", "cpu"])
    assert captions.run(args)[1]["generated"] * 32 >= 28

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(WEIGHTS / "nano-sd")
    pipeline.set_progress_bar_config(disable=True)
    caption = scenes[0].caption()
    theirs = pipeline(caption, height=64, width=64, num_inference_steps=5, guidance_scale=3.0,
                      generator=torch.Generator().manual_seed(7)).images[0]
    ours, other = painter.generate([caption, scenes[1].caption()], steps=5, cfg_text=3.0, seed=7)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    assert np.abs(np.asarray(ours, int) - np.asarray(other, int)).max() > 50


@torch.no_grad()
def test_nano_clip_tells_scenes_apart_and_equals_transformers():
    clip, tokenizer = load_network(CLIP, WEIGHTS / "nano-clip"), load_tokenizer(WEIGHTS / "nano-clip")
    scenes = [random_scene("test", index) for index in range(32)]
    pixels = torch.stack([to_tensor(scene.render(64)) for scene in scenes])
    ids = tokenizer([scene.caption() for scene in scenes])
    logits = clip(ids, pixels)
    assert (logits.argmax(1) == torch.arange(32)).float().mean() > 0.75  # one in 32 by chance
    theirs = transformers.CLIPModel.from_pretrained(WEIGHTS / "nano-clip").eval()
    assert relative_error(logits, theirs(input_ids=ids, pixel_values=pixels).logits_per_image) < 1e-5
    assert transformers.CLIPTokenizer.from_pretrained(WEIGHTS / "nano-clip").vocab_size == tokenizer.end + 1


def test_the_editor_reads_with_nano_clips_text_tower():
    clip = load_network(CLIP, WEIGHTS / "nano-clip").text_model.state_dict()
    text = load_network(TextEncoder, WEIGHTS / "nano-ip2p" / "text_encoder").text_model.state_dict()
    assert clip.keys() == text.keys() and all(torch.equal(clip[key], text[key]) for key in clip)


QUICK = {"steps": 4, "sampler": "dpmpp_2m"}  # as good as the defaults, see docs/results.md


@pytest.mark.parametrize("name, lora, least, settings", [
    ("nano-ip2p", [], 0.5, QUICK), ("nano-ip2p", [str(four_steps.LORA)], 0.5, STUDENT_DEFAULTS),
    ("nano-ip2p-paper", [], 0.3, QUICK)], ids=["teacher", "student", "paper"])
def test_editors_edit_scenes_they_never_saw(name, lora, least, settings):
    """Doing nothing scores 0; the README has the figures for 490."""
    editor = Editor.load(WEIGHTS / name, "cpu")
    apply_loras(editor, lora)
    numbers = table(score_scenes(editor, choose_edits(14), settings))[1]
    assert numbers["all"]["success"] > least


def test_demo_draws_its_picture(tmp_path):
    assert demo.main(["--out", str(tmp_path / "demo.png"), "--device", "cpu"]) == 0
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 4 * 192 and picture.height > 4 * 192


def test_demo_that_cannot_write_says_so_before_the_work(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1  # no progress bar


def test_demo_without_weights_is_one_line(tmp_path, capsys):
    assert demo.main(["--weights", str(tmp_path / "none"), "--out", str(tmp_path / "demo.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "demo.png").exists()


def test_masks_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(Editor, "edit", partialmethod(Editor.edit, **QUICK))
    assert masks.main(["--n", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:19].strip() for line in lines[:4]] == ["none", "auto", "true", "auto, blur 4"]
    success, psnr = ({line[5:19].strip(): float(line[19:].replace("%", "").split()[k]) for line in lines[:4]}
                     for k in (0, -2))
    assert success["true"] == 100 and psnr["none"] < psnr["auto"] < psnr["auto, blur 4"] < psnr["true"]
    assert 0.3 < float(lines[4].split()[3].rstrip(":")) <= 1
    assert masks.main(["--weights", "none/here"]) == 2


def test_held_out_scenes_pass_through_the_autoencoder_sharply(tmp_path, capsys):
    assert round_trip.main(["--n", "64", "--out", str(tmp_path / "a.webp")]) == 0
    said = capsys.readouterr().out
    assert float(said.split()[2]) > 34  # dB; 29.5 before its decoder was trained further
    assert Image.open(tmp_path / "a.webp").format == "WEBP"

"""The shipped nano weights: small enough, opened by others too, and able to do what the README shows."""

from pathlib import Path

import torch
import transformers
from helpers import relative_error
from PIL import Image

from nanoip2p import demo
from nanoip2p.clip import CLIP, TextEncoder
from nanoip2p.editor import Editor
from nanoip2p.evaluate import questions, score_scenes, table
from nanoip2p.images import to_tensor
from nanoip2p.network import load_network
from nanoip2p.scenes import random_scene
from nanoip2p.tokenizer import load_tokenizer

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def test_together_under_30_megabytes():
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()]
    assert 1e6 < sum(sizes) < 30e6


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


def test_editor_edits_scenes_it_never_saw():
    editor = Editor.load(WEIGHTS / "nano-ip2p", "cpu")
    numbers = table(score_scenes(editor, questions(21), {"steps": 10}))[1]
    assert numbers["all"]["success"] > 0.5  # doing nothing scores 0; the README has the figure for 500


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

"""The CLIP filter against transformers' CLIPModel, and its four cosines against their definition."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from comparing import relative_error
from PIL import Image
from tiny_editor import write_tiny_clip

from nanoip2p.checkpoint import hub
from nanoip2p.clip_filter import SIMILARITIES, Judge, Thresholds, best, clean_twice, similarities
from nanoip2p.tokenizer import load_tokenizer
from nanoip2p.world.scenes import random_scene

NANO = Path(__file__).parents[2] / "weights" / "nano-clip"
CAPTIONS = ["a cat on a sofa", "a dog under the table"]
PUBLISHED = [  # the files of openai/clip-vit-large-patch14
    ".gitattributes", "README.md", "config.json", "flax_model.msgpack", "merges.txt", "model.safetensors",
    "preprocessor_config.json", "pytorch_model.bin", "special_tokens_map.json", "tf_model.h5",
    "tokenizer.json", "tokenizer_config.json", "vocab.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def pictures(count, size=48, seed=0):
    """Pictures of noise: each way to shrink them gives another result."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def prepared(images, settings, **how):
    """The input of CLIP, as clip_similarity.py of the paper's code computes it from pixels in [0, 1]."""
    pixels = torch.tensor(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    small = torch.nn.functional.interpolate(pixels, size=32, mode="bicubic", align_corners=False, **how)
    mean, std = (torch.tensor(settings[f"image_{name}"])[None, :, None, None] for name in ("mean", "std"))
    return (small - mean) / std


@torch.no_grad()
def peer_features(clip, images, texts, folder):
    """transformers' features of pictures (B, P), prepared as in the paper's code, and of texts (B, P)."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    out = clip(input_ids=ids, pixel_values=prepared(images, settings))
    return out.image_embeds, out.text_embeds


def cosine(a, b):
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def test_features_and_similarities_equal_transformers(folder):
    judge, clip = Judge.load(folder), transformers.CLIPModel.from_pretrained(folder).eval()
    before, after = pictures(3), pictures(3, seed=1)
    image, text = peer_features(clip, before + after, CAPTIONS, folder)
    assert relative_error(judge.encode_pictures(before + after), image) <= 1e-5
    assert relative_error(judge.encode_texts(CAPTIONS), text) <= 1e-5
    assert relative_error(image.roll(1, 0), image) > 1e-2  # the two pictures have different features
    image, text = image.double().numpy(), text.double().numpy()
    first, second, change = image[:3], image[3:], text[1] - text[0]
    expected = np.stack([cosine(first, text[0]), cosine(second, text[1]), cosine(second - first, change),
                         cosine(first, second)], axis=1)
    rows = judge.score(before, after, judge.encode_texts(CAPTIONS))
    assert [tuple(row) for row in rows] == [SIMILARITIES] * 3
    np.testing.assert_allclose([list(row.values()) for row in rows], expected, atol=2e-5)
    assert expected.std(axis=0).min() > 1e-3  # so a swapped row or column is noticed


def test_reads_the_folder_that_transformers_writes(folder, tmp_path):
    """transformers 5 drops prefixes and defaults, writes a tokenizer.json, and writes sizes as objects."""
    clip = transformers.CLIPModel.from_pretrained(folder)
    clip.save_pretrained(tmp_path)
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    shutil.copy(folder / "preprocessor_config.json", tmp_path)
    ours, again = Judge.load(folder), Judge.load(tmp_path)
    assert torch.equal(ours.encode_pictures(pictures(2)), again.encode_pictures(pictures(2)))
    assert torch.equal(ours.encode_texts(CAPTIONS), again.encode_texts(CAPTIONS))


def test_pictures_are_shrunk_as_the_paper_did(folder):
    """Bicubic without antialiasing: the paper's thresholds were chosen with this method."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    ours = Judge.load(folder).prepare(pictures(2))
    assert ours.shape == (2, 3, 32, 32)
    assert relative_error(ours, prepared(pictures(2), settings)) <= 1e-5
    assert relative_error(ours, prepared(pictures(2), settings, antialias=True)) > 0.1


def test_padding_with_zeros_as_openai_does_gives_the_same_features(folder):
    judge = Judge.load(folder)
    ids = judge.tokenizer(CAPTIONS)
    zeros = torch.where((ids == judge.tokenizer.end).cumsum(1) > 1, 0, ids)
    assert (zeros != ids).sum() > 100
    with torch.no_grad():
        assert relative_error(judge.clip.encode_text(zeros), judge.encode_texts(CAPTIONS)) <= 1e-6


@pytest.mark.parametrize("typed, plain", [
    ("it’s a “cat”", "it's a \"cat\""), ("a cat &amp; a dog", "a cat & a dog"), ("a ﬁsh", "a fish"),
    ("a &lt cat &copy", "a < cat ©"), ("<b>a &ldquo;cat</b>", "<b>a “cat</b>"), ("&#38;amp;amp;amp;", "&"),
    ("a <b>&amp;quot;", 'a <b>"')])
def test_captions_are_cleaned_as_by_openai(folder, typed, plain):
    """Compared with the ids of SimpleTokenizer, clip-anytorch 2.6.0; test_tokenizer.py compares with ftfy."""
    assert clean_twice(typed) == plain
    judge = Judge.load(folder)
    raw = load_tokenizer(folder)
    raw.clean = str
    assert torch.equal(judge.tokenizer([typed]), raw([plain])) and not torch.equal(raw([typed]), raw([plain]))


def test_no_change_has_no_direction():
    features = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=-1)
    a, b, text_a, text_b = features
    assert similarities(a, a, text_a, text_b)[:, 2].tolist() == [0, 0]
    assert similarities(a, b, text_a, text_a)[:, 2].tolist() == [0, 0]
    torch.testing.assert_close(similarities(a, a, text_a, text_a)[:, 3], torch.ones(2))
    opposite = similarities(a, b, text_a, text_b) + similarities(b, a, text_a, text_b)
    torch.testing.assert_close(opposite[:, 2], torch.zeros(2))


def scores(before=0.2, after=0.2, direction=0.2, image=0.7, seed=0):
    """The scores of a pair that just passes."""
    return dict(zip(SIMILARITIES, (before, after, direction, image))) | {"seed": seed}


@pytest.mark.parametrize("change, reasons", [
    ({}, []),
    ({"before": 0.1999}, ["clip_sim_0"]),
    ({"after": 0.1999}, ["clip_sim_1"]),
    ({"direction": 0.1999}, ["clip_sim_dir"]),
    ({"image": 0.6999}, ["clip_sim_image"]),
    ({"direction": float("nan"), "image": -1.0}, ["clip_sim_dir", "clip_sim_image"]),
])
def test_thresholds_are_the_papers_and_inclusive(change, reasons):
    assert Thresholds().reasons(scores(**change)) == reasons
    assert Thresholds(-1, -1, -1).reasons(scores(before=-1, after=-1, direction=-1, image=-1)) == []


def test_best_directions_are_kept_of_all():
    rows = [(scores(direction=d, seed=s), s) for d, s in
            [(0.3, 1), (0.9, 2), (0.2, 3), (0.5, 4), (0.5, 5), (0.8, 6)]]
    assert [name for _, name in best(rows, 4)] == [2, 6, 5, 4]
    assert best(rows, 9)[-1][1] == 3 and best([], 4) == []


@pytest.mark.parametrize("damage, named", [
    (lambda path: (path / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    (lambda path: (path / "preprocessor_config.json").write_text("{}"), "image_mean"),
    (lambda path: (path / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0], "image_std": [1, 0, 1]}'), "image_std"),
    (lambda path: (path / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0], "image_std": [1, 1]}'), "three colours"),
    (lambda path: (path / "vocab.json").unlink(), "vocab.json"),
    (lambda path: (path / "model.safetensors").write_bytes(b"PK"), "model.safetensors"),
    (lambda path: shutil.copy(NANO / "vocab.json", path) and shutil.copy(NANO / "merges.txt", path),
     "tokenizer"),
])
def test_broken_folders_are_one_line(folder, tmp_path, damage, named):
    copy = shutil.copytree(folder, tmp_path / "clip")
    damage(copy)
    with pytest.raises(ValueError, match=named) as error:
        Judge.load(copy)
    assert "\n" not in str(error.value)


def test_only_what_is_read_is_fetched_from_the_hub(folder, monkeypatch):
    """A fake library replaces the Hub; test_hub.py tests the download itself."""
    wanted = {"config.json", "preprocessor_config.json", "model.safetensors", "vocab.json", "merges.txt",
              "tokenizer_config.json", "special_tokens_map.json"}
    assert set(hub.clip_files(PUBLISHED)) == wanted
    bins = [name for name in PUBLISHED if name != "model.safetensors"]
    assert "pytorch_model.bin" in hub.clip_files(bins)
    for name in ("config.json", "preprocessor_config.json"):
        assert hub.clip_files([other for other in PUBLISHED if other != name]) == []
    asked = []
    siblings = [SimpleNamespace(rfilename=name) for name in PUBLISHED]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info",
                        lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda repo, allow_patterns, **_: asked.append((repo, set(allow_patterns))) or folder)
    judge = Judge.load(hub.CLIP)
    assert asked == [("openai/clip-vit-large-patch14", wanted)]
    assert judge.encode_texts(CAPTIONS).shape == (2, 16)
    with pytest.raises(ValueError, match="nowhere"):
        Judge.load("nowhere")


def test_nano_clip_sees_which_way_an_edit_goes():
    """True edits of the nano world score higher than the reversed edits, and than no edit."""
    judge = Judge.load(NANO)
    forth, back = [], []
    for i in range(16):
        scene = random_scene("test", i)
        edit = scene.edits()[i * 7 % len(scene.edits())]
        captions = judge.encode_texts([scene.caption(), edit.caption])
        before, after = scene.render(64), edit.scene.render(64)
        rows = judge.score([before, after], [after, before], captions)
        forth.append(rows[0]["clip_sim_dir"])
        back.append(rows[1]["clip_sim_dir"])
    assert np.mean(forth) > 0.3 and np.allclose(forth, -np.array(back), atol=1e-4)

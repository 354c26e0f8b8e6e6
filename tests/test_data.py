"""Pairs from scenes and from the original's folder layout, encoded once, in a reproducible order."""

import json

import pytest
import torch
from PIL import Image
from tiny_editor import write_tiny_editor

from nanoip2p.checkpoint import load_parts
from nanoip2p.data import (
    Pair,
    batch_rows,
    captioned_scenes,
    encode_pairs,
    encoded_pairs,
    folder_pairs,
    load_picture,
    order,
    scene_pairs,
)
from nanoip2p.images import to_tensor
from nanoip2p.scenes import EDIT_KINDS, random_scene


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return load_parts(write_tiny_editor(tmp_path_factory.mktemp("tiny")))


def write_folder(root, prompts=20, seeds=("11", "22")):
    """The original's layout: gradients as pictures, prompt 1 without survivors."""
    listed = []
    for number in range(prompts):
        folder = root / f"{number:07d}"
        folder.mkdir(parents=True)
        prompt = {"input": "a", "edit": f"edit {number}", "output": "b"}
        (folder / "prompt.json").write_text(json.dumps(prompt))
        kept = [] if number == 1 else list(seeds)
        for seed in kept:
            for part in "01":
                Image.linear_gradient("L").resize((40, 32)).save(folder / f"{seed}_{part}.jpg")
        listed.append([folder.name, kept])
    (root / "seeds.json").write_text(json.dumps(listed))
    return root


def test_scene_pairs_are_true_edits_in_seen_phrasings():
    pairs = scene_pairs(40, "train")
    assert len(pairs) == 40 and pairs == scene_pairs(40, "train") != scene_pairs(40, "validation")
    for i, pair in enumerate(pairs):
        assert pair.before == random_scene("train", i // 4)
        edit = next(edit for edit in pair.before.edits() if edit.scene == pair.after)
        assert pair.edit in edit.instructions[:-1]


def test_scene_pairs_follow_the_odds():
    odds = tuple(float(kind == "ground") for kind in EDIT_KINDS)
    for pair in scene_pairs(12, weights=odds):
        assert pair.before.ground != pair.after.ground


def test_captioned_scenes_show_what_edits_lead_to_and_never_repeat_themselves():
    pairs = captioned_scenes(200)
    assert [pair.after for pair in pairs[::2]] == [random_scene("train", 2 * i) for i in range(100)]
    assert all(pair.before == pair.after and pair.edit == pair.after.caption() for pair in pairs)
    assert any(not pair.after.things for pair in pairs)  # an empty place, to which only removing leads
    assert captioned_scenes(50) == pairs[:50] and len(set(pairs)) == 200
    assert not {pair.after for pair in captioned_scenes(50, "validation")} & {pair.after for pair in pairs}


def test_folder_is_split_contiguously_and_skips_prompts_without_pictures(tmp_path):
    root = write_folder(tmp_path)
    train, validation, test = (folder_pairs(root, split) for split in ("train", "validation", "test"))
    assert [pair.edit for pair in train[:3]] == ["edit 0", "edit 0", "edit 2"]
    assert len(train) == 2 * 17
    assert [pair.edit for pair in validation + test] == ["edit 18"] * 2 + ["edit 19"] * 2
    assert train[0] == Pair(root / "0000000" / "11_0.jpg", "edit 0", root / "0000000" / "11_1.jpg")


def test_a_handful_of_prompts_can_be_trained_on_without_validation(tmp_path):
    root = write_folder(tmp_path, prompts=5)
    assert len(folder_pairs(root)) == 2 * 3 and folder_pairs(root, "validation", may_be_empty=True) == []
    with pytest.raises(ValueError, match="validation"):
        folder_pairs(root, "validation")


@pytest.mark.parametrize("breakage, named", [
    (lambda root: (root / "seeds.json").unlink(), "seeds.json"),
    (lambda root: (root / "seeds.json").write_text("{"), "seeds.json"),
    (lambda root: (root / "0000003" / "prompt.json").unlink(), "prompt.json"),
    (lambda root: (root / "0000003" / "prompt.json").write_text("{}"), "edit"),
    (lambda root: (root / "seeds.json").write_text("[]"), "no pairs"),
])
def test_broken_folders_are_named_in_one_line(tmp_path, breakage, named):
    root = write_folder(tmp_path)
    breakage(root)
    with pytest.raises(ValueError, match=named) as error:
        folder_pairs(root)
    assert "\n" not in str(error.value)


def test_pictures_keep_their_aspect(tmp_path):
    wide = Image.new("RGB", (80, 40), "red")
    wide.paste("blue", (20, 0, 60, 40))  # the middle square
    wide.save(tmp_path / "wide.png")
    square = load_picture(tmp_path / "wide.png", 16)
    assert square.size == (16, 16)
    assert square.crop((4, 0, 12, 16)).getcolors() == [(128, (0, 0, 255))]  # Lanczos blurs the sides a little


def test_encoding_stores_each_picture_and_sentence_once(parts):
    pairs = scene_pairs(8)
    data = encode_pairs(pairs, parts.vae, parts.text_encoder, parts.tokenizer, 32, batch=3)
    assert len(data["moments"]) == len({pair.before for pair in pairs} | {pair.after for pair in pairs})
    assert len(data["texts"]) == 1 + len({pair.edit for pair in pairs})
    before, after, text = data["rows"][5]
    for picture, row in ((pairs[5].before, before), (pairs[5].after, after)):
        with torch.no_grad():
            mean, logvar = parts.vae.encode(to_tensor(picture.render(32))[None])
        moments = torch.cat([mean, logvar], 1)[0]
        torch.testing.assert_close(data["moments"][row].float(), moments, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        for row, sentence in ((text, pairs[5].edit), (0, "")):
            states = parts.text_encoder(parts.tokenizer([sentence]))[0]
            torch.testing.assert_close(data["texts"][row].float(), states, rtol=2e-3, atol=2e-3)


def test_stored_encodings_are_used_again_for_the_same_pairs_and_networks_only(parts, tmp_path, monkeypatch):
    arguments = (tmp_path / "encoded", parts.vae, parts.text_encoder, parts.tokenizer)
    first = encoded_pairs(scene_pairs(4), *arguments, 32)
    calls = []
    monkeypatch.setattr("nanoip2p.data.encode_pairs", lambda *_: calls.append(1) or {"x": torch.zeros(1)})
    again = encoded_pairs(scene_pairs(4), *arguments, 32)
    assert not calls and all(torch.equal(first[key], again[key]) for key in first)
    encoded_pairs(scene_pairs(3), *arguments, 32)
    encoded_pairs(scene_pairs(4), *arguments, 16)
    pictured = [Pair(tmp_path / "a.png", "x", tmp_path / "a.png")]
    for colour in ("red", "blue"):  # the same file, changed
        Image.new("RGB", (32, 32 if colour == "red" else 40), colour).save(tmp_path / "a.png")
        encoded_pairs(pictured, *arguments, 32)
    with torch.no_grad():
        parts.vae.quant_conv.bias += 1
    encoded_pairs(scene_pairs(4), *arguments, 32)
    assert len(calls) == 5


def test_every_epoch_visits_every_pair_once_in_its_own_order():
    rows = torch.cat([batch_rows(seed=5, step=step, batch=4, count=10) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() == order(5, 0, 10).tolist() != rows[10:].tolist()
    assert batch_rows(5, 0, 4, 10).tolist() != batch_rows(6, 0, 4, 10).tolist()

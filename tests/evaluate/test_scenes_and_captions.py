"""The metrics: a perfect editor scores 100%, an idle editor 0%, and PSNR follows its formula."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_editor import write_tiny_editor

from nanoip2p.evaluate import __main__ as evaluate
from nanoip2p.evaluate import captions, scenes
from nanoip2p.evaluate.captions import distinct_scenes, ranked_first
from nanoip2p.evaluate.scenes import (
    choose_edits,
    instruct,
    nearest_edit,
    rate,
    score_scenes,
    table,
    unchanged_psnr,
)
from nanoip2p.world.scenes import EDIT_KINDS, held_out, random_scene

ASKED = choose_edits(21)


def editor_that(answers):
    """An editor without networks: `answers(scene, edit)` is its picture."""
    pending, seeds = iter(ASKED), []

    def edit(images, texts, seed, batch):
        seeds.append(seed)
        return [answers(*question) for _, question in zip(images, pending)]

    return SimpleNamespace(side=64, edit=edit, seeds=seeds)


def test_questions_are_fixed_and_of_every_kind():
    assert choose_edits(21) == ASKED
    assert [edit.kind for _, edit in ASKED] == list(EDIT_KINDS) * 3
    assert all(edit in scene.edits() for scene, edit in ASKED)


def test_questions_about_combinations_that_training_may_or_may_not_see():
    for combinations in ("seen", "held-out"):
        asked = choose_edits(28, combinations)
        assert len({scene for scene, _ in asked}) == 28
        assert [edit.kind for _, edit in asked] == list(EDIT_KINDS) * 4
        assert {held_out(scene, edit) for scene, edit in asked} == {combinations == "held-out"}


@pytest.fixture(autouse=True)
def perfect_autoencoder(monkeypatch):
    monkeypatch.setattr(scenes, "round_trip", lambda editor, picture: picture)


def test_perfect_editor_scores_everything(monkeypatch):
    monkeypatch.setattr(scenes, "BATCH", 8)
    editor = editor_that(lambda scene, edit: edit.scene.render(64))
    rows = score_scenes(editor, ASKED, {})
    assert editor.seeds == [0, 8, 16]  # no two edits have the same noise
    used = {edit.instructions.index(row["instruction"]) for row, (_, edit) in zip(rows, ASKED)}
    assert used == {18, 19}  # both held-out phrasings
    text, numbers = table(rows)
    assert numbers["all"]["success"] == 1 and numbers["all"]["n"] == 21 and "100.0%" in text
    assert "± 0.0%" not in text  # 21 of 21 leave room for doubt
    assert all(numbers[kind]["n"] == 3 for kind in EDIT_KINDS)
    assert numbers["all"]["psnr"] == numbers["all"]["ceiling"] > 70


def test_wordings():
    edits = [edit for _, edit in choose_edits(70)]
    texts = {wordings: instruct(edits, wordings)
             for wordings in ("held-out", "plain", "polite", "seen", "reworded")}
    assert texts == {wordings: instruct(edits, wordings) for wordings in texts}
    assert texts["plain"] == [edit.instructions[-1] for edit in edits]
    assert texts["polite"] == [edit.instructions[-2] for edit in edits]
    both = list(zip(texts["plain"], texts["polite"]))  # seven edits of seven kinds, then the next phrasing
    assert texts["held-out"] == [pair[i // 7 % 2] for i, pair in enumerate(both)]
    assert all(text in edit.seen_instructions for text, edit in zip(texts["seen"], edits))
    assert len({edit.instructions.index(text) for text, edit in zip(texts["seen"], edits)}) == 18
    assert 10 < sum(a != b for a, b in zip(texts["seen"], texts["reworded"])) < 60


def test_editor_that_does_nothing_scores_nothing():
    rows = score_scenes(editor_that(lambda scene, edit: scene.render(64)), ASKED, {})
    assert table(rows)[1]["all"]["success"] == 0


def test_nearest_edit_stands_noise_and_names_the_neighbour():
    scene = random_scene("test", 3)
    noise = np.random.default_rng(0).normal(0, 12, (64, 64, 3))
    for edit in scene.edits()[::7]:
        noisy = np.asarray(edit.scene.render(64)) + noise
        assert nearest_edit(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), scene) == edit.scene
    assert nearest_edit(scene.render(64), scene) == scene


def test_unchanged_psnr_looks_at_common_pixels_only():
    before, after, picture = (np.full((10, 10, 3), 100, np.uint8) for _ in range(3))
    after[:9] = 200                      # the edit; a tenth of the picture is common
    picture[:9], picture[9:] = 0, 110    # wrong where it changes, off by 10 where it should not
    psnr = unchanged_psnr(*map(Image.fromarray, (picture, before, after)))
    assert psnr == pytest.approx(20 * math.log10(255 / 10))
    after[:], after[0, :4] = 200, 100    # 4% are common
    assert unchanged_psnr(*map(Image.fromarray, (picture, before, after))) is None


def test_command_prints_a_table_and_keeps_scores_and_failures(tmp_path, capsys):
    weights = write_tiny_editor(tmp_path / "tiny")
    words = ["scenes", "--weights", str(weights), "--n", "7", "--steps", "1", "--out", str(tmp_path / "out"),
             "--device", "cpu"]
    assert evaluate.main(words) == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in EDIT_KINDS)
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["all"]["n"] == 7
    assert Image.open(tmp_path / "out" / "failed.png").width > 64  # random weights do fail


def test_a_full_disk_leaves_the_old_failures_and_no_new_scores(tmp_path, monkeypatch, capsys):
    def full(image, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "failed.png").write_bytes(b"old")
    row = {"success": False, "pictures": [Image.new("RGB", (8, 8))] * 3, "instruction": "a"}
    monkeypatch.setattr(scenes.Editor, "load", lambda *_: None)
    monkeypatch.setattr(scenes, "score_scenes", lambda *_: [row])
    monkeypatch.setattr(Image.Image, "save", full)
    assert evaluate.main(["scenes", "--out", str(tmp_path)]) == 2
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_missing_weights_are_one_line(tmp_path, capsys):
    assert evaluate.main(["scenes", "--weights", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_captions_differ():
    found = distinct_scenes(500)  # some of the first 500 scenes share a caption
    assert len(found) == len({scene.caption() for scene in found}) == 512 and distinct_scenes(1) == found[:32]


class OneHotJudge:
    """Sees in a picture's grey level, and reads in a caption, a number from 0 to 31."""

    def encode_pictures(self, pictures):
        return torch.eye(32)[[picture.getpixel((0, 0))[0] for picture in pictures]]

    def encode_texts(self, captions):
        return torch.eye(32)[[int(caption) for caption in captions]]


def test_a_caption_is_found_among_those_of_its_group():
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    seen = [*order, *order[:30], order[31], order[31]]  # the last two pictures show one thing
    pictures = [Image.new("RGB", (8, 8), (number,) * 3) for number in seen]
    hits = ranked_first(OneHotJudge(), pictures, [str(number) for number in order * 2])
    assert hits == [True] * 62 + [False, True]
    assert rate(hits)[0] == 63 / 64 and 0.01 < rate(hits)[1] < 0.05


def test_true_renders_score_next_to_painted_ones(monkeypatch, tmp_path, capsys):
    class Painter:
        defaults, device = {"resolution": 64}, "cpu"

        def generate(self, captions, seed, batch, **settings):
            return [Image.new("RGB", (64, 64), "grey")] * len(captions)

    monkeypatch.setattr(captions.TextToImage, "load", lambda *_: Painter())
    clip = str(Path(__file__).resolve().parents[2] / "weights" / "nano-clip")
    assert evaluate.main(["captions", "--clip", clip, "--n", "32", "--out", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["generated"] == 1 / 32 and scores["true renders"] > 0.9 and scores["n"] == 32
    assert "3.1%" in capsys.readouterr().out

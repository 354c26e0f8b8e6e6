"""MagicBrush's metrics on a small dataset in its layout: by hand, and against transformers' CLIP."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_editor import write_tiny_clip, write_tiny_editor

from nanoip2p.clip_filter import Judge
from nanoip2p.dataset.layouts import Pair
from nanoip2p.editor import Editor
from nanoip2p.evaluate import __main__ as evaluate
from nanoip2p.evaluate.magicbrush import COLUMNS, clip_view, read_sessions, score

# Grey levels of the pictures of each session: the input, and what the dataset has after each turn
LEVELS = {"12": (0, 51, 153), "7": (102, 0)}


def write_split(root):
    """The folder of a split, whose true pictures are of another size than the inputs."""
    turns, captions = [], {}
    for name, levels in LEVELS.items():
        (root / "images" / name).mkdir(parents=True)
        names = [f"{name}-input.png", *(f"{name}-output{i}.png" for i in range(1, len(levels)))]
        for i, level in enumerate(levels):
            Image.new("RGB", (16, 24) if i else (8, 12), (level,) * 3).save(root / "images" / name / names[i])
        turns += [
            {"input": before, "mask": "", "output": after, "instruction": f"turn {i} of {name}"}
            for i, (before, after) in enumerate(zip(names, names[1:]), 1)]
        captions[name] = {picture: str(level) for picture, level in zip(names, levels)}
    (root / "edit_turns.json").write_text(json.dumps(turns))
    (root / "global_descriptions.json").write_text(json.dumps(captions))
    return root


class Brighter:
    """An editor that adds 51 to every level."""

    defaults = {"resolution": 64, "steps": 3, "cfg_text": 2.0, "cfg_image": 1.5, "sampler": "ddim"}

    def __init__(self):
        self.device, self.asked = "cpu", []

    def fill_defaults(self, settings):
        return {key: self.defaults[key] if value is None else value for key, value in settings.items()}

    def edit(self, image, instruction, **settings):
        self.asked.append(instruction)
        return image.point(lambda level: level + 51)


class Levels:
    """A judge to whom grey level 51 k, seen or read, is a unit vector at an angle of 30 k degrees."""

    clip = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=6)))

    def encode_texts(self, texts):
        angles = torch.tensor([int(text) / 51 for text in texts]) * torch.pi / 6
        return torch.stack([angles.cos(), angles.sin()], 1)

    def encode_pictures(self, pictures):
        assert {picture.size for picture in pictures} == {(6, 6)}
        return self.encode_texts([str(picture.getpixel((0, 0))[0]) for picture in pictures])


@pytest.fixture
def brighter(monkeypatch):
    editor = Brighter()
    monkeypatch.setattr(Editor, "load", lambda *_: editor)
    monkeypatch.setattr(Judge, "load", lambda *_: Levels())
    return editor


def command(root, *more):
    return evaluate.main(["magicbrush", "--data", str(root / "dev"), "--out", str(root / "out"), *more])


def test_scores_by_hand(tmp_path, brighter, capsys):
    write_split(tmp_path / "dev")
    assert command(tmp_path, "--seed", "5", "--steps", "4") == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    # Session 12: 0 -> 51, which is right; then of the dataset's 51, or of its own, 102 where 153 is right.
    # Session 7: 102 -> 153 where 0 is right.
    cos = [np.cos(np.pi / 6 * k) for k in range(4)]
    rows = [(0, 0, cos[0], cos[0]), (0.2, 0.04, cos[1], cos[1]), (0.6, 0.36, cos[3], cos[3])]
    for way, chosen in (("single-turn", rows), ("multi-turn", rows[1:])):
        found = scores[way]
        assert found.pop("n") == len(chosen) and found.pop("clip_t_truth") == pytest.approx(1)
        assert list(found.values()) == pytest.approx(np.mean(chosen, 0), abs=1e-6)
        assert list(found) == ["l1", "l2", "clip_i", "clip_t"]
    settings = {"steps": 4, "cfg_image": 1.5, "seed": 5, "weights": "weights/nano-ip2p"}
    assert settings.items() <= scores.items() and scores["clip"] == "openai/clip-vit-base-patch32"
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["single-turn", "3", "0.2667", "0.1333", "0.6220", "0.6220", "1.0000"]
    assert printed[2].split()[:3] == ["multi-turn", "2", "0.4000"] and printed[3].endswith("patch32")


def test_multi_turn_edits_its_own_pictures(tmp_path, brighter, monkeypatch):
    write_split(tmp_path / "dev")
    monkeypatch.setattr(brighter, "edit", lambda image, *_, **__: image.point(lambda level: 255 - level // 3))
    assert command(tmp_path) == 0
    levels = {path.stem: Image.open(path).getpixel((0, 0))[0] for path in (tmp_path / "out").rglob("*.png")}
    assert levels == {"12_1": 255, "12_inde_2": 255 - 17, "12_iter_2": 255 - 85, "7_1": 255 - 34}
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["multi-turn"]
    assert scores["l1"] == pytest.approx(((170 - 153) + (221 - 0)) / 2 / 255)


def test_the_first_sessions(tmp_path, brighter):
    write_split(tmp_path / "dev")
    assert command(tmp_path, "--n", "1") == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["single-turn"]["n"], scores["multi-turn"]["n"]) == (2, 1)
    assert brighter.asked == ["turn 1 of 12", "turn 2 of 12", "turn 2 of 12"]  # the first turn serves both


def change(name, **entries):
    def broken(root):
        content = json.loads((root / name).read_text())
        if isinstance(content, list):
            content[-1] |= entries
        else:
            content |= entries
        (root / name).write_text(json.dumps(content))
    return broken


BROKEN = {
    "no folder": (shutil.rmtree, "there is no "),
    "no turns": (lambda root: (root / "edit_turns.json").unlink(), "is no training data"),
    "an object": (lambda root: (root / "edit_turns.json").write_text("{}"), "holds a JSON dict"),
    "nothing": (lambda root: (root / "edit_turns.json").write_text("[]"), "has no pairs"),
    "no picture": (lambda root: (root / "images/7/7-output1.png").unlink(), "7-output1.png (pairs"),
    "no captions": (lambda root: (root / "global_descriptions.json").unlink(), "no caption of 12-input.png"),
    "no caption": (change("global_descriptions.json", **{"12": {}}), "no caption of 12-input.png"),
    "a number": (change("global_descriptions.json", **{"7": {"7-output1.png": 3}}), "or 7-output1.png"),
    "no text": (change("edit_turns.json", instruction=None), 'no text under "instruction"'),
    "no name": (change("edit_turns.json", input=1), 'no text under "input"'),
    "a name above": (change("edit_turns.json", input="../../victim/x"), "is not a file inside"),
    "a path": (change("edit_turns.json", input="/etc/hostname"), "is not a file inside"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_layout_is_one_line(name, tmp_path, brighter, capsys):
    write_split(tmp_path / "dev")
    break_it, message = BROKEN[name]
    break_it(tmp_path / "dev")
    assert command(tmp_path) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed and not brighter.asked


@pytest.mark.parametrize("size", [(90, 60), (48, 75), (32, 32), (20, 31)])
def test_clip_scores_are_those_of_transformers(size, tmp_path):
    """Their processor, too, scales the short side and cuts the middle, rounding alike for these sizes."""
    folder = write_tiny_clip(tmp_path / "clip")
    chance = np.random.default_rng(0)
    pictures = [Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))
                for width, height in ((40, 45), size)]
    truth, caption = tmp_path / "truth.png", "a cat on a sofa"
    pictures[1].save(truth)
    pair = Pair(truth, "add a cat", truth, ("a sofa", caption))
    found = dict(zip(COLUMNS, score(Judge.load(folder), pictures[0], pair)))

    model, tokenizer = (kind.from_pretrained(folder) for kind in (
        transformers.CLIPModel, transformers.CLIPTokenizer))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    processor = transformers.CLIPImageProcessorPil(**settings, crop_size=32)
    with torch.no_grad():
        output = model(pixel_values=processor(pictures, return_tensors="pt")["pixel_values"],
                       **tokenizer([caption], padding="max_length", return_tensors="pt"))
    edited, truth = output.image_embeds
    [text] = output.text_embeds
    expected = [edited @ truth, edited @ text, truth @ text]
    assert [found[key] for key in ("clip_i", "clip_t", "clip_t_truth")] == pytest.approx(
        [float(value) for value in expected], abs=1e-5)
    edited, truth = (np.asarray(picture, float) for picture in (pictures[0].resize(size), pictures[1]))
    difference = (edited - truth) / 255
    assert found["l1"] == pytest.approx(np.abs(difference).mean(), rel=1e-5)
    assert found["l2"] == pytest.approx((difference**2).mean(), rel=1e-5)


def test_the_middle_is_cut_as_openai_does():
    wide = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(4, 9).repeat(3).reshape(4, 9, 3))
    assert np.array_equal(np.asarray(clip_view(wide, 4)), np.asarray(wide)[:, 2:6])  # 2.5 rounds to even


def test_sessions_keep_the_order_of_the_dataset(tmp_path):
    sessions = read_sessions(write_split(tmp_path / "dev"))
    assert list(sessions) == ["12", "7"]
    assert [[pair.captions[1] for pair in session] for session in sessions.values()] == [["51", "153"], ["0"]]


def test_as_a_command_with_real_networks(tmp_path, capsys):
    write_split(tmp_path / "dev")
    words = ["--weights", str(write_tiny_editor(tmp_path / "tiny")), "--steps", "1", "--device", "cpu",
             "--clip", str(write_tiny_clip(tmp_path / "clip"))]
    assert command(tmp_path, *words) == 0
    assert json.loads((tmp_path / "out/scores.json").read_text())["multi-turn"]["n"] == 2
    assert len(list((tmp_path / "out/edited").rglob("*.png"))) == 4

"""The words that a pair of captions changes, the leakage of a pair, and `--blend auto`."""

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_editor import write_tiny_painter

from nanoip2p import prompt_to_prompt
from nanoip2p.dataset import changes
from nanoip2p.dataset.changes import MeasuredPainter, changed_words, leakage
from nanoip2p.prompt_to_prompt import PairPainter, find_words
from nanoip2p.text_to_image import TextToImage
from nanoip2p.tokenizer import load_tokenizer

NANO = Path(__file__).parents[2] / "weights" / "nano-ip2p" / "tokenizer"
CLIP = Path(__file__).resolve().parents[3] / "shared" / "clip-tokenizer"
SEEDS, SHARES, GUIDANCE = [5, 6, 7], [0.3, 1.0, 0.6], [7.5, 1.0, 3.0]


@pytest.fixture(scope="module", params=[NANO, pytest.param(CLIP, marks=pytest.mark.skipif(
    not CLIP.is_dir(), reason="CLIP's vocabulary is not in the project"))], ids=["nano", "clip"])
def tokenizer(request):
    return load_tokenizer(request.param)


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return TextToImage.load(write_tiny_painter(tmp_path_factory.mktemp("weights") / "painter"), "cpu")


@pytest.mark.parametrize("source, edit, gone, new", [
    ("a red house", "a blue house", ["red"], ["blue"]),
    ("a cat on a sofa", "a skyscraper on a sofa", ["cat"], ["skyscraper"]),
    ("a house, clear day", "a house and a small tree, clear day", [], ["small", "tree"]),
    ("a house and a tree, clear day", "a tree, clear day", ["house"], []),
    ("a red house and a red tree", "a blue house and a red tree", ["red"], ["blue"]),
    ("a cat and a cat", "a cat", ["cat"], []),
    ("a dog", "an extraordinarily old dog", [], ["extraordinarily", "old"]),
    ("a car", "a car, at night", [], ["night"]),
    ("the car", "a car", ["the"], ["a"]),  # fillers count if nothing else changed
    ("a car on sand", "a car, sand", ["on"], [","]),
    ("a photo of a house", "A  Photo of a house", [], []),
    ("", "", [], []), ("", "a cat", [], ["cat"]),
    ("house " * 75 + "red", "house " * 75 + "blue", [], []),  # cut off
    ("house " * 74 + "red", "house " * 74 + "blue", ["red"], ["blue"]),  # the last token that fits
    ("blue " + "house " * 90, "red " + "house " * 90, ["blue"], ["red"]),
])
def test_words_that_differ(tokenizer, source, edit, gone, new):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that are too long
        found = changed_words(tokenizer, source, edit)
        assert [[word for word, _ in side] for side in found] == [gone, new]
        for text, side in zip((source, edit), found):
            for word, tokens in side:
                assert tokens and set(tokens) <= set(find_words(tokenizer, text, word))


def test_the_repeated_word_that_changed_is_the_one_that_is_named(tokenizer):
    for k, place in enumerate(("a {} house", "a red house and a {} tree", "red red {} red tree")):
        source, edit = (place.format(word) for word in ("red", "blue"))
        [(_, tokens)], [(_, new)] = changed_words(tokenizer, source, edit)
        assert new == find_words(tokenizer, edit, "blue"), k
        if k < 2:
            assert tokens == new  # in the last, any of three alike may be meant


def test_the_reverse_edit_changes_as_much_and_fillers_never_beside_others(tokenizer):
    draw, words = random.Random(0), "a the and on red blue house tree skyscraper , extraordinarily".split()
    fillers = {"a", "the", "and", "on", ","}
    for _ in range(100):
        source, edit = ([draw.choice(words) for _ in range(draw.randrange(7))] for _ in range(2))
        forth = changed_words(tokenizer, " ".join(source), " ".join(edit))
        names = [[word for word, _ in side] for side in forth]
        assert any(forth) == (source != edit)
        assert not (set(sum(names, [])) & fillers and set(sum(names, [])) - fillers)
        for text, side in ((source, names[0]), (edit, names[1])):
            assert all(side.count(word) <= text.count(word) for word in side)
        for word in {*source, *edit} - fillers:  # every word that one has more often
            assert (names[0] + names[1]).count(word) >= abs(source.count(word) - edit.count(word))


def picture(values):
    return Image.fromarray(np.asarray(values, np.uint8))


def test_leakage_by_hand():
    """0 for a change inside only, 1 for the same everywhere; a ratio of means, of any size or sign."""
    before, region = np.full((8, 8, 3), 100), torch.zeros(1, 8, 8, dtype=torch.bool)
    region[:, :4, :4] = True
    inside = before.copy()
    inside[:4, :4] += 80
    assert leakage(picture(before), picture(inside), region) == 0
    assert leakage(picture(before), picture(before + 50), region) == pytest.approx(1)
    assert leakage(picture(before), picture(before), region) == 0
    both = inside.copy()
    both[4:] -= 12  # of the 48 pixels outside, 32
    assert leakage(picture(before), picture(both), region) == pytest.approx(8 / 80, rel=1e-5)
    assert leakage(picture(both), picture(before), region) == pytest.approx(8 / 80, rel=1e-5)
    turned = (picture(np.rot90(image)) for image in (before, both))
    assert leakage(*turned, torch.rot90(region, dims=(1, 2))) == pytest.approx(8 / 80, rel=1e-5)
    assert leakage(picture(before), picture(before + ~region[0, ..., None].numpy() * 9), region) < np.inf
    for nothing in (torch.zeros_like(region), torch.ones_like(region)):
        assert leakage(picture(before), picture(both), nothing) is None


def heat_in_a_corner(monkeypatch, side=2):
    """Maps that are hot in `side` x `side` positions for the edit of pair 0, everywhere for other pairs."""
    sample = PairPainter.sample

    def with_heat(self, *given):
        latents, maps = sample(self, *given)
        maps[:], maps[0] = 1, 0
        maps[len(given[0])] = 0
        maps[0, :, :side, :side] = 1
        return latents, maps
    monkeypatch.setattr(PairPainter, "sample", with_heat)


@pytest.mark.parametrize("inject", prompt_to_prompt.MODES)
def test_a_measured_pair_is_the_painted_one(painter, inject, monkeypatch):
    captions = "a red house", "a blue house"
    model = MeasuredPainter(painter, *captions, inject, 3, "euler", 64)
    pairs, notes = model.measure(SEEDS, SHARES, GUIDANCE)
    assert pairs == PairPainter(painter, *captions, inject, 3, "euler", 64).paint(SEEDS, SHARES, GUIDANCE)
    heat_in_a_corner(monkeypatch)
    notes = model.measure(SEEDS, SHARES, GUIDANCE)[1]
    height = 64 // model.coarse[0] * 3  # with one position more, of the max-pooling
    change = np.abs(np.asarray(pairs[0][0], float) - np.asarray(pairs[0][1]))
    inside = change[:height, :height].mean()
    outside = (change.sum() - change[:height, :height].sum()) / (change.size - 3 * height**2)
    assert notes == [{"leakage": pytest.approx(outside / inside, rel=1e-4)}, *[{"leakage": None}] * 2]


@pytest.mark.parametrize("inject", prompt_to_prompt.MODES)
def test_auto_blends_where_the_words_are_and_no_pair_depends_on_another(painter, inject, monkeypatch):
    monkeypatch.setattr(prompt_to_prompt, "BLEND_THRESHOLD", 0.98)  # random networks look everywhere
    monkeypatch.setattr(changes, "MOST", 0.75)
    captions = "a red house and a boat", "a blue house and a small boat"
    model = MeasuredPainter(painter, *captions, inject, 4, "euler", 64, blend="auto")
    pairs, notes = model.measure(SEEDS, SHARES, GUIDANCE)
    for k in range(3):
        [pair], [note] = model.measure(SEEDS[k : k + 1], SHARES[k : k + 1], GUIDANCE[k : k + 1])
        assert all(np.abs(np.asarray(a, int) - np.asarray(b)).max() <= 1 for a, b in zip(pair, pairs[k]))
        assert note["blend"] == notes[k]["blend"]
        assert note["leakage"] == pytest.approx(notes[k]["leakage"], rel=0.05)
    plain = MeasuredPainter(painter, *captions, inject, 4, "euler", 64).measure(SEEDS, SHARES, GUIDANCE)[0]
    for (source, edit), (source_too, whole), note in zip(pairs, plain, notes):
        assert source == source_too and set(note) == {"leakage", "blend"}
        assert note["blend"] is None or any(note["blend"])
        for side, known in zip(note["blend"] or [], ({"red"}, {"blue", "small"})):
            assert set(side) <= known
        assert (edit == whole) <= (note["blend"] is None)
    assert any(note["blend"] for note in notes)


@pytest.mark.parametrize("captions", [("a red house", "a red house"), ("a cat", "A cat")], ids=str)
def test_equal_captions_have_no_region(painter, captions):
    model = MeasuredPainter(painter, *captions, "self", 2, "euler", 32, blend="auto")
    assert model.measure([1], [0.5], [3.0])[1] == [{"leakage": None, "blend": None}]


def test_an_edit_of_the_whole_picture_is_not_blended(painter, monkeypatch):
    """Where the words are high in more than MOST of the picture."""
    monkeypatch.setattr(prompt_to_prompt, "BLEND_THRESHOLD", 0.98)
    monkeypatch.setattr(changes, "MOST", 0.0)
    settings = (painter, "a house", "a house at night", "self", 3, "euler", 64)
    measured = MeasuredPainter(*settings, blend="auto").measure(SEEDS, SHARES, GUIDANCE)
    assert measured[0] == MeasuredPainter(*settings).measure(SEEDS, SHARES, GUIDANCE)[0]
    assert measured[1] == [{"leakage": None, "blend": None}] * 3

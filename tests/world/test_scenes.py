"""The nano world is deterministic and unambiguous, and training does not see what is held out."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest

from nanoip2p.world.painting import COLOURS, paint, paint_landscape
from nanoip2p.world.scenes import (
    EDIT_KINDS,
    GROUNDS,
    HELD_OUT_EDITS,
    HELD_OUT_THINGS,
    KINDS,
    SLOTS,
    TIMES,
    WEATHERS,
    Scene,
    Thing,
    held_out,
    random_scene,
    training_edits,
    unknown_words,
)
from nanoip2p.world.wordings import HELD_OUT, MISSPELLINGS, PHRASINGS, SYNONYMS, reword

PINNED = "an orange balloon on the left and a blue flower in the middle, on dirt, foggy day"
SAMPLE = [random_scene("test-scenes", index) for index in range(60)]


def test_same_scene_every_time_and_streams_differ():
    assert [random_scene("test-scenes", index) for index in range(60)] == SAMPLE
    assert random_scene("train", 0) != random_scene("test", 0)
    # A new Python or a careless change must not change the test set
    assert random_scene("test", 0).caption() == PINNED
    assert len(set(SAMPLE)) == len(SAMPLE)


def test_drawing_ignores_the_global_random_state():
    random.seed(1)
    before = SAMPLE[0].render(48)
    random.seed(2)
    assert before.tobytes() == SAMPLE[0].render(48).tobytes()
    assert before.size == (48, 48) and before.mode == "RGB"


def test_world_is_as_rich_as_promised():
    assert len(KINDS) >= 8 and len(COLOURS) >= 8 and len(EDIT_KINDS) >= 6
    seen = {edit.kind for scene in SAMPLE for edit in scene.edits()}
    assert seen == set(EDIT_KINDS)


@pytest.mark.parametrize("scene", SAMPLE[:20], ids=str)
def test_every_edit_is_a_different_picture(scene):
    """Otherwise, two edits could be equally near to a result, and the evaluation could not choose."""
    results = [scene, *(edit.scene for edit in scene.edits())]
    pictures = {result.render(64).tobytes() for result in results}
    assert len(pictures) == len(results)


def test_edits_change_one_thing_and_say_so():
    scene = Scene("day", "clear", "grass", (Thing("house", "red", "large", 1),), 3)
    edits = {edit.instructions[0]: edit for edit in scene.edits()}
    assert edits["make it night"].scene.time == "night"
    assert edits["make the house blue"].scene.things[0].colour == "blue"
    assert edits["replace the house with a tree"].scene.things[0] == Thing("tree", "red", "large", 1)
    assert edits["remove the house"].scene.things == ()
    added = edits["add an orange balloon on the left"].scene
    assert added.things == (Thing("balloon", "orange", slot=0), *scene.things)
    assert edits["turn the ground into sand"].caption == "a red house in the middle, on sand, clear day"
    for edit in scene.edits():
        assert edit.caption == edit.scene.caption() != scene.caption()
        assert len(set(edit.instructions)) == len(edit.instructions) >= 3


def test_what_is_held_out_is_seen_in_other_company():
    """Training sees each part of a held-out thing or edit, but never the combination."""
    seen = [edit for scene in SAMPLE for edit in training_edits(scene)]
    shown = {(thing.kind, thing.colour) for edit in seen for thing in edit.scene.things}
    done = {(edit.kind, edit.thing) for edit in seen}
    for parts, held in ((shown, HELD_OUT_THINGS), (done, HELD_OUT_EDITS)):
        assert not parts & held
        assert {first for first, _ in held} <= {first for first, _ in parts}
        assert {second for _, second in held} <= {second for _, second in parts}
    assert sorted(kind for kind, _ in HELD_OUT_THINGS) == sorted(KINDS)
    assert sorted(colour for _, colour in HELD_OUT_THINGS) == sorted(COLOURS)


def test_edits_are_held_out_for_what_they_show_or_do():
    things = (Thing("house", "red", slot=0), Thing("flower", "pink", slot=2))
    scene = Scene("day", "clear", "grass", things, 3)
    out = {edit.instructions[0] for edit in scene.edits() if held_out(scene, edit)}
    assert {"make the house purple", "make the flower red", "replace the flower with a balloon"} & out == {
        "make the house purple", "make the flower red"}
    assert "add a blue rocket in the middle" in out and "add a blue mushroom in the middle" in out
    assert not {"remove the flower", "make the house blue", "make it night"} & out
    there = Scene("day", "clear", "grass", (Thing("house", "purple", slot=0),), 3)
    assert there.edits() and not training_edits(there)


def test_an_edit_leaves_the_rest_alone_to_the_pixel():
    scene = Scene("day", "clear", "grass", (Thing("house", "red", slot=0), Thing("tree", "green", slot=2)), 3)
    after = next(edit.scene for edit in scene.edits() if edit.instructions[0] == "make the house blue")
    differs = (np.asarray(scene.render(64)) != np.asarray(after.render(64))).any(-1)
    assert differs[:, :32].any() and not differs[:, 32:].any()


def test_a_kept_landscape_is_that_of_its_scene_and_bare():
    scene = Scene("day", "clear", "grass", (Thing("house", "red"),), 3)
    others = [scene, *(replace(scene, **one) for one in (
        {"time": "night"}, {"weather": "cloudy"}, {"ground": "sand"}, {"landscape": 40}, {"things": ()}))]
    pictures = []
    for other in others:
        for size in (32, 64):
            paint_landscape.cache_clear()
            alone = other.render(size).tobytes()
            paint_landscape.cache_clear()
            scene.render(64)
            assert other.render(size).tobytes() == alone
            pictures.append(alone)
    assert len(set(pictures)) == 2 * len(others)


def test_things_weather_and_edges_look_as_they_should():
    def pixels(scene, size=64):
        return np.asarray(scene.render(size), float)

    bare = Scene("day", "cloudy", "grass", (), 3)
    house, tree = Thing("house", "red", "large", 0, dx=0.12), Thing("tree", "blue", "large", dx=-0.12)
    columns = []
    for dx in (0.0, 0.125):  # of the picture: 8 columns of 64
        there = replace(bare, things=(replace(house, dx=dx),))
        columns.append(np.flatnonzero((pixels(there) != pixels(bare)).any((0, 2))))
    assert abs(columns[1].mean() - columns[0].mean() - 8) <= 0.5
    both, last = (pixels(replace(bare, things=things)) for things in ((house, tree), (tree,)))
    trunk_and_crown = (last == pixels(replace(bare, things=(tree, tree)))).all(-1) & (
        last != pixels(bare)).any(-1)
    same = (both == last).all(-1)[:45][trunk_and_crown[:45]]  # above the shadows
    assert same.mean() > 0.9  # the later thing covers the earlier one
    rainy, foggy = (pixels(replace(bare, weather=weather)) for weather in ("rainy", "foggy"))
    assert rainy[50:].mean() < 0.95 * pixels(bare)[50:].mean() and foggy.std() < 0.8 * pixels(bare).std()
    assert house_is_smooth(replace(bare, things=(house,)))


def house_is_smooth(scene):
    """Edges have the colours of 4 x 4 pixels each."""
    return scene.render(32).tobytes() == paint(scene, 128).reduce(4).tobytes()


def test_no_two_things_share_a_kind_or_a_slot():
    for scene in SAMPLE:
        for result in [scene, *(edit.scene for edit in scene.edits())]:
            assert len({thing.kind for thing in result.things}) == len(result.things) <= len(SLOTS)
            assert [thing.slot for thing in result.things] == sorted({thing.slot for thing in result.things})


def test_words_of_held_out_phrasings_are_known_from_others():
    known = {word for phrases in PHRASINGS.values() for phrase in phrases[:-HELD_OUT]
             for word in re.findall(r"[\w'{}]+", phrase)}
    for phrases in PHRASINGS.values():
        assert len(set(phrases)) == 20
        for phrase in phrases[-HELD_OUT:]:
            assert set(re.findall(r"[\w'{}]+", phrase)) <= known


def test_training_sees_all_phrasings_but_the_held_out_ones():
    edit = random_scene("train", 0).edits("time")[0]
    assert edit.seen_instructions == edit.instructions[:-HELD_OUT]
    assert edit.instructions[0] == f"make it {edit.scene.time}"


def test_rewording_keeps_the_meaning():
    """Each new word belongs to one word of the world, so that no reworded instruction names another edit."""
    words = {*KINDS, *COLOURS, *TIMES, *WEATHERS, *GROUNDS}
    others = [word for table in (SYNONYMS, MISSPELLINGS) for words in table.values() for word in words]
    assert len(set(others)) == len(others) and not words & set(others)
    back = {other: word for table in (SYNONYMS, MISSPELLINGS) for word, found in table.items()
            for other in found}
    pattern = re.compile("|".join(rf"\b{re.escape(other)}\b" for other in sorted(back, key=len)[::-1]))

    def plain(text):
        return re.sub(r"\b(the|an?) ", "", text)

    rng, reworded, bare = random.Random(0), 0, 0
    for scene in SAMPLE[:10]:
        for edit in scene.edits()[::5]:
            for text in edit.instructions:
                new = reword(text, rng)
                assert plain(pattern.sub(lambda match: back[match[0]], new)) == plain(text)
                assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", new) and unknown_words(new) == []
                reworded += new != text
                bare += plain(text) != text and plain(new) == new
    assert reworded > 100 and bare > 20


def test_unknown_words_are_those_of_no_sentence_of_the_world():
    for scene in (random_scene("train", i) for i in range(20)):
        sentences = [scene.caption(), *(text for edit in scene.edits() for text in edit.instructions)]
        assert unknown_words(" ".join(sentences)) == []
    assert unknown_words("Add a large cyborg, a Cyborg {new}") == ["large", "cyborg", "new"]

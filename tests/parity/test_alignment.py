"""Token maps: compared with the mappers of Prompt-to-Prompt's authors (hertz.py), and checked by property."""

import random
from pathlib import Path

import hertz
import pytest
import torch
import transformers

from nanoip2p.prompt_to_prompt import align, find_words, split_words, token_map
from nanoip2p.tokenizer import load_tokenizer

NANO = Path(__file__).parents[2] / "weights" / "nano-ip2p" / "tokenizer"
CLIP = Path(__file__).resolve().parents[3] / "shared" / "clip-tokenizer"
WORDS = "a cat dog house red blue on the sofa skyscraper watercolour of extraordinarily photograph".split()
S, E = 100, 101  # ids of the start and end tokens


needs_clip = pytest.mark.skipif(not CLIP.is_dir(), reason="CLIP's vocabulary is not in the project")


@pytest.fixture(params=[NANO, pytest.param(CLIP, marks=needs_clip)], ids=["nano", "clip"])
def tokenizers(request):
    """Our tokenizer, and transformers' tokenizer for the reference."""
    return load_tokenizer(request.param), transformers.CLIPTokenizer(
        vocab=str(request.param / "vocab.json"), merges=str(request.param / "merges.txt"),
        model_max_length=77)


def row(*tokens, length=12):
    return [S, *tokens, E] + [E] * (length - len(tokens) - 2)


def maps_of(ours, source, edit):
    return token_map(*ours([source, edit]).tolist(), ours.end)


def test_word_swaps_are_those_of_the_authors(tokenizers):
    """Except the words after a swap of unequal token counts: see hertz.replacement_mapper."""
    ours, theirs = tokenizers
    lengths = set()
    for source, edit in (
            ("a cat on a sofa", "a dog on a sofa"), ("a house", "a skyscraper"), ("the dog", "the cat"),
            ("a photograph of a house on the sofa", "a photograph of a skyscraper on the sofa"),
            ("a red skyscraper on a sofa", "a red house on a sofa"), ("the red house", "the blue tree"),
            ("a red cat on a blue sofa", "a blue cat on a red sofa")):
        mapping = maps_of(ours, source, edit)
        assert torch.equal(mapping, hertz.replacement_mapper(theirs, source, edit)), (source, edit)
        assert mapping.any(0)[: len(hertz.tokens_of(theirs, edit))].min() == 1
        lengths.add(len(hertz.tokens_of(theirs, source)) - len(hertz.tokens_of(theirs, edit)))
    assert 0 in lengths and len(lengths) > 1


@needs_clip
@pytest.mark.parametrize("words", [("red", "extraordinarily"), ("extraordinarily", "red"), ("zzyzx", "qwop")])
def test_swaps_of_words_of_several_tokens(words):
    theirs = transformers.CLIPTokenizer(vocab=str(CLIP / "vocab.json"), merges=str(CLIP / "merges.txt"),
                                        model_max_length=77)
    captions = [f"a {word} house on the sofa" for word in words]
    mapping = maps_of(load_tokenizer(CLIP), *captions)
    assert torch.equal(mapping, hertz.replacement_mapper(theirs, *captions))
    assert max(len(hertz.tokens_of(theirs, caption)) for caption in captions) > 8


def test_added_and_dropped_words_are_those_of_the_authors_but_for_padding(tokenizers):
    """Random captions, some with repeated words, and the same captions with words dropped.

    In a shorter edited caption, the authors give the first padding tokens the maps of source words. Ours keep
    their own maps.
    """
    ours, theirs = tokenizers
    draw = random.Random(0)
    for _ in range(60):
        long = [draw.choice(WORDS) for _ in range(draw.randrange(1, 9))]
        short = [word for word in long if draw.random() < 0.6]
        for source, edit in ((short, long), (long, short)):
            source, edit = " ".join(source), " ".join(edit)
            mapping = maps_of(ours, source, edit)
            taken = mapping.any(0).float()
            wanted, alpha = hertz.refinement_mapper(theirs, source, edit)
            begin, end = (len(hertz.tokens_of(theirs, text)) for text in (edit, source))
            assert alpha[begin:].min() == 1 and not taken[begin:end].any()  # only these maps differ
            alpha[begin:end] = 0
            assert torch.equal(taken, alpha), (source, edit)
            columns = torch.arange(77)[alpha > 0]
            assert torch.equal(mapping.sum(0), alpha)
            assert torch.equal(mapping[wanted[columns], columns], torch.ones(len(columns))), (source, edit)


@pytest.mark.parametrize("source, edit, cut", [
    ([S, 1, 2, E], [S, 1, 2, E], [([0], [0]), ([1], [1]), ([2], [2]), ([3], [3])]),
    ([S, 1, 2, E], [S, 1, 3, E], [([0], [0]), ([1], [1]), ([2], [2]), ([3], [3])]),
    ([S, 1, E], [S, 1, 3, 4, E], [([0], [0]), ([1], [1]), ([], [2, 3]), ([2], [4])]),
    ([S, 3, 4, 1, E], [S, 1, E], [([0], [0]), ([1, 2], []), ([3], [1]), ([4], [2])]),
    ([S, 1, 2, 3, 9, E], [S, 4, 5, 9, E], [([0], [0]), ([1, 2, 3], [1, 2]), ([4], [3]), ([5], [4])]),
    ([S, 1, 1, E], [S, 1, E], [([0], [0]), ([1], [1]), ([2], []), ([3], [2])]),
    ([S, 1, 2, 3, E], [S, 2, 3, 1, E],
     [([0], [0]), ([1], []), ([2], [1]), ([3], [2]), ([], [3]), ([4], [4])]),
    ([1, 2], [2, 1], [([0], []), ([1], [0]), ([], [1])]),  # of two equally good ones
    ([1, 2], [3], [([0, 1], [0])]), ([], [], []), ([], [1], [([], [0])]),
], ids=str)
def test_alignment_by_hand(source, edit, cut):
    assert [(list(a), list(b)) for a, b in align(source, edit)] == cut


def longest_common(a, b):
    """Length of the longest common subsequence of two short sequences, by recursion."""
    if not a or not b:
        return 0
    return max(longest_common(a[1:], b), longest_common(a, b[1:]),
               longest_common(a[1:], b[1:]) + 1 if a[0] == b[0] else 0)


def test_blocks_cover_both_sequences_and_keep_all_common_tokens():
    draw = random.Random(1)
    for _ in range(200):
        a, b = ([draw.randrange(3) for _ in range(draw.randrange(7))] for _ in range(2))
        found = align(a, b)
        assert [i for ours, _ in found for i in ours] == list(range(len(a)))
        assert [j for _, theirs in found for j in theirs] == list(range(len(b)))
        same = [(x, y) for x, y in found if len(x) == len(y) == 1 and a[x.start] == b[y.start]]
        assert len(same) == longest_common(a, b), (a, b)


@pytest.mark.parametrize("source, edit, ones, halves, added", [
    (row(1, 2), row(1, 3), {(i, i) for i in range(12)}, set(), set()),
    (row(1), row(1, 3, 4), {(0, 0), (1, 1), (2, 4)} | {(i, i) for i in range(5, 12)}, set(), {2, 3}),
    (row(5, 1), row(3, 4, 1), {(0, 0), (2, 3), (3, 4)} | {(i, i) for i in range(5, 12)},
     {(1, 1), (1, 2)}, set()),
    (row(3, 4, 1), row(1), {(0, 0), (3, 1), (4, 2)} | {(i, i) for i in range(5, 12)}, set(), {3, 4}),
    (row(*range(10)), row(1), {(0, 0), (2, 1), (11, 2)}, set(), set(range(3, 12))),
], ids=["swap", "added", "longer", "dropped", "no padding"])
def test_token_map_by_hand(source, edit, ones, halves, added):
    mapping = token_map(source, edit, E)
    assert mapping.dtype == torch.float32
    assert {tuple(place) for place in (mapping == 1).nonzero().tolist()} == ones
    assert {tuple(place) for place in (mapping == 0.5).nonzero().tolist()} == halves
    assert mapping.count_nonzero() == len(ones) + len(halves)
    assert set((mapping.sum(0) == 0).nonzero()[:, 0].tolist()) == added


def test_mass_and_identity():
    """The total attention to a block stays equal; equal texts change nothing."""
    draw = random.Random(2)
    for _ in range(200):
        a, b = ([draw.randrange(5) for _ in range(draw.randrange(11))] for _ in range(2))
        mapping = token_map(row(*a), row(*b), E)
        for ours, theirs in align([S, *a, E], [S, *b, E]):
            block = mapping[:, list(theirs)]
            assert bool(ours and theirs) or not block.any()
            if ours and theirs:
                assert torch.allclose(block.sum(1)[list(ours)], torch.ones(len(ours)))
                assert block.sum() == pytest.approx(len(ours))
            assert block.any(0).tolist() == [bool(ours)] * len(theirs)
        padding = len(b) + 2
        assert (mapping[: min(len(a) + 2, 11), padding:] == 0).all()
        common = max(len(a) + 2, padding)
        assert torch.equal(mapping[:, common:], torch.eye(12)[:, common:])
        assert not mapping[:, padding:common].any()  # or padding would use a word's map many times
        assert torch.equal(token_map(row(*a), row(*a), E), torch.eye(12))


def test_find_words(tokenizers):
    ours, theirs = tokenizers
    text = "a cat on a skyscraper, a cat on the sofa"
    plain = text.replace(",", " ,")
    for word in ("a", "cat", "skyscraper", ",", "sofa", "the"):
        assert find_words(ours, text, word) == hertz.places(theirs, plain, word), word
    assert find_words(ours, text, " CAT  on ") == sorted(
        hertz.places(theirs, plain, "cat") + hertz.places(theirs, plain, "on"))
    with pytest.raises(ValueError, match="'red' is not in 'house house"):
        find_words(ours, "house " * 75 + "red", "red")  # cut off
    for missing in ("dog", "", " ", "ca", "cat sofa"):
        with pytest.raises(ValueError, match=f"^{missing!r} is not in 'a cat on .*; name a word of it$"):
            find_words(ours, text, missing)


def test_split_words(tokenizers):
    ours, theirs = tokenizers
    text = " A cat,  on a Skyscraper's SOFA!"
    words = split_words(ours, text)
    assert [word for word, _ in words] == ["A", "cat", ",", "on", "a", "Skyscraper", "'s", "SOFA", "!"]
    count = len(hertz.tokens_of(theirs, text))
    assert [place for _, tokens in words for place in tokens] == list(range(1, count - 1))
    for word, tokens in words:
        assert set(tokens) <= set(find_words(ours, text, word)), word
    long = split_words(ours, "skyscraper " * 90)
    assert all(0 < place < 76 for _, tokens in long for place in tokens)
    assert split_words(ours, "") == []

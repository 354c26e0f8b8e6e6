"""nanoip2p.tokenizer gives the ids of transformers' CLIPTokenizer for any text, and cleans as ftfy does."""

import html
import json
import random
import shutil
import time
import unicodedata
import warnings
from html.entities import html5
from pathlib import Path

import pytest
import torch
import transformers
from train_tokenizer import train_tokenizer

from nanoip2p.clip import CLIPTextConfig
from nanoip2p.clip_filter import clean_twice
from nanoip2p.prompt_to_prompt import find_words
from nanoip2p.tokenizer import END, START, check_fits, clean, load_tokenizer

CLIP_FILES = Path(__file__).resolve().parents[3] / "shared" / "clip-tokenizer"
needs_clip = pytest.mark.skipif(not CLIP_FILES.is_dir(), reason="CLIP's vocabulary is not in the project")
SENTENCES = ["make the house red", "turn day to night, please", "it's a cat on a hill", "remove the tree"] * 2

# Pieces that are difficult for normalising, splitting and special tokens
PIECES = """
<|endoftext|> <|startoftext|> <|ENDOFTEXT|> <|endoftext |endoftext|> </w> cat</w> !
make MAKE it's It'S we'LL he'd've 're don't rock'n'roll 'tis  ' ''
1 123 4,5.6 x2y ½ ² ٣ १ ② Ⅷ -- ... !!! $_^ @you #tag
é e\u0301 \u0301 a\u0327\u0301 Å \u212b \u1100\u1161\u11a8 한국 日本語 ｶﾞ ﬁ ß ẞ İ ı ς ΣΑΣ ǅ Ǆ ŉ ﷺ \u0345 ͅΑ
😀 👩\u200d👩\u200d👧 🏳️\u200d🌈 👍🏽 🇫🇷 \U0001d400 \U0010ffff \ue000 \uffff
\ufeff \u200b \u200e \u00ad \x00 \x07 \x1b \x7f
""".split()
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u1680", "\u2028", "\u3000"]


def random_texts(count: int) -> list[str]:
    """Random texts of difficult pieces, white space and characters from all of Unicode."""
    draw = random.Random(0)

    def piece() -> str:
        kind = draw.random()
        if kind < 0.4:
            return draw.choice(PIECES)
        if kind < 0.6:
            return draw.choice(SPACES)
        first, last = draw.choice([(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x9FFF), (0xE000, 0x10FFFF)])
        return chr(draw.randint(first, last))

    return ["".join(piece() for _ in range(draw.randrange(60))) for _ in range(count)]


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    """A tokenizer folder with a small vocabulary, similar to the nano models'."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES, 540, folder)
    return folder


def flags(token: str) -> dict:
    """A special token with the flags that it has in the published Stable Diffusion 1.5 folder."""
    return {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def as_published(folder: Path) -> None:
    special = {"bos_token": flags(START), "eos_token": flags(END), "unk_token": flags(END), "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    typed = {key: {"__type": "AddedToken", **flags(START if key == "bos_token" else END)} for key in special}
    config = typed | {"pad_token": END, "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def listed_in_config(folder: Path) -> None:
    """As written by transformers 4 since late 2023: the list has the flags, the roles only have names."""
    vocab = json.loads((folder / "vocab.json").read_text())
    listed = {vocab[token]: flags(token) | {"special": True} for token in (START, END)}
    config = {"added_tokens_decoder": listed, "bos_token": START, "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": END}))


def padded_otherwise(folder: Path) -> None:
    """The pad token of Stable Diffusion 2, and a shorter length."""
    special = {"bos_token": flags(START), "eos_token": flags(END), "unk_token": END, "pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 20}))


def saved_by_transformers(folder: Path) -> None:
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    for file in folder.iterdir():
        file.unlink()
    theirs.save_pretrained(folder)
    assert (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists()


def with_more_tokens(folder: Path) -> None:
    """Words added to the vocabulary, as for textual inversion."""
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<my-cat>", transformers.AddedToken("X2Y", single_word=True, normalized=False)])
    theirs.save_pretrained(folder)


def with_added_tokens_file(folder: Path) -> None:
    size = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({"cat": size, "MAKE": size + 1}))


def with_named_tokens(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"extra_special_tokens": {"style_token": "<my-cat>"}}')


def saved_by_transformers_4_57(folder: Path) -> None:
    """The files that 4.57.3 writes for CLIPTokenizer.from_pretrained(folder, extra_special_tokens={...})."""
    vocab = json.loads((folder / "vocab.json").read_text())
    token = flags("<my-cat>") | {"normalized": False}
    ids = {vocab[START]: flags(START), vocab[END]: flags(END), len(vocab): token}
    special = {"bos_token": flags(START), "eos_token": flags(END), "unk_token": flags(END), "pad_token": END}
    (folder / "added_tokens.json").write_text(json.dumps({"<my-cat>": len(vocab)}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"style_token": token}))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict.fromkeys(special, END) | {
        "added_tokens_decoder": {number: token | {"special": True} for number, token in ids.items()},
        "bos_token": START, "extra_special_tokens": {"style_token": "<my-cat>"}, "style_token": "<my-cat>",
        "model_max_length": 77, "errors": "replace", "clean_up_tokenization_spaces": False}))


def bare(folder: Path) -> None:
    for file in folder.glob("*token*.json"):
        file.unlink()


@pytest.mark.filterwarnings("ignore:.*do not fit")
@pytest.mark.parametrize(
    "layout",
    [
        bare,
        as_published,
        listed_in_config,
        padded_otherwise,
        saved_by_transformers,
        with_more_tokens,
        with_added_tokens_file,
        with_named_tokens,
        saved_by_transformers_4_57,
    ],
)
@pytest.mark.parametrize("vocabulary", ["nano", pytest.param("clip", marks=needs_clip)])
def test_equals_transformers(layout, vocabulary, nano, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in (nano if vocabulary == "nano" else CLIP_FILES).iterdir():
        shutil.copyfile(file, folder / file.name)
    layout(folder)
    ours, theirs = load_tokenizer(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    assert ours.backend.get_vocab_size() == len(theirs)
    count = 1000 if layout is bare else 300  # the layouts differ in special tokens, not in cleaning
    texts = ["", " ", "a photo of a cat", "<my-cat> X2Y x2y style_token", *SENTENCES, *random_texts(count)]
    cleaned = ours(texts)
    ours.clean = str
    ids = ours(texts)
    plain = torch.tensor([clean(text) == text for text in texts])
    assert plain.sum() > count / 10 and torch.equal(ids[plain], cleaned[plain])
    assert ids.shape == (len(texts), 20 if layout is padded_otherwise else 77) and ids.dtype == torch.int64
    reference = theirs(texts, padding="max_length", truncation=True, max_length=ours.length)["input_ids"]
    different = [text for text, a, b in zip(texts, ids.tolist(), reference) if a != b]
    assert not different, f"{len(different)} of {len(texts)}, first {different[0]!r}"
    cut = (ids[:, -1] == ours.end) & (ids[:, -2] != ours.end)
    assert cut.sum() > 10, "too few texts were long enough to be cut"


PLAIN = ["make it night", "turn the <x> & y into a 'z'", "café – 5 m² ′ «» 日本 😀", "R&D; a&b &c"]
TYPED = """
‘ ’ ‚ ‛ “ ” „ ‟ ʼ it’s “night” ﬁsh oﬀer ﬃ ﬄ ﬅ ﬆ Ĳ ǆ ŉ ＡＢ３！ ｶﾞ \u3000 \x07 \x7f \ufeff \u2028 — …
< > a cat THE &amp; &amp;amp; &lt; &gt; &quot; &#39; &#x2019; &ldquo; &nbsp; &notit; &bogus; &#0;
&#xD800; &#99999999; &amp &copy salt&pepper
""".replace("\n", " ").split(" ")


def fixed(text: str) -> str:
    """The text cleaned by ftfy, then normalised as our tokenizer does: composed (NFC), single spaces."""
    ftfy = pytest.importorskip("ftfy", "6.3")
    return " ".join(unicodedata.normalize("NFC", ftfy.fix_text(text)).split())


def folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", clean(text)).split())


def lines(words) -> list[str]:
    """Texts of 32 words each: ftfy takes as long for one as for one word."""
    words = list(words)
    return [" ".join(words[i : i + 32]) for i in range(0, len(words), 32)]


def test_every_character_and_every_entity_is_cleaned_as_by_ftfy():
    codes = (*range(0x300, 0x3100), *range(0xF900, 0x10000), *range(0x10000, 0x110000, 101))  # all: slow
    texts = [chr(code) for code in range(0x300)] + lines(map(chr, codes))
    texts += [f"a&{name}b" for name in html5 if name.endswith(";")]
    texts += [f"&#{code};" for code in range(0x300)] + lines(f"&#{code};" for code in range(0x300, 0x2100))
    assert [text for text in texts if folded(text) != fixed(text)] == ["a&semi;b"]


def test_typed_texts_are_cleaned_as_by_ftfy_and_as_by_openai():
    draw = random.Random(0)
    texts = [draw.choice(["", " "]).join(draw.choices(TYPED, k=draw.randrange(9))) for _ in range(5000)]
    assert [text for text in texts if folded(text) != fixed(text)] == []
    for text in texts:  # as OpenAI's basic_clean and whitespace_clean do
        theirs = " ".join(html.unescape(html.unescape(fixed(text))).split())
        assert " ".join(unicodedata.normalize("NFC", clean_twice(text)).split()) == theirs, text
    assert [text for text in PLAIN if clean(text) != text or fixed(text) != text] == []


@pytest.mark.parametrize("typed, plain", [
    ("it’s “night”", "it's \"night\""), ("salt &amp; pepper", "salt & pepper"), ("&#39;x&#x27;", "'x'"),
    ("oﬀer ﬁsh", "offer fish"), ("ＡＢＣ\u3000１", "ABC 1"), ("it\x92s", "it's"), ("a\ufeffb\x00", "ab"),
    ("<b>&amp;</b>", "<b>&amp;</b>"), ("salt&pepper &copy", "salt&pepper &copy"), ("&EACUTE;", "&EACUTE;"),
    ("itâ€™s", "itâ€™s"), ("\x1b[31mred", "[31mred"), *[(text, text) for text in PLAIN]])
def test_what_is_cleaned_and_what_is_not(typed, plain, nano):
    """The last three cases before PLAIN stay as they are, unlike in ftfy."""
    tokenizer = load_tokenizer(nano)
    assert clean(typed) == plain and clean(plain) == plain
    ids = tokenizer([typed])
    tokenizer.clean = str
    assert torch.equal(ids, tokenizer([plain])) and (typed == plain) == torch.equal(ids, tokenizer([typed]))


def test_words_are_found_by_their_cleaned_text(nano):
    """Prompt-to-Prompt finds a word with any kind of quote, typed in the caption or in the word."""
    tokenizer = load_tokenizer(nano)
    for word in ("cat's", "cat’s", "cat&#39;s"):
        found = find_words(tokenizer, "“the” cat’s hill", word)
        assert found == find_words(tokenizer, "\"the\" cat's hill", "cat's")
    tokenizer.clean = str
    with pytest.raises(ValueError, match="is not in"):
        find_words(tokenizer, "the cat’s hill", "cat's")


def test_nested_entities_take_no_time():
    start = time.monotonic()
    assert clean("&" + "amp;" * 2499) == "&" and clean("’&" + "amp;" * 2499) == "'&"
    assert time.monotonic() - start < 2


def test_rows_are_start_tokens_end_padding(nano):
    tokenizer = load_tokenizer(nano)
    vocab = json.loads((nano / "vocab.json").read_text())
    ids = tokenizer(["the CAT", ""]).tolist()
    assert ids[0][:2] == [vocab[START], vocab["the</w>"]] and ids[1] == [vocab[START]] + [vocab[END]] * 76
    assert vocab[END] == max(vocab.values()), "CLIP's pooling looks for the largest id"
    assert len(vocab) <= 540 and sorted(vocab.values()) == list(range(len(vocab)))
    assert tokenizer([]).shape == (0, 77)


def test_dropped_text_is_quoted(nano):
    tokenizer = load_tokenizer(nano)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = tokenizer(["the house", "the " * 74 + "house AND A Cafe\u0301 😀!"])
    assert len(caught) == 1 and "AND A Cafe\u0301 😀!'" in str(caught[0].message)
    assert "house" not in str(caught[0].message)
    assert ids[1, -1] == tokenizer.end and ids[1, -2] == tokenizer(["house"])[0, 1]


def test_a_text_of_ten_megabytes_is_refused_at_once(nano):
    with pytest.raises(ValueError, match="has 10000000 characters; the limit is 10000: 'aaaa") as caught:
        load_tokenizer(nano)(["a" * 10**7])
    assert len(str(caught.value)) < 200
    with pytest.warns(UserWarning, match="do not fit"):
        assert load_tokenizer(nano)(["a" * 10_000]).shape == (1, 77)


def test_bytes_that_are_no_unicode_are_refused(nano):
    with pytest.raises(ValueError, match="not valid Unicode"):
        load_tokenizer(nano)([b"caf\xe9".decode("utf-8", "surrogateescape")])


def test_ids_beyond_the_text_encoders_table_are_refused(nano, tmp_path):
    folder = shutil.copytree(nano, tmp_path / "gap")
    vocab = json.loads((folder / "vocab.json").read_text())
    config = CLIPTextConfig(vocab_size=len(vocab))
    check_fits(load_tokenizer(folder), config, folder)
    (folder / "vocab.json").write_text(json.dumps(vocab | {"a": 10**6}))
    with pytest.raises(ValueError, match="ids below 1000001, the text encoder reads 77, ids below"):
        check_fits(load_tokenizer(folder), config, folder)


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("merges.txt", None, "merges.txt is missing"),
        ("vocab.json", None, "vocab.json .* is missing"),
        ("vocab.json", "{", "vocab.json .* broken"),
        ("vocab.json", '{"a": 0}', "vocab.json .* broken|lacks"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer.json", '{"model": {"vocab": []}}', "tokenizer.json is .* vocab = \\[\\] should"),
        ("tokenizer.json", '{"model": []}', "tokenizer.json is .* model = \\[\\] should be an object"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}}', "tokenizer.json is .* broken"),
        ("tokenizer.json", '{"added_tokens": [{"content": "a"}]}', "id of a token = None should be"),
        ("merges.txt", "a b", "merges.txt is missing or broken: .*out of vocabulary"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "lacks '</s>'"),
        ("tokenizer_config.json", '{"pad_token": ""}', "lacks ''"),
        ("tokenizer_config.json", '{"unk_token": {"content": 7}}', "unk_token: content = 7 should be a text"),
        ("tokenizer_config.json", '{"unk_token": {"content": "a", "lstrip": 1}}', "lstrip = 1 should be"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', "model_max_length = '77' should be a whole"),
        ("tokenizer_config.json", '{"model_max_length": 2}', "model_max_length = 2 should be"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 5}}', "token = 5 should be an object"),
        ("added_tokens.json", '{"a": "b"}', "added_tokens.json: a = 'b' should be a whole number"),
    ],
)
def test_broken_folders_are_named(name, content, complaint, nano, tmp_path):
    folder = shutil.copytree(nano, tmp_path / "broken")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load_tokenizer(folder)

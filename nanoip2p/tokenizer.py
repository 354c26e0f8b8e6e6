"""CLIP's byte-level BPE tokenizer: texts -> the same token ids as transformers' CLIPTokenizer.

First, `clean` replaces characters such as curly quotes. Then the word <x> of a textual inversion with
several vectors (checkpoint/embeddings.py) becomes <x> <x>_1 ..., as in diffusers' maybe_convert_prompt.
"""

import re
import unicodedata
import warnings
from html import unescape
from itertools import takewhile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from nanoip2p.common.files import read_json, regular
from nanoip2p.common.schema import LONGEST, checked

START, END = "<|startoftext|>", "<|endoftext|>"
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
LENGTH = 77  # tokens per text, unless tokenizer_config.json has another number
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # settings of a special token
WORD_END = "</w>"
# A word is a run of letters, one digit, or a run of other characters, as in OpenAI's simple_tokenizer.py
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")  # an entity of HTML
# Code point -> its replacement. First: 0x80 to 0x9F as in cp1252, then ligatures and full-width letters
FOLDED = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
FOLDED |= {code: unicodedata.normalize("NFKC", chr(code)) for code in (
    0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), 0x3000, *range(0xFB00, 0xFB07),
    *range(0xFF01, 0xFFEF))}
FOLDED |= {0x149: "'n", 0x2BC: "'", 0xFB05: "\u017ft"}
FOLDED |= dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
FOLDED |= dict.fromkeys((*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF,
                         *range(0xFFF9, 0xFFFD)))


def clean(text: str) -> str:
    """Replace curly quotes, entities (&amp;), ligatures and full-width letters by plain characters.

    Also drops control characters. OpenAI's tokenizer calls ftfy for this, as does transformers 4.19 in the
    paper's code. Our table needs no further package. A text with a "<" keeps its entities, as in ftfy. The
    result is that of ftfy 6.3.1 without Unicode NFC, except that `clean` does not repair mojibake, and keeps
    &semi; and entities in capitals that HTML lacks (&EACUTE;).
    """
    before, entities = None, "<" not in text
    while before != text:
        before = text
        if entities:
            text = ENTITY.sub(lambda it: it[0] if ";" in unescape(it[0]) else unescape(it[0]), text)
        text = text.translate(FOLDED)
    return text


class Tokenizer:
    """Turns texts into token ids when called. load_tokenizer makes it from files.

    Each text first goes through the attribute `clean`. Set it to `str` to leave texts unchanged.
    """

    def __init__(self, backend: Backend, start: int, end: int, pad: int, length: int):
        self.backend, self.length, self.clean = backend, length, clean
        self.start, self.end, self.pad = start, end, pad

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Texts -> token ids (B, length) int64: start, tokens, end, padding.

        Truncates long texts, with a warning. Raises ValueError for a text that is not valid Unicode, or has
        more than LONGEST characters, which would take minutes.
        """
        assert not isinstance(texts, str), "the tokenizer needs a list of texts, not one text"
        return torch.tensor([self._row(text) for text in texts], dtype=torch.int64).reshape(-1, self.length)

    def prepare(self, text: str) -> str:
        """Clean a text, and write <x> out as <x> <x>_1 ..., see above. ValueError: see __call__."""
        if len(text) > LONGEST:
            raise ValueError(f"a text has {len(text)} characters; the limit is {LONGEST}: {text[:40]!r}…")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text {text!r} is not valid Unicode ({error.reason}); retype it") from None
        text = self.clean(text)
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        if not any(token.endswith("_1") for token in added):  # no word of several vectors
            return text
        encoded = self.backend.encode(text, add_special_tokens=False)
        for token, (_, end) in reversed([*zip(encoded.tokens, encoded.offsets)]):
            if token in added:
                names = (f"{token}_{i}" for i in range(1, self.length))
                text = " ".join([text[:end], *takewhile(added.__contains__, names)]) + text[end:]
        return text

    def _row(self, text: str) -> list[int]:
        text = self.prepare(text)
        encoded = self.backend.encode(text, add_special_tokens=False)
        ids, room = encoded.ids, self.length - 2
        if len(ids) > room:
            dropped = text[encoded.offsets[room][0] :].strip()
            warnings.warn(f"{len(ids) - room} of {len(ids)} tokens do not fit, dropped: {dropped!r}",
                          stacklevel=4)
        row = [self.start, *ids[:room], self.end]
        return row + [self.pad] * (self.length - len(row))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read tokenizer.json, or else vocab.json and merges.txt, and the config files in the same folder.

    Pads with the end-of-text token unless tokenizer_config.json or special_tokens_map.json names another one.
    Raises ValueError, with the folder or file, if anything is missing or broken.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json", missing={})
    fast = read_json(folder / "tokenizer.json", missing={})
    roles, special = _special_tokens(folder, config, fast)
    length = checked(config.get("model_max_length"), int | float | None,
                     f"{folder / 'tokenizer_config.json'}: model_max_length", 3) or LENGTH
    length = length if length < 10**6 else LENGTH  # transformers writes 1e30 for "not set"
    try:
        if fast:  # takes precedence, as in transformers
            model = checked(fast.get("model"), dict, "model")
            vocab, merges = checked(model.get("vocab"), dict, "vocab"), [*map(split_merge, model["merges"])]
        else:
            paths = (str(regular(folder / name)) for name in ("vocab.json", "merges.txt"))
            vocab, merges = BPE.read_file(*paths)
        backend = clip_backend(vocab, merges, roles["unk_token"])
        backend.add_tokens([AddedToken(special=True, **token) for token in special])
    except Exception as error:  # `tokenizers` raises Exception itself for wrong types and contents
        files = "tokenizer.json" if fast else "vocab.json or merges.txt"
        raise ValueError(f"{folder}: {files} is missing or broken: {error}") from None
    missing = {roles[role] for role in ("bos_token", "eos_token", "unk_token")} - vocab.keys()
    ids = [backend.token_to_id(roles[role]) for role in ("bos_token", "eos_token", "pad_token")]
    if missing or None in ids:  # the vocabulary lacks a special token, for example one of empty text
        raise ValueError(f"{folder}: the vocabulary lacks {min(missing, default='')!r}, so it is not CLIP's")
    return Tokenizer(backend, *ids, int(length))


def check_fits(tokenizer: Tokenizer, config, folder: Path) -> None:
    """Raise ValueError if a text encoder with this CLIPTextConfig cannot read the tokenizer's output."""
    length, known = config.max_position_embeddings, max(tokenizer.backend.get_vocab().values()) + 1
    if tokenizer.length > length or known > config.vocab_size:
        raise ValueError(f"{folder}: this tokenizer makes {tokenizer.length} tokens with ids below {known}, "
                         f"the text encoder reads {length}, ids below {config.vocab_size}; use its tokenizer")


def clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None) -> Backend:
    """CLIP's BPE: NFC, collapse white space, lower case; split into words; map to bytes; merge."""
    backend = Backend(BPE(vocab=vocab, merges=merges, end_of_word_suffix=WORD_END, unk_token=unknown))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _special_tokens(folder: Path, config: dict, fast: dict) -> tuple[dict[str, str], list[dict]]:
    """The token of each role (see ROLES), and all special tokens, which are matched before words are split.

    If tokenizer_config.json has `added_tokens_decoder`, we ignore the older special_tokens_map.json,
    added_tokens.json and the list in tokenizer.json.
    """
    path = folder / "tokenizer_config.json"
    named = _tokens_by_role(ROLES, path) | _tokens_by_role(config, path)
    if "added_tokens_decoder" in config:
        by_id = checked(config["added_tokens_decoder"], dict, f"{path}: added_tokens_decoder")
        listed = [by_id[key] for key in sorted(by_id, key=lambda key: (len(key), key))]  # as numbers
    else:
        path = folder / "special_tokens_map.json"
        named |= _tokens_by_role(read_json(path, missing={}), path)
        roles, path = {token["content"] for token in named.values()}, folder / "added_tokens.json"
        added = {text: checked(number, int, f"{path}: {text}") for text, number in
                 read_json(path, missing={}).items()}
        listed = [{"content": text, "normalized": text not in roles} for text in sorted(added, key=added.get)]
        path = folder / "tokenizer.json"
        tokens = checked(fast.get("added_tokens", []), list[dict], f"{path}: added_tokens")
        listed += sorted(tokens, key=lambda token: checked(token.get("id"), int, f"{path}: id of a token"))
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = checked(config.get(key), list[str | dict] | dict | None, f"{folder}: {key}") or []
        listed += more.values() if isinstance(more, dict) else more
    listed = [_token(token, f"{folder}: a special token") for token in listed]
    # `listed` comes first to set the order, and again last so that its flags replace those of `named`
    special = {token["content"]: token for token in [*listed, *named.values(), *listed]}
    return {role: token["content"] for role, token in named.items()}, list(special.values())


def _tokens_by_role(config: dict, path: Path) -> dict[str, dict]:
    return {key: _token(token, f"{path}: {key}") for key, token in config.items()
            if key.endswith("_token") and isinstance(token, (str, dict))}


def _token(token, where: str) -> dict:
    """Config files write a token as a text, or as an object with its text and flags. Returns an object."""
    token = {"content": token} if isinstance(token, str) else checked(token, dict, where)
    return {"content": checked(token.get("content"), str, f"{where}: content")} | {
        flag: checked(token[flag], bool, f"{where}: {flag}") for flag in FLAGS if flag in token}


def split_merge(merge: str | list[str]) -> tuple[str, str]:
    """Read a merge: "a b" in files from before 2024, ["a", "b"] in newer files."""
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)

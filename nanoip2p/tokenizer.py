"""CLIP's byte-level BPE tokenizer: texts -> token ids, the same ids as transformers' CLIPTokenizer.

The `tokenizers` library merges the byte pairs; this file holds the settings with which it does so as CLIP.
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from nanoip2p.common.files import read_json, replacing, write_json

START, END = "<|startoftext|>", "<|endoftext|>"
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
LENGTH = 77  # tokens of a text, unless tokenizer_config.json says otherwise
WORD_END = "</w>"
# A word is a run of letters, one digit, or a run of other signs, as in OpenAI's simple_tokenizer.py
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Callable: texts -> token ids. Made by load_tokenizer."""

    def __init__(self, backend: Backend, start: int, end: int, pad: int, length: int):
        assert length >= 2, f"no room for start and end in {length} tokens"
        self.backend, self.length = backend, length
        self.start, self.end, self.pad = start, end, pad

    def __call__(self, texts: list[str]) -> Tensor:
        """Texts -> (B, length) int64: start, tokens, end, padding.

        Cuts a text that is too long before the end token, with a warning that quotes the dropped part.
        Raises ValueError for a text that is not valid Unicode (bytes of another encoding on a command line).
        """
        assert not isinstance(texts, str), "a list of texts, not one text"
        return torch.tensor([self._row(text) for text in texts], dtype=torch.int64).reshape(-1, self.length)

    def _row(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text {text!r} is not valid Unicode ({error.reason}); retype it") from None
        encoded = self.backend.encode(text, add_special_tokens=False)
        ids, room = encoded.ids, self.length - 2
        if len(ids) > room:
            dropped = text[encoded.offsets[room][0] :].strip()
            message = f"{len(ids) - room} of the text's {len(ids)} tokens do not fit, dropped: {dropped!r}"
            warnings.warn(message, stacklevel=4)
        row = [self.start, *ids[:room], self.end]
        return row + [self.pad] * (self.length - len(row))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read tokenizer.json, or else vocab.json and merges.txt, and the settings files beside them.

    Padding is the end-of-text token unless tokenizer_config.json or special_tokens_map.json names another.
    Raises ValueError, naming the folder or file, if something is missing or broken.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json", missing={})
    fast = read_json(folder / "tokenizer.json", missing={})
    vocab, merges = _vocabulary(folder, fast)
    roles, special = _special_tokens(folder, config, fast)
    for role in ("bos_token", "eos_token"):
        if roles[role] not in vocab:
            raise ValueError(f"{folder}: the vocabulary lacks {roles[role]!r}, so it is not CLIP's")
    backend = _backend(vocab, merges, roles["unk_token"])
    backend.add_tokens(special)
    length = config.get("model_max_length") or LENGTH
    length = length if length < 10**6 else LENGTH  # transformers writes 1e30 for "not set"
    start, end, pad = (backend.token_to_id(roles[role]) for role in ("bos_token", "eos_token", "pad_token"))
    return Tokenizer(backend, start, end, pad, int(length))


def check_fits(tokenizer: Tokenizer, config, folder: Path) -> None:
    """Raise ValueError if a text encoder with this CLIPTextConfig cannot read the tokenizer's output."""
    length, known = config.max_position_embeddings, tokenizer.backend.get_vocab_size()
    if tokenizer.length > length or known > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer makes {tokenizer.length} tokens out of {known}, the text "
                         f"encoder reads {length} out of {config.vocab_size}; use that encoder's tokenizer")


def train_tokenizer(texts: Iterable[str], size: int, folder: str | Path) -> None:
    """Learn a vocabulary of at most `size` tokens; write vocab.json, merges.txt, tokenizer_config.json.

    The order is CLIP's: bytes, bytes that end a word, merges, start, end. End-of-text has the largest id, as
    CLIP's pooling expects. Every byte is a token, so any text can be encoded.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + WORD_END for letter in alphabet]
    assert size >= len(tokens) + 2, f"{len(tokens)} bytes and two special tokens do not fit in {size}"
    backend = _backend({}, [], None)
    # The trainer's vocab_size counts only the word-ending bytes that occur, so the merges are cut below
    trainer = BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet,
                         end_of_word_suffix=WORD_END, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    merges = [_pair(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    merges = merges[: size - len(tokens) - 2]
    tokens += [first + second for first, second in merges] + [START, END]

    folder = Path(folder)
    write_json({token: index for index, token in enumerate(tokens)}, folder / "vocab.json")
    with replacing(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {**ROLES, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    write_json(config, folder / "tokenizer_config.json")


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None) -> Backend:
    """CLIP's steps: compose Unicode, shorten white space, lower case; split into words; bytes; merge."""
    settings = {} if unknown is None else {"unk_token": unknown}
    backend = Backend(BPE(vocab=vocab, merges=merges, end_of_word_suffix=WORD_END, **settings))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _vocabulary(folder: Path, fast: dict) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and merges by precedence. tokenizer.json takes precedence, as in transformers."""
    if fast:
        model = fast.get("model", {})
        if not {"vocab", "merges"} <= model.keys():
            raise ValueError(f"{folder / 'tokenizer.json'} has no BPE vocabulary, so it is not CLIP's")
        return model["vocab"], [_pair(merge) for merge in model["merges"]]
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    for file in (vocab_file, merges_file):
        if not file.is_file():
            raise ValueError(f"{file} is missing; needed are vocab.json and merges.txt, or tokenizer.json")
    try:
        return BPE.read_file(str(vocab_file), str(merges_file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{vocab_file} or {merges_file.name} is broken: {error}") from None


def _special_tokens(folder: Path, config: dict, fast: dict) -> tuple[dict[str, str], list[AddedToken]]:
    """The token of each role, and all tokens that are cut out of a text before it is split into words.

    `added_tokens_decoder` in tokenizer_config.json supersedes the older special_tokens_map.json,
    added_tokens.json and the list in tokenizer.json.
    """
    named = ROLES | _token_fields(config)
    if "added_tokens_decoder" in config:
        by_id = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
        listed = [token for _, token in by_id]
    else:
        named |= _token_fields(read_json(folder / "special_tokens_map.json", missing={}))
        roles = {_text(token) for token in named.values()}
        by_id = sorted(read_json(folder / "added_tokens.json", missing={}).items(), key=lambda item: item[1])
        listed = [{"content": text, "normalized": text not in roles} for text, _ in by_id]
        listed += sorted(fast.get("added_tokens", []), key=lambda token: token["id"])
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed += config.get(key) or []
    # A token's flags come from the list, or else from the last role that names it, as in transformers
    found = {_text(token): token for token in listed}
    found |= {_text(token): token for token in named.values() if _text(token) not in found}
    return {role: _text(token) for role, token in named.items()}, list(map(_added_token, found.values()))


def _added_token(token: str | dict) -> AddedToken:
    """A token that is cut out of a text before normalising (after, if `normalized`) and splitting."""
    flags = token if isinstance(token, dict) else {}
    flags = {key: flags[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in flags}
    return AddedToken(_text(token), special=True, **flags)


def _token_fields(config: dict) -> dict:
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    return {key: value for key, value in tokens.items() if isinstance(value, (str, dict))}


def _text(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Files before 2024 write a merge as "a b", later ones as ["a", "b"]."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second

"""CLIP's byte-level BPE tokenizer: texts -> the same token ids as transformers' CLIPTokenizer."""

import warnings
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from torch import Tensor

from nanoip2p.common.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
LENGTH = 77  # tokens per text, unless tokenizer_config.json has another number
WORD_END = "</w>"
# A word is a run of letters, one digit, or a run of other characters, as in OpenAI's simple_tokenizer.py
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Turns texts into token ids when called. load_tokenizer makes one from files."""

    def __init__(self, backend: Backend, start: int, end: int, pad: int, length: int):
        self.backend, self.length = backend, length
        self.start, self.end, self.pad = start, end, pad

    def __call__(self, texts: list[str]) -> Tensor:
        """Texts -> token ids (B, length) int64: start, tokens, end, padding.

        Truncates long texts, with a warning. Raises ValueError for a text that is not valid Unicode.
        """
        assert not isinstance(texts, str), "the tokenizer needs a list of texts, not one text"
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
    vocab, merges = _vocabulary(folder, fast)
    roles, special = _special_tokens(folder, config, fast)
    if missing := {roles["bos_token"], roles["eos_token"]} - vocab.keys():
        raise ValueError(f"{folder}: the vocabulary lacks {min(missing)!r}, so it is not CLIP's")
    backend = clip_backend(vocab, merges, roles["unk_token"])
    backend.add_tokens(special)
    length = config.get("model_max_length") or LENGTH
    length = length if length < 10**6 else LENGTH  # transformers writes 1e30 for "not set"
    ids = (backend.token_to_id(roles[role]) for role in ("bos_token", "eos_token", "pad_token"))
    return Tokenizer(backend, *ids, int(length))


def check_fits(tokenizer: Tokenizer, config, folder: Path) -> None:
    """Raise ValueError if a text encoder with this CLIPTextConfig cannot read the tokenizer's output."""
    length, known = config.max_position_embeddings, tokenizer.backend.get_vocab_size()
    if tokenizer.length > length or known > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer makes {tokenizer.length} tokens with ids below {known}, "
                         f"the text encoder reads {length} with ids below {config.vocab_size}; use its own")


def clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None) -> Backend:
    """CLIP's BPE: NFC, collapse white space, lower case; split into words; map to bytes; merge."""
    backend = Backend(BPE(vocab=vocab, merges=merges, end_of_word_suffix=WORD_END, unk_token=unknown))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _vocabulary(folder: Path, fast: dict) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary {token: id} and ordered merges. tokenizer.json takes precedence, as in transformers."""
    if fast:
        model = fast.get("model", {})
        if not {"vocab", "merges"} <= model.keys():
            raise ValueError(f"{folder / 'tokenizer.json'} has no BPE vocabulary, so it is not CLIP's")
        return model["vocab"], [split_merge(merge) for merge in model["merges"]]
    try:
        return BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder}: vocab.json or merges.txt is missing or broken: {error}") from None


def _special_tokens(folder: Path, config: dict, fast: dict) -> tuple[dict[str, str], list[AddedToken]]:
    """The token of each role (see ROLES), and all special tokens, which are matched before words are split.

    If tokenizer_config.json has `added_tokens_decoder`, we ignore the older special_tokens_map.json,
    added_tokens.json and the list in tokenizer.json.
    """
    named = _tokens_by_role(ROLES) | _tokens_by_role(config)
    if "added_tokens_decoder" in config:
        by_id = config["added_tokens_decoder"]
        listed = [by_id[key] for key in sorted(by_id, key=int)]
    else:
        named |= _tokens_by_role(read_json(folder / "special_tokens_map.json", missing={}))
        roles = {token["content"] for token in named.values()}
        added = read_json(folder / "added_tokens.json", missing={})
        listed = [{"content": text, "normalized": text not in roles} for text in sorted(added, key=added.get)]
        listed += sorted(fast.get("added_tokens", []), key=lambda token: token["id"])
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed += map(_as_dict, config.get(key) or [])
    # `listed` comes first for its order, and again last because its flags take precedence over the roles'
    special = {token["content"]: token for token in [*listed, *named.values(), *listed]}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return ({role: token["content"] for role, token in named.items()},
            [AddedToken(text, special=True, **{flag: token[flag] for flag in flags if flag in token})
             for text, token in special.items()])


def _tokens_by_role(config: dict) -> dict[str, dict]:
    return {key: _as_dict(token) for key, token in config.items()
            if key.endswith("_token") and isinstance(token, (str, dict))}


def _as_dict(token: str | dict) -> dict:
    """Config files write a token as a string, or as a dictionary of its text and flags."""
    return {"content": token} if isinstance(token, str) else token


def split_merge(merge: str | list[str]) -> tuple[str, str]:
    """Read a merge: "a b" in files from before 2024, ["a", "b"] in newer files."""
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)

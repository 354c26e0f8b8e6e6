"""Learn a byte-pair vocabulary like CLIP's from texts. All nano models share one, from make_nano.py."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer

from nanoip2p.common.files import replacing, write_json
from nanoip2p.tokenizer import END, LENGTH, ROLES, START, WORD_END, clip_backend, split_merge


def train_tokenizer(texts: Iterable[str], size: int, folder: str | Path) -> None:
    """Learn a vocabulary of at most `size` tokens; write vocab.json, merges.txt, tokenizer_config.json.

    The tokens have CLIP's order: bytes, word-ending bytes, merges, start, end. End-of-text has the largest
    id, as CLIP's pooling expects. Every byte is a token, so the tokenizer can encode any text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + WORD_END for letter in alphabet]
    assert size >= len(tokens) + 2, f"{len(tokens)} bytes and two special tokens do not fit in {size}"
    backend = clip_backend({}, [], None)
    # vocab_size counts only those word-ending bytes that occur, so the trainer learns too many merges
    trainer = BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet,
                         end_of_word_suffix=WORD_END, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    merges = [split_merge(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    merges = merges[: size - len(tokens) - 2]  # START and END are the last two tokens
    tokens += [first + second for first, second in merges] + [START, END]

    folder = Path(folder)
    write_json({token: index for index, token in enumerate(tokens)}, folder / "vocab.json")
    with replacing(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {**ROLES, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    write_json(config, folder / "tokenizer_config.json")

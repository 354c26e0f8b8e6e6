"""Textual inversions (Gal et al. 2208.01618): files with the token embeddings of one new word."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken

from nanoip2p.checkpoint.tensors import cast, check_tensors, read_tensors
from nanoip2p.pipeline import Model


def add_embedding(model: Model, path: str | Path) -> str:
    """Add the word of a file to a model. Returns one line that names the word.

    Reads learned_embeds of diffusers, where the tensor's name is the word, and .pt or .safetensors of the
    web UIs, where the file's name is the word. Vectors (n, D) add n tokens <x>, <x>_1, ... at the end of the
    vocabulary, as in diffusers. Raises ValueError for other files, for vectors of another width, and for a
    word that equals a token (cyborg does not equal cyborg</w>) or would share tokens with an added word.
    """
    path, tokenizer, encoder = Path(path), model.tokenizer, model.text_encoder
    tensors, table = read_tensors(path), encoder.text_model.embeddings.token_embedding
    if len(tensors) != 1:
        raise ValueError(f"{path} holds {len(tensors)} tensors; a textual inversion of SD 1.x has one")
    [(name, vectors)] = tensors.items()
    vectors, (known, width) = torch.atleast_2d(vectors), table.weight.shape
    unnamed = name == "emb_params" or name.startswith("string_to_param.")  # files of the web UIs
    word = tokenizer.clean(path.stem if unnamed else name).strip()
    n = max(1, min(len(vectors), tokenizer.length - 2))  # at most as many as fit into a text
    check_tensors({word: vectors}, {word: torch.empty(n, width, device="meta")}, path)
    tokens = [word, *(f"{word}_{i}" for i in range(1, n))]
    base, _, number = word.rpartition("_")  # if <x>_1 is known, <x>_2 would be the third vector of <x>
    before = base if number == "1" else f"{base}_{int(number) - 1}" if number.isdecimal() else None
    added = {token.content.lower() for token in tokenizer.backend.get_added_tokens_decoder().values()}
    taken = {token.lower() for token in tokenizer.backend.get_vocab()}  # case does not matter in a text
    if not word or before and before.lower() in added or taken & {x.lower() for x in (f"{word}_1", *tokens)}:
        raise ValueError(f"{path}: its word {word!r} is empty, known, or would share tokens with a known "
                         f"word; rename {'the file' if unnamed else 'its tensor'}")
    tokenizer.backend.add_tokens([AddedToken(token) for token in tokens])
    ids = [tokenizer.backend.token_to_id(token) for token in tokens]
    grown = table.weight.new_zeros(max(known, max(ids) + 1), width)
    grown[:known] = table.weight.detach()
    grown[ids] = cast(vectors, grown.dtype, word).to(grown.device)
    table.weight, table.num_embeddings = torch.nn.Parameter(grown, requires_grad=False), len(grown)
    encoder.config = replace(encoder.config, vocab_size=len(grown))
    return f"opened {path}: its word is {word} ({n} vector{'s' * (n > 1)})"

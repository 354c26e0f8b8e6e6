"""Which word of a caption becomes which of the edited caption: the token mappings of Prompt-to-Prompt.

Hertz et al. (2208.01626, section 3.2) distinguish a word swap (replace) from a longer prompt (refine). One
global alignment of the two token sequences serves both: between the tokens they have in common lie blocks
that were swapped, added or left out.
"""

import torch
from torch import Tensor

from nanoip2p.tokenizer import WORD_END, Tokenizer


def blocks(source: list[int], edit: list[int]) -> list[tuple[range, range]]:
    """Cut both sequences into blocks that belong together, in order: (places in source, places in edit).

    A common token is a block of two single places; else it holds what was swapped, either side may be empty.
    The alignment is Needleman & Wunsch's with 1 for a match and 0 for a gap; two tokens that differ are two
    gaps, since Hertz et al. give that pair -1.
    """
    rows, columns = len(source), len(edit)
    common = [[0] * (columns + 1) for _ in range(rows + 1)]  # of source[i:] and edit[j:], the longest
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            common[i][j] = max(common[i + 1][j], common[i][j + 1],
                               common[i + 1][j + 1] + 1 if source[i] == edit[j] else 0)
    found, i, j, i_from, j_from = [], 0, 0, 0, 0
    while i < rows and j < columns:
        if source[i] == edit[j]:
            found += [(range(i_from, i), range(j_from, j)), (range(i, i + 1), range(j, j + 1))]
            i, j = i + 1, j + 1
            i_from, j_from = i, j
        elif common[i + 1][j] >= common[i][j + 1]:
            i += 1
        else:
            j += 1
    found.append((range(i_from, rows), range(j_from, columns)))
    return [(ours, theirs) for ours, theirs in found if ours or theirs]


def token_map(source: list[int], edit: list[int], end: int) -> tuple[Tensor, Tensor]:
    """M (T, T) and a (T,), both float32, from the T token ids of each caption, `end` and padding included.

    Column j of M says which source tokens' maps token j of the edited caption takes over; a is 1 where it
    takes them over at all, and 0 for an added token, which keeps its own map (the paper's refine). A common
    token takes its own; a swapped block of as many tokens takes them one by one, of another number evenly,
    so that the attention paid to the block stays the same (the authors' replace).
    """
    length = len(edit)
    mapping, taken = torch.zeros(length, length), torch.zeros(length)
    n_source, n_edit = source.index(end) + 1, edit.index(end) + 1
    for ours, theirs in blocks(source[:n_source], edit[:n_edit]):
        if len(ours) == len(theirs):
            mapping[list(ours), list(theirs)] = 1
        elif ours and theirs:
            mapping[ours.start : ours.stop, theirs.start : theirs.stop] = 1 / len(theirs)
        if ours and theirs:
            taken[list(theirs)] = 1
    for j in range(max(n_source, n_edit), length):  # what is padding in both stays where it is; in the
        mapping[j, j] = taken[j] = 1                # edit alone it has no other map than its own
    return mapping, taken


def find_words(tokenizer: Tokenizer, text: str, words: str) -> list[int]:
    """Where the tokens of a word or phrase stand in a text, every time it occurs; the start token is 0.

    Raises ValueError when it does not occur.
    """
    tokens, wanted = (tokenizer.backend.encode(part, add_special_tokens=False).tokens
                      for part in (text, words))
    tokens = [WORD_END, *tokens[: tokenizer.length - 2]]
    places = [range(i, i + len(wanted)) for i in range(1, len(tokens))
              if tokens[i : i + len(wanted)] == wanted and tokens[i - 1].endswith(WORD_END)]  # whole words
    if not wanted or not places:
        raise ValueError(f"{words!r} is not in {text!r}; name a word of it")
    return [i for place in places for i in place]


def split_words(tokenizer: Tokenizer, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text with the places of their tokens; the start token is 0."""
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    found, begin = [], 0
    for i, token in enumerate(encoded.tokens[: tokenizer.length - 2]):
        if token.endswith(WORD_END):
            word = text[encoded.offsets[begin][0] : encoded.offsets[i][1]]
            found.append((word.strip(), list(range(begin + 1, i + 2))))
            begin = i + 1
    return found

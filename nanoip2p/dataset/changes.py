"""What a pair of captions changes, where the painter attends to it, and how much else changed in the pictures.

    words = changed_words(tokenizer, "a red house", "a blue house")     # ["red", "blue"], and their tokens
    model = PairPainter(..., blend=words.tokens, blend_most=MOST)       # --blend auto
    [(pair, leakage, whole)] = paint(model, words.tokens, seeds=[0], shares=[0.5], cfg_text=[3.0])
"""

from dataclasses import dataclass

import torch
from PIL import Image
from tqdm import tqdm

from nanoip2p.images import to_tensor
from nanoip2p.prompt_to_prompt import PairPainter, align, attended, split_words
from nanoip2p.tokenizer import Tokenizer

# Words that show nothing. They count only if nothing else changed
FILLERS = set("a an the this that its and or but of in on at to by with from for into onto over under near "
              "is are as".split())


def changed_words(tokenizer: Tokenizer, source: str, edit: str) -> tuple[list[str], list[list[int]]]:
    """The words of each caption that the other lacks by `align`, and their token positions: two of each.

    A word counts if any of its tokens changed. Equal captions, and those that first differ after the last
    token that fits, change no words: "" and [].
    """
    ids = tokenizer([source, edit]).tolist()
    blocks = [block for block in align(*ids) if [ids[0][i] for i in block[0]] != [ids[1][j] for j in block[1]]]
    sides = [[(word, tokens) for word, tokens in split_words(tokenizer, text)
              if any(token in block[side] for block in blocks for token in tokens)]
             for side, text in enumerate((source, edit))]
    shown = [[(word, tokens) for word, tokens in words
              if word.lower() not in FILLERS and any(letter.isalnum() for letter in word)] for words in sides]
    sides = shown if any(shown) else sides
    return ([" ".join(word for word, _ in words) for words in sides],
            [[token for _, tokens in words for token in tokens] for words in sides])

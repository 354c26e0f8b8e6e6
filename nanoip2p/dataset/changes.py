"""Find the words that differ between two captions, and measure how much else changed in their pictures.

This is not in the paper. The region of an edit is where the attention to a changed word is high, as in the
local blend of Prompt-to-Prompt (prompt_to_prompt.hot_words). A word with high attention in more than MOST of
the picture is ignored. If no word is left, as in an edit of the whole picture (time, weather, style), the
pair has no region, no blend and no leakage.

    leakage = mean |after - before| outside the region / mean |after - before| inside     (8-bit RGB pixels)

0 means that nothing else changed, 1 that everything changed alike. The attention maps are from the second
lowest level (16 x 16 at 512 pixels), summed over all steps. After a blend, leakage is near 0, even if the
region is wrong.
"""

from itertools import zip_longest

import torch
from PIL import Image
from tqdm import tqdm

from nanoip2p.images import to_tensor
from nanoip2p.prompt_to_prompt import PairPainter, align, attended, hot_words, split_words
from nanoip2p.text_to_image import TextToImage
from nanoip2p.tokenizer import Tokenizer

MOST = 0.4  # measured in the nano world, see docs/datasets.md
# Words that name nothing in a picture. They count as changed only if no other word changed
FILLERS = set("a an the this that its and or but of in on at to by with from for into onto over under near "
              "is are as".split())


def changed_words(tokenizer: Tokenizer, source: str, edit: str) -> list[list[tuple[str, list[int]]]]:
    """The words of `source` that `edit` lacks, then the words of `edit` that `source` lacks, by `align`.

    Each word has its token positions. Aligns words instead of tokens, because different words can share
    tokens. Drops words beyond the token limit.
    """
    texts = [split_words(tokenizer, text) for text in (source, edit)]
    names = [[word.lower() for word, _ in words] for words in texts]
    blocks = [(a, b) for a, b in align(*names) if [names[0][i] for i in a] != [names[1][j] for j in b]]
    changed = [[words[i] for block in blocks for i in block[side]] for side, words in enumerate(texts)]
    shown = [[(word, tokens) for word, tokens in words
              if word.lower() not in FILLERS and any(map(str.isalnum, word))] for words in changed]
    return shown if any(shown) else changed


def leakage(before: Image.Image, after: Image.Image, region: torch.Tensor) -> float | None:
    """Mean change outside the region (1, H, W), bool, over mean change inside. None if either is empty."""
    change = (to_tensor(after) - to_tensor(before)).abs().mean(0, keepdim=True).cpu()       # (1, H, W)
    if region.all() or not region.any():
        return None
    return float(change[~region].mean() / change[region].mean().clamp(min=1e-6))


class MeasuredPainter(PairPainter):
    """A PairPainter that also measures leakage. Its `blend` may be "auto": the words that differ."""

    def __init__(self, painter: TextToImage, source: str, edit: str, *settings, blend=None, **more):
        """Arguments: as for PairPainter."""
        words = list(zip_longest(*changed_words(painter.tokenizer, source, edit), fillvalue=("", [])))
        self.words = list(zip(*words)) or [[("", [])]] * 2  # of each caption, padded to the same number
        tokens = [[tokens for _, tokens in side] for side in self.words]
        self.auto = blend == "auto"
        super().__init__(painter, source, edit, *settings, **more, blend=tokens if self.auto else blend,
                         blend_most=MOST if self.auto else 1.0)
        self.changed = [self.columns(side) for side in tokens]

    @torch.inference_mode()
    def measure(self, seeds: list[int], shares: list[float], cfg_text: list[float], bar: tqdm | None = None,
                ) -> tuple[list[tuple[Image.Image, Image.Image]], list[dict]]:
        """Paint pairs as `paint` does. Returns the pairs, and a note {"leakage": number or None} for each.

        With blend "auto", a note also has "blend": the words of each caption that the blend used, or None.
        """
        latents, maps = self.sample(seeds, shares, cfg_text, self.changed, bar)
        edits, sources = (self.painter.decode(half) for half in latents.chunk(2))
        hot = hot_words(maps[:, : len(self.words[0])], MOST).cpu()
        regions, notes = attended(hot, edits[0].size[::-1]), []
        for i, region in enumerate(regions):
            notes.append({"leakage": leakage(sources[i], edits[i], region)})
            if self.auto:
                sides = [[word for (word, _), on in zip(words, hot[row]) if on.any()]
                         for words, row in zip(self.words, (len(seeds) + i, i))]
                notes[-1]["blend"] = sides if any(sides) else None
        return list(zip(sources, edits)), notes

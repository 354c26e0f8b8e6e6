"""Attention taken over from another row of the batch, by q, k and v alone: see prompt_to_prompt.py."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoip2p.attention import attention, attention_twice
from nanoip2p.unet import spread


@dataclass
class Injection:
    """How the rows of a UNet forward attend; UNet.forward's `inject`.

    The batch is [edit rows | source rows]: row i of the first half belongs to row i of the second. The rows
    that take something over are the first ones.
    """

    rows: int                           # of the whole batch; until the first text a row may stand for some
    self_rows: int = 0                  # this many take over self-attention
    self_tokens: float = math.inf       # in layers of at most so many positions
    cross_rows: int = 0                 # this many, n, take over text attention
    from_source: Tensor | None = None   # (n, T, T): M diag(a c)
    own: Tensor | None = None           # (n, T): how much of its own map a token keeps; None for nothing
    words: Tensor | None = None         # (rows, T, W): whose attention to note down, a column each
    word_tokens: int = 0                # in layers of so many positions
    heat: list[Tensor] = field(default_factory=list)  # written here: (rows, positions, W), a mean over heads
    values: dict = field(default_factory=dict)        # layer -> edit_values of its text, where known before

    def to_picture(self, layer, x: Tensor, _: Tensor) -> Tensor:
        """Self-attention of x (rows or less, positions, C)."""
        n = self.self_rows * len(x) // self.rows if x.shape[1] <= self.self_tokens else 0
        q, k, v = layer.to_q(x[n:]), layer.to_k(x[n:]), layer.to_v(x)
        if n == 0:
            return attention(q, k, v, layer.heads)
        half = len(x) // 2
        of_source, rest = slice(half - n, half), half - n  # q and k lack the first n rows
        taken, own = attention_twice(q[of_source], k[of_source], v[:n], v[half : half + n], layer.heads)
        if rest == 0:
            return torch.cat([taken, own])
        q, k, v = (torch.cat([y[first : first + rest], y[-rest:]]) for y, first in ((q, 0), (k, 0), (v, n)))
        edit, source = attention(q, k, v, layer.heads).chunk(2)
        return torch.cat([taken, edit, own, source])

    def to_text(self, layer, x: Tensor, context) -> Tensor:
        """Attention of x (rows or less, positions, C) to the text, a Tensor or Projected of all rows."""
        k, v = layer.project(context)
        q = layer.to_q(spread(x, context)[self._without_q :])
        if self.words is not None and x.shape[1] == self.word_tokens:
            width, parts = v.shape[2] // layer.heads, []
            for words in self.words.to(v.dtype).split(width, dim=2):    # as many columns as a head is wide
                columns = F.pad(words, (0, width - words.shape[2])).repeat(1, 1, layer.heads)
                heat = self._attend_to_text(q, k, *self.edit_values(columns), layer.heads)
                heat = heat.unflatten(2, (layer.heads, width)).float().mean(2)
                parts.append(heat[..., : words.shape[2]])
            self.heat.append(torch.cat(parts, dim=2))
        return self._attend_to_text(q, k, *self.values.get(layer) or self.edit_values(v), layer.heads)

    @property
    def _without_q(self) -> int:
        return self.cross_rows if self.own is None else 0

    def edit_values(self, v: Tensor) -> tuple[Tensor | None, Tensor]:
        """Values (rows, T, C) -> what the source's maps are applied to (n, T, C), and the rows' own maps."""
        n = self.cross_rows
        if n == 0:
            return None, v
        own = [] if self.own is None else [self.own.to(v.dtype)[..., None] * v[:n]]
        return self.from_source.to(v.dtype) @ v[:n], torch.cat([*own, v[n:]])

    def _attend_to_text(self, q: Tensor, k: Tensor, taken: Tensor | None, v: Tensor, heads: int) -> Tensor:
        if taken is None:
            return attention(q, k, v, heads)
        n, half = len(taken), len(k) // 2
        if self.own is None:  # q lacks the first n rows, whose maps are all the source's
            places = torch.arange(len(q), dtype=torch.int32, device=q.device)
            map_of = torch.cat([places[half - n : half], places])
            return attention(q, k[n:], torch.cat([taken, v]), heads, map_of=map_of)
        h = attention(q, k, v, heads)
        taken = attention(q[half : half + n], k[half : half + n], taken, heads)
        return torch.cat([taken + h[:n], h[n:]])

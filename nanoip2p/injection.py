"""Attention taken over from another row of the batch, by q, k and v alone: see prompt_to_prompt.py.

Between positions the map is half the work, so it is made once, for the values of both rows. To a text it is
small: there one call attends for all rows, told by an index whose map each of them meets.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

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
        q, k = layer.to_q(spread(x, context)[self._without_q :]), k[self._without_q :]
        v = self.values[layer] if layer in self.values else self.edit_values(v)
        if self.words is None or x.shape[1] != self.word_tokens:
            return self._add_up(attention(q, k, v, layer.heads, map_from=self.map_from))
        width, parts = v.shape[2] // layer.heads, []
        for words in self.words.to(v.dtype).split(width, dim=2):        # one turn in most: a column a word
            columns = F.pad(words, (0, width - words.shape[2])).repeat(1, 1, layer.heads)
            h, heat = attention_twice(q, k, v, self.edit_values(columns), layer.heads, self.map_from)
            heat = self._add_up(heat).unflatten(2, (layer.heads, width)).float().mean(2)
            parts.append(heat[..., : words.shape[2]])
        self.heat.append(torch.cat(parts, dim=2))
        return self._add_up(h)

    @property
    def _without_q(self) -> int:
        return self.cross_rows if self.own is None else 0

    @cached_property
    def map_from(self) -> Tensor | None:
        """For each row of `edit_values`, the row of q and k (without the first `_without_q`) of its map."""
        if self.cross_rows == 0:
            return None
        rows = torch.arange(self.rows - self._without_q, dtype=torch.int32, device=self.from_source.device)
        of_source = self.rows // 2 - self._without_q
        return torch.cat([rows[of_source : of_source + self.cross_rows], rows])

    def edit_values(self, v: Tensor) -> Tensor:
        """Values (rows, T, C) -> what the source's maps meet (n, T, C), and then what the rows' own meet;
        where nothing is kept of the first n, of the others only."""
        n = self.cross_rows
        if n == 0:
            return v
        own = [] if self.own is None else [self.own.to(v.dtype)[..., None] * v[:n]]
        return torch.cat([self.from_source.to(v.dtype) @ v[:n], *own, v[n:]])

    def _add_up(self, h: Tensor) -> Tensor:
        """Attention to `edit_values` -> (rows, positions, C): taken over plus own, in place."""
        if self.own is None:
            return h
        taken, h = h.split([self.cross_rows, self.rows])
        h[: len(taken)] += taken
        return h

"""Attention with its map in memory, one operation a line: the specification of nanoip2p.attention."""

import torch
from torch import Tensor

from nanoip2p.attention import check_shapes


def attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
                        map_from: Tensor | None = None) -> Tensor:
    """Computes what `attention` computes. It is slow, and its map takes B * heads * Tq * Tk numbers."""
    check_shapes(q, k, v, heads, causal, map_from)
    if map_from is not None:
        q, k = q[map_from], k[map_from]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5               # (B, heads, Tq, Tk)
    if causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)             # (B, Tq, heads * d)

"""Attention: softmax(q k^T / sqrt(d)) v, where d is the width of one head. All networks use this file.

`attention` uses torch's fused kernels. `attention_reference` computes the same in separate operations.
speed/kernels.py (CUDA) and speed/cpu.py (bf16) have functions that can replace `attention` in a network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
              map_from: Tensor | None = None) -> Tensor:
    """Multi-head attention by torch's fused kernels, which do not store the map. Checks the shapes.

    q (B, Tq, heads * d), k and v (B, Tk, heads * d) -> (B, Tq, heads * d). The last axis concatenates the
    heads. The map is softmax(q k^T / sqrt(d)), (Tq, Tk) for each head of each batch row. causal: position i
    attends only to positions 0..i; needs Tq = Tk. map_from (N,) int32, for Prompt-to-Prompt: v and the result
    have N rows. Row i of the result is row i of v, weighted by the map of row map_from[i] of q and k.
    """
    q, k, v = split_heads(q, k, v, heads, causal, map_from)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
                        map_from: Tensor | None = None) -> Tensor:
    """The same as `attention`, but slow: it stores the maps, B * heads * Tq * Tk numbers."""
    q, k, v = split_heads(q, k, v, heads, causal, map_from)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5               # (B, heads, Tq, Tk)
    if causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)        # (B, Tq, heads * d)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, map_from: Tensor | None) -> None:
    """Raise AssertionError, with the shapes, if `attention` cannot use these inputs."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {heads} heads"
    assert k.shape[1:] == v.shape[1:] and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], shapes
    assert v.shape[0] == (k.shape[0] if map_from is None else len(map_from)), shapes
    assert q.shape[2] % heads == 0, shapes
    assert not causal or q.shape[1] == k.shape[1], shapes


def split_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, map_from: Tensor | None) -> list:
    """Check q, k and v, apply map_from to q and k, and split the heads: (rows, heads, T, d) each."""
    check_shapes(q, k, v, heads, causal, map_from)
    if map_from is not None:
        q, k = (x.index_select(0, map_from) for x in (q, k))
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]

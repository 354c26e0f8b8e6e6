"""Attention: softmax(q k^T / sqrt(d)) v, where d is the width of one head. All networks use this file.

`attention` runs on torch's fused kernels. `attention_reference` computes the same in separate operations.
speed/kernels.py has a Triton kernel that can replace `attention` in the layers of a UNet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
              map_from: Tensor | None = None) -> Tensor:
    """Multi-head attention on fused kernels, which never store the (Tq, Tk) attention map.

    q (B, Tq, heads * d), k and v (B, Tk, heads * d) -> (B, Tq, heads * d). The last axis concatenates the
    heads. causal: position i attends only to positions 0..i; needs Tq = Tk. map_from (N,) int32, used by
    Prompt-to-Prompt: the attention map of row map_from[i] of q and k is applied to row i of v
    (N, Tk, heads * d), so the result has N rows.
    """
    check_shapes(q, k, v, heads, causal, map_from)
    if map_from is not None:
        q, k = (x.index_select(0, map_from) for x in (q, k))
    q, k, v = (_split(x, heads) for x in (q, k, v))
    return _merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
                        map_from: Tensor | None = None) -> Tensor:
    """The same result as `attention`, but slow, and it stores the map: B * heads * Tq * Tk numbers."""
    check_shapes(q, k, v, heads, causal, map_from)
    if map_from is not None:
        q, k = q[map_from], k[map_from]
    q, k, v = (_split(x, heads) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5               # (B, heads, Tq, Tk)
    if causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return _merge(scores.softmax(dim=-1) @ v)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, map_from: Tensor | None) -> None:
    """Raise AssertionError, with the shapes, if `attention` cannot use these inputs."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {heads} heads"
    assert k.shape[1:] == v.shape[1:] and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], shapes
    assert v.shape[0] == (k.shape[0] if map_from is None else len(map_from)), shapes
    assert q.shape[2] % heads == 0, shapes
    assert not causal or q.shape[1] == k.shape[1], shapes


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                 # (B, heads, T, d)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)                                 # (B, T, heads * d)

"""Attention: softmax(q k^T / sqrt(d)) v, with d the width of one head. Every network computes it here.

`attention` runs on torch's fused kernels. speed/kernels.py has a kernel of our own, which takes the place of
`attention` in the layers of a UNet. tests/helpers/attention_reference.py computes the map, step by step.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
              map_from: Tensor | None = None) -> Tensor:
    """Multi-head attention on fused kernels, which never store the (Tq, Tk) map.

    q (B, Tq, heads * d), k and v (B, Tk, heads * d) -> (B, Tq, heads * d). The heads lie side by side in the
    last axis. causal: position i attends to positions 0..i only, and Tq = Tk. map_from (N,) int32: row i of
    v (N, Tk, heads * d) meets the attention map of row map_from[i] of q and k, and the result has N rows;
    Prompt-to-Prompt is made of this.
    """
    check_shapes(q, k, v, heads, causal, map_from)
    if map_from is not None:
        q, k = (x.index_select(0, map_from) for x in (q, k))
    q, k, v = (_split(x, heads) for x in (q, k, v))
    return _merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def check_shapes(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, map_from: Tensor | None) -> None:
    """AssertionError, naming the shapes, if `attention` does not take them."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {heads} heads"
    assert k.shape[1:] == v.shape[1:] and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], shapes
    assert v.shape[0] == (k.shape[0] if map_from is None else len(map_from)), shapes
    assert q.shape[2] % heads == 0, shapes
    assert not causal or q.shape[1] == k.shape[1], shapes


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                 # (B, heads, T, d)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)                                 # (B, T, heads * d)

"""The one place that attends: softmax(q k^T / sqrt(d)) v, with d the width of one head.

Every network calls `attention`. `attention_reference` says what it must compute, one line an operation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention on torch's fused kernels, which never store the (Tq, Tk) map.

    q (B, Tq, heads * d), k and v (B, Tk, heads * d) -> (B, Tq, heads * d). The heads lie side by side in
    the last axis. With `causal`, position i sees keys 0..i only (Tq and Tk must be equal). Each head of v,
    and so of the result, may be several times d wide: one map then serves so many values.
    """
    _check(q, k, v, heads, causal)
    q, k, v = (_split(x, heads) for x in (q, k, v))
    if v.shape[-1] != k.shape[-1] and v.device.type not in ("cuda", "meta"):  # fused for equal widths only
        parts = v.split(k.shape[-1], dim=-1)
        return _merge(torch.cat([F.scaled_dot_product_attention(q, k, part) for part in parts], dim=-1))
    return _merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """The same as `attention`, spelled out; slow, and the map takes B * heads * Tq * Tk numbers."""
    _check(q, k, v, heads, causal)
    q, k, v = (_split(x, heads) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5               # (B, heads, Tq, Tk)
    if causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return _merge(scores.softmax(dim=-1) @ v)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                 # (B, heads, T, d)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)                                 # (B, T, heads * d)


def _check(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {heads} heads"
    assert k.shape[:2] == v.shape[:2] and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], shapes
    assert q.shape[2] % heads == 0 and v.shape[2] % k.shape[2] == 0, shapes
    assert not causal or q.shape[1] == k.shape[1], shapes

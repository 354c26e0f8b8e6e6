"""The one place that attends: softmax(q k^T / sqrt(d)) v, with d the width of one head.

Every network calls `attention`. `attention_reference` says what it must compute, one line an operation.
On CUDA our own kernels (kernels.py) take the calls for which they have been measured to be faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 128  # so many keys fit on chip at once, and a simpler kernel takes them
SAFE_TILE = (64, 32, 4, 2)  # queries and keys of a block, warps, stages: fits on any card, fast on none
# (kind, d, B * heads, queries and keys up to, dtype, capability) -> the tile with which our kernel beat every
# one of torch's, as tests/benchmarks/attention.py prints them. Empty, as nothing was measured on a GPU yet.
FASTER: dict[tuple, tuple[int, ...]] = {}


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
              map_from: Tensor | None = None, kernel: str = "auto") -> Tensor:
    """Multi-head attention on fused kernels, which never store the (Tq, Tk) map.

    q (B, Tq, heads * d), k and v (B, Tk, heads * d) -> (B, Tq, heads * d). The heads lie side by side in
    the last axis. With `causal`, position i sees keys 0..i only (Tq and Tk must be equal). With `map_from`
    (B,) int32, v[b] meets the map of q[map_from[b]] and k[map_from[b]], and q and k may have other rows.
    kernel: "sdpa" is torch's, "ours" in kernels.py, "auto" ours where that was measured to be faster.
    """
    _check(q, k, v, heads, causal, map_from)
    kind = "causal" if causal else "short" if k.shape[1] <= SHORT else "long"
    if tile := _choose(kind, kernel, heads, q, k, v):
        from nanoip2p.speed import kernels  # needs triton
        ours = kernels.short_attention if kind == "short" else kernels.long_attention
        return ours(q, k, v, heads, tile, map_from)
    if map_from is not None:
        q, k = (x.index_select(0, map_from) for x in (q, k))
    q, k, v = (_split(x, heads) for x in (q, k, v))
    return _merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def attention_twice(q: Tensor, k: Tensor, v: Tensor, v2: Tensor, heads: int, map_from: Tensor | None = None,
                    kernel: str = "auto") -> tuple[Tensor, Tensor]:
    """`attention` to v and to v2 (shaped alike) by one map.

    Of torch's fused kernels, a CPU's and flash want values as wide as keys; the memory-efficient one and, up
    to a width, cuDNN's take wider ones (sdp_utils.cpp). So a CPU attends twice, CUDA once to both side by
    side. Whether two calls are faster there, tests/benchmarks/attention.py tells; no GPU was at hand for it.
    """
    assert v.shape == v2.shape, (v.shape, v2.shape)
    _check(q, k, v, heads, False, map_from)
    if tile := _choose("twice", kernel, heads, q, k, v, v2):
        from nanoip2p.speed import kernels
        return kernels.long_attention(q, k, v, heads, tile, map_from, v2)
    if map_from is not None:
        q, k = (x.index_select(0, map_from) for x in (q, k))
    if q.device.type not in ("cuda", "meta"):
        return attention(q, k, v, heads, kernel="sdpa"), attention(q, k, v2, heads, kernel="sdpa")
    q, k, *both = (_split(x, heads) for x in (q, k, v, v2))
    h = F.scaled_dot_product_attention(q, k, torch.cat(both, dim=-1))   # (B, heads, Tq, 2 d)
    return tuple(_merge(part) for part in h.chunk(2, dim=-1))


def _choose(kind: str, kernel: str, heads: int, q: Tensor, k: Tensor,
            *values: Tensor) -> tuple[int, ...] | None:
    """The tile for our kernel, or None where torch's is to run."""
    assert kernel in ("auto", "ours", "sdpa"), kernel
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, *values))
    if kernel == "ours":
        assert kind != "causal" and not gradients, "our kernels know neither a causal mask nor gradients"
        return SAFE_TILE
    if kernel == "sdpa" or gradients or not (FASTER and q.is_cuda):
        return None
    return FASTER.get(case(kind, heads, q, k, values[0]))


def case(kind: str, heads: int, q: Tensor, k: Tensor, v: Tensor) -> tuple:
    """The key into FASTER of a call: sizes up to the next power of two."""
    sizes = (1 << (n - 1).bit_length() for n in (v.shape[0] * heads, q.shape[1], k.shape[1]))
    return kind, q.shape[2] // heads, *sizes, str(q.dtype), torch.cuda.get_device_capability(q.device)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
                        map_from: Tensor | None = None) -> Tensor:
    """The same as `attention`, spelled out; slow, and the map takes B * heads * Tq * Tk numbers."""
    _check(q, k, v, heads, causal, map_from)
    if map_from is not None:
        q, k = q[map_from], k[map_from]
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


def _check(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, map_from: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {heads} heads"
    assert k.shape[1:] == v.shape[1:] and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], shapes
    assert v.shape[0] == (k.shape[0] if map_from is None else len(map_from)), shapes
    assert q.shape[2] % heads == 0, shapes
    assert not causal or q.shape[1] == k.shape[1], shapes

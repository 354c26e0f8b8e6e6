"""The one place that attends: softmax(q k^T / sqrt(d)) v, with d the width of one head.

Every network calls `attention`. `attention_reference` says what it must compute, one line an operation.
On CUDA our own kernels (kernels.py) take the calls for which they have been measured to be faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 128  # so many keys fit on chip at once, and a simpler kernel takes them
SAFE_TILE = (64, 32, 4, 2)  # queries and keys of a block, warps, stages: fits on any card, fast on none
# (kind, d, queries up to, keys up to, rows x heads up to, dtype, capability) -> the tile with which our
# kernel beat every one of torch's, as tests/benchmarks/attention.py prints them. Empty: not measured yet.
FASTER: dict[tuple, tuple[int, ...]] = {}


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
              map_of: Tensor | None = None, kernel: str = "auto") -> Tensor:
    """Multi-head attention on fused kernels, which never store the (Tq, Tk) map.

    q (B, Tq, heads * d), k and v (B, Tk, heads * d) -> (B, Tq, heads * d). The heads lie side by side in
    the last axis. With `causal`, position i sees keys 0..i only (Tq and Tk must be equal). With `map_of`
    (B,) int32, row b takes the map of row map_of[b] of q and k, which may have another number of rows.
    kernel: "sdpa" is torch's, "ours" in kernels.py, "auto" ours where that was measured to be faster.
    """
    _check(q, k, v, heads, causal, map_of)
    kind = "elsewhere" if map_of is not None else "short" if k.shape[1] <= SHORT else "long"
    if tile := _choose("causal" if causal else kind, kernel, heads, q, k, v):
        from nanoip2p import kernels  # needs triton
        if kind == "short":
            return kernels.short_attention(q, k, v, heads, tile)
        return kernels.long_attention(q, k, v, heads, tile, map_of)
    if map_of is not None:
        q, k = q[map_of], k[map_of]
    q, k, v = (_split(x, heads) for x in (q, k, v))
    return _merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def attention_twice(q: Tensor, k: Tensor, v: Tensor, v2: Tensor, heads: int,
                    kernel: str = "auto") -> tuple[Tensor, Tensor]:
    """`attention` to v and to v2 (shaped alike) by one map.

    On CUDA torch picks one of its kernels that takes values wider than keys; on a CPU it has none that would
    not form the map, so it runs twice.
    """
    assert v.shape == v2.shape, (v.shape, v2.shape)
    _check(q, k, v, heads, False)
    if tile := _choose("twice", kernel, heads, q, k, v, v2):
        from nanoip2p import kernels
        return kernels.long_attention(q, k, v, heads, tile, v2=v2)
    if q.device.type not in ("cuda", "meta"):
        return attention(q, k, v, heads, kernel="sdpa"), attention(q, k, v2, heads, kernel="sdpa")
    q, k, *both = (_split(x, heads) for x in (q, k, v, v2))
    h = F.scaled_dot_product_attention(q, k, torch.cat(both, dim=-1))   # (B, heads, Tq, 2 d)
    return tuple(_merge(part) for part in h.chunk(2, dim=-1))


def _choose(kind: str, kernel: str, heads: int, q: Tensor, *others: Tensor) -> tuple[int, ...] | None:
    """The tile for our kernel, or None where torch's is to run."""
    assert kernel in ("auto", "ours", "sdpa"), kernel
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *others))
    if kernel == "ours":
        assert kind != "causal" and not gradients, "our kernels know neither a causal mask nor gradients"
        return SAFE_TILE
    if kernel == "sdpa" or gradients or not (FASTER and q.is_cuda):
        return None
    return FASTER.get(case(kind, q, others[0], heads))


def case(kind: str, q: Tensor, k: Tensor, heads: int) -> tuple:
    """The key into FASTER of a call with queries q and keys k."""
    sizes = (q.shape[1], k.shape[1], q.shape[0] * heads)
    sizes = (1 << (size - 1).bit_length() for size in sizes)  # the next powers of two
    return kind, q.shape[2] // heads, *sizes, str(q.dtype), torch.cuda.get_device_capability(q.device)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False,
                        map_of: Tensor | None = None) -> Tensor:
    """The same as `attention`, spelled out; slow, and the map takes B * heads * Tq * Tk numbers."""
    _check(q, k, v, heads, causal, map_of)
    if map_of is not None:
        q, k = q[map_of], k[map_of]
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


def _check(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, map_of: Tensor | None = None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {heads} heads"
    assert k.shape[1:] == v.shape[1:] and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], shapes
    assert v.shape[0] == (k.shape[0] if map_of is None else len(map_of)), shapes
    assert q.shape[2] % heads == 0, shapes
    assert not causal or q.shape[1] == k.shape[1], shapes

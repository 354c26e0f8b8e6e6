"""Attention in Triton for CUDA, without gradients, made for heads of width 40, 80 and 160.

Triton's blocks are powers of two, and tensor cores multiply 16 columns of bf16 at a time. So the kernel
splits each head in two: 40 into 32 + 16 (the last 8 are zeros), 80 into 64 + 16, 160 into 128 + 32. Padding
to 64, 128 and 256 would take 1.33, 1.6 and 1.6 times the work.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoip2p.attention import check_shapes

LOG2_E = 1.4426950408889634  # e^x = 2^(x log2 e); GPUs compute powers of 2


def fused_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, tile: tuple[int, int, int, int],
                    map_from: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`attention` with our kernel, written to `out` if given. Head width 8, 16, ... 160; any strides.

    tile: queries per block, keys per block, num_warps, num_stages; tune.py chooses it. Does not check the
    indices in map_from, because a check would wait for the GPU.
    """
    check_shapes(q, k, v, heads, False, map_from)
    d, keys, (bm, bn, warps, stages) = q.shape[2] // heads, k.shape[1], tile
    assert 8 <= d <= 160 and d % 8 == 0, f"heads of {d} columns"
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert map_from is None or map_from.dtype == torch.int32, map_from.dtype
    out = q.new_empty(len(v), *q.shape[1:]) if out is None else out
    # torch.compile chooses the device itself, and would cut the network in two at device_of
    with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(q):
        _attention[(triton.cdiv(q.shape[1], bm) * len(v) * heads,)](
            q, k, v, out, out if map_from is None else map_from.contiguous(), *q.stride(), *k.stride(),
            *v.stride(), *out.stride(), LOG2_E * d**-0.5, q.shape[1], keys, heads, d, *pieces(d),
            map_from is not None, bm, bn, keys % bn > 0, num_warps=warps, num_stages=stages)
    return out


def pieces(d: int) -> tuple[int, int]:
    """Split head width d into powers of two from 16 up: (main, tail), or (whole, 0) if that saves nothing."""
    whole = max(16, triton.next_power_of_2(d))
    tail = max(16, triton.next_power_of_2(max(1, d - whole // 2)))
    return (whole // 2, tail) if whole // 2 + tail < whole else (whole, 0)


@triton.jit
def _load(x, rows, end, row_stride, column_stride, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
          CHECK: tl.constexpr):
    """Load columns FROM to FROM + WIDTH of a matrix of D columns, 0 outside. CHECK: rows may exceed `end`."""
    columns = FROM + tl.arange(0, WIDTH)
    at = x + rows[:, None] * row_stride + columns[None, :] * column_stride
    if CHECK:
        block = tl.load(at, mask=(rows < end)[:, None] & (columns < D)[None, :], other=0.0)
    elif FROM + WIDTH > D:
        block = tl.load(at, mask=(columns < D)[None, :], other=0.0)
    else:
        block = tl.load(at)
    return block


@triton.jit
def _store(block, x, rows, end, row_stride, column_stride, FROM: tl.constexpr, WIDTH: tl.constexpr,
           D: tl.constexpr):
    columns = FROM + tl.arange(0, WIDTH)
    at = x + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(at, block.to(x.dtype.element_ty), mask=(rows < end)[:, None] & (columns < D)[None, :])


@triton.jit
def _attention(q, k, v, out, map_from, qb, qt, qc, kb, kt, kc, vb, vt, vc, ob, ot, oc, scale, Tq, Tk, heads,
               D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, INDEXED: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, CHECK: tl.constexpr):
    """BM queries of one head attend to all keys, with online softmax (Milakov & Gimelshein 1805.02867)."""
    programs = tl.cdiv(Tq, BM)                                          # per head and row
    head = tl.program_id(0) // programs % heads
    b = (tl.program_id(0) // programs // heads).to(tl.int64)            # int64: offsets may exceed 2^31
    a = tl.load(map_from + b).to(tl.int64) if INDEXED else b
    q, k = q + a * qb + head * D * qc, k + a * kb + head * D * kc
    v, out = v + b * vb + head * D * vc, out + b * ob + head * D * oc
    queries = tl.program_id(0) % programs * BM + tl.arange(0, BM)
    q0 = _load(q, queries, Tq, qt, qc, 0, D0, D, True)
    q1 = _load(q, queries, Tq, qt, qc, D0, D1, D, True) if D1 > 0 else q0
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    sum0 = tl.zeros([BM, D0], tl.float32)
    sum1 = tl.zeros([BM, D1 if D1 > 0 else 1], tl.float32)
    for start in range(0, Tk, BN):
        keys = start + tl.arange(0, BN)
        s = tl.dot(q0, tl.trans(_load(k, keys, Tk, kt, kc, 0, D0, D, CHECK)), input_precision="ieee")
        if D1 > 0:
            s = tl.dot(q1, tl.trans(_load(k, keys, Tk, kt, kc, D0, D1, D, CHECK)), s, input_precision="ieee")
        if CHECK:
            s = tl.where((keys < Tk)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * scale)
        p, fade = tl.exp2(s * scale - new[:, None]), tl.exp2(top - new)  # (BM, BN), (BM,)
        top, total = new, total * fade + tl.sum(p, 1)
        p = p.to(v.dtype.element_ty)
        v0 = _load(v, keys, Tk, vt, vc, 0, D0, D, CHECK)
        sum0 = tl.dot(p, v0, sum0 * fade[:, None], input_precision="ieee")
        if D1 > 0:
            v1 = _load(v, keys, Tk, vt, vc, D0, D1, D, CHECK)
            sum1 = tl.dot(p, v1, sum1 * fade[:, None], input_precision="ieee")
    _store(sum0 / total[:, None], out, queries, Tq, ot, oc, 0, D0, D)
    if D1 > 0:
        _store(sum1 / total[:, None], out, queries, Tq, ot, oc, D0, D1, D)

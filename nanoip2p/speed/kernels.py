"""Fused attention, GroupNorm + SiLU and GEGLU in Triton. attention.py imports this, on CUDA only.

Beside each stands what it must compute, in PyTorch (attention's is `attention_reference`). Forward only:
where gradients are wanted, attention.py takes torch's kernels, and `fused_elementwise` is not for training.

Widths that are no power of two. Triton's blocks are powers of two, and tensor cores contract 16 numbers of
bf16 at a time. So a head is cut in two: 40 is 32 + 16 (8 of them zeros, which are not read), 80 is 64 + 16,
160 is 128 + 32, where padding to 64, 128 and 256 does 1.33, 1.6 and 1.6 times the work. A tail of 8 columns
would do for A v, but Triton 3.6 leaves Hopper's wgmma for it and takes Ampere's instruction on its own.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from nanoip2p.attention import SHORT
from nanoip2p.unet import GEGLU, ResnetBlock, UNet

LOG2_E = 1.4426950408889634  # 2^(x log2 e) = e^x: the hardware's exponential has base 2
QUERY_BLOCKS = 4  # of queries that one program of `_short` takes, so that it loads k and v once for all


def pieces(d: int) -> tuple[int, int]:
    """Two powers of two, of at least 16, that cover a head of width d: (main, tail), or (all, 0)."""
    whole = max(16, triton.next_power_of_2(d))
    tail = max(16, triton.next_power_of_2(max(1, d - whole // 2)))
    return (whole // 2, tail) if whole // 2 + tail < whole else (whole, 0)


@triton.jit
def _tile(x, rows, end, row_stride, column_stride, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
          CHECK: tl.constexpr):
    """(rows, WIDTH): columns FROM ... of a matrix with D; zeros outside. CHECK: rows may lie past the end."""
    columns = FROM + tl.arange(0, WIDTH)
    at = x + rows[:, None] * row_stride + columns[None, :] * column_stride
    if CHECK:
        tile = tl.load(at, mask=(rows < end)[:, None] & (columns < D)[None, :], other=0.0)
    elif FROM + WIDTH > D:
        tile = tl.load(at, mask=(columns < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _put(tile, x, rows, end, row_stride, column_stride, FROM: tl.constexpr, WIDTH: tl.constexpr,
         D: tl.constexpr):
    columns = FROM + tl.arange(0, WIDTH)
    at = x + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(at, tile.to(x.dtype.element_ty), mask=(rows < end)[:, None] & (columns < D)[None, :])


@triton.jit
def _add(total, p, v, keys, end, row_stride, column_stride, FROM: tl.constexpr, WIDTH: tl.constexpr,
         D: tl.constexpr, CHECK: tl.constexpr):
    """total (BM, WIDTH) + p (BM, BN) times columns of v."""
    v = _tile(v, keys, end, row_stride, column_stride, FROM, WIDTH, D, CHECK)
    return tl.dot(p.to(v.dtype), v, total, input_precision="ieee")


@triton.jit
def _step(q0, q1, top, mass, a0, a1, b0, b1, k, v, v2, start, Tk, kt, kc, vt, vc, scale, D: tl.constexpr,
          D0: tl.constexpr, D1: tl.constexpr, TWO: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr):
    """BN keys into the running maximum, mass and sums (Milakov and Gimelshein 1805.02867)."""
    keys = start + tl.arange(0, BN)
    s = tl.dot(q0, tl.trans(_tile(k, keys, Tk, kt, kc, 0, D0, D, CHECK)), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(q1, tl.trans(_tile(k, keys, Tk, kt, kc, D0, D1, D, CHECK)), s, input_precision="ieee")
    if CHECK:
        s = tl.where((keys < Tk)[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])                               # (BM, BN)
    fade = tl.exp2(top - new)
    mass = mass * fade + tl.sum(p, 1)
    a0 = _add(a0 * fade[:, None], p, v, keys, Tk, vt, vc, 0, D0, D, CHECK)
    if D1 > 0:
        a1 = _add(a1 * fade[:, None], p, v, keys, Tk, vt, vc, D0, D1, D, CHECK)
    if TWO:
        b0 = _add(b0 * fade[:, None], p, v2, keys, Tk, vt, vc, 0, D0, D, CHECK)
        if D1 > 0:
            b1 = _add(b1 * fade[:, None], p, v2, keys, Tk, vt, vc, D0, D1, D, CHECK)
    return new, mass, a0, a1, b0, b1


@triton.jit
def _long(q, k, v, v2, out, out2, map_from, qb, qt, qc, kb, kt, kc, vb, vt, vc, ob, ot, oc, scale, Tq, Tk,
          heads, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, TWO: tl.constexpr,
          INDEXED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """BM queries of one head over all keys; with TWO, the map is also multiplied with v2, into out2."""
    blocks = tl.cdiv(Tq, BM)
    head = tl.program_id(0) // blocks % heads
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)              # rows may lie 2^31 numbers apart
    a = tl.load(map_from + b).to(tl.int64) if INDEXED else b
    q += a * qb + head * D * qc
    k += a * kb + head * D * kc
    v += b * vb + head * D * vc
    v2 += b * vb + head * D * vc
    out += b * ob + head * D * oc
    out2 += b * ob + head * D * oc

    queries = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    q0 = _tile(q, queries, Tq, qt, qc, 0, D0, D, True)
    q1 = _tile(q, queries, Tq, qt, qc, D0, D1, D, True) if D1 > 0 else q0
    top, mass = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    a0 = tl.zeros([BM, D0], tl.float32)
    a1 = tl.zeros([BM, D1 if D1 > 0 else 1], tl.float32)
    b0, b1 = a0, a1
    whole = Tk // BN * BN  # only what is left over has to be masked
    for start in range(0, whole, BN):
        top, mass, a0, a1, b0, b1 = _step(q0, q1, top, mass, a0, a1, b0, b1, k, v, v2, start, Tk, kt, kc, vt,
                                          vc, scale, D, D0, D1, TWO, BN, False)
    if whole < Tk:
        top, mass, a0, a1, b0, b1 = _step(q0, q1, top, mass, a0, a1, b0, b1, k, v, v2, whole, Tk, kt, kc, vt,
                                          vc, scale, D, D0, D1, TWO, BN, True)
    share = 1 / mass[:, None]
    _put(a0 * share, out, queries, Tq, ot, oc, 0, D0, D)
    if D1 > 0:
        _put(a1 * share, out, queries, Tq, ot, oc, D0, D1, D)
    if TWO:
        _put(b0 * share, out2, queries, Tq, ot, oc, 0, D0, D)
        if D1 > 0:
            _put(b1 * share, out2, queries, Tq, ot, oc, D0, D1, D)


def long_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, tile: tuple[int, ...],
                   map_from: Tensor | None = None, v2: Tensor | None = None, out: Tensor | None = None,
                   out2: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v of q (N, Tq, heads * d), k (N, Tk, heads * d) and v (B, Tk, heads * d).

    d is a multiple of 8 in 8 ... 160. Any strides; nothing is copied. Returns out (B, Tq, heads * d), written
    into `out` if given. v[b] meets the map of q[map_from[b]] and k[map_from[b]], indices (B,) int32 below N
    (not checked: that would wait for the GPU); without, N = B. With other values v2, returns (out, out2),
    both by one map; v2 of other strides than v is copied. tile: BM, BN, warps, stages.
    """
    d, (bm, bn, warps, stages) = _width(q, k, v, heads, map_from), tile
    out = q.new_empty(len(v), *q.shape[1:]) if out is None else out
    if v2 is not None:
        v, v2 = (v, v2) if v.stride() == v2.stride() else (v.contiguous(), v2.contiguous())
        out2 = torch.empty_like(out) if out2 is None else out2
        assert v2.shape == v.shape and v2.dtype == v.dtype and out2.stride() == out.stride(), v2.shape
    with torch.cuda.device_of(q):
        _long[(triton.cdiv(q.shape[1], bm) * len(v) * heads,)](
            q, k, v, v if v2 is None else v2, out, out if v2 is None else out2,
            out if map_from is None else map_from.contiguous(), *q.stride(), *k.stride(), *v.stride(),
            *out.stride(), LOG2_E * d**-0.5, q.shape[1], k.shape[1], heads, d, *pieces(d), v2 is not None,
            map_from is not None, bm, bn, num_warps=warps, num_stages=stages)
    return out if v2 is None else (out, out2)


@triton.jit
def _short(q, k, v, out, map_from, qb, qt, qc, kb, kt, kc, vb, vt, vc, ob, ot, oc, scale, Tq, Tk, heads,
           D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, INDEXED: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS x BM queries of one head over at most BN keys, which are loaded once."""
    groups = tl.cdiv(Tq, BM * BLOCKS)
    head = tl.program_id(0) // groups % heads
    b = (tl.program_id(0) // groups // heads).to(tl.int64)
    a = tl.load(map_from + b).to(tl.int64) if INDEXED else b
    q += a * qb + head * D * qc
    k += a * kb + head * D * kc
    v += b * vb + head * D * vc
    out += b * ob + head * D * oc

    keys = tl.arange(0, BN)
    k0 = tl.trans(_tile(k, keys, Tk, kt, kc, 0, D0, D, True))
    k1 = tl.trans(_tile(k, keys, Tk, kt, kc, D0, D1, D, True)) if D1 > 0 else k0
    v0 = _tile(v, keys, Tk, vt, vc, 0, D0, D, True)
    v1 = _tile(v, keys, Tk, vt, vc, D0, D1, D, True) if D1 > 0 else v0
    first = tl.program_id(0) % groups * BM * BLOCKS
    for start in range(first, min(first + BM * BLOCKS, Tq), BM):
        queries = start + tl.arange(0, BM)
        s = tl.dot(_tile(q, queries, Tq, qt, qc, 0, D0, D, True), k0, input_precision="ieee")
        if D1 > 0:
            s = tl.dot(_tile(q, queries, Tq, qt, qc, D0, D1, D, True), k1, s, input_precision="ieee")
        s = tl.where((keys < Tk)[None, :], s, float("-inf"))            # (BM, BN)
        p = tl.exp2((s - tl.max(s, 1)[:, None]) * scale)
        share = 1 / tl.sum(p, 1)[:, None]
        p = p.to(v0.dtype)
        _put(tl.dot(p, v0, input_precision="ieee") * share, out, queries, Tq, ot, oc, 0, D0, D)
        if D1 > 0:
            _put(tl.dot(p, v1, input_precision="ieee") * share, out, queries, Tq, ot, oc, D0, D1, D)


def short_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, tile: tuple[int, ...],
                    map_from: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The same of at most SHORT keys, which are one block whatever the tile's BN."""
    d, keys, (bm, _, warps, stages) = _width(q, k, v, heads, map_from), k.shape[1], tile
    assert keys <= SHORT, k.shape
    out = q.new_empty(len(v), *q.shape[1:]) if out is None else out
    with torch.cuda.device_of(q):
        _short[(triton.cdiv(q.shape[1], bm * QUERY_BLOCKS) * len(v) * heads,)](
            q, k, v, out, out if map_from is None else map_from.contiguous(), *q.stride(), *k.stride(),
            *v.stride(), *out.stride(), LOG2_E * d**-0.5, q.shape[1], keys, heads, d, *pieces(d),
            map_from is not None, bm, max(16, triton.next_power_of_2(keys)), QUERY_BLOCKS, num_warps=warps,
            num_stages=stages)
    return out


def _width(q: Tensor, k: Tensor, v: Tensor, heads: int, map_from: Tensor | None) -> int:
    """The width of a head, of inputs that the kernels can take."""
    d = q.shape[2] // heads
    given = (tuple(q.shape), tuple(k.shape), tuple(v.shape), heads, q.dtype, k.dtype, v.dtype)
    assert q.shape[2] == k.shape[2] == v.shape[2] == heads * d and 8 <= d <= 160 and d % 8 == 0, given
    assert k.shape[1] == v.shape[1] > 0 and q.dtype == k.dtype == v.dtype, given
    assert len(q) == len(k) and len(v) == len(k if map_from is None else map_from), given
    assert map_from is None or map_from.dtype == torch.int32, map_from.dtype
    return d


@triton.jit
def _moments(x, means, squares, xb, xc, xp, C, P, G, chunks, BC: tl.constexpr, BP: tl.constexpr):
    """Mean, and sum of squares about it, of one group's channels at BP positions."""
    group, chunk = tl.program_id(0) % G, tl.program_id(0) // G % chunks
    b = (tl.program_id(0) // G // chunks).to(tl.int64)
    channels, places = tl.arange(0, BC)[None, :], (chunk * BP + tl.arange(0, BP))[:, None]
    inside = (channels < C) & (places < P)
    at = x + b * xb + (group * C + channels) * xc + places.to(tl.int64) * xp
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(h) / (C * min(BP, P - chunk * BP))
    off = tl.where(inside, h - mean, 0.0)
    tl.store(means + (b * G + group) * chunks + chunk, mean)
    tl.store(squares + (b * G + group) * chunks + chunk, tl.sum(off * off))


@triton.jit
def _normalise(x, out, weight, bias, means, squares, xb, xc, xp, C, P, G, chunks, eps, BC: tl.constexpr,
               BP: tl.constexpr, CHUNKS: tl.constexpr):
    """The group's moments out of those of its chunks (Chan et al. 1979), then one chunk."""
    group, chunk = tl.program_id(0) % G, tl.program_id(0) // G % chunks
    b = (tl.program_id(0) // G // chunks).to(tl.int64)
    part = tl.arange(0, CHUNKS)
    count = tl.where(part < chunks, tl.minimum(BP, P - part * BP), 0) * C
    at = (b * G + group) * chunks + part
    chunk_means = tl.load(means + at, mask=part < chunks, other=0.0)
    mean = tl.sum(chunk_means * count) / (C * P)
    off = chunk_means - mean
    spread = tl.load(squares + at, mask=part < chunks, other=0.0) + count * off * off
    scale = 1 / tl.sqrt(tl.sum(spread) / (C * P) + eps)

    channels, places = tl.arange(0, BC)[None, :], (chunk * BP + tl.arange(0, BP))[:, None]
    inside = (channels < C) & (places < P)
    place = b * xb + (group * C + channels) * xc + places.to(tl.int64) * xp
    h = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + group * C + channels, mask=channels < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + group * C + channels, mask=channels < C, other=0.0).to(tl.float32)
    h = (h - mean) * scale * gain + shift
    tl.store(out + place, (h / (1 + tl.exp(-h))).to(out.dtype.element_ty), mask=inside)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`group_norm_silu_reference` in two launches. x (B, C, h, w), contiguous or channels last."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    assert dense and x.shape[1] % groups == 0, (x.shape, x.stride(), groups)
    batch, c, places = len(x), x.shape[1] // groups, x.shape[2] * x.shape[3]
    bc = triton.next_power_of_2(c)
    bp = min(triton.next_power_of_2(places), max(1, 8192 // bc))
    chunks = triton.cdiv(places, bp)
    means, squares = x.new_empty(2, batch * groups * chunks, dtype=torch.float32)
    out, (xb, xc, xp) = torch.empty_like(x), x.flatten(2).stride()
    grid = (batch * groups * chunks,)
    with torch.cuda.device_of(x):
        _moments[grid](x, means, squares, xb, xc, xp, c, places, groups, chunks, bc, bp)
        _normalise[grid](x, out, weight, bias, means, squares, xb, xc, xp, c, places, groups, chunks, eps, bc,
                         bp, triton.next_power_of_2(chunks))
    return out


def group_norm_silu_reference(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """SiLU of the GroupNorm, as in front of every convolution of a residual block."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


@triton.jit
def _geglu(x, out, row_stride, C, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = x + at // C * row_stride + at % C
    h = tl.load(value, mask=at < total, other=0.0).to(tl.float32)
    gate = tl.load(value + C, mask=at < total, other=0.0).to(tl.float32)
    h *= 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))           # 1 / sqrt(2)
    tl.store(out + at, h.to(out.dtype.element_ty), mask=at < total)


def geglu(x: Tensor) -> Tensor:
    """`geglu_reference` in one launch; rows may lie apart, the last axis not."""
    rows, width = x.flatten(0, -2), x.shape[-1] // 2
    assert x.shape[-1] % 2 == 0 and rows.stride(1) == 1, (x.shape, x.stride())
    out = x.new_empty(*x.shape[:-1], width)
    with torch.cuda.device_of(x):
        _geglu[(triton.cdiv(out.numel(), 1024),)](rows, out, rows.stride(0), width, out.numel(), 1024)
    return out


def geglu_reference(x: Tensor) -> Tensor:
    """One half times the GELU of the other, by the exact error function. (..., 2 C) -> (..., C)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class FusedResnetBlock(ResnetBlock):
    """With GroupNorm and SiLU in one kernel."""

    def forward(self, x: Tensor, time: Tensor | dict) -> Tensor:
        time = time[self] if isinstance(time, dict) else self.time_emb_proj(time)
        h = self.conv1(_norm_silu(self.norm1, x)) + time[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(_norm_silu(self.norm2, h))


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class FusedGEGLU(GEGLU):
    """With all after the product in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


def fused_elementwise(unet: UNet) -> UNet:
    """A UNet on CUDA with the last two kernels, changed in place like speed.py's; for inference.

    Not part of `speed.fast`: whether they beat what torch.compile makes, tests/benchmarks/attention.py tells,
    and it has not run on a GPU yet.
    """
    for layer in unet.modules():
        layer.__class__ = {ResnetBlock: FusedResnetBlock, GEGLU: FusedGEGLU}.get(type(layer), type(layer))
    return unet

"""Our kernels against float64, or at least their specification in it. test_kernels.py runs this.

Memory that nobody has written is NaN, and so is everything around inputs and outputs: a kernel that reads or
writes a place too far shows it.
"""

import os
import random
from functools import partial

import pytest
import torch
from comparing import relative_error
from tiny_configs import tiny_unet

from nanoip2p.attention import SAFE_TILE, attention, attention_reference, attention_twice
from nanoip2p.speed import kernels
from nanoip2p.unet import UNet

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TILE = (16, 16, 4, 2)  # small ones, so that small inputs have several blocks of queries and keys
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
NAN = float("nan")

if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
    import numpy as np
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot = InterpreterBuilder.create_dot

    def dot(self, a, b, d, *how):
        a, b = (TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), float32)
                if x.data.dtype == np.uint16 else x for x in (a, b))
        return plain_dot(self, a, b, d, *how)

    InterpreterBuilder.create_dot = dot


@pytest.fixture(autouse=True)
def poison():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    assert torch.empty(9, device=DEVICE).isnan().all() and torch.ones(2).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def surrounded(shape, dtype=torch.float32, layout="plain"):
    """A tensor of NaN of this shape, a view into a larger one, which is returned as well."""
    b, t, c = shape
    if layout == "plain":
        whole = torch.full((b + 2, t + 3, c), NAN, dtype=dtype, device=DEVICE)
        return whole[1:-1, 1:-2], whole
    if layout == "fused":  # as a chunk of what one projection makes for q, k and v
        whole = torch.full((b, t + 2, 3 * c), NAN, dtype=dtype, device=DEVICE)
        return whole[:, 1:-1, c : 2 * c], whole
    whole = torch.full((2 * b + 1, c + 2, t + 1), NAN, dtype=dtype, device=DEVICE)  # "turned": channels first
    return whole[1::2, 1:-1, :-1].transpose(1, 2), whole


def draw(seed, *shapes, dtype=torch.float32, layouts=("plain",) * 4, size=1.0):
    generator, drawn = torch.Generator().manual_seed(seed), []
    for shape, layout in zip(shapes, layouts):
        drawn.append(surrounded(shape, dtype, layout)[0])
        drawn[-1].copy_(size * torch.randn(shape, generator=generator))
    return drawn


def expect(q, k, v, heads, map_from=None):
    return attention_reference(q.double(), k.double(), v.double(), heads, map_from=map_from)


def check_within(out, whole):
    """Nothing has been written around `out`; leaves NaN in it."""
    out.fill_(NAN)
    assert whole.isnan().all(), "wrote outside of the output"


def test_heads_are_cut_with_little_padding():
    cut = {8: (16, 0), 24: (32, 0), 40: (32, 16), 56: (64, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32),
           104: (128, 0), 160: (128, 32)}
    assert {d: kernels.pieces(d) for d in cut} == cut


@pytest.mark.parametrize("d", range(8, 168, 8))
def test_long_equals_float64_at_every_width(d):
    choose = random.Random(d)
    dtype = choose.choice(list(BOUNDS))
    batch, heads, queries, keys = (choose.randint(1, n) for n in (2, 2, 40, 50))
    layouts = choose.choices(("plain", "fused", "turned"), k=4)
    shapes = [(batch, tokens, heads * d) for tokens in (queries, keys, keys)]
    q, k, v = draw(d, *shapes, dtype=dtype, layouts=layouts)
    out, whole = surrounded(shapes[0], dtype, layouts[3])
    assert kernels.long_attention(q, k, v, heads, TILE, out=out) is out
    assert relative_error(out, expect(q, k, v, heads)) < BOUNDS[dtype], (dtype, shapes, layouts)
    check_within(out, whole)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("d, keys", [(40, 1), (40, 33), (80, 16), (160, 33)])
def test_long_equals_float64_in_every_dtype(d, keys, dtype):
    q, k, v = draw(keys, (1, 17, 2 * d), (1, keys, 2 * d), (1, keys, 2 * d), dtype=dtype)
    assert relative_error(kernels.long_attention(q, k, v, 2, TILE), expect(q, k, v, 2)) < BOUNDS[dtype]


@pytest.mark.parametrize("keys", [1, 16, 77, 128])
@pytest.mark.parametrize("d", [8, 40, 80, 160])
def test_short_equals_float64(d, keys):
    choose = random.Random(d * keys)
    dtype, layouts = choose.choice(list(BOUNDS)), choose.choices(("plain", "fused", "turned"), k=4)
    queries = choose.randint(1, 2 * 16 * kernels.QUERY_BLOCKS)  # one or two programs a head
    q, k, v = draw(d, *[(2, tokens, 2 * d) for tokens in (queries, keys, keys)], dtype=dtype, layouts=layouts)
    out, whole = surrounded(q.shape, dtype, layouts[3])
    kernels.short_attention(q, k, v, 2, TILE, out=out)
    assert relative_error(out, expect(q, k, v, 2)) < BOUNDS[dtype], (dtype, queries, layouts)
    check_within(out, whole)


def test_more_keys_than_short_has_room_for_are_refused():
    q, k = draw(0, (1, 3, 8), (1, 129, 8))
    with pytest.raises(AssertionError, match="129"):
        kernels.short_attention(q, k, k, 1, TILE)


@pytest.mark.parametrize("kernel", [kernels.long_attention, kernels.short_attention])
def test_a_map_from_another_row(kernel):
    map_from = torch.tensor([3, 3, 0, 1, 2], dtype=torch.int32, device=DEVICE)
    q, k, v = draw(1, (4, 7, 48), (4, 35, 48), (5, 35, 48), layouts=("turned", "fused", "plain"))
    for some in (map_from, map_from.repeat_interleave(2)[::2]):
        assert relative_error(kernel(q, k, v, 2, TILE, some), expect(q, k, v, 2, map_from)) < 2e-6
    for wrong in (map_from[:4], map_from.long()):
        with pytest.raises(AssertionError):
            kernel(q, k, v, 2, TILE, wrong)


@pytest.mark.parametrize("d", [16, 40])
def test_two_values_by_one_map(d):
    shapes = (1, 21, 3 * d), (1, 37, 3 * d), (1, 37, 3 * d), (1, 37, 3 * d)
    for layouts in (("plain",) * 4, ("plain", "plain", "turned", "fused")):
        q, k, v, v2 = draw(d, *shapes, layouts=layouts)
        out, whole = surrounded(shapes[0])
        out2, whole2 = surrounded(shapes[0])
        kernels.long_attention(q, k, v, 3, TILE, v2=v2, out=out, out2=out2)
        assert relative_error(out, expect(q, k, v, 3)) < 2e-6
        assert relative_error(out2, expect(q, k, v2, 3)) < 2e-6
        check_within(out, whole)
        check_within(out2, whole2)


@pytest.mark.parametrize("kernel", [kernels.long_attention, kernels.short_attention])
@pytest.mark.parametrize("size, bound", [(0.0, 1e-6), (30.0, 1e-4), (1e3, 1e-2)])
def test_extreme_scores_neither_overflow_nor_vanish(kernel, size, bound):
    """Up to 1e7, which e^x knows nothing of; float32 scores of that size are wrong by 1 themselves."""
    q, k, v = draw(3, (1, 20, 80), (1, 45, 80), (1, 45, 80))
    q, k = size * q, size * k
    assert relative_error(kernel(q, k, v, 2, TILE), expect(q, k, v, 2)) < bound


@pytest.mark.parametrize("kernel", [kernels.long_attention, kernels.short_attention])
def test_keys_that_are_not_there_have_no_weight(kernel):
    """Where all scores are very low, a score of 0 for padding would take everything."""
    q, k, v = draw(4, (1, 5, 40), (1, 21, 40), (1, 21, 40))
    q, k = q.abs(), -20 * k.abs()
    assert relative_error(kernel(q, k, v, 1, TILE), expect(q, k, v, 1)) < 1e-5


@pytest.mark.parametrize("kernel", [kernels.long_attention, kernels.short_attention])
def test_the_same_every_time(kernel):
    q, k, v = draw(6, (1, 20, 80), (1, 77, 80), (1, 77, 80), dtype=torch.float16)
    assert torch.equal(kernel(q, k, v, 2, TILE), kernel(q, k, v, 2, TILE))


def test_attention_hands_over_to_ours(monkeypatch):
    taken = []
    for name in ("long_attention", "short_attention"):
        def seen(*args, plain, name, **more):
            taken.append((name, args[4]))
            return plain(*args, **more)
        monkeypatch.setattr(kernels, name, partial(seen, plain=getattr(kernels, name), name=name))
    q, k, v, v2 = draw(7, (2, 18, 32), (2, 130, 32), (2, 130, 32), (2, 130, 32))
    map_from = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    few, indexed = (k[:, :128], v[:, :128]), {"map_from": map_from}
    two = attention_twice(q, k, v, v2, 2, map_from, kernel="ours")
    for out, wanted in [(attention(q, k, v, 2, kernel="ours"), expect(q, k, v, 2)),
                        (attention(q, *few, 2, kernel="ours"), expect(q, *few, 2)),
                        (attention(q, *few, 2, **indexed, kernel="ours"), expect(q, *few, 2, **indexed)),
                        (two[0], expect(q, k, v, 2, map_from)), (two[1], expect(q, k, v2, 2, map_from))]:
        assert relative_error(out, wanted) < 2e-6
    assert [name for name, _ in taken] == ["long_attention"] * 2 + ["short_attention"] * 2
    assert {tile for _, tile in taken} == {SAFE_TILE}


@pytest.mark.parametrize("d", [4, 12, 168])
def test_widths_that_ours_does_not_know_are_refused(d):
    (q,) = draw(0, (1, 3, d))
    with pytest.raises(AssertionError, match=f"{d}"):
        kernels.long_attention(q, q, q, 1, TILE)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape, groups", [((2, 20, 27, 25), 2), ((1, 12, 5, 3), 4), ((2, 4, 1, 1), 2)])
def test_group_norm_silu_equals_float64(shape, groups, channels_last, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator).to(DEVICE, dtype)
                       for size in (shape, shape[1], shape[1]))
    x = (3 * x + 5).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    out = kernels.group_norm_silu(x, groups, weight, bias, 1e-5)
    wanted = kernels.group_norm_silu_reference(x.double(), groups, weight.double(), bias.double(), 1e-5)
    assert relative_error(out, wanted) < BOUNDS[dtype]
    assert out.dtype == dtype and out.stride() == x.stride()


def test_group_norm_silu_of_a_large_mean_and_a_small_spread():
    """A variance as the mean of squares less the square of the mean would be lost in rounding, or eps."""
    x = 1000 + torch.randn(1, 20, 27, 25, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ones, zeros = torch.ones(20, device=DEVICE), torch.zeros(20, device=DEVICE)
    for scale, eps in ((1.0, 1e-5), (1e-3, 1e-6)):
        y = scale * x
        wanted = kernels.group_norm_silu_reference(y.double(), 2, ones.double(), zeros.double(), eps)
        assert relative_error(kernels.group_norm_silu(y, 2, ones, zeros, eps), wanted) < 2e-4


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_geglu_equals_float64(dtype):
    (x,) = draw(8, (2, 17, 74), dtype=dtype, size=2.0)
    for given in (x[0], x[:1]):  # the rows of a batch lie apart as its columns do not
        out = kernels.geglu(given)
        assert out.dtype == dtype
        assert relative_error(out, kernels.geglu_reference(given.double())) < BOUNDS[dtype]
    wide = draw(9, (1, 40, 3 * 74), dtype=dtype, layouts=("plain",))[0][0, :, 74:148]
    assert relative_error(kernels.geglu(wide), kernels.geglu_reference(wide.double())) < BOUNDS[dtype]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_unet_with_fused_elementwise_gives_the_same(layout):
    torch.manual_seed(0)
    unet = UNet(tiny_unet()).to(DEVICE, memory_format=layout)
    latents, context = torch.randn(2, 4, 6, 4).to(DEVICE), torch.randn(2, 3, 12).to(DEVICE)
    with torch.inference_mode():
        wanted = unet(latents, 7.0, context)
        assert kernels.fused_elementwise(unet) is unet
        assert relative_error(unet(latents, 7.0, context), wanted) < 1e-5
        told = unet.project_timesteps({7.0: torch.tensor([7.0], device=DEVICE)})
        assert relative_error(unet(latents, told[7.0], context), wanted) < 1e-5
    assert {type(layer).__name__ for layer in unet.modules()} >= {"FusedResnetBlock", "FusedGEGLU"}

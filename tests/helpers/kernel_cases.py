"""Our kernels against their specification in float64. test_kernels.py runs this.

Memory that nobody has written is NaN, and so is everything around inputs and outputs: a kernel that reads or
writes too far fails.
"""

import os
import random

import pytest
import torch
from comparing import randomise, relative_error
from tiny_configs import tiny_unet

from nanoip2p.attention import attention_reference
from nanoip2p.speed import kernels, tune
from nanoip2p.speed.kernels import fused_attention
from nanoip2p.unet import Attention, UNet, attend

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
def unwritten_memory_is_nan():
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


def our_attention(q, k, v, heads, map_from=None, out=None):
    return fused_attention(q, k, v, heads, TILE, map_from, out)


def check_within(out, whole):
    """Nothing has been written around `out`; leaves NaN in it."""
    out.fill_(NAN)
    assert whole.isnan().all(), "wrote outside of the output"


def test_heads_are_cut_with_little_padding():
    cut = {8: (16, 0), 24: (32, 0), 40: (32, 16), 56: (64, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32),
           104: (128, 0), 160: (128, 32)}
    assert {d: kernels.pieces(d) for d in cut} == cut


@pytest.mark.parametrize("d", range(8, 168, 8))
def test_equals_float64_at_every_width(d):
    choose = random.Random(d)
    dtype = choose.choice(list(BOUNDS))
    batch, heads, queries, keys = (choose.randint(1, n) for n in (2, 2, 40, 50))
    layouts = choose.choices(("plain", "fused", "turned"), k=4)
    shapes = [(batch, tokens, heads * d) for tokens in (queries, keys, keys)]
    q, k, v = draw(d, *shapes, dtype=dtype, layouts=layouts)
    out, whole = surrounded(shapes[0], dtype, layouts[3])
    assert our_attention(q, k, v, heads, out=out) is out
    assert relative_error(out, expect(q, k, v, heads)) < BOUNDS[dtype], (dtype, shapes, layouts)
    check_within(out, whole)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("d, keys", [(40, 1), (40, 33), (80, 16), (160, 33)])
def test_equals_float64_in_every_dtype(d, keys, dtype):
    q, k, v = draw(keys, (1, 17, 2 * d), (1, keys, 2 * d), (1, keys, 2 * d), dtype=dtype)
    assert relative_error(our_attention(q, k, v, 2), expect(q, k, v, 2)) < BOUNDS[dtype]


def test_a_map_from_another_row():
    map_from = torch.tensor([3, 3, 0, 1, 2], dtype=torch.int32, device=DEVICE)
    q, k, v = draw(1, (4, 7, 48), (4, 35, 48), (5, 35, 48), layouts=("turned", "fused", "plain"))
    for some in (map_from, map_from.repeat_interleave(2)[::2]):
        assert relative_error(our_attention(q, k, v, 2, some), expect(q, k, v, 2, map_from)) < 2e-6
    for wrong in (map_from[:4], map_from.long()):
        with pytest.raises(AssertionError):
            our_attention(q, k, v, 2, wrong)


@pytest.mark.parametrize("size, bound", [(0.0, 1e-6), (30.0, 1e-4), (1e3, 1e-2)])
def test_extreme_scores_neither_overflow_nor_vanish(size, bound):
    """Up to 1e7, which e^x knows nothing of; float32 scores of that size are wrong by 1 themselves."""
    q, k, v = draw(3, (1, 20, 80), (1, 45, 80), (1, 45, 80))
    q, k = size * q, size * k
    assert relative_error(our_attention(q, k, v, 2), expect(q, k, v, 2)) < bound


def test_keys_that_are_not_there_have_no_weight():
    """Where all scores are very low, a score of 0 for padding would take everything."""
    q, k, v = draw(4, (1, 5, 40), (1, 21, 40), (1, 21, 40))
    q, k = q.abs(), -20 * k.abs()
    assert relative_error(our_attention(q, k, v, 1), expect(q, k, v, 1)) < 1e-5


def test_the_same_every_time():
    q, k, v = draw(6, (1, 20, 80), (1, 77, 80), (1, 77, 80), dtype=torch.float16)
    assert torch.equal(our_attention(q, k, v, 2), our_attention(q, k, v, 2))


def test_a_unet_whose_every_attention_is_ours(monkeypatch):
    """As --attention ours makes it, with and without another row's maps, at sizes that no tile divides."""
    monkeypatch.setattr(tune, "card", lambda device: "a card")
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    generator, ran = torch.Generator().manual_seed(0), []
    unet = randomise(UNet(tiny_unet())).to(DEVICE)
    layers = [layer for layer in unet.modules() if isinstance(layer, Attention)]
    latents, context = (torch.randn(shape, generator=generator).to(DEVICE)
                        for shape in ((2, 4, 14, 10), (2, 77, 12)))
    maps = torch.tensor([1, 1], dtype=torch.int32, device=DEVICE)

    def ours(*given):
        ran.append(given[0].shape[2] // given[3])
        return fused_attention(*given)

    def swapped(layer, x, context):
        return layer.attention(layer.to_q(x), *layer.project(context), layer.heads, map_from=maps)

    with torch.inference_mode():
        plain = [unet(latents, 7.0, context, how) for how in (attend, swapped)]
        assert relative_error(*plain) > 1e-3
        tuner = tune.Tuner(ours, True, pytest.fail)
        for layer in layers:
            layer.attention = tuner
        for how, wanted in zip((attend, swapped), plain):
            unet(latents, 7.0, context, how)  # checks each case
            ran.clear()
            assert relative_error(unet(latents, 7.0, context, how), wanted) < 1e-5
            assert ran == [8] * len(layers)


@pytest.mark.parametrize("d, keys", [(40, 300), (80, 77), (160, 77), (160, 200)])
def test_every_tile_that_may_be_chosen_is_right(d, keys):
    q, k, v = draw(d, (1, 150, d), (1, keys, d), (1, keys, d), dtype=torch.float16)
    wanted = expect(q, k, v, 1)
    for tile in tune.tiles(d, keys, torch.float16):
        assert relative_error(fused_attention(q, k, v, 1, tile), wanted) < BOUNDS[torch.float16], tile


@pytest.mark.parametrize("d", [4, 12, 168])
def test_widths_that_ours_does_not_know_are_refused(d):
    (q,) = draw(0, (1, 3, d))
    with pytest.raises(AssertionError, match=f"heads of {d}"):
        fused_attention(q, q, q, 1, TILE)

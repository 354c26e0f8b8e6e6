"""`attention` against `attention_reference`, and both against a loop in float64."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from comparing import relative_error

import nanoip2p.attention as module
from nanoip2p.attention import attention, attention_reference

# batch, queries, keys, heads, head width: self-attention, SD 1.5's text, one head, one token, odd sizes
SHAPES = [(2, 64, 64, 8, 40), (3, 35, 77, 4, 16), (1, 48, 48, 1, 32), (2, 1, 1, 2, 8), (2, 5, 3, 3, 7)]


def draw(batch, queries, keys, heads, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, tokens, heads * width, generator=generator).to(dtype)
        for tokens in (queries, keys, keys)
    ]


def by_hand(q, k, v, heads, causal):
    """Attention computed for one head and one query at a time."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    width, out = q.shape[2] // heads, np.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            for i in range(q.shape[1]):
                seen = slice(0, i + 1 if causal else None)
                scores = k[b, seen, columns] @ q[b, i, columns] / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                out[b, i, columns] = weights / weights.sum() @ v[b, seen, columns]
    return torch.from_numpy(out)


@pytest.mark.parametrize("attend", [attention, attention_reference])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_queries(attend, shape):
    q, k, v = draw(*shape)
    assert relative_error(attend(q, k, v, shape[3]), by_hand(q, k, v, shape[3], causal=False)) < 1e-6


@pytest.mark.parametrize("attend", [attention, attention_reference])
@pytest.mark.parametrize("tokens", [1, 77])
def test_causal_equals_a_loop_over_queries(attend, tokens):
    q, k, v = draw(2, tokens, tokens, 4, 16)
    assert relative_error(attend(q, k, v, 4, causal=True), by_hand(q, k, v, 4, causal=True)) < 1e-6


def test_gradients_equal_those_of_the_reference():
    inputs = [x.requires_grad_() for x in draw(2, 20, 13, 4, 16)]
    probe = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((attention(*inputs, heads=4) * probe).sum(), inputs)
    reference = torch.autograd.grad((attention_reference(*inputs, heads=4) * probe).sum(), inputs)
    for a, b in zip(ours, reference):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_and_near(dtype):
    q, k, v = draw(2, 30, 77, 4, 40, dtype)
    out = attention(q, k, v, heads=4)
    assert out.dtype == dtype
    assert relative_error(out, attention_reference(q.float(), k.float(), v.float(), heads=4)) < 1e-2


@pytest.mark.parametrize("attend", [attention, attention_reference])
def test_wrong_shapes_are_named(attend):
    q, k, v = draw(2, 6, 4, 3, 8)
    with pytest.raises(AssertionError, match=r"q \(2, 6, 24\).*5 heads"):
        attend(q, k, v, heads=5)
    with pytest.raises(AssertionError, match=r"k \(2, 4, 24\)"):
        attend(q, k, v, heads=3, causal=True)
    with pytest.raises(AssertionError, match=r"q \(1, 6, 24\)"):  # torch would repeat the row
        attend(q[:1], k, v, heads=3)
    with pytest.raises(AssertionError, match=r"v \(2, 3, 24\)"):
        attend(q, k, v[:, :3], heads=3)
    with pytest.raises(AssertionError, match=r"v \(2, 4, 24\)"):
        attend(q, k, v, heads=3, map_from=torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("attend", [attention, attention_reference])
def test_a_map_from_another_row(attend):
    q, k, v = draw(3, 20, 13, 4, 16)
    map_from = torch.tensor([1, 1, 0], dtype=torch.int32)
    expected = torch.cat([by_hand(q[[a]], k[[a]], v[[b]], 4, False) for b, a in enumerate(map_from.tolist())])
    assert relative_error(attend(q[:2], k[:2], v, 4, map_from=map_from), expected) < 1e-6


def test_without_cuda_nothing_imports_triton():
    code = ("import sys, torch; from nanoip2p.attention import attention; q = torch.ones(1, 4, 8); "
            "attention(q, q, q, 1); import nanoip2p.unet; sys.exit('triton' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=module.__file__.rsplit("/", 2)[0]).returncode == 0

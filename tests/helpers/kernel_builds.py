"""Compile our kernels for GPUs that may be absent: a compiler can refuse what the interpreter runs.

test_kernels.py runs this. Shapes are those of SD 1.5 at 64x64 latents.
"""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoip2p.speed import kernels, tune

POINTERS = {"q", "k", "v", "out"}


def build(kernel, capability, dtype="bf16", warps=4, stages=2, **values):
    """The PTX of a kernel for these arguments, after ptxas has taken it too."""
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = f"*{dtype}" if name in POINTERS else values.get(name, 320 if name[1:] in ("b", "t") else 1)
        if parameter.is_constexpr or value == 1:
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = value if isinstance(value, str) else "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, str) or value % 16 == 0:  # as Triton finds by itself when it launches
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": warps, "num_stages": stages})
    assert made.asm["cubin"]
    return made.asm["ptx"]


def attention_values(d, **more):
    sizes = {"scale": 0.1, "Tq": 4096, "Tk": 4096, "heads": 8, "map_from": "*i32", "INDEXED": True}
    widths = dict(zip(("D", "D0", "D1"), (d, *kernels.pieces(d))))
    return sizes | widths | {"BM": 64, "BN": 64, "CHECK": False} | more


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("d", [40, 80, 160])
def test_builds_for_a_card(capability, d):
    bm, bn, warps, stages = tune.tiles(d, 4096, torch.bfloat16)[0]
    values = attention_values(d, BM=bm, BN=bn)
    ptx = build(kernels._attention, capability, warps=warps, stages=stages, **values)
    check_tensor_cores(ptx, capability)
    assert "cp.async" in ptx  # keys and values of the next block are fetched meanwhile


def check_tensor_cores(ptx, capability):
    """Hopper's own instruction for every product, with none padded from 48 columns to 64."""
    hopper, ampere = re.findall(r"wgmma\.mma_async\.\S*m64n\d+k16", ptx), re.findall(r"mma\.sync\.\S+", ptx)
    assert (hopper and not ampere) if capability == 90 else ampere, (len(hopper), len(ampere))


def test_sizes_of_one():
    """Triton compiles another kernel for an argument that is 1, with a constant for it."""
    values = attention_values(40, heads=1, Tq=1, Tk=1, BN=16, INDEXED=False)
    build(kernels._attention, 90, **values)


def test_torch_compile_takes_our_kernel_into_its_graph(monkeypatch):
    """Without a break, which would cut the CUDA graph in two. There is no GPU, so a stub is the compiler."""
    graphs, q = [], torch.randn(1, 48, 16)

    def compiler(graph, _):
        graphs.append(graph)
        return lambda *_: (torch.zeros(1, 48, 16),)

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(tune, "card", lambda device: "a card")
    tuner = tune.Tuner(kernels.fused_attention, True, pytest.fail)
    monkeypatch.setattr(tuner, "table", {"a card": {"1 rows, 2 heads of 8, 48 x 48, torch.float32":
                                                    str(tune.TILES["fp32"][0])}})
    compiled = torch.compile(lambda q: tuner(q, q, q, 2) + 1, fullgraph=True, dynamic=False, backend=compiler)
    with torch.inference_mode():
        compiled(q)
    assert [name for name in graphs[0].code.split() if "triton_kernel_wrapper" in name]

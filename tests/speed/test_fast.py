"""Faster networks against the plain ones: the same numbers, and the same state dict."""

import copy
from functools import partial

import pytest
import torch
from comparing import randomise, relative_error
from tiny_configs import TINY_VAE, tiny_unet
from torch import nn

import nanoip2p.speed.fast as speed
from nanoip2p.checkpoint.folder import load_network, save_network
from nanoip2p.unet import Attention, UNet, UNetConfig
from nanoip2p.vae import VAE

WAYS = {
    "channels_last": speed.channels_last, "fused": speed.fused_projections,
    "packed": speed.packed_products,
    "convolutions": lambda model: speed.fast_convolutions(model, least=8),
}
WAYS["all"] = lambda model: WAYS["channels_last"](WAYS["packed"](WAYS["convolutions"](model)))


@pytest.fixture
def unet():
    return randomise(UNet(tiny_unet(in_channels=8)))


def inputs(height=12, width=8, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, 8, height, width, generator=generator), torch.tensor([431.5]),
            torch.randn(rows, 7, 12, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(12, 8), (7, 9), (2, 2), (64, 48)], ids=str)
def test_equals_the_plain_network(unet, way, size):
    given = inputs(*size)
    plain = unet(*given)
    made = WAYS[way](copy.deepcopy(unet))
    assert relative_error(made(*given), plain) < 1e-5
    assert relative_error(made(given[0].flip(0), *given[1:]), plain) > 0.1
    assert relative_error(made(*given[:2], given[2].flip(0)), plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_weights_are_saved_as_before(unet, way, tmp_path):
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    made = WAYS[way](unet)
    assert made is unet and list(made.state_dict()) == list(before)
    save_network(made, tmp_path)
    again = load_network(UNet, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in again.state_dict().items())
    assert relative_error(again(*inputs()), made(*inputs())) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size, channels, rows", [
    ((1, 1), (3, 5), 2), ((5, 8), (4, 4), 1), ((33, 70), (6, 2), 3), ((2, 700), (2, 3), 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_winograd_equals_convolution(size, channels, rows, layout):
    """In float64 to its rounding: it is the same number, summed otherwise. Large ones come in strips."""
    generator = torch.Generator().manual_seed(0)
    convolution = randomise(nn.Conv2d(*channels, 3, padding=1)).double()
    x = torch.randn(rows, channels[0], *size, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=layout)
    wanted = convolution(x)
    made = speed.fast_convolutions(nn.Sequential(convolution), least=1)(x)
    assert type(convolution) is speed.Winograd and relative_error(made, wanted) < 1e-14


@torch.no_grad()
def test_half_precision_is_hardly_farther_from_single():
    unet = randomise(UNet(UNetConfig(
        8, block_out_channels=(64, 128), norm_num_groups=8, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)))
    latents, step, text = inputs(16, 16)
    wanted = unet(latents, step, text)
    half = copy.deepcopy(unet).bfloat16()
    given = latents.bfloat16(), step, text.bfloat16()
    plain = relative_error(half(*given), wanted)
    fast = relative_error(speed.fast(half, print)(*given), wanted)
    assert 1e-3 < plain and fast < 1.5 * plain, (plain, fast)


def test_what_has_no_such_convolution_stays(unet):
    vae = speed.fast_convolutions(randomise(VAE(TINY_VAE)), least=8)
    for model in (vae, speed.fast_convolutions(unet, least=8)):
        kinds = {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
        assert {kinds[name] for name in kinds if name.endswith(("conv1", "conv2"))} == {speed.Winograd}
        assert {kinds[name] for name in kinds if "downsamplers" in name or "shortcut" in name} == {nn.Conv2d}
        assert kinds.get("conv_out", kinds.get("decoder.conv_out")) is nn.Conv2d
    assert all(type(layer) is nn.Conv2d or layer.in_channels >= 64 for layer in speed.fast_convolutions(
        randomise(UNet(tiny_unet()))).modules() if isinstance(layer, nn.Conv2d))


@torch.no_grad()
def test_fused_projections_are_one_product_and_heed_another_attend(unet):
    layer, x = speed.fused_projections(unet).down_blocks[1].attentions[0].transformer_blocks[0], inputs()[0]
    x, seen = torch.randn(2, 5, 16), []
    layer.attn1.to_q.register_forward_hook(lambda *_: seen.append("q"))
    plain = layer.attn1(x, x)
    assert seen == [] and type(layer.attn1) is speed.FusedAttention and type(layer.attn2) is Attention
    assert relative_error(layer.attn1(x, x.clone()), plain) < 1e-6 and seen == ["q"]
    assert torch.equal(layer.attn1(x, x, lambda layer, x, context: torch.zeros_like(x)),
                       layer.attn1.to_out[0].bias.expand(2, 5, 16))
    storage = layer.attn1.qkv.untyped_storage()  # no memory besides
    assert layer.attn1.to_v.weight.untyped_storage().data_ptr() == storage.data_ptr()


def test_a_fast_network_neither_trains_nor_takes_other_weights(unet):
    """Both would go unnoticed where something else has been made of the weights."""
    other = {name: weight + 1 for name, weight in unet.state_dict().items()}
    for change in (speed.fused_projections, speed.packed_products, partial(speed.fast_convolutions, least=8)):
        fast = change(copy.deepcopy(unet))
        with pytest.raises(RuntimeError, match="plain one"):
            fast.load_state_dict(other)
        assert not fast(*inputs()).requires_grad
    unet.load_state_dict(other)


def test_compiled_for_more_shapes_than_torch_would(monkeypatch):
    class Small(nn.Module):
        def forward(self, latents, timestep, context, inject=None, recompute=False):
            return latents * timestep + context.mean()

    graphs, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: real(
        f, dynamic=False, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]))
    torch._dynamo.reset()
    made = speed.compiled(Small(), lambda line: None)
    for side in [*range(2, 14)] * 2:
        made(torch.ones(1, 4, side, side), 3.0, torch.zeros(1, 2, 2))
    assert len(graphs) == 12


@torch.no_grad()
def test_compiled_once_for_a_shape_and_told_so(unet, monkeypatch):
    lines, given = [], inputs()
    plain, injected = unet(*given), []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: real(f, backend="eager", fullgraph=True))
    made = speed.compiled(unet, lines.append)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in (431.5, torch.tensor([431.5]), torch.tensor(431.5)):
            assert relative_error(made(given[0], timestep, given[2]), plain) < 1e-6
        assert relative_error(made(given[0], 7.0, given[2]), plain) > 1e-3
    assert len(lines) == 1 and "(3, 8, 12, 8)" in lines[0]
    with torch._dynamo.config.patch(error_on_recompile=False):
        made(*inputs(8, 8))
    assert len(lines) == 2

    def inject(layer, x, context):
        injected.append(len(x))
        return layer.to_q(x)

    made(*given, inject)
    assert injected and len(lines) == 2


class FakeGraph:
    """What a CUDA graph does: runs again on the same memory, and writes to the same memory."""

    def __init__(self):
        self.captures = self.replays = 0

    def capture(self, run, device):
        self.captures += 1
        made = torch.full_like(run(), float("nan"))  # capturing computes nothing

        def replay():
            self.replays += 1
            made.copy_(run())
        return replay, made


@torch.no_grad()
def test_a_graph_is_captured_for_a_shape_and_replayed_on_new_inputs(unet):
    plain, graph = copy.deepcopy(unet), FakeGraph()
    made = speed.cuda_graph(unet, graph.capture)
    first, second = inputs(), inputs(seed=1)
    results = [made(*first), made(*second), made(first[0], 12.0, first[2]), made(*first)]
    wanted = [plain(*first), plain(*second), plain(first[0], 12.0, first[2]), plain(*first)]
    for a, b in zip(results, wanted):  # all still there: a result is not the memory that replays write to
        assert relative_error(a, b) < 1e-6
    assert (graph.captures, graph.replays) == (1, 4)
    assert relative_error(made(*inputs(8, 8)), plain(*inputs(8, 8))) < 1e-6
    assert relative_error(made(*first), wanted[0]) < 1e-6
    assert (graph.captures, graph.replays) == (3, 6)
    made(*first, recompute=True)
    assert graph.replays == 6

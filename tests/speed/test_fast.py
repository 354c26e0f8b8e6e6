"""Faster networks against the plain ones: the same numbers, and the same state dict."""

import copy
import subprocess
import sys

import pytest
import torch
from comparing import randomise, relative_error
from PIL import Image
from tiny_configs import TINY_VAE, tiny_unet
from tiny_editor import write_tiny_editor
from torch import nn

from nanoip2p.attention import attention
from nanoip2p.checkpoint.folder import load_network, save_network
from nanoip2p.editor import Editor
from nanoip2p.speed import fast
from nanoip2p.speed.fast import Packed, Winograd, compile_unet, repack, speed_up
from nanoip2p.unet import Attention, UNet, UNetConfig
from nanoip2p.vae import VAE


@pytest.fixture
def unet():
    return randomise(UNet(tiny_unet(in_channels=8)))


def inputs(height=12, width=8, rows=3):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, 8, height, width, generator=generator), torch.tensor([431.5]),
            torch.randn(rows, 7, 12, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("min_channels", [8, 1000], ids=["winograd", "packed only"])
@pytest.mark.parametrize("size", [(12, 8), (7, 9), (2, 2), (64, 48)], ids=str)
def test_equals_the_plain_network(unet, min_channels, size):
    given = inputs(*size)
    plain = unet(*given)
    made = repack(copy.deepcopy(unet), min_channels)
    assert relative_error(made(*given), plain) < 1e-5
    assert relative_error(made(given[0].flip(0), *given[1:]), plain) > 0.1
    assert relative_error(made(*given[:2], given[2].flip(0)), plain) > 1e-3


@torch.no_grad()
def test_weights_are_saved_as_before(unet, tmp_path):
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    made = repack(unet, min_channels=8)
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
    """In float64 to its rounding: the same sum in another order. Large pictures are computed in strips."""
    generator = torch.Generator().manual_seed(0)
    convolution = randomise(nn.Conv2d(*channels, 3, padding=1)).double()
    x = torch.randn(rows, channels[0], *size, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=layout)
    model = repack(nn.Sequential(convolution), min_channels=1)
    assert type(model[0]) is Winograd and relative_error(model(x), convolution(x)) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("spreads", [0, 10, 100, 1000])
@pytest.mark.parametrize("channels, size", [(8, (12, 8)), (64, (9, 9)), (320, (16, 16))], ids=str)
def test_norm_keeps_its_digits_when_the_mean_is_large(spreads, channels, size):
    """torch 2.13's GroupNorm is off by 2e-4 at 10 spreads and by 2e-2 at 100 in channels_last on a CPU."""
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0)) + spreads
    x = x.contiguous(memory_format=torch.channels_last)
    norm = randomise(nn.GroupNorm(4, channels))
    exact = copy.deepcopy(norm).double()(x.double().contiguous())
    made = repack(nn.Sequential(norm, nn.SiLU(), nn.Conv2d(channels, 4, 1)))
    assert (made[0](x) - exact).abs().max() < 1e-6 * (5 + spreads)


@torch.no_grad()
def test_large_means_make_the_fast_network_hardly_farther_from_double_precision(unet):
    """Shifted: the latents that flat pictures have, and every bias in front of a norm."""
    for name, bias in unet.named_parameters():
        if name.endswith(("conv_in.bias", "conv1.bias", "conv2.bias")):
            bias += 50
    latents, step, text = inputs()
    exact = copy.deepcopy(unet).double()(latents.double(), step, text.double())
    plain = relative_error(unet(latents, step, text).double(), exact)
    quick = relative_error(repack(unet, min_channels=8)(latents, step, text).double(), exact)
    assert quick < 4 * plain, (plain, quick)


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
    quick = relative_error(speed_up(half, print)(*given), wanted)
    assert 1e-3 < plain and quick < 1.5 * plain, (plain, quick)


def test_only_layers_that_compute_the_same_are_replaced(unet):
    vae = repack(randomise(VAE(TINY_VAE)), min_channels=8)
    for model in (vae, repack(unet, min_channels=8)):
        kinds = {name: type(layer) for name, layer in model.named_modules()}
        assert {kinds[name] for name in kinds if name.endswith(("conv1", "conv2"))} == {Winograd}
        assert {kinds[name] for name in kinds if name.endswith("to_q")} == {Packed}
        assert {kinds[name] for name in kinds if name.endswith("downsamplers.0.conv")} == {nn.Conv2d}
        assert kinds.get("conv_out", kinds.get("decoder.conv_out")) is nn.Conv2d
        assert nn.Linear not in kinds.values()
    kinds = {type(layer) for layer in repack(randomise(UNet(tiny_unet()))).modules()}
    assert Packed in kinds and Winograd not in kinds


def test_a_fast_network_neither_trains_nor_takes_other_weights(unet):
    """Both would go unnoticed, because the layers compute with copies of their weights."""
    other = {name: weight + 1 for name, weight in unet.state_dict().items()}
    quick = repack(copy.deepcopy(unet))
    with pytest.raises(RuntimeError, match="before speed.fast"):
        quick.load_state_dict(other)
    assert not quick(*inputs()).requires_grad
    unet.load_state_dict(other)


def test_an_edit_compiles_once_for_each_size(tmp_path, monkeypatch):
    """Neither the timestep nor the text may be a constant of what is compiled."""
    graphs, real, lines = [], torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: real(
        f, dynamic=dynamic, fullgraph=True,
        backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]))
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)  # `compile_unet` has to raise it
    editor = Editor.load(write_tiny_editor(tmp_path), "cpu")

    def edit(side, text):
        return editor.edit([Image.new("RGB", (side, side), "red")], [text], 3, resolution=side, seed=0)[0]

    plain = edit(32, "make it night")
    names = list(editor.unet.state_dict())
    assert compile_unet(editor.unet, lines.append) is editor.unet and list(editor.unet.state_dict()) == names
    assert edit(32, "make it night") == plain and len(graphs) == 1
    assert edit(32, "turn the house red") != plain and len(graphs) == 1
    edit(40, "make it night")
    assert len(graphs) == 2 and len(lines) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton for others")
@pytest.mark.parametrize("choice", ["auto", "sdpa", "ours"])
def test_the_choice_of_attention(unet, choice, tmp_path, monkeypatch):
    """On CUDA, which here is the CPU by another name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda:0"), raising=False)
    monkeypatch.setattr(fast, "compile_unet", lambda unet, say: (unet, say))
    assert speed_up(unet, print, attention=choice, verbose=True) == (unet, print)
    assert speed_up(unet, print, injects=True, attention=choice) is unet
    used = {layer.attention for layer in unet.modules() if isinstance(layer, Attention)}
    assert len(used) == 1 and (used == {attention}) is (choice == "sdpa")
    if choice != "sdpa":
        assert used.pop().only_ours is (choice == "ours")


def test_a_cpu_needs_neither_triton_nor_the_tuner(unet, tmp_path):
    save_network(unet, tmp_path)
    code = ("import sys; from pathlib import Path; from nanoip2p.checkpoint.folder import load_network\n"
            "from nanoip2p.speed.fast import speed_up; from nanoip2p.unet import UNet\n"
            "speed_up(load_network(UNet, Path(sys.argv[1])), print, attention='ours')\n"
            "assert not {'triton', 'nanoip2p.speed.tune', 'nanoip2p.speed.kernels'} & {*sys.modules}\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "needs CUDA" in done.stdout, done.stderr


def test_attention_is_measured_before_a_size_is_compiled(unet, monkeypatch):
    """The first call of each size and number of texts is not compiled, and equals the others."""
    calls, recorded = [], []

    def chooses(q, k, v, heads, map_from=None):
        (recorded if torch.compiler.is_compiling() else calls).append(len(v))
        return attention(q, k, v, heads, map_from=map_from)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: real(f, dynamic=dynamic, backend="eager"))
    torch._dynamo.reset()
    compile_unet(unet, print)
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.attention = chooses
    latents, time, text = inputs()
    projected = unet.project_context(torch.cat([text, text.flip(2)]), torch.arange(3).repeat(2))
    with torch.inference_mode():
        for given in ((latents, time, text), (latents[:, :, :8], time, text), (latents, time, projected)):
            calls.clear(), recorded.clear()
            first = unet(*given)
            assert calls and not recorded
            assert relative_error(unet(*given), first) < 1e-6
            assert recorded

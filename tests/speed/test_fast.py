"""Faster networks compute the same as the plain ones, with each weight in memory once."""

import copy
import gc
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comparing import randomise, relative_error
from PIL import Image
from tiny_configs import TINY_VAE, tiny_unet
from tiny_editor import write_tiny_editor
from torch import nn

from nanoip2p.attention import attention, attention_reference
from nanoip2p.checkpoint.folder import load_network, save_network
from nanoip2p.editor import Editor
from nanoip2p.speed import cpu, fast
from nanoip2p.speed.cpu import Convolution, Product, Winograd, lay_out, tiled_attention
from nanoip2p.speed.fast import compile_unet, speed_up
from nanoip2p.unet import Attention, UNet, UNetConfig
from nanoip2p.vae import VAE


@pytest.fixture
def unet():
    return randomise(UNet(replace(tiny_unet(in_channels=8), block_out_channels=(16, 32))))


def middle_unet(width):
    """One level, with attention in the middle only: torch.compile traces it in a third of the time."""
    return randomise(UNet(UNetConfig(
        8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), cross_attention_dim=width)))


def inputs(height=12, width=8, rows=3):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, 8, height, width, generator=generator), torch.tensor([431.5]),
            torch.randn(rows, 7, 12, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("small, large", [(0, 0), (cpu.SMALL_MAP, 10**9), (cpu.SMALL_MAP, 0)],
                         ids=["plain convolutions", "laid out convolutions", "products"])
@pytest.mark.parametrize("size", [(12, 8), (7, 9), (2, 2), (40, 30)], ids=str)
def test_equals_the_plain_network(unet, small, large, size, monkeypatch):
    winograd = (small == 0) == (size in [(12, 8), (2, 2)])  # each of six ways at two sizes
    monkeypatch.setattr(cpu, "SMALL_MAP", small)
    monkeypatch.setattr(cpu, "LARGE_WEIGHT", large)
    given = inputs(*size)
    plain = unet(*given)
    made = lay_out(copy.deepcopy(unet), winograd, least=8)
    assert relative_error(made(*given), plain) < 1e-5
    assert relative_error(made(given[0].flip(0), *given[1:]), plain) > 0.1
    assert relative_error(made(*given[:2], given[2].flip(0)), plain) > 1e-3


@torch.no_grad()
def test_sizes_may_change_from_call_to_call(unet, monkeypatch):
    """Each change between tiny, small and large maps lays out weights anew. Their values stay the same."""
    monkeypatch.setattr(cpu, "SMALL_MAP", 90)  # just the size of 3 maps of (5, 6), half of (9, 12)
    monkeypatch.setattr(cpu, "TINY_MAP", 20)
    monkeypatch.setattr(cpu, "LARGE_WEIGHT", 1000)  # some layers have fewer
    made, ways, seen = lay_out(copy.deepcopy(unet)), {}, set()
    layers = {name: layer for name, layer in made.named_modules() if isinstance(layer, Convolution)}

    def way(layer, given):
        positions = given[0].shape[2] * given[0].shape[3]
        small = len(given[0]) * positions <= 90
        ways[layer] = small, small and positions <= 20 and layer.held.numel() >= 1000

    for layer in layers.values():
        layer.register_forward_pre_hook(way)
    for size in ((4, 4), (40, 30), (5, 4), (6, 5), (4, 4), (9, 12)):
        assert relative_error(made(*inputs(*size)), unet(*inputs(*size))) < 1e-5
        assert {layer: (layer.blocks, layer.product) for layer in layers.values()} == ways
        seen |= {*ways.values()}
        for name, layer in layers.items():
            weight = unet.get_submodule(name).weight
            held = layer.held.to_dense() if layer.blocks else layer.held
            assert torch.equal(held, weight.permute(0, 2, 3, 1).flatten(1) if layer.product else weight)
    assert seen == {(True, True), (True, False), (False, False)}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(unet, dtype):
    """oneDNN has no blocks for float64, and torch cannot use those for float16. The layers work anyway."""
    latents, step, text = inputs()
    wanted = copy.deepcopy(unet).double()(latents.double(), step, text.double())
    plain, given = copy.deepcopy(unet).to(dtype), (latents.to(dtype), step, text.to(dtype))
    error = relative_error(plain(*given).double(), wanted)
    for winograd in (False, True):
        made = lay_out(copy.deepcopy(plain), winograd, least=8)
        assert relative_error(made(*given).double(), wanted) < 2 * error + 1e-12


@torch.no_grad()
@pytest.mark.parametrize("size, channels, rows", [
    ((1, 1), (3, 5), 2), ((5, 8), (4, 4), 1), ((33, 70), (6, 2), 3), ((2, 1100), (2, 3), 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_winograd_equals_convolution(size, channels, rows, layout):
    """In float64, equal up to rounding. Large pictures are computed in strips."""
    generator = torch.Generator().manual_seed(0)
    convolution = randomise(nn.Conv2d(*channels, 3, padding=1)).double()
    x = torch.randn(rows, channels[0], *size, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=layout)
    model = lay_out(nn.Sequential(copy.deepcopy(convolution)), True, least=1)
    assert type(model[0]) is Winograd and relative_error(model(x), convolution(x)) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("dtype, channels, tile", [
    (torch.float32, 320, 4), (torch.float32, 321, 2), (torch.bfloat16, 320, 2), (torch.float16, 8, 2)],
    ids=str)
def test_large_tiles_of_winograd(dtype, channels, tile):
    """Their weights are 4 times as large, not 16/9 times, and they lose a digit that half precision needs."""
    layer = Winograd(nn.Conv2d(channels, 640, 3, padding=1, dtype=dtype, device="cpu"))
    assert (len(layer.outputs), len(layer.products)) == (tile, (tile + 2)**2)


@torch.no_grad()
@pytest.mark.parametrize("spreads", [0, 10, 100, 1000])
@pytest.mark.parametrize("channels, size", [(16, (12, 8)), (64, (9, 9)), (320, (16, 16))], ids=str)
def test_norm_keeps_its_digits_when_the_mean_is_large(spreads, channels, size):
    """In channels_last on a CPU, the error of torch 2.13's GroupNorm is 2e-4 if the mean is 10 standard
    deviations, and 2e-2 if it is 100."""
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0)) + spreads
    x = x.contiguous(memory_format=torch.channels_last)
    norm = randomise(nn.GroupNorm(4, channels))
    exact = copy.deepcopy(norm).double()(x.double().contiguous())
    made = lay_out(nn.Sequential(norm, nn.SiLU(), nn.Conv2d(channels, 16, 1)))
    assert (made[0](x) - exact).abs().max() < 1e-6 * (5 + spreads)


@torch.no_grad()
def test_norms_of_small_maps_round_once_in_half_precision():
    x = (torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    norm = randomise(nn.GroupNorm(4, 32)).bfloat16()
    exact = copy.deepcopy(norm).double()(x.double().contiguous())
    error = (lay_out(nn.Sequential(norm))[0](x) - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-5).all()


@torch.no_grad()
def test_large_means_make_the_fast_network_hardly_farther_from_double_precision(unet):
    """The test adds a large mean to the latents, as flat pictures have, and to every bias before a norm."""
    for name, bias in unet.named_parameters():
        if name.endswith(("conv_in.bias", "conv1.bias", "conv2.bias")):
            bias += 50
    latents, step, text = inputs()
    exact = copy.deepcopy(unet).double()(latents.double(), step, text.double())
    plain = relative_error(unet(latents, step, text).double(), exact)
    quick = relative_error(lay_out(unet, True, least=8)(latents, step, text).double(), exact)
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
    quick = relative_error(lay_out(half, True, least=64)(*given), wanted)
    assert 1e-3 < plain and quick < 1.5 * plain, (plain, quick)


def kinds_of(model):
    return {name: type(layer) for name, layer in model.named_modules()}


@pytest.mark.parametrize("quick", [True, False])
def test_which_layers_are_replaced(tmp_path, quick, monkeypatch):
    """Winograd's weights are larger. In the lowest levels, which have most weights, they save little time."""
    monkeypatch.setattr(fast, "lay_out", partial(lay_out, least=16))
    editor = Editor.load(write_tiny_editor(tmp_path), "cpu")
    editor.unet = randomise(UNet(UNetConfig(
        8, block_out_channels=(16, 32, 32), norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3)))
    editor.vae = randomise(VAE(replace(TINY_VAE, block_out_channels=(16, 32))))
    speed_up(editor, quick, print)
    unet, vae = kinds_of(editor.unet), kinds_of(editor.vae)
    if not quick:
        assert not {Convolution, Product, Winograd} & {*vae.values()}
    for kinds in (unet, vae) if quick else (unet,):
        assert not {nn.Linear} & {*kinds.values()}
        assert {kinds[name] for name in kinds if name.endswith("to_q")} == {Product}
        assert {kinds[name] for name in kinds if name.endswith("downsamplers.0.conv")} == {Convolution}
        assert kinds.get("conv_out", kinds.get("decoder.conv_out")) is nn.Conv2d
    lowest = ("down_blocks.1.", "down_blocks.2.", "mid_block.", "up_blocks.0.")
    for name, kind in [*unet.items(), *((f"vae.{name}", kind) for name, kind in vae.items() if quick)]:
        if name.endswith(("conv1", "conv2")):
            assert kind is (Winograd if quick and not name.startswith(lowest) else Convolution), name


@torch.inference_mode()
@pytest.mark.parametrize("q_rows, heads, tq, tk, d", [(2, 2, 35, 35, 8), (3, 4, 9, 77, 5), (1, 1, 9, 9, 64)])
def test_tiled_attention_equals_the_reference(q_rows, heads, tq, tk, d, monkeypatch):
    """In tiles of all sizes, with the maps of other rows. The scores are too large for a plain exp."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(q_rows, size, heads * d, generator=generator) for size in (tq, tk, tk))
    for rows in (None, torch.randint(q_rows, (q_rows + 2,), generator=generator, dtype=torch.int32)):
        given = [10 * q, 10 * k, v if rows is None else v.repeat(9, 1, 1)[: q_rows + 2], heads]
        right = attention_reference(*[x.double() for x in given[:3]], heads, map_from=rows)
        for tile in (1, 2 * tk, 12 * tk, 3 * tq * tk, 2**20):
            monkeypatch.setattr(cpu, "MAP_TILE", tile)
            assert relative_error(tiled_attention(*given, map_from=rows), right) < 1e-5
        half = [x.bfloat16() for x in given[:3]]
        right = attention_reference(*[x.double() for x in half], heads, map_from=rows)
        assert relative_error(tiled_attention(*half, heads, map_from=rows), right) < 0.006


@pytest.mark.parametrize("dtype, bf16, amx, tiled", [
    (torch.bfloat16, True, False, True), (torch.bfloat16, False, False, False),
    (torch.bfloat16, True, True, False), (torch.float32, True, False, False)], ids=str)
def test_attention_is_tiled_where_the_cpu_has_instructions(unet, dtype, bf16, amx, tiled, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for network in (unet, VAE(TINY_VAE)):
        lay_out(network.to(dtype))
        used = [layer.attention for layer in network.modules() if hasattr(layer, "attention")]
        assert used and {*used} == {tiled_attention if tiled else attention}


@torch.no_grad()
@pytest.mark.parametrize("kernel, stride, padding, size", [
    ((3, 3), (1, 1), (1, 1), (5, 7)), ((3, 3), (2, 2), (1, 1), (8, 5)), ((3, 3), (2, 2), (0, 0), (7, 8)),
    ((3, 2), (2, 1), (0, 1), (6, 6))], ids=str)
def test_a_product_of_patches_equals_convolution(kernel, stride, padding, size, monkeypatch):
    """Also with other kernels, strides and paddings than the networks have now."""
    monkeypatch.setattr(cpu, "LARGE_WEIGHT", 0)
    plain = randomise(nn.Conv2d(24, 20, kernel, stride, padding))
    x = torch.randn(2, 24, *size, generator=torch.Generator().manual_seed(0))
    layer, expected = Convolution(plain), plain(x)
    made = layer(x)
    assert layer.product and made.shape == expected.shape and relative_error(made, expected) < 1e-5
    for other in (nn.Conv2d(24, 20, 3, groups=2), nn.Conv2d(24, 20, 3, dilation=2)):
        layer = Convolution(other)
        assert relative_error(layer(x), other(x)) < 1e-5 and not layer.product


@torch.no_grad()
@pytest.mark.parametrize("winograd", [True, False])
def test_convolutions_without_a_bias(winograd):
    layer = randomise(nn.Conv2d(16, 16, 3, padding=1, bias=False))
    x = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(0))
    assert relative_error(lay_out(nn.Sequential(copy.deepcopy(layer)), winograd, least=8)(x), layer(x)) < 1e-5


@torch.no_grad()
def test_each_layer_uses_its_own_attention(unet):
    vae = VAE(TINY_VAE)
    for network, run in ((unet, lambda: unet(*inputs())),
                         (vae.encoder, lambda: vae.encode(torch.ones(1, 3, 8, 8))),
                         (vae.decoder, lambda: vae.decode(torch.ones(1, 4, 4, 4)))):
        layers, used = [layer for layer in network.modules() if hasattr(layer, "attention")], []
        for layer in layers:
            layer.attention = lambda *given, used=used, **names: used.append(1) or attention(*given, **names)
        run()
        assert len(used) == len(layers) > 0


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0, 1], [0, 0, 1], [1, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("prefix", ["DownBlock2D", "CrossAttnDownBlock2D"])
def test_all_maps_stay_in_channels_last(rows, prefix):
    """Other layouts are slower. Skip connections are repeated where texts outnumber pictures."""
    types = (prefix, "CrossAttnDownBlock2D")
    unet = randomise(UNet(replace(tiny_unet(8), block_out_channels=(16, 32), down_block_types=types)))
    latents, time, context = inputs(12, 8, 4)
    latents, context, rows = latents[:2], context[: len(rows)], torch.tensor(rows)
    expected, seen = unet(latents[rows], time, context), []
    lay_out(unet)
    for layer in unet.modules():
        if layer is not unet.conv_in and isinstance(layer, cpu.Norm | cpu.Convolution | nn.Conv2d):
            layer.register_forward_pre_hook(
                lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last)))
    assert relative_error(unet(latents, time, unet.project_context(context, rows)), expected) < 1e-5
    assert len(seen) > 20 and all(seen)


def test_the_first_convolution_stays(unet):
    """Its weight tells the pipeline the dtype and the device. This holds with 16 input channels too."""
    wide = UNet(replace(unet.config, in_channels=16))
    assert type(lay_out(wide, True, least=8).conv_in) is nn.Conv2d


def test_in_half_precision_without_layouts_all_convolutions_use_winograd(unet, monkeypatch):
    """torch's own convolutions take ten times as long, at any width. oneDNN has no layouts of float16."""
    lay_out(unet.half(), True, (unet.down_blocks[-1], unet.mid_block, unet.up_blocks[0]))
    kinds = kinds_of(unet)
    assert {kinds[name] for name in kinds if name.endswith(("conv1", "conv2", "conv_out"))} == {Winograd}
    assert {kinds[name] for name in kinds if name.endswith("downsamplers.0.conv")} == {Convolution}
    monkeypatch.setattr(cpu, "has_blocks", lambda weight: True)  # as of bf16 on a CPU with AVX-512
    assert type(lay_out(nn.Sequential(nn.Conv2d(16, 16, 3, dtype=torch.bfloat16)), True)[0]) is Convolution


def test_a_fast_network_neither_trains_nor_takes_other_weights(unet):
    """It does not save, move or copy its weights either, because it has none in the plain layout."""
    other = {name: weight + 1 for name, weight in unet.state_dict().items()}
    for winograd in (False, True):
        quick = lay_out(copy.deepcopy(unet), winograd, least=8)
        assert not quick(*inputs()).requires_grad
        for use in (lambda quick=quick: quick.load_state_dict(other), quick.state_dict, quick.half,
                    partial(copy.deepcopy, quick), partial(pickle.dumps, quick.time_embedding)):
            with pytest.raises(RuntimeError, match="before speed.fast"):
                use()
    unet.load_state_dict(other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # with and without oneDNN's blocks
def test_no_layer_keeps_its_plain_weight_or_the_mapped_file(unet, tmp_path, dtype):
    """Each weight is in memory once: the layers drop the plain weights, and the last one closes the file."""
    save_network(unet.to(dtype), tmp_path, dtype)
    latents, step, text = inputs()
    for winograd in (False, True):
        mapped = load_network(UNet, tmp_path, dtype)
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        size = sum(weight.nbytes for weight in mapped.parameters())
        size += sum(weight.numel() * 4 - weight.nbytes for layer in mapped.modules()  # norms compute in fp32
                    if isinstance(layer, nn.GroupNorm) for weight in layer.parameters())
        lay_out(mapped, winograd, least=8)(latents.to(dtype), step, text.to(dtype))
        gc.collect()
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        held = sum(layer.held.nbytes if not layer.held.is_mkldnn else layer.held.to_dense().nbytes
                   for layer in mapped.modules() if hasattr(layer, "held"))
        held += sum(weight.nbytes for weight in mapped.parameters())
        assert held == size if not winograd else size < held < 4 * size


@pytest.mark.parametrize("width, positions, chosen", [
    (256, 10240, True), (256, 10239, False), (256, 2048, False), (256, 2047, False), (128, 10**6, False),
    (320, 10**6, True)])
def test_fast_is_chosen_where_it_pays(width, positions, chosen, tmp_path, monkeypatch, capsys):
    used = []
    monkeypatch.setattr(fast, "lay_out", lambda network, winograd, *direct: used.append(winograd))
    editor = Editor.load(write_tiny_editor(tmp_path), "cpu")
    editor.unet.config = replace(editor.unet.config, block_out_channels=(width, width), norm_num_groups=1)
    for given, wanted in ((None, chosen), (True, True), (False, False)):
        speed_up(editor, given, print, positions)
        assert used == ([True, True] if wanted else [False] if positions >= 2048 else [])
        used.clear()
        assert ("--no-fast" in capsys.readouterr().out) is (given is None and chosen)


def test_an_edit_compiles_once_for_each_size(tmp_path, monkeypatch):
    """The compiled network must not contain the timestep or the text as a constant."""
    graphs, real, lines = [], torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: real(
        f, dynamic=dynamic, fullgraph=True,
        backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]))
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)  # `compile_unet` has to raise this limit
    editor = Editor.load(write_tiny_editor(tmp_path), "cpu")
    editor.unet = middle_unet(32)

    def edit(side, text):
        return editor.edit([Image.new("RGB", (side, side), "red")], [text], 3, resolution=side, seed=0)[0]

    plain = edit(32, "make it night")
    names = list(editor.unet.state_dict())
    compile_unet(editor.unet, lines.append)
    assert list(editor.unet.state_dict()) == names and torch._dynamo.config.recompile_limit > 60
    assert edit(32, "make it night") == plain and len(graphs) == 1
    assert edit(32, "turn the house red") != plain and len(graphs) == 1
    edit(40, "make it night")
    assert len(graphs) == 2 and len(lines) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton for others")
@pytest.mark.parametrize("choice", ["auto", "sdpa", "ours"])
def test_the_choice_of_attention(unet, choice, tmp_path, monkeypatch):
    """On CUDA. In this test, the CPU pretends to be CUDA."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled, model = [], SimpleNamespace(unet=unet, device=torch.device("cuda:0"))
    monkeypatch.setattr(fast, "compile_unet", lambda unet, say: compiled.append(unet))
    speed_up(model, True, print, attention=choice, verbose=True)
    speed_up(model, True, print, injects=True, attention=choice)
    assert compiled == [unet]
    used = {layer.attention for layer in unet.modules() if isinstance(layer, Attention)}
    assert len(used) == 1 and (used == {attention}) is (choice == "sdpa")
    if choice != "sdpa":
        assert used.pop().only_ours is (choice == "ours")


def test_a_cpu_needs_neither_triton_nor_the_tuner(tmp_path):
    write_tiny_editor(tmp_path)
    code = ("import sys\n"
            "from nanoip2p.speed.fast import speed_up; from nanoip2p import Editor\n"
            "speed_up(Editor.load(sys.argv[1], 'cpu'), True, print, attention='ours')\n"
            "assert not {'triton', 'nanoip2p.speed.tune', 'nanoip2p.speed.kernels'} & {*sys.modules}\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "needs CUDA" in done.stdout, done.stderr


def test_attention_is_measured_before_a_size_is_compiled(monkeypatch):
    """The first call of each size and number of texts is not compiled. All calls have equal results."""
    unet, calls, recorded = middle_unet(12), [], []

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


@pytest.mark.parametrize("asked, said", [(True, ["--fast changes nothing on mps"]), (None, []), (False, [])])
def test_other_devices_stay_as_they_are(unet, asked, said):
    lines, kinds = [], kinds_of(unet)
    speed_up(SimpleNamespace(device=torch.device("mps"), unet=unet, vae=nn.Module()), asked, lines.append)
    assert lines == said and kinds_of(unet) == kinds

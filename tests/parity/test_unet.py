"""The UNet against diffusers' UNet2DConditionModel, whose outputs are computed here."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from comparing import randomise, relative_error
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from tiny_configs import tiny_unet

from nanoip2p.unet import UNet, UNetConfig, timestep_embedding

D, U = "DownBlock2D", "UpBlock2D"
CD, CU = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SMALL = {"norm_num_groups": 4, "cross_attention_dim": 12}
CONFIGS = {
    "tiny": tiny_unet(),
    "like SD 1.5": UNetConfig(
        block_out_channels=(8, 16, 24, 24), down_block_types=(CD, CD, CD, D), up_block_types=(U, CU, CU, CU),
        attention_head_dim=4, **SMALL,
    ),
    "editor, attention below": UNetConfig(
        block_out_channels=(8, 16, 16), down_block_types=(D, CD, CD), up_block_types=(CU, CU, U),
        in_channels=8, layers_per_block=1, attention_head_dim=(2, 4, 8), **SMALL,
    ),
    "attention on top": UNetConfig(
        block_out_channels=(16, 8, 12), down_block_types=(CD, D, D), up_block_types=(U, U, CU),
        layers_per_block=1, attention_head_dim=(2, 8, 1), **SMALL,
    ),
    "up and down differ": UNetConfig(
        block_out_channels=(8, 12, 16), down_block_types=(D, CD, D), up_block_types=(CU, U, CU),
        attention_head_dim=(1, 2, 4), out_channels=3, norm_eps=1e-3, flip_sin_to_cos=False,
        freq_shift=1, **SMALL,
    ),
    "one level": UNetConfig(
        block_out_channels=(8,), down_block_types=(CD,), up_block_types=(CU,), attention_head_dim=2, **SMALL,
    ),
}


@cache
def pair(name: str) -> tuple[UNet, UNet2DConditionModel]:
    """Our UNet and diffusers' UNet with the same random weights."""
    ours = randomise(UNet(CONFIGS[name]), seed=len(name))
    theirs = UNet2DConditionModel.from_config(CONFIGS[name].to_json()).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def inputs(config: UNetConfig, height: int, width: int, batch: int = 2, tokens: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, config.in_channels, height, width, generator=generator)
    return latents, torch.randn(batch, tokens, config.cross_attention_dim, generator=generator)


def outputs(models, latents, timestep, context) -> tuple[torch.Tensor, torch.Tensor]:
    ours, theirs = models
    with torch.no_grad():
        return ours(latents, timestep, context), theirs(latents, timestep, context).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_of_weights_are_those_of_diffusers(name):
    ours, theirs = ({key: w.shape for key, w in model.state_dict().items()} for model in pair(name))
    assert ours == theirs


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 24), (7, 5), (9, 10), (3, 1)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name, size):
    latents, context = inputs(CONFIGS[name], *size)
    ours, theirs = outputs(pair(name), latents, torch.tensor([17, 950]), context)
    assert ours.shape == (2, CONFIGS[name].out_channels, *size)
    assert relative_error(ours, theirs) < 1e-5


TIMESTEPS = {
    "int": 999,
    "float": 431.7,
    "zero": 0,
    "int tensor": torch.tensor(500),
    "float tensor": torch.tensor(12.25),
    "one in a row": torch.tensor([321]),
    "one per sample": torch.tensor([3, 700]),
    "floats per sample": torch.tensor([0.5, 998.9]),
    "float64": torch.tensor([3.3, 77.7], dtype=torch.float64),
}


@pytest.mark.parametrize("kind", TIMESTEPS)
@pytest.mark.parametrize("name", ["tiny", "up and down differ"])
def test_every_kind_of_timestep(name, kind):
    latents, context = inputs(CONFIGS[name], 8, 8)
    ours, theirs = outputs(pair(name), latents, TIMESTEPS[kind], context)
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_reacts_to_every_input(name):
    """Otherwise, two networks that ignore the text would count as equal."""
    _, theirs = pair(name)
    latents, context = inputs(CONFIGS[name], 8, 8)
    with torch.no_grad():
        before = theirs(latents, 500, context).sample
        changed = [latents.index_fill(1, torch.tensor(i), 0.5) for i in range(latents.shape[1])]
        reactions = [theirs(x, 500, context).sample for x in changed]
        reactions += [theirs(latents, 400, context).sample, theirs(latents, 500, -context).sample]
        reactions += [theirs(latents, 500, context.index_fill(1, torch.tensor(6), 0.0)).sample]
    for after in reactions:
        assert relative_error(after, before) > 1e-3


def test_samples_of_a_batch_do_not_mix():
    ours, _ = pair("editor, attention below")
    latents, context = inputs(ours.config, 8, 6, batch=3)
    timestep = torch.tensor([10.0, 500.0, 900.0])
    with torch.no_grad():
        together = ours(latents, timestep, context)
        apart = [ours(latents[i : i + 1], timestep[i], context[i : i + 1]) for i in range(3)]
    assert relative_error(together, torch.cat(apart)) < 1e-5


@pytest.mark.parametrize("rows", [[0, 1, 0, 1], [0, 0, 1, 1, 1], [1, 0, 0], [1, 0, 1, 1]], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_projected_text_may_share_latents(name, rows):
    """Equal, up to rounding, to plain texts with latents for each row. Odd sizes give odd skips."""
    ours, _ = pair(name)
    latents, _ = inputs(ours.config, 7, 10)
    _, context = inputs(ours.config, 1, 1, batch=len(rows), seed=1)
    rows = torch.tensor(rows)
    with torch.no_grad():
        plain = ours(latents[rows], 431.7, context)
        assert relative_error(ours(latents[rows], 431.7, ours.project_context(context)), plain) < 1e-6
        shared = ours(latents, 431.7, ours.project_context(context, rows))
        assert relative_error(shared, plain) < 1e-5
        assert relative_error(ours(latents[rows], 431.7, context.flip(0)), plain) > 1e-3  # uses the text
        assert relative_error(plain[rows == 0][:1], plain[rows == 1][:1]) > 1e-2          # and the latents


@pytest.mark.parametrize("name", CONFIGS)
def test_projected_timesteps_are_those_of_each_step(name):
    ours, _ = pair(name)
    latents, context = inputs(ours.config, 7, 10)
    times = {sigma: torch.tensor([t]) for sigma, t in ((9.5, 801.25), (1.0, 400.0), (0.1, 3.0))}
    with torch.no_grad():
        told = ours.project_timesteps(times)
        plain = [ours(latents, t, context) for t in times.values()]
        for sigma, wanted in zip(times, plain):
            assert relative_error(ours(latents, told[sigma], context), wanted) < 1e-5
    assert list(told) == list(times) and relative_error(plain[0], plain[1]) > 1e-2


def test_a_projected_text_needs_no_text_weights():
    """With a plain text, the text weights of every layer get gradients, with and without recomputing."""
    ours, _ = pair("like SD 1.5")
    latents, context = inputs(ours.config, 8, 8)
    texts = [weight for key, weight in ours.named_parameters() if "attn2.to_k" in key or "attn2.to_v" in key]
    for recompute in (False, True):
        out = ours(latents, 5, context.requires_grad_(), recompute=recompute)
        assert all(g.norm() > 0 for g in torch.autograd.grad(out.square().sum(), [context, *texts]))
    with torch.no_grad():
        projected = ours.project_context(context)
    out = ours(latents, 5, projected)
    assert torch.autograd.grad(out.square().sum(), texts, allow_unused=True) == (None,) * len(texts)


def test_compiles_whole_and_once_for_all_texts_and_steps():
    ours, _ = pair("tiny")
    latents, context = inputs(ours.config, 8, 8, batch=4)
    latents, rows = latents[:2], torch.tensor([0, 1, 1, 0])
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for text, t in ((context, 5.0), (context, 700.0), (-context, 30.0)):
            text, t = ours.project_context(text, rows), ours.project_timesteps({t: torch.tensor([t])})[t]
            assert relative_error(compiled(latents, t, text), ours(latents, t, text)) < 1e-6


@pytest.mark.parametrize("name", ["like SD 1.5", "editor, attention below", "up and down differ"])
def test_gradients_equal_those_of_diffusers(name):
    ours, theirs = pair(name)
    latents, context = inputs(ours.config, 8, 12)
    probe = torch.randn(2, ours.config.out_channels, 8, 12, generator=torch.Generator().manual_seed(3))
    gradients = []
    for model in (ours, theirs):
        leaves = [latents.clone().requires_grad_(), context.clone().requires_grad_()]
        out = model(leaves[0], torch.tensor([5, 800]), leaves[1])
        out = out if model is ours else out.sample
        named = dict(model.named_parameters()) | {"latents": leaves[0], "context": leaves[1]}
        gradients.append(dict(zip(named, torch.autograd.grad((out * probe).sum(), list(named.values())))))
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert relative_error(gradient, gradients[1][key]) < 1e-4, key


@pytest.mark.parametrize("width", [8, 320])
@pytest.mark.parametrize("flip, shift", [(True, 0), (False, 1)])
def test_timestep_embedding_equals_diffusers(width, flip, shift):
    steps = torch.tensor([0.0, 0.25, 1.0, 421.5, 999.0])
    theirs = get_timestep_embedding(steps, width, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    assert relative_error(timestep_embedding(steps, width, flip, shift), theirs) < 1e-6


def test_timestep_is_embedded_in_float32_even_in_a_half_precision_network():
    """bfloat16 cannot tell 999 from 1000: the embedding must be rounded, never the timestep."""
    assert timestep_embedding(torch.tensor([999]), 8, True, 0).dtype == torch.float32
    ours = randomise(UNet(tiny_unet())).to(torch.bfloat16)
    latents, context = (x.to(torch.bfloat16) for x in inputs(ours.config, 8, 8))
    with torch.no_grad():
        out = [ours(latents, t, context) for t in (997, 999)]
    assert out[0].dtype == torch.bfloat16
    assert relative_error(out[1], out[0]) > 1e-3


def test_wrong_shapes_are_named():
    ours, _ = pair("tiny")
    latents, context = inputs(ours.config, 8, 8)
    for a, b in ((latents[:, :3], context), (latents, context[:, :, :5]), (latents, context[:1])):
        with pytest.raises((AssertionError, RuntimeError)):
            ours(a, 1, b)


# unet/config.json of the published Stable Diffusion 1.5
PUBLISHED = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
    "cross_attention_dim": 768, "down_block_types": [CD, CD, CD, D], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 64, "up_block_types": [U, CU, CU, CU],
}


def test_the_defaults_are_stable_diffusion_1_5():
    with torch.device("meta"):
        assert UNet.from_config(PUBLISHED).config == UNetConfig()


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_diffusers_writes(name):
    theirs = pair(name)[1].config
    assert UNet.from_config(dict(theirs)).config == CONFIGS[name]


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_linear_projection", True), ("upcast_attention", True), ("dual_cross_attention", True),
        ("only_cross_attention", True), ("center_input_sample", True), ("num_attention_heads", 4),
        ("class_embed_type", "timestep"), ("num_class_embeds", 10), ("addition_embed_type", "text_time"),
        ("encoder_hid_dim", 64), ("time_cond_proj_dim", 256), ("transformer_layers_per_block", [1, 2]),
        ("mid_block_type", None), ("mid_block_type", "UNetMidBlock2D"), ("act_fn", "gelu"),
        ("resnet_time_scale_shift", "scale_shift"), ("time_embedding_type", "fourier"), ("dropout", 0.1),
        ("layers_per_block", [1, 2]), ("cross_attention_dim", [12, 12]), ("block_out_channels", [8, 18]),
        ("attention_head_dim", 3), ("attention_head_dim", [2, 2, 2]), ("attention_head_dim", None),
        ("norm_num_groups", None), ("in_channels", 0), ("conv_in_kernel", 1), ("downsample_padding", 0),
        ("down_block_types", [D, "SimpleCrossAttnDownBlock2D"]), ("up_block_types", [U]),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        UNet.from_config({**tiny_unet().to_json(), key: value})


def sd15(in_channels: int) -> tuple[UNet, UNet2DConditionModel]:
    """Our UNet and diffusers', without weights. Drawing initial ones would take as long as the test."""
    config = replace(UNetConfig(), in_channels=in_channels)
    with torch.device("meta"):
        return UNet(config).eval(), UNet2DConditionModel.from_config(config.to_json()).eval()


@torch.no_grad()
def test_equals_diffusers_at_the_size_of_stable_diffusion():
    """The editor, and a text-to-image model with the same weights."""
    ours, theirs = sd15(in_channels=8)
    weights = randomise(ours.to_empty(device="cpu")).state_dict()                # 3.4 GB, that all share
    theirs.load_state_dict(weights, strict=True, assign=True)
    latents, context = inputs(ours.config, 16, 8, tokens=77)
    rows, t = torch.tensor([0, 1, 0]), torch.tensor([999.0, 20.5, 999.0])
    wanted = theirs(latents[rows], t, torch.cat([context, -context[:1]])).sample
    assert relative_error(ours(latents, t[:2], context), wanted[:2]) < 1e-5
    assert relative_error(wanted[2], wanted[0]) > 1e-3  # it reads the text

    weights["conv_in.weight"] = weights["conv_in.weight"][:, :4].contiguous()
    painters = sd15(in_channels=4)
    for painter in painters:
        painter.load_state_dict(weights, strict=True, assign=True)
    ours, theirs = painters
    wanted = theirs(latents[:1, :4], t[1], context[:1]).sample
    assert relative_error(ours(latents[:1, :4], t[1], context[:1]), wanted) < 1e-5

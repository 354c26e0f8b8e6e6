"""Weights folders: round trips, reading by diffusers and transformers, one-line errors for every fault."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from comparing import randomise, relative_error
from safetensors.torch import load_file, save_file
from tiny_configs import TINY_CLIP, TINY_TEXT, TINY_VAE, tiny_unet
from tiny_editor import DEFAULTS, write_tiny_editor

from nanoip2p.checkpoint.folder import load_network, save_network
from nanoip2p.checkpoint.load import load_model, with_defaults
from nanoip2p.checkpoint.save import save_parts
from nanoip2p.clip import CLIP, TextEncoder
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.pipeline import PAPER_DEFAULTS
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
IDS = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(0))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "unet": (UNet, tiny_unet(8), diffusers.UNet2DConditionModel),
    "vae": (VAE, TINY_VAE, diffusers.AutoencoderKL),
    "text": (TextEncoder, TINY_TEXT, transformers.CLIPTextModel),
    "clip": (CLIP, TINY_CLIP, transformers.CLIPModel),
}
RUN = {  # ours and theirs, on the same input
    "unet": (lambda m: m(noise(2, 8, 8, 12), 500, noise(2, 7, 12)),
             lambda m: m(noise(2, 8, 8, 12), 500, noise(2, 7, 12)).sample),
    "vae": (lambda m: m.decode(noise(2, 4, 4, 6)), lambda m: m.decode(noise(2, 4, 4, 6)).sample),
    "text": (lambda m: m(IDS), lambda m: m(IDS).last_hidden_state),
    "clip": (lambda m: m(IDS, noise(2, 3, 32, 32)),
             lambda m: m(input_ids=IDS, pixel_values=noise(2, 3, 32, 32)).logits_per_image),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_ours_and_the_libraries_read_what_we_write(name, dtype, tmp_path):
    cls, config, peer_cls = NETWORKS[name]
    ours = randomise(cls(config))
    save_network(ours, tmp_path, dtype)
    again = load_network(cls, tmp_path)
    assert again.config == ours.config and not again.training
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor.to(dtype).float()), key
    assert all(parameter.requires_grad for parameter in again.parameters())

    theirs = peer_cls.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    run_ours, run_theirs = RUN[name]
    assert relative_error(run_ours(again), run_theirs(theirs)) <= 1e-5
    assert relative_error(run_ours(randomise(cls(config), seed=9)), run_theirs(theirs)) > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_we_read_what_the_libraries_write(name, tmp_path):
    cls, config, peer_cls = NETWORKS[name]
    save_network(randomise(cls(config)), tmp_path / "ours")
    theirs = peer_cls.from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        ours, again = (RUN[name][0](load_network(cls, tmp_path / side)) for side in ("ours", "theirs"))
    assert torch.equal(ours, again)


def test_text_encoder_in_every_published_spelling(tmp_path):
    encoder = randomise(TextEncoder(TINY_TEXT))
    save_network(encoder, tmp_path)
    path = tmp_path / "model.safetensors"
    published = load_file(path)
    assert all(name.startswith("text_model.") for name in published)
    spellings = {
        "transformers 5": {name.removeprefix("text_model."): tensor for name, tensor in published.items()},
        "transformers 4": published | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    }
    for name, weights in spellings.items():
        save_file(weights, path, metadata={"format": "pt"})
        assert torch.equal(load_network(TextEncoder, tmp_path)(IDS), encoder(IDS)), name


def test_vae_with_attention_names_of_2022(tmp_path):
    vae = randomise(VAE(TINY_VAE))
    save_network(vae, tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for now, then in old.items():
        now, then = f"attentions.0.{now}.", f"attentions.0.{then}."
        weights = {name.replace(now, then): tensor for name, tensor in weights.items()}
    assert sum(".query." in name for name in weights) == 4
    save_file(weights, path, metadata={"format": "pt"})
    assert torch.equal(load_network(VAE, tmp_path).decode(noise(1, 4, 4, 4)), vae.decode(noise(1, 4, 4, 4)))


def test_weights_can_be_loaded_in_half_precision(tmp_path):
    save_network(randomise(UNet(tiny_unet(8))), tmp_path)
    loaded = load_network(UNet, tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_saving_does_not_touch_the_model(tmp_path):
    model = randomise(UNet(tiny_unet())).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_network(model, tmp_path, torch.float16)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    save_network(randomise(UNet(tiny_unet()), seed=5), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"], "a temporary file was left"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_tiny_editor(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def folder(intact, tmp_path):
    """A copy to damage."""
    return shutil.copytree(intact, tmp_path / "tiny")


def test_editor_parts(intact):
    parts = load_model(intact)
    assert parts.defaults == DEFAULTS
    assert parts.schedule == NoiseSchedule()
    assert parts.unet.config.in_channels == 8 and parts.tokenizer(["night"]).shape == (1, 77)


@torch.no_grad()
def test_diffusers_loads_the_folder_without_being_told_anything(intact, tmp_path):
    parts = load_model(intact)
    save_parts(tmp_path / "half", parts.unet, parts.vae, parts.text_encoder, intact / "tokenizer",
                NoiseSchedule().to_json(), {}, torch.float16)
    sizes = [(folder / UNET_FILE).stat().st_size for folder in (intact, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "half")
    assert pipeline.safety_checker is None and pipeline.config.requires_safety_checker is False
    assert type(pipeline.scheduler) is diffusers.EulerAncestralDiscreteScheduler
    # With networks of different precisions, the pipeline would fail or give another picture
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    text = "make it night"
    ids = pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, parts.tokenizer([text]))
    half = load_model(tmp_path / "half")
    assert half.defaults == PAPER_DEFAULTS
    assert relative_error(half.text_encoder(ids), pipeline.text_encoder(ids).last_hidden_state) <= 1e-5


def test_an_editor_can_be_saved_over_itself(folder, intact):
    parts = load_model(folder)
    save_parts(folder, parts.unet, parts.vae, parts.text_encoder, folder / "tokenizer",
                NoiseSchedule().to_json(), parts.defaults)
    for path in intact.rglob("*"):
        assert path.is_dir() or (folder / path.relative_to(intact)).read_bytes() == path.read_bytes(), path


def rewrite(path, change):
    """Change the tensors of a safetensors file, or the content of a JSON file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))
    else:
        save_file(change(load_file(path)), path, metadata={"format": "pt"})


def drop(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


def put(key, value):
    return lambda content: content | {key: value}


FAULTS = {
    "wrong shape": (UNET_FILE, put("conv_in.bias", torch.zeros(3)), r"conv_in.bias of \(3,\) for \(16,\)"),
    "missing key": (UNET_FILE, drop("conv_in.bias"), "lacks conv_in.bias"),
    "extra key": (UNET_FILE, put("conv_on.bias", torch.zeros(3)), "unknown conv_on.bias"),
    "NaN": (UNET_FILE, put("conv_in.bias", torch.full((16,), torch.nan)), "NaN or infinity in conv_in.bias"),
    "infinity": (UNET_FILE, put("conv_in.bias", torch.full((16,), torch.inf)), "infinity in conv_in.bias"),
    "integers": (UNET_FILE, put("conv_in.bias", torch.zeros(16).byte()), "floating-point .* conv_in.bias"),
    "no tensors": (UNET_FILE, lambda _: {}, "lacks .* and [0-9]+ more"),
    "unsupported": ("unet/config.json", put("use_linear_projection", True), "use_linear_projection"),
    "wrong type": ("unet/config.json", put("block_out_channels", "many"), "unet/config.json"),
    "other network": ("unet/config.json", put("_class_name", "FluxModel"), "holds a 'FluxModel', not"),
    "4 channels": ("unet/config.json", put("in_channels", 4), "4 channels, an editor 8"),
    "no object": ("vae/config.json", lambda _: [], "list, not a dict"),
    "default name": ("defaults.json", put("stepps", 3), "unknown setting stepps"),
    "default type": ("defaults.json", put("steps", 2.5), "steps = 2.5 should be a whole number from 1"),
    "huge default": ("defaults.json", put("cfg_text", 10**400), "cfg_text = 1000.* should be a number from"),
    "null": ("vae/config.json", put("scaling_factor", None), "scaling_factor = None should be a number"),
    "text": ("unet/config.json", put("norm_eps", "x"), "norm_eps = 'x' should be a number from 0 to 1"),
    "negative": ("unet/config.json", put("attention_head_dim", -2), "attention_head_dim = -2 should be"),
    "layers": ("unet/config.json", put("layers_per_block", 10**7), "layers_per_block = .* from 1 to 32"),
    "levels": ("vae/config.json", put("block_out_channels", [8] * 9), "has 9 entries, 1 to 6"),
    "no levels": ("unet/config.json", put("block_out_channels", []), "has 0 entries, 1 to 6"),
    "odd width": ("unet/config.json", put("block_out_channels", [3, 3]), "must be even"),
    "parameters": ("text_encoder/config.json", put("hidden_size", 2**16), r"3.4e\+10 parameters, at most 1e"),
    "colours": ("vae/config.json", put("in_channels", 4), "pictures have 4 and 3 colours, not 3"),
    "noise": ("scheduler/scheduler_config.json", put("beta_start", 2.0), "beta_start = 2.0 should be"),
    "timesteps": ("scheduler/scheduler_config.json", put("num_train_timesteps", 10**9), "1 to 100000"),
    "no signal": ("scheduler/scheduler_config.json", put("beta_end", 0.999), "the signal at the last of"),
    "nested": ("vae/config.json", put("act_fn", [[["silu"]]]), "is not supported, only 'silu'"),
    "tokens": ("tokenizer/tokenizer_config.json", put("model_max_length", 90), "makes 90 tokens .* reads 77"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(fault, folder):
    name, change, message = FAULTS[fault]
    rewrite(folder / name, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [
    UNET_FILE, "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "vae",
])
def test_a_missing_file_is_named(name, folder):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=name.partition("/")[2].partition(".")[0] or name) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)


@pytest.mark.parametrize("name", [UNET_FILE, "unet/config.json", "scheduler/scheduler_config.json",
                                  "tokenizer/vocab.json", "defaults.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "bytes"])
def test_a_damaged_file_is_named(name, damage, folder):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "bytes": bytes(range(256))}[damage])
    with pytest.raises(ValueError, match=f"{path.parent}.*{path.name}") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_networks_that_do_not_belong_together(folder):
    save_network(randomise(UNet(tiny_unet(8))), folder / "unet")
    with pytest.raises(ValueError, match="width 12, the text encoder returns 32"):
        load_model(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_model(tmp_path / "absent")


def test_defaults_fall_back_to_the_paper(tmp_path):
    assert with_defaults({}, tmp_path) == PAPER_DEFAULTS
    chosen = {"steps": 20, "cfg_text": 3}
    assert with_defaults(chosen, tmp_path) == PAPER_DEFAULTS | chosen

"""nanoip2p.clip against transformers' CLIP classes: same weights in, same numbers out."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from comparing import randomise, relative_error
from tiny_configs import TINY_CLIP, TINY_TEXT

from nanoip2p.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, TextEncoder, VisionTransformer

TEXT, VISION = TINY_TEXT, TINY_CLIP.vision_config
END = 999  # the end token of the tiny vocabulary: the largest id, as in CLIP


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def texts(count: int, length: int = 77) -> torch.Tensor:
    """Ids of random texts of different lengths, with end token and padding as from the tokenizer."""
    ids = torch.randint(3, END, (count, length))
    for row in range(count):
        ids[row, length // (row + 2) :] = END
    return ids


def without_initial_weights(network: type, config) -> transformers.PreTrainedModel:
    """To draw them takes longer than the comparison. The only buffers are the numbers of the positions."""
    with torch.device("meta"):
        model = network(config)
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.numel()))
    return randomise(model)


def their_text(config: CLIPTextConfig) -> transformers.CLIPTextModel:
    settings = config.to_json() | {"bos_token_id": 0, "pad_token_id": 1}
    return without_initial_weights(transformers.CLIPTextModel, transformers.CLIPTextConfig(**settings))


def their_vision(config: CLIPVisionConfig) -> transformers.CLIPVisionModel:
    config = transformers.CLIPVisionConfig(**config.to_json())
    return without_initial_weights(transformers.CLIPVisionModel, config)


def their_clip(config: CLIPConfig) -> transformers.CLIPModel:
    settings = config.to_json()
    settings["text_config"] |= {"bos_token_id": 0, "pad_token_id": 1}
    return randomise(transformers.CLIPModel(transformers.CLIPConfig(**settings)))


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [TEXT, replace(TEXT, hidden_act="gelu", layer_norm_eps=1e-3), replace(CLIPTextConfig(), vocab_size=1000)],
    ids=["tiny", "gelu", "sd-1.5"],
)
def test_text_encoder_equals_transformers(config):
    theirs = their_text(config)
    with torch.device("meta"):
        ours = TextEncoder.from_config(theirs.config.to_dict()).eval()
    assert ours.config == config
    ours.load_state_dict(TextEncoder.published_names(theirs.state_dict()), strict=True, assign=True)
    ids = texts(2)
    reference = theirs(ids).last_hidden_state
    assert relative_error(ours(ids), reference) <= 1e-5
    assert relative_error(theirs(ids[:1].roll(1, 1)).last_hidden_state, reference[:1]) > 0.1
    assert relative_error(ours(ids[:, :20]), theirs(ids[:, :20]).last_hidden_state) <= 1e-5


@torch.no_grad()
def test_text_is_read_from_left_to_right():
    encoder = randomise(TextEncoder(TEXT))
    ids = texts(1)
    other = ids.clone()
    other[0, 30:] = 5
    before, after = encoder(ids), encoder(other)
    assert relative_error(after[:, :30], before[:, :30]) <= 1e-6
    assert relative_error(after[:, 30:], before[:, 30:]) > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [VISION, CLIPVisionConfig(56, 14, 3, 1024, 4096, 3, 16, 768)],  # 3 of the 24 equal layers
    ids=["tiny", "vit-l-14"],
)
def test_vision_encoder_equals_transformers(config):
    theirs = their_vision(config)
    with torch.device("meta"):
        ours = VisionTransformer(config)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    reference = theirs(pixels)
    hidden = ours(pixels)
    assert hidden.shape == (2, 1 + (config.image_size // config.patch_size) ** 2, config.hidden_size)
    assert relative_error(hidden, reference.last_hidden_state) <= 1e-5
    assert relative_error(ours.post_layernorm(hidden[:, 0]), reference.pooler_output) <= 1e-5
    assert relative_error(theirs(pixels.flip(3)).pooler_output, reference.pooler_output) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("eos_token_id", [2, END, 500])
def test_clip_equals_transformers(eos_token_id):
    """Configs of 2022 have the end token 2; 500 is an end token that is not the largest id."""
    config = replace(TINY_CLIP, text_config=replace(TEXT, eos_token_id=eos_token_id))
    theirs = their_clip(config)
    ours = CLIP.from_config(theirs.config.to_dict()).eval()
    assert ours.config == config
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids, pixels = texts(3), torch.randn(2, 3, 32, 32)
    ids[:, 9] = 500
    reference = theirs(input_ids=ids, pixel_values=pixels)
    text, image = ours.encode_text(ids), ours.encode_image(pixels)
    assert text.shape == (3, 16) and image.shape == (2, 16)
    assert torch.allclose(torch.cat([text, image]).norm(dim=1), torch.ones(5))
    assert relative_error(text, reference.text_embeds) <= 1e-5
    assert relative_error(image, reference.image_embeds) <= 1e-5
    assert relative_error(ours(ids, pixels), reference.logits_per_image) <= 1e-5
    assert relative_error(reference.text_embeds.roll(1, 0), reference.text_embeds) > 0.1


def test_clip_gradients_equal_transformers():
    theirs = their_clip(TINY_CLIP)
    ours = CLIP(TINY_CLIP)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids, pixels = texts(3), torch.randn(3, 3, 32, 32)
    torch.nn.functional.cross_entropy(ours(ids, pixels), torch.arange(3)).backward()
    logits = theirs(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    reference, compared = dict(theirs.named_parameters()), 0
    for name, parameter in ours.named_parameters():
        if not name.endswith("k_proj.bias"):  # its gradient is zero, up to rounding
            assert relative_error(parameter.grad, reference[name].grad) <= 1e-4, name
            compared += 1
    assert compared == len(reference) - 4


@torch.no_grad()
def test_both_spellings_are_read_and_the_published_one_is_written():
    prefix = "text_model."
    without = their_text(TEXT).state_dict()
    assert not any(name.startswith(prefix) for name in without), "transformers 5 writes no prefix"
    published = {prefix + name: tensor for name, tensor in without.items()}
    published[prefix + "embeddings.position_ids"] = torch.arange(77)[None]  # transformers 4 saved this

    networks = [TextEncoder(TEXT), TextEncoder(TEXT)]
    for network, weights in zip(networks, (without, published)):
        network.load_state_dict(TextEncoder.published_names(weights), strict=True)
    weights = [network.state_dict() for network in networks]
    assert weights[0].keys() == weights[1].keys() == {prefix + name for name in without}
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "text_model.embeddings.position_ids" not in CLIP.published_names(
        {"text_model.embeddings.position_ids": torch.arange(77)}
    )


def test_embeddings_begin_as_in_openai_s_code():
    model = CLIP(TINY_CLIP)
    text, vision = model.text_model.embeddings, model.vision_model.embeddings
    for layer in (text.token_embedding, text.position_embedding, vision.position_embedding):
        assert 0.015 < layer.weight.std() < 0.025
    assert 0.6 < vision.class_embedding.std() * VISION.hidden_size**0.5 < 1.4


@pytest.mark.parametrize("size, patch", [(31, 32), (258, 2)])
def test_the_number_of_patches_is_limited(size, patch):
    with pytest.raises(ValueError, match=f"image_size = {size} must hold 1 to 128 patches of {patch}"):
        VisionTransformer(replace(VISION, image_size=size, patch_size=patch))


def test_weights_of_another_network_are_not_taken():
    with pytest.raises(RuntimeError, match="text_model.patch_embedding"):
        TextEncoder(TEXT).load_state_dict(TextEncoder.published_names({"patch_embedding": torch.zeros(1)}))


def test_reads_what_transformers_writes(tmp_path):
    """In nested configs, transformers omits values that equal its own defaults. Ours differ."""
    transformers.CLIPConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    with torch.device("meta"):
        small, empty = CLIP.from_config(written).config, CLIP.from_config({"model_type": "clip"}).config
    assert small == empty
    assert small.text_config.hidden_size == 512 and small.vision_config.patch_size == 32


def test_reads_configs_of_2022():
    """openai/clip-vit-large-patch14 has generation settings, and each tower twice; `_dict` is preferred."""
    old = {"do_sample": False, "top_k": 50, "length_penalty": 1.0, "pruned_heads": {}, "bad_words_ids": None}
    config = TINY_CLIP.to_json()
    config |= {"text_config_dict": config["text_config"] | old, "text_config": {"hidden_size": 8}}
    config |= {"vision_config_dict": None, "torch_dtype": "float32", "initializer_factor": 1.0}
    assert CLIP.from_config(config).config == TINY_CLIP


@pytest.mark.parametrize(
    "setting",
    [{"hidden_act": "relu"}, {"attention_dropout": 0.1}, {"hidden_size": 33}, {"use_rotary": True}],
)
def test_refuses_by_name_what_it_does_not_compute(setting):
    (key,) = setting
    with pytest.raises(ValueError, match=key):
        TextEncoder.from_config(TEXT.to_json() | setting)

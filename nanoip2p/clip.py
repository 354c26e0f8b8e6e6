"""CLIP (Radford et al. 2103.00020): the text encoder of Stable Diffusion, and the scorer of edited pictures.

It computes the same as transformers' CLIP classes, with the same weight names. Published weights of the text
encoder have the prefix `text_model.`; transformers 5 drops it. We read both and write the prefix.
"""

from collections import OrderedDict
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoip2p.attention import attention
from nanoip2p.common.config import IGNORED, read_config
from nanoip2p.common.schema import checked

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class _Config:
    """Base class of the three configs below."""

    def to_json(self) -> dict:
        """The config.json from which transformers builds the same network."""
        return {"architectures": [self.architecture[0]], "model_type": self.architecture[1], **asdict(self)}


@dataclass(frozen=True)
class CLIPTextConfig(_Config):
    """Config of the text encoder: names as in transformers' config.json, default values as in SD 1.5."""

    architecture = ("CLIPTextModel", "clip_text_model")  # class name and model_type in transformers
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    projection_dim: int = 768
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2  # SD 1.5's config has this wrong value, see CLIP.encode_text


@dataclass(frozen=True)
class CLIPVisionConfig(_Config):
    """Config of the vision encoder: names and default values as in transformers (ViT-B/32)."""

    architecture = ("CLIPVisionModel", "clip_vision_model")
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class CLIPConfig(_Config):
    """Configs of both encoders, and the width of their shared embedding space."""

    architecture = ("CLIPModel", "clip")
    text_config: CLIPTextConfig
    vision_config: CLIPVisionConfig
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # log(1 / 0.07)


# transformers' defaults, for keys that a config.json omits. Only the defaults that differ from SD 1.5's
TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                 "projection_dim": 512, "eos_token_id": 49407}


class Layer(nn.Module):
    """A pre-norm transformer layer: self-attention, then an MLP. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        width, hidden, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        if width % heads or config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"CLIP: hidden_size = {width} must be a multiple of {heads} heads, and "
                             f"hidden_act = {config.hidden_act!r} one of {sorted(ACTIVATIONS)}")
        self.heads, self.causal, self.activation = heads, causal, ACTIVATIONS[config.hidden_act]
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](h) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn["out_proj"](attention(q, k, v, self.heads, self.causal))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


def _encoder(config: CLIPTextConfig | CLIPVisionConfig, causal: bool) -> nn.Sequential:
    """The transformer layers of one encoder, text or vision. (B, T, D) -> (B, T, D)."""
    layers = (Layer(config, causal) for _ in range(config.num_hidden_layers))
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))


class VisionEmbeddings(nn.Module):
    """Class token and patch embeddings, plus positions. (B, 3, S, S) -> (B, 1 + (S/patch)^2, D)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        if not 1 <= config.image_size // patch <= 128:
            raise ValueError(f"CLIP: image_size = {config.image_size} must hold 1 to 128 patches of {patch}")
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)            # (B, patches, D)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1)  # (B, 1 + patches, D)
        return x + self.position_embedding.weight


class TextTransformer(nn.Module):
    """The text encoder without projection: transformers' CLIPTextModel. ids (B, T) -> (B, T, D)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(config.vocab_size, width),
            "position_embedding": nn.Embedding(config.max_position_embeddings, width)})
        for table in self.embeddings.values():
            nn.init.normal_(table.weight, std=0.02)  # as in OpenAI's code; std=1 trains slowly
        self.encoder = _encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        tokens, positions = self.embeddings.values()
        x = tokens(ids) + positions.weight[: ids.shape[1]]                           # (B, T, D)
        return self.final_layer_norm(self.encoder(x))


class VisionTransformer(nn.Module):
    """The vision encoder without projection: transformers' CLIPVisionModel. (B, 3, S, S) -> (B, T, D)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps)  # published with this typo
        self.encoder = _encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)))


class TextEncoder(nn.Module):
    """The text encoder of Stable Diffusion. Its weights have the published names, `text_model.…`."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    @classmethod
    def from_config(cls, config: dict) -> "TextEncoder":
        """Build from the content of text_encoder/config.json. Raises ValueError for unsupported settings."""
        return cls(read_config(CLIPTextConfig, TEXT_DEFAULTS | config, {}, IGNORED["clip"]))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) int64 -> hidden states (B, T, D) after the final layer norm."""
        return self.text_model(ids)

    @staticmethod
    def published_names(state_dict: dict) -> dict:
        """Add the prefix `text_model.` if it is missing; drop the position_ids that transformers 4 saved."""
        return {"text_model." + name.removeprefix("text_model."): tensor
                for name, tensor in CLIP.published_names(state_dict).items()}


class CLIP(nn.Module):
    """Both encoders, projected into one space. The cosine tells how well a text and a picture match."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        text, vision, shared = config.text_config, config.vision_config, config.projection_dim
        self.text_model, self.vision_model = TextTransformer(text), VisionTransformer(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, shared, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, shared, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    @classmethod
    def from_config(cls, config: dict) -> "CLIP":
        """Build from the content of a CLIPModel's config.json. Raises ValueError for unsupported settings."""
        towers = (("text_config", CLIPTextConfig, TEXT_DEFAULTS), ("vision_config", CLIPVisionConfig, {}))
        for key, tower, defaults in towers:
            # Configs of 2022 also have `text_config_dict`. It takes precedence, as in transformers
            given = checked(config.get(f"{key}_dict") or config.get(key) or {}, dict, f"CLIPConfig: {key}")
            config = config | {key: read_config(tower, defaults | given, {}, IGNORED["clip"])}
        return cls(read_config(CLIPConfig, config, {}, IGNORED["clip"]))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) int64 -> unit vectors (B, P), from the hidden state at the first end-of-text."""
        eos = self.config.text_config.eos_token_id
        # Configs before mid-2023 wrongly have 2: take the largest id (end-of-text), as OpenAI's code does
        end = ids.argmax(1) if eos == 2 else (ids == eos).int().argmax(1)                    # (B,)
        pooled = self.text_model(ids)[torch.arange(len(ids), device=ids.device), end]        # (B, D)
        return F.normalize(self.text_projection(pooled), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, S, S) -> unit vectors (B, P), from the class token."""
        pooled = self.vision_model.post_layernorm(self.vision_model(pixels)[:, 0])           # (B, D)
        return F.normalize(self.visual_projection(pooled), dim=-1)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """Cosines times exp(logit_scale), (pictures, texts): the logits of CLIP's contrastive loss."""
        return self.logit_scale.exp() * self.encode_image(pixels) @ self.encode_text(ids).T

    @staticmethod
    def published_names(state_dict: dict) -> dict:
        """Drop the position_ids (0, 1, 2, …), which transformers 4 saved among the weights."""
        return {name: tensor for name, tensor in state_dict.items() if not name.endswith(".position_ids")}

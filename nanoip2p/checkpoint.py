"""Read and write weights in diffusers' folder layout.

    model_index.json  unet/  vae/  text_encoder/    config.json and one safetensors file each
    tokenizer/  scheduler/                          as diffusers writes them
    defaults.json                                   ours: the settings these weights were made for
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanoip2p.clip import CLIP, TextEncoder, VisionEncoder
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.files import read_json, remedy, replacing, write_json
from nanoip2p.tokenizer import Tokenizer, load_tokenizer
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

# Our class -> the class that reads the same folder in diffusers or transformers, and its file of weights
LAYOUT = {
    UNet: ("UNet2DConditionModel", "diffusion_pytorch_model.safetensors"),
    VAE: ("AutoencoderKL", "diffusion_pytorch_model.safetensors"),
    TextEncoder: ("CLIPTextModel", "model.safetensors"),
    VisionEncoder: ("CLIPVisionModel", "model.safetensors"),
    CLIP: ("CLIPModel", "model.safetensors"),
}
PIPELINE = "StableDiffusionInstructPix2PixPipeline"
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)
# Appendix of the paper and edit_cli.py of its code; a weights folder overrides them in defaults.json
PAPER_DEFAULTS = {
    "resolution": 512, "steps": 100, "cfg_text": 7.5, "cfg_image": 1.5, "sampler": "euler_ancestral",
}


@dataclass(frozen=True)
class EditorParts:
    """Everything an editor is made of. `defaults` has the keys of PAPER_DEFAULTS, all present."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    defaults: dict


def load_network(cls: type, folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a network from <folder>/config.json and its weights, in eval mode on the CPU.

    Half-precision files are widened to `dtype`. Raises ValueError, in one line, for a missing file, another
    network's folder, names of weights that are missing or unknown, a wrong shape, and NaN or infinity.
    """
    folder = Path(folder)
    class_name, weights_file = LAYOUT[cls]
    config = read_json(folder / "config.json")
    written_by = config.get("_class_name") or (config.get("architectures") or [class_name])[0]
    if written_by != class_name:
        raise ValueError(f"{folder} holds a {written_by}, not the {class_name} needed here")
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
            model = cls.from_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    path = folder / weights_file
    weights = read_weights(path)
    if hasattr(cls, "published_names"):
        weights = cls.published_names(weights)
    check_weights(weights, model.state_dict(), path)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. ValueError when it is missing, truncated or something else."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy(path.parent)}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from None


def check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """ValueError, naming the first few, when weights do not fit a network or are not finite."""
    _refuse(path, "lacks", [name for name in expected if name not in weights])
    _refuse(path, "has unknown", [name for name in weights if name not in expected])
    shapes = [
        f"{name} of {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
        for name, tensor in weights.items()
        if tensor.shape != expected[name].shape
    ]
    _refuse(path, "does not fit its config.json:", shapes)
    integers = [name for name, tensor in weights.items() if not tensor.is_floating_point()]
    _refuse(path, "needs floating-point numbers in", integers)
    infinite = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    _refuse(path, "has NaN or infinity in", infinite)


def _refuse(path: Path, problem: str, found: list[str]) -> None:
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{path} {problem} {', '.join(found[:3])}{more}")


def save_network(model: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and the weights as diffusers or transformers would, each file whole or not at all."""
    weights_file = LAYOUT[type(model)][1]
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    with replacing(Path(folder) / weights_file) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})  # which transformers insists on
    config = model.config.to_json()
    if "architectures" in config:  # transformers 5 computes in the dtype of the file, diffusers in float32:
        config["torch_dtype"] = "float32"  # together they fail, or give another picture, unless both are told
    write_json(config, Path(folder) / "config.json")


def load_editor_parts(folder: str | Path, dtype: torch.dtype = torch.float32) -> EditorParts:
    """Read a weights folder. Raises ValueError, in one line, for what is missing, broken or mismatched."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no weights folder {folder}")
    parts = EditorParts(
        unet=load_network(UNet, folder / "unet", dtype),
        vae=load_network(VAE, folder / "vae", dtype),
        text_encoder=load_network(TextEncoder, folder / "text_encoder", dtype),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        schedule=NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json")),
        defaults=read_defaults(folder),
    )
    check_fit(parts, folder)
    return parts


def check_fit(parts: EditorParts, folder: Path) -> None:
    """ValueError when the networks of a folder do not belong together."""
    unet, latent = parts.unet.config, parts.vae.config.latent_channels
    if unet.in_channels != 2 * latent:
        raise ValueError(
            f"{folder}: the UNet takes {unet.in_channels} channels, an editor needs {2 * latent}, noised "
            "latents and picture; are these the weights of a text-to-picture model?"
        )
    text = parts.text_encoder.config
    if unet.cross_attention_dim != text.hidden_size:
        raise ValueError(
            f"{folder}: the UNet reads text states of width {unet.cross_attention_dim}, "
            f"the text encoder writes {text.hidden_size}"
        )
    if parts.tokenizer.length > text.max_position_embeddings:
        raise ValueError(
            f"{folder}: the tokenizer makes {parts.tokenizer.length} tokens, "
            f"the text encoder has {text.max_position_embeddings} positions"
        )


def read_defaults(folder: str | Path) -> dict:
    """PAPER_DEFAULTS, overridden by <folder>/defaults.json where it exists. ValueError for a wrong entry."""
    path = Path(folder) / "defaults.json"
    chosen = read_json(path, missing={})
    for key, value in chosen.items():
        if key not in PAPER_DEFAULTS:
            raise ValueError(f"{path}: unknown setting {key}; known are {', '.join(PAPER_DEFAULTS)}")
        wanted = type(PAPER_DEFAULTS[key])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{path}: {key} = {value!r} should be a {wanted.__name__}")
    return PAPER_DEFAULTS | chosen


def save_editor(
    folder: str | Path, unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer_folder: str | Path,
    scheduler_config: dict, defaults: dict, dtype: torch.dtype = torch.float32,
) -> None:
    """Write a weights folder that diffusers' StableDiffusionInstructPix2PixPipeline loads as well.

    tokenizer_folder: copied from there. scheduler_config: the content of scheduler_config.json, its
    `_class_name` included. defaults: as PAPER_DEFAULTS. dtype: of the files; float16 halves them.
    """
    folder = Path(folder)
    save_network(unet, folder / "unet", dtype)
    save_network(vae, folder / "vae", dtype)
    save_network(text_encoder, folder / "text_encoder", dtype)
    write_json(scheduler_config, folder / "scheduler" / "scheduler_config.json")
    for name in TOKENIZER_FILES:
        source = Path(tokenizer_folder) / name
        if source.exists() and source.resolve() != (folder / "tokenizer" / name).resolve():
            with replacing(folder / "tokenizer" / name) as temporary:
                shutil.copyfile(source, temporary)
    write_json(defaults, folder / "defaults.json")
    index = {
        "_class_name": PIPELINE,
        "unet": ["diffusers", LAYOUT[UNet][0]],
        "vae": ["diffusers", LAYOUT[VAE][0]],
        "text_encoder": ["transformers", LAYOUT[TextEncoder][0]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler_config["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    write_json(index, folder / "model_index.json")

"""One network and its folder: config.json beside its weights, as diffusers and transformers have it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoip2p.checkpoint.tensors import check_tensors, find_weights, narrowed, write_tensors
from nanoip2p.clip import CLIP, TextEncoder
from nanoip2p.common.files import read_json, write_json
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

# Our class -> the class that reads the same folder in diffusers or transformers
CLASS_NAMES = {UNet: "UNet2DConditionModel", VAE: "AutoencoderKL", TextEncoder: "CLIPTextModel",
               CLIP: "CLIPModel"}


@dataclass(frozen=True)
class Network:
    """A network without memory (on torch's meta device), and its tensors, which are still on disk.

    `read` maps their file anew each time, because what was touched of a mapping stays in memory with it.
    """

    model: nn.Module
    read: Callable[[], dict[str, Tensor]]
    path: Path  # of the file or folder, for messages

    def load(self, dtype: torch.dtype | None) -> nn.Module:
        """The model with its weights in `dtype` (None: as they are, still on disk), in eval mode on the CPU.

        ValueError, in one line, when names, shapes or numbers are not those of the model.
        """
        tensors = self.read()
        check_tensors(tensors, self.model.state_dict(), self.path)
        weights = {name: narrowed(tensor, dtype or tensor.dtype, name) for name, tensor in tensors.items()}
        self.model.load_state_dict(weights, assign=True)
        return self.model.eval()


def empty(cls: type, config: dict, path: Path) -> nn.Module:
    """The network of a config.json without memory. ValueError names what in `path` is not supported."""
    try:
        with torch.device("meta"):
            return cls.from_config(config)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from None


def open_network(cls: type, folder: str | Path) -> Network:
    """Read a network's folder: config.json and weights. ValueError, in one line, for what is amiss."""
    folder, class_name = Path(folder), CLASS_NAMES[cls]
    config = read_json(folder / "config.json")
    written_by = config.get("_class_name") or config.get("architectures") or class_name
    if written_by not in (class_name, [class_name]):
        raise ValueError(f"{folder} holds a {written_by}, not the {class_name} needed here")
    published_names = getattr(cls, "published_names", dict)
    return Network(empty(cls, config, folder / "config.json"),
                   lambda: published_names(find_weights(folder)), folder)


def load_network(cls: type, folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a network from its folder, in eval mode on the CPU. Half-precision files are widened to `dtype`.

    Raises ValueError, in one line, for a missing file, another network's folder, names of weights that are
    missing or unknown, a wrong shape, and NaN or infinity.
    """
    return open_network(cls, folder).load(dtype)


def save_network(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = torch.float32) -> None:
    """Write config.json and the weights as diffusers or transformers would, each file whole or not at all.

    dtype: of the file; None leaves that of each weight.
    """
    config, stem = model.config.to_json(), "diffusion_pytorch_model"
    if "architectures" in config:  # transformers 5 computes in the dtype of the file, diffusers in float32:
        config["torch_dtype"] = "float32"  # together they fail, or give another picture, unless both are told
        stem = "model"
    write_tensors(model.state_dict(), Path(folder) / f"{stem}.safetensors", dtype)
    write_json(config, Path(folder) / "config.json")

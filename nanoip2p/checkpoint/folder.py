"""Read and write the folder of one network, as diffusers and transformers do: config.json and weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanoip2p.checkpoint.tensors import FLOAT8, cast, check_tensors, read_weights, write_tensors
from nanoip2p.clip import CLIP, TextEncoder
from nanoip2p.common.files import read_json, write_json
from nanoip2p.common.schema import checked, shown
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

# Our class -> the class that reads the same folder in diffusers or transformers
CLASS_NAMES = {UNet: "UNet2DConditionModel", VAE: "AutoencoderKL", TextEncoder: "CLIPTextModel",
               CLIP: "CLIPModel"}
DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)  # they draw initial values
MOST_PARAMETERS = 10**10  # of one network: ten times the UNet of Stable Diffusion 1.x


@dataclass(frozen=True)
class StoredNetwork:
    """A network whose weights are still on disk."""

    model: nn.Module  # on torch's meta device, without weights
    read: Callable[[], dict[str, Tensor]]  # maps the file at each call: a kept mapping would fill the memory
    path: Path  # the file or folder, for error messages

    def load(self, dtype: torch.dtype | None) -> nn.Module:
        """Load the weights in eval mode on the CPU. dtype: None keeps the stored dtype, memory-mapped.

        float8 becomes float16, which can hold all float8 numbers. Raises ValueError if the names or shapes
        do not match the model, or if a weight is not finite.
        """
        tensors = {name: tensor.half() if tensor.dtype in FLOAT8 else tensor
                   for name, tensor in self.read().items()}
        check_tensors(tensors, self.model.state_dict(), self.path)
        weights = {name: cast(tensor, dtype or tensor.dtype, name) for name, tensor in tensors.items()}
        self.model.load_state_dict(weights, assign=True)
        return self.model.eval()


class Undrawn(TorchFunctionMode):
    """Skips the functions DRAWS. On the meta device, they would import torch._dynamo, sympy and FSDP."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kwargs["tensor"] if func in DRAWS else func(*args, **kwargs or {})


def build_without_memory(cls: type, config: dict, path: Path) -> nn.Module:
    """Build a network on torch's meta device. ValueError for a bad setting; its message names `path`."""
    try:
        with torch.device("meta"), Undrawn():
            model = cls.from_config(config)
        if (count := sum(p.numel() for p in model.parameters())) > MOST_PARAMETERS:
            raise ValueError(f"{count:.1e} parameters, at most {MOST_PARAMETERS:.0e} are supported")
        return model
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def open_network(cls: type, folder: str | Path, raw: bool = False) -> StoredNetwork:
    """Read config.json. `read_weights` reads the weights later. ValueError for an unsuitable config."""
    folder, wanted = Path(folder), CLASS_NAMES[cls]
    config = read_json(folder / "config.json")
    architectures = checked(config.get("architectures") or [wanted], list[str], f"{folder}: architectures")
    stored = config.get("_class_name") or architectures[0]
    if stored != wanted:
        raise ValueError(f"{folder} holds a {shown(stored)}, not the {wanted} needed here")
    model = build_without_memory(cls, config, folder / "config.json")
    published_names = getattr(cls, "published_names", dict)
    return StoredNetwork(model, lambda: published_names(read_weights(folder, raw)), folder)


def load_network(cls: type, folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a network folder in `dtype`, in eval mode on the CPU. ValueError: see StoredNetwork.load."""
    return open_network(cls, folder).load(dtype)


def save_network(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = torch.float32,
                 sample_size: int | None = None) -> None:
    """Write config.json and weights for diffusers or transformers. Each file is written atomically.

    dtype: dtype of the file; None keeps each weight's dtype. sample_size: diffusers' default image size, in
    latents for a UNet and in pixels for a VAE.
    """
    config, stem = model.config.to_json(), "diffusion_pytorch_model"
    if "architectures" in config:
        # By default, transformers 5 computes in the file's dtype, and diffusers in float32. The mixture fails
        # or gives another picture, so the config asks transformers for float32
        config["torch_dtype"], stem = "float32", "model"
    if sample_size:
        config["sample_size"] = sample_size
    write_tensors(model.state_dict(), Path(folder) / f"{stem}.safetensors", dtype)
    write_json(config, Path(folder) / "config.json")

"""The parts of one model, and what editing and painting share."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanoip2p.clip import TextEncoder
from nanoip2p.common.device import pick_device
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.images import fit_size
from nanoip2p.samplers import SAMPLERS, Denoise
from nanoip2p.tokenizer import Tokenizer
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

KEPT = 64  # encoded pictures, and texts, that may come again


class Model:
    """Networks, tokenizer, noise schedule and default settings. Editor and TextToImage are such models."""

    edits = True  # whether its UNet is shown a picture

    def __init__(self, unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer: Tokenizer,
                 schedule: NoiseSchedule, defaults: dict, tokenizer_folder: Path | None = None):
        """All networks on one device and in one dtype. defaults: the keys of PAPER_DEFAULTS, all present."""
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule, self.defaults, self.tokenizer_folder = schedule, defaults, tokenizer_folder
        self.device = unet.conv_in.weight.device  # where they work; with low_memory, they wait on the CPU
        self.kept_texts: dict[str, Tensor] = {}  # see encode_texts
        self.kept_pictures: dict[bytes, Tensor] = {}  # digest of the pixels -> z_image (C, h, w)

    @classmethod
    def load(cls, weights, device: str | torch.device | None = None,
             dtype: torch.dtype = torch.float32, low_memory: bool = False) -> "Model":
        """weights: see checkpoint.open_checkpoint. device None: see pick_device. ValueError if bad.

        low_memory: an Editor's networks wait on the CPU for `edit` with low_memory.
        """
        from nanoip2p.checkpoint.load import load_model  # the core itself knows nothing of files

        device = pick_device(device)
        model = load_model(weights, dtype, cls.edits)
        for network in (model.unet, model.vae, model.text_encoder):
            network.to("cpu" if low_memory else device)
        model.device = device
        return model

    @property
    def multiple(self) -> int:
        """Both sides of a picture are multiples of this: 64 in SD 1.5, 8 for the VAE times 8 for the UNet."""
        return self.vae.downsampling * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def fingerprint(self) -> str:
        """What tells whether other weights lie at the same path now."""
        return fingerprint(self.unet, self.vae, self.text_encoder)

    @property
    def side(self) -> int:
        """Of a square picture in the resolution of the weights."""
        resolution = self.defaults["resolution"]
        return fit_size(resolution, resolution, resolution, self.multiple)[0]

    def complete(self, settings: dict) -> dict:
        """`settings` with those of the weights where a value is None. ValueError for an unknown sampler."""
        settings = {key: self.defaults[key] if value is None else value for key, value in settings.items()}
        if settings["sampler"] not in SAMPLERS:
            raise ValueError(f"no sampler {settings['sampler']!r}; there are {', '.join(SAMPLERS)}")
        return settings


def encode_texts(text_encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str],
                 kept: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Text states (T, D) of each distinct text; the last of them stay in `kept`.

    One forward for each, because the last bits of a sum depend on how many texts share it: the states of a
    text must not depend on its company.
    """
    weight, kept = text_encoder.text_model.final_layer_norm.weight, {} if kept is None else kept
    states = {
        text: kept[text].to(weight) if text in kept else text_encoder(tokenizer([text]).to(weight.device))[0]
        for text in dict.fromkeys(texts)}
    keep(kept, states)
    return states


def keep(kept: dict, used: dict) -> None:
    """Add what was used to what is kept: the KEPT last ones, of those used at once the first ones."""
    for key in reversed(used):
        kept.pop(key, None)
        kept[key] = used[key]
    for key in list(kept)[:-KEPT]:
        del kept[key]


def same_size(sizes: list[tuple[int, ...]], batch: int) -> list[list[int]]:
    """Indices of pictures that can share a forward: of one size, at most `batch` together."""
    by_size = {}
    for i, size in enumerate(sizes):
        by_size.setdefault(size, []).append(i)
    return [group[k : k + batch] for group in by_size.values() for k in range(0, len(group), batch)]


def counted(denoise: Denoise, bar: tqdm) -> Denoise:
    """The same denoiser, moving a progress bar on at each call."""
    def counted(x: Tensor, sigma: float) -> Tensor:
        denoised = denoise(x, sigma)
        bar.update()
        return denoised
    return counted


# Appendix of the paper and edit_cli.py of its code; a weights folder overrides them in defaults.json
PAPER_DEFAULTS = dict(resolution=512, steps=100, cfg_text=7.5, cfg_image=1.5, sampler="euler_ancestral")


def fingerprint(*networks: nn.Module, begin: bytes = b"") -> str:
    """Tells networks apart by the first numbers of each tensor, which takes no time and sees a training."""
    told = hashlib.sha256(begin)
    for network in networks:
        for name, tensor in network.state_dict().items():
            told.update(f"{name} {tensor.dtype} {tensor.flatten()[:16].tolist()}".encode())
    return told.hexdigest()[:16]

"""The base class of Editor and TextToImage, and how both handle pictures, texts and seeds."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nanoip2p.clip import TextEncoder
from nanoip2p.common.colours import to_rgb
from nanoip2p.common.device import pick_device
from nanoip2p.common.files import find_weights
from nanoip2p.common.schema import checked, shown
from nanoip2p.diffusion import NoiseSchedule, plan
from nanoip2p.images import fit_size, open_image, to_pil
from nanoip2p.samplers import SAMPLERS, Denoise
from nanoip2p.tokenizer import Tokenizer
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

Callback = Callable[[int, Tensor], None]
# From the paper's appendix and the authors' edit_cli.py; a defaults.json in the weights folder overrides them
PAPER_DEFAULTS = dict(resolution=512, steps=100, cfg_text=7.5, cfg_image=1.5, sampler="euler_ancestral")
# Kind, least and most of the arguments of `edit` and `generate`; as_image checks the pictures. Seeds have 64
# bits, with room for seed + i
ARGUMENTS = {key: (type(value),) for key, value in PAPER_DEFAULTS.items()} | {
    "resolution": (int, 1, 2**15), "seed": (int | list[int] | None, -(2**63), 2**64 - 2**32),
    "instructions": (str | list[str],), "captions": (str | list[str],), "negative": (str,),
    "mask_blur": (float, 0, 1000), "strength": (float | None,), "low_memory": (bool,), "progress": (bool,),
    "batch": (int, 1), "deep_every": (int, 1), "callback": (Callable | None,)}


class Model:
    """Base class of Editor and TextToImage: networks, tokenizer, noise schedule and default settings."""

    edits = True  # whether the UNet takes an input picture
    arguments = ARGUMENTS
    default_weights = "weights/nano-ip2p"

    def __init__(self, unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer: Tokenizer,
                 schedule: NoiseSchedule, defaults: dict, tokenizer_folder: Path | None = None):
        """All networks have one device and one dtype. defaults: needs every key of PAPER_DEFAULTS."""
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule, self.defaults, self.tokenizer_folder = schedule, defaults, tokenizer_folder
        self.device = unet.conv_in.weight.device  # stored, as low_memory moves the networks to the CPU
        self.last_seed: int | list[int] | None = None  # pass it as `seed` to repeat the last call

    @classmethod
    def load(cls, weights=None, device: str | torch.device | None = None,
             dtype: torch.dtype = torch.float32, low_memory: bool = False) -> "Model":
        """Load weights: a folder, a single file, a name on the Hub, or an open Checkpoint.

        weights None: the nano weights. device None: see pick_device. low_memory (for `edit`): the networks
        stay on the CPU until they are needed. Raises ValueError, in one line, for a missing or broken file.
        """
        from nanoip2p.checkpoint.load import load_model  # the core itself reads no checkpoints

        weights = cls.default_weights if weights is None else weights
        device = pick_device(device)
        if isinstance(weights, (str, Path)):
            weights = find_weights(weights)
        elif not hasattr(weights, "networks"):
            raise ValueError(f"weights {weights!r}: give a folder, a file, a name on the Hub or a Checkpoint")
        model = load_model(weights, dtype, cls.edits).to("cpu" if low_memory else device)
        model.device = device
        return model

    def to(self, device: str | torch.device) -> "Model":
        """Move all networks and return self."""
        device = pick_device(device)
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(device)
        self.device = device
        return self

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.defaults.items())
        millions, dtype = sum(p.numel() for p in self.unet.parameters()) / 1e6, self.unet.conv_in.weight.dtype
        return f"{type(self).__name__}(UNet of {millions:.1f} M, {dtype}, {self.device}; {settings})"

    @property
    def multiple(self) -> int:
        """Picture sides must be multiples of this: 64 in SD 1.5 (8 from the VAE times 8 from the UNet)."""
        return self.vae.downsampling * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def side(self) -> int:
        """The side of a square picture at the default resolution, in pixels."""
        resolution = self.defaults["resolution"]
        return fit_size(resolution, resolution, resolution, self.multiple)[0]

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of a square picture. resolution: its side in pixels."""
        side = resolution // self.vae.downsampling
        return self.unet.config.out_channels, side, side

    def fill_defaults(self, settings: dict) -> dict:
        """The settings in ARGUMENTS, checked; None becomes the weights' default. Raises ValueError."""
        settings = {key: self.defaults.get(key) if value is None else value
                    for key, value in settings.items() if key in ARGUMENTS}
        for key, value in settings.items():
            kind, *limits = self.arguments[key]
            settings[key] = checked(value, kind, key, *limits, longest=2**63)
        if settings["sampler"] not in SAMPLERS:
            raise ValueError(f"unknown sampler {settings['sampler']!r}; take one of {', '.join(SAMPLERS)}")
        if not self.edits and settings["resolution"] % self.multiple:  # an editor rounds it, see fit_size
            raise ValueError(f"these weights cannot use a resolution of {settings['resolution']}; take a "
                             f"multiple of {self.multiple}")
        plan(self.schedule, settings["sampler"], settings["steps"])  # raises for unusable steps
        return settings

    @torch.inference_mode()
    def decode(self, latents: Tensor, low_memory: bool = False) -> list[Image.Image]:
        """Scaled latents (B, C, h, w) -> B pictures. low_memory: in tiles if large. NaN: PictureError."""
        decode = self.vae.decode_low_memory if low_memory else self.vae.decode
        pixels = decode((latents / self.vae.scaling_factor).to(self.unet.conv_in.weight.dtype))
        return [to_pil(picture) for picture in pixels]                                  # (3, H, W) each

    def _requests(self, seed: int | list[int] | None, **given) -> tuple[bool, list[list]]:
        """Turn the checked arguments and the seed into lists of equal length. Sets last_seed.

        Returns (True if no argument was a list, lists). A single value is repeated. A single seed s becomes
        s, s + 1, ...; None stands for a random s.
        """
        given["seed"] = seed = random.randrange(2**31) if seed is None else seed
        lengths = {name: len(value) for name, value in given.items() if isinstance(value, (list, tuple))}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise ValueError(f"{counts}: give lists of equal length, or a single value for all pictures")
        n = max(lengths.values(), default=1)
        *lists, seeds = (list(value) if name in lengths else [value] * n for name, value in given.items())
        self.last_seed = seed
        return not lengths, [*lists, seeds if "seed" in lengths else [seed + i for i in range(n)]]


def as_image(picture, name: str = "images") -> Image.Image:
    """Path, PIL image, array (H, W, 3) or tensor (3, H, W) -> RGB PIL image. name: of the argument.

    Arrays and tensors hold uint8, or floats in [0, 1]. Raises ValueError for other types, modes and ranges.
    """
    if isinstance(picture, (str, Path)):
        return open_image(picture)
    if isinstance(picture, Image.Image) and all(picture.size):
        return to_rgb(picture)
    pixels = picture
    if isinstance(picture, Tensor) and picture.ndim == 3:
        picture = picture.float() if picture.is_floating_point() else picture
        pixels = picture.detach().cpu().permute(1, 2, 0).numpy()                        # (H, W, 3)
    if isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
        if pixels.dtype.kind == "f" and 0 <= pixels.min() <= pixels.max() <= 1:
            pixels = (pixels * 255).round().astype(np.uint8)
        if pixels.dtype == np.uint8:
            return Image.fromarray(pixels)
    raise ValueError(f"{name} = {shown(picture)} should be a path, a PIL image, an array (H, W, 3) or a "
                     "tensor (3, H, W), of uint8 or of floats in [0, 1]")


def encode_texts(text_encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """{text: hidden states (T, D)} of the distinct texts.

    Encodes the texts one by one: in a batch, rounding would depend on the other texts.
    """
    device = text_encoder.text_model.final_layer_norm.weight.device
    return {text: text_encoder(tokenizer([text]).to(device))[0] for text in dict.fromkeys(texts)}


def same_size(sizes: list[tuple[int, ...]], batch: int) -> list[list[int]]:
    """Split pictures into batches of one size, at most `batch` pictures each. Returns their indices."""
    by_size = {}
    for i, size in enumerate(sizes):
        by_size.setdefault(size, []).append(i)
    return [group[k : k + batch] for group in by_size.values() for k in range(0, len(group), batch)]


def reporting(denoise: Denoise, bar: tqdm, callback: Callback | None) -> Denoise:
    """Wrap a denoiser: each call advances the progress bar and calls callback(step, estimate of z_0)."""
    steps = itertools.count()

    def reported(x: Tensor, sigma: float) -> Tensor:
        denoised = denoise(x, sigma)
        bar.update()
        if callback:
            callback(next(steps), denoised)
        return denoised
    return reported

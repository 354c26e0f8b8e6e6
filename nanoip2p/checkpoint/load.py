"""Open and write checkpoints of Stable Diffusion 1.x and its editors, in every layout people have them in.

    python -m nanoip2p.checkpoint instruct-pix2pix-00-22000.ckpt           # what is in it
    python -m nanoip2p.checkpoint in.ckpt out-folder/                      # original -> diffusers layout
    python -m nanoip2p.checkpoint out-folder/ single.safetensors --dtype fp16

A diffusers folder:                                     A single file of 2022 (see original.py):
    model_index.json  unet/  vae/  text_encoder/            model.diffusion_model.*  first_stage_model.*
    tokenizer/  scheduler/                                  cond_stage_model.*  model_ema.*
    defaults.json  (ours: settings it was made for)         metadata "nanoip2p"  (ours: all of the JSON files)
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanoip2p.checkpoint.folder import Network, empty, open_network
from nanoip2p.checkpoint.hub import fetch_weights, find_tokenizer
from nanoip2p.checkpoint.single_file import PARTS, PREFIXES, find_networks, find_vae
from nanoip2p.checkpoint.tensors import dtype_names, read_metadata, read_tensors
from nanoip2p.common.files import read_json
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.editor import Editor
from nanoip2p.pipeline import PAPER_DEFAULTS
from nanoip2p.text_to_image import TextToImage
from nanoip2p.tokenizer import Tokenizer, check_fits, load_tokenizer
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE


@dataclass(frozen=True)
class Checkpoint:
    """What a name led to. `networks` has the keys of PARTS, `defaults` those of PAPER_DEFAULTS."""

    source: Path
    found: str  # in words
    networks: dict[str, Network]
    tokenizer: str | None  # as the user named it
    schedule: dict  # the content of scheduler_config.json
    defaults: dict

    def open_tokenizer(self) -> tuple[Path, Tokenizer]:
        """The tokenizer and its folder, fetched if need be. ValueError says what to fetch or to mend."""
        folder = self.source / "tokenizer"
        if self.tokenizer is not None or not self.source.is_dir():
            folder = find_tokenizer(self.source, self.tokenizer)
        tokenizer = load_tokenizer(folder)
        check_fits(tokenizer, self.networks["text_encoder"].model.config, folder)
        return folder, tokenizer


def open_checkpoint(name: str | Path, vae: str | Path | None = None, tokenizer: str | None = None,
                    raw_weights: bool = False) -> Checkpoint:
    """Find out what `name` is: a diffusers folder, a single file (.safetensors, .ckpt), a name on the Hub.

    vae: a file or folder whose autoencoder replaces the checkpoint's own. tokenizer: its folder or name on
    the Hub. raw_weights: not the averaged (EMA) weights of a file that holds both. Raises ValueError, in one
    line, for anything that is not a Stable Diffusion 1.x checkpoint, saying what it is instead.
    """
    source = Path(name) if Path(name).exists() else fetch_weights(str(name))
    other = None if vae is None else open_vae(Path(vae))
    found, networks, schedule, defaults = (
        _open_folder if source.is_dir() else _open_single)(source, raw_weights, other)
    unet, autoencoder, text = (networks[part].model.config for part in PARTS)
    latent = autoencoder.latent_channels
    if unet.cross_attention_dim != text.hidden_size:
        raise ValueError(f"{source}: the UNet reads text states of width {unet.cross_attention_dim}, "
                         f"the text encoder writes {text.hidden_size}")
    if unet.in_channels not in (latent, 2 * latent) or unet.out_channels != latent:
        raise ValueError(f"{source}: the UNet takes {unet.in_channels}, makes {unet.out_channels} channels; "
                         f"an editor takes {2 * latent} and its base {latent} (an inpainting model 9)")
    try:
        NoiseSchedule.from_config(schedule).alphas_cumprod()
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{source}: its noise schedule cannot be used ({error})") from None
    found = found if vae is None else f"{found}, autoencoder of {vae}"
    return Checkpoint(source, found, networks, tokenizer, schedule, defaults)


def _open_folder(folder: Path, raw_weights: bool, vae: Network | None) -> tuple:
    """What it is in words, the networks, schedule and defaults."""
    if raw_weights:
        raise ValueError(f"{folder} is a folder, which holds one set of weights; leave out --raw-weights")
    networks = {part: vae if vae and part == "vae" else open_network(cls, folder / part)
                for part, cls in PARTS.items()}
    kinds = dtype_names(tensor for network in networks.values() for tensor in network.read().values())
    path, channels = folder / "defaults.json", networks["unet"].model.config.in_channels
    return (f"a diffusers folder, {channels} input channels, {kinds}", networks,
            read_json(folder / "scheduler" / "scheduler_config.json"),
            with_defaults(read_json(path, missing={}), path))


def _open_single(path: Path, raw_weights: bool, vae: Network | None) -> tuple:
    """As _open_folder. `vae` is in place of the file's own, if it has one."""
    def read() -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in read_tensors(path).items()
                if not (vae and name.removeprefix("state_dict.").startswith(PREFIXES[VAE]))}

    ours = _own_metadata(path)
    found, networks = find_networks(
        read, path, raw_weights, ours | ({"vae": vae.model.config.to_json()} if vae else {}))
    networks |= {"vae": vae} if vae else {}
    return found, networks, ours.get("schedule", NoiseSchedule().to_json()), ours["defaults"]


def _own_metadata(path: Path) -> dict:
    """The JSON that `convert` leaves in a single file; "defaults" is there in any case."""
    try:
        ours = dict(json.loads(read_metadata(path).get("nanoip2p", "{}")))
        for part in PARTS:
            if not isinstance(ours.get(part, {}), dict):
                raise ValueError(f"{part} = {ours[part]!r} should be an object")
        return ours | {"defaults": with_defaults(dict(ours.get("defaults", {})), "defaults")}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is broken ({error})") from None


def open_vae(path: Path) -> Network:
    """An autoencoder of its own: its folder, a whole checkpoint's folder, or a single file."""
    if path.is_dir():
        return open_network(VAE, path / "vae" if (path / "vae").is_dir() else path)
    return find_vae(lambda: read_tensors(path), path, _own_metadata(path).get("vae"))


def widen(checkpoint: Checkpoint) -> Checkpoint:
    """A text-to-picture checkpoint as the editor that training starts from (section 3.2 of the paper).

    The first convolution gets as many more input channels, all zero, so that the picture changes nothing
    before training; an editor is returned as it is.
    """
    unet = checkpoint.networks["unet"]
    latent = checkpoint.networks["vae"].model.config.latent_channels
    if unet.model.config.in_channels != latent:
        return checkpoint

    def read() -> dict[str, torch.Tensor]:
        return {name: torch.cat([tensor, torch.zeros_like(tensor)], dim=1)      # (C, 4, 3, 3) -> (C, 8, 3, 3)
                if name == "conv_in.weight" and tensor.ndim == 4 else tensor
                for name, tensor in unet.read().items()}

    model = empty(UNet, unet.model.config.to_json() | {"in_channels": 2 * latent}, unet.path)
    return replace(checkpoint, networks=checkpoint.networks | {"unet": Network(model, read, unet.path)})


def load_model(checkpoint: str | Path | Checkpoint, dtype: torch.dtype = torch.float32,
               edits: bool = True) -> Editor | TextToImage:
    """Load an editor, or with edits=False a text-to-picture model, in eval mode on the CPU.

    ValueError, in one line, for what is missing, broken or mismatched, or the other of the two.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    source, networks = checkpoint.source, checkpoint.networks
    channels, latent = networks["unet"].model.config.in_channels, networks["vae"].model.config.latent_channels
    if edits and channels == latent:
        raise ValueError(f"{source}: the UNet takes {channels} channels, an editor {2 * latent}; this is a "
                         "text-to-picture model, the base for train.py")
    if not edits and channels != latent:
        raise ValueError(f"{source}: the UNet takes {channels} channels, a text-to-picture model {latent}; "
                         "this is an editor, for sample.py")
    folder, tokenizer = checkpoint.open_tokenizer()
    schedule = NoiseSchedule.from_config(checkpoint.schedule)
    loaded = (networks[part].load(dtype) for part in PARTS)
    return (Editor if edits else TextToImage)(*loaded, tokenizer, schedule, checkpoint.defaults, folder)


def with_defaults(chosen: dict, path: Path, defaults: dict = PAPER_DEFAULTS) -> dict:
    """`defaults`, overridden by what a checkpoint says. ValueError, naming `path`, for a wrong entry."""
    for key, value in chosen.items():
        if key not in defaults:
            raise ValueError(f"{path}: unknown setting {key}; known are {', '.join(defaults)}")
        wanted = type(defaults[key])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{path}: {key} = {value!r} should be a {wanted.__name__}")
    return defaults | chosen


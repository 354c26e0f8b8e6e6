"""Open a checkpoint of Stable Diffusion 1.x or InstructPix2Pix, in every common layout.

A diffusers folder:                                     An original single file (see single_file.py):
    model_index.json  unet/  vae/  text_encoder/            model.diffusion_model.*  first_stage_model.*
    tokenizer/  scheduler/                                  cond_stage_model.*  model_ema.*
    defaults.json  (ours: default settings)                 metadata "nanoip2p"  (ours: all JSON files)
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from nanoip2p.checkpoint.folder import StoredNetwork, build_without_memory, open_network
from nanoip2p.checkpoint.hub import fetch_weights, find_tokenizer, weight_files
from nanoip2p.checkpoint.marks import marked_schedule
from nanoip2p.checkpoint.single_file import PARTS, find_networks, find_vae
from nanoip2p.checkpoint.tensors import dtype_names, json_metadata, read_metadata, read_tensors
from nanoip2p.common.files import read_json
from nanoip2p.common.schema import checked, shown
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.editor import Editor
from nanoip2p.pipeline import PAPER_DEFAULTS
from nanoip2p.text_to_image import TextToImage
from nanoip2p.tokenizer import Tokenizer, check_fits, load_tokenizer
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

# Ranges of settings in defaults.json, far wider than any use; flags have no such limits
LIMITS = {"resolution": (1, 4096), "steps": (1, 10_000),
          "cfg_text": (-1000, 1000), "cfg_image": (-1000, 1000)}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Its weights are still on disk."""

    source: Path
    description: str  # one line: layout, kind, channels, dtypes
    networks: dict[str, StoredNetwork]  # the keys of PARTS
    tokenizer: str | None  # a folder or a name on the Hub, if the user gave one
    schedule: dict  # the content of scheduler_config.json
    defaults: dict  # the keys of PAPER_DEFAULTS
    merged_from: str = ""  # the formula of `merge`, for the metadata

    def open_tokenizer(self) -> tuple[Path, Tokenizer]:
        """Return (folder, tokenizer). Downloads missing files. ValueError says how to supply them."""
        folder = self.source / "tokenizer"
        if self.tokenizer is not None or not self.source.is_dir():
            folder = find_tokenizer(self.source, self.tokenizer)
        tokenizer = load_tokenizer(folder)
        check_fits(tokenizer, self.networks["text_encoder"].model.config, folder)
        return folder, tokenizer


def open_checkpoint(name: str | Path, vae: str | Path | None = None, tokenizer: str | None = None,
                    raw_weights: bool | None = None) -> Checkpoint:
    """Open a diffusers folder, a single file (.safetensors, .ckpt, .gguf), or a name on the Hub.

    vae: a file or folder with another autoencoder. tokenizer: a tokenizer's folder or name on the Hub.
    raw_weights: whether to use the raw weights of a checkpoint that also has averaged (EMA) ones; None: only
    if the EMA cannot be their average, see single_file.is_average. Raises ValueError if `name` is no Stable
    Diffusion 1.x checkpoint; the message says what the file holds.
    """
    source = Path(name) if Path(name).exists() else fetch_weights(str(name), raw_weights is True)
    own_vae = None if vae is None else _open_vae(Path(vae))
    open_layout = _open_folder if source.is_dir() else _open_single_file
    description, networks, schedule, defaults = open_layout(source, raw_weights, own_vae)
    unet, autoencoder, text = (networks[part].model.config for part in PARTS)
    latent = autoencoder.latent_channels
    if unet.cross_attention_dim != text.hidden_size:
        raise ValueError(f"{source}: the UNet expects hidden states of width {unet.cross_attention_dim}, "
                         f"the text encoder returns {text.hidden_size}")
    if unet.in_channels not in (latent, 2 * latent) or unet.out_channels != latent:
        raise ValueError(f"{source}: the UNet has {unet.in_channels} input and {unet.out_channels} output "
                         f"channels, instead of {latent} (editor: {2 * latent}) and {latent}")
    if not autoencoder.in_channels == autoencoder.out_channels == 3:
        raise ValueError(f"{source}: the autoencoder's pictures have {autoencoder.in_channels} and "
                         f"{autoencoder.out_channels} colours, not 3")
    try:
        noise = NoiseSchedule.from_config(schedule)
        noise.alphas_cumprod()
    except ValueError as error:
        raise ValueError(f"{source}: its noise schedule cannot be used ({error})") from None
    description += ", v-prediction" * (noise.prediction_type == "v_prediction")
    description += ", zero terminal SNR" * noise.rescale_betas_zero_snr
    solver, own = schedule.get("_class_name"), defaults["sampler"] == "lcm" and "LCMScheduler"
    if solver not in (None, "EulerAncestralDiscreteScheduler", own):
        description += f", sampler {defaults['sampler']} in place of {shown(solver)}"
    description += ", latents not clipped (clip_sample)" * (schedule.get("clip_sample") is True)
    description = description if vae is None else f"{description}, autoencoder of {vae}"
    return Checkpoint(source, description, networks, tokenizer, schedule, defaults)


def _open_folder(folder: Path, raw_weights: bool | None, vae: StoredNetwork | None) -> tuple:
    """Open a diffusers folder. Returns its description, networks, schedule and defaults."""
    names, raw = [path.name for path in (folder / "unet").glob("*")], raw_weights is True
    usual, non_ema, averaged = weight_files(names), weight_files(names, raw=True), folder / "unet_ema"
    if raw and usual == non_ema and not averaged.is_dir():
        raise ValueError(f"{folder} holds only one set of weights; leave out --raw-weights")
    folders = {part: folder / part for part in PARTS}
    which = ", raw weights" if raw or non_ema and not usual else ""
    if averaged.is_dir() and not raw:
        folders["unet"], which = averaged, ", averaged weights of unet_ema/"
    networks = {part: vae if vae and part == "vae" else open_network(cls, folders[part], raw)
                for part, cls in PARTS.items()}
    dtypes = dtype_names(tensor for network in networks.values() for tensor in network.read().values())
    channels, path = networks["unet"].model.config.in_channels, folder / "defaults.json"
    return (f"a diffusers folder, {channels} input channels{which}, {dtypes}", networks,
            read_json(folder / "scheduler" / "scheduler_config.json"),
            with_defaults(read_json(path, missing={}), path))


def _open_single_file(path: Path, raw_weights: bool | None, vae: StoredNetwork | None) -> tuple:
    """Like _open_folder, for a single file. With `vae`, the file needs no autoencoder."""
    metadata = _own_metadata(path)
    description, networks = find_networks(partial(read_tensors, path), path, raw_weights, metadata, not vae)
    networks |= {"vae": vae} if vae else {}
    if "schedule" not in metadata:
        metadata["schedule"] = marked_schedule(path, read_tensors(path, None), read_metadata(path)).to_json()
    return description, networks, metadata["schedule"], metadata["defaults"]


def _own_metadata(path: Path) -> dict:
    """The metadata that `convert` wrote to a single file; for other files only {"defaults": ...}."""
    metadata = json_metadata(path, "nanoip2p")
    for key in {*PARTS, "schedule", "defaults"} & metadata.keys():
        checked(metadata[key], dict, f"{path}: its metadata is broken: {key}")
    return metadata | {"defaults": with_defaults(metadata.get("defaults", {}), f"{path}, its metadata")}


def _open_vae(path: Path) -> StoredNetwork:
    """Open the autoencoder in its own folder, in a checkpoint folder, or in a single file."""
    if path.is_dir():
        return open_network(VAE, path / "vae" if (path / "vae").is_dir() else path)
    return find_vae(partial(read_tensors, path), path, _own_metadata(path).get("vae"))


def widen(checkpoint: Checkpoint) -> Checkpoint:
    """Turn a text-to-image checkpoint into the editor that training starts from (section 3.2 of the paper).

    Adds input channels for the input image's latents to the first convolution. The new weights are zero, so
    the input image has no effect before training. Returns the checkpoint of an editor unchanged.
    """
    unet = checkpoint.networks["unet"]
    latent = checkpoint.networks["vae"].model.config.latent_channels
    if unet.model.config.in_channels != latent:
        return checkpoint

    def read() -> dict[str, torch.Tensor]:
        return {name: torch.cat([tensor, torch.zeros_like(tensor)], dim=1)     # (C, 4, 3, 3) -> (C, 8, 3, 3)
                if name == "conv_in.weight" and tensor.ndim == 4 else tensor
                for name, tensor in unet.read().items()}

    config = unet.model.config.to_json() | {"in_channels": 2 * latent}
    wide = StoredNetwork(build_without_memory(UNet, config, unet.path), read, unet.path)
    return replace(checkpoint, networks=checkpoint.networks | {"unet": wide})


def load_model(checkpoint: str | Path | Checkpoint, dtype: torch.dtype = torch.float32,
               edits: bool = True) -> Editor | TextToImage:
    """Load an editor (edits=True) or a text-to-image model (edits=False), in eval mode on the CPU.

    Raises ValueError for a missing, broken or mismatched file, and for a model of the other kind.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    source, networks = checkpoint.source, checkpoint.networks
    channels, latent = networks["unet"].model.config.in_channels, networks["vae"].model.config.latent_channels
    if edits != (channels > latent):
        wanted = f"an editor {2 * latent}" if edits else f"a text-to-image model {latent}"
        found = "a text-to-image model, the base for train.py" if edits else "an editor, for sample.py"
        raise ValueError(f"{source}: the UNet takes {channels} channels, {wanted}; this is {found}")
    folder, tokenizer = checkpoint.open_tokenizer()
    schedule = NoiseSchedule.from_config(checkpoint.schedule)
    loaded = (networks[part].load(dtype) for part in PARTS)
    return (Editor if edits else TextToImage)(*loaded, tokenizer, schedule, checkpoint.defaults, folder)


def with_defaults(chosen: dict, path: Path | str) -> dict:
    """PAPER_DEFAULTS, overridden by a checkpoint's settings. ValueError names `path` and the setting."""
    if unknown := chosen.keys() - PAPER_DEFAULTS.keys():
        raise ValueError(f"{path}: unknown setting {min(unknown)}; known are {', '.join(PAPER_DEFAULTS)}")
    return PAPER_DEFAULTS | {
        key: checked(value, type(PAPER_DEFAULTS[key]), f"{path}: {key}", *LIMITS.get(key, ()))
        for key, value in chosen.items()}

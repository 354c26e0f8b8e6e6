"""Open and write checkpoints of Stable Diffusion 1.x and its editors, in every layout people have them in.

    python -m nanoip2p.checkpoint instruct-pix2pix-00-22000.ckpt           # what is in it
    python -m nanoip2p.checkpoint in.ckpt out-folder/                      # original -> diffusers layout
    python -m nanoip2p.checkpoint out-folder/ single.safetensors --dtype fp16

A diffusers folder:                                     A single file of 2022 (see original.py):
    model_index.json  unet/  vae/  text_encoder/            model.diffusion_model.*  first_stage_model.*
    tokenizer/  scheduler/                                  cond_stage_model.*  model_ema.*
    defaults.json  (ours: settings it was made for)         metadata "nanoip2p"  (ours: all of the JSON files)
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanoip2p import cli
from nanoip2p.clip import TextEncoder
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.files import read_json, replacing, write_json
from nanoip2p.hub import TOKENIZER_FILES, fetch_weights, find_tokenizer
from nanoip2p.network import Network, empty, open_network, save_network
from nanoip2p.original import PARTS, PREFIXES, find_networks, find_vae, to_original
from nanoip2p.tensors import DTYPES, dtype_names, read_metadata, read_tensors, write_tensors
from nanoip2p.tokenizer import Tokenizer, check_fits, load_tokenizer
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE

# Appendix of the paper and edit_cli.py of its code; a weights folder overrides them in defaults.json
PAPER_DEFAULTS = dict(resolution=512, steps=100, cfg_text=7.5, cfg_image=1.5, sampler="euler_ancestral")


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


@dataclass(frozen=True)
class Parts:
    """Everything a model is made of. `defaults` has the keys of PAPER_DEFAULTS, all present."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    defaults: dict
    tokenizer_folder: Path


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


def load_parts(checkpoint: str | Path | Checkpoint, dtype: torch.dtype = torch.float32,
               edits: bool = True) -> Parts:
    """Load the networks of an editor, or with edits=False those of a text-to-picture model.

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
    return Parts(*loaded, tokenizer, schedule, checkpoint.defaults, folder)


def with_defaults(chosen: dict, path: Path, defaults: dict = PAPER_DEFAULTS) -> dict:
    """`defaults`, overridden by what a checkpoint says. ValueError, naming `path`, for a wrong entry."""
    for key, value in chosen.items():
        if key not in defaults:
            raise ValueError(f"{path}: unknown setting {key}; known are {', '.join(defaults)}")
        wanted = type(defaults[key])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{path}: {key} = {value!r} should be a {wanted.__name__}")
    return defaults | chosen


def save_parts(
    folder: str | Path, unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer_folder: str | Path,
    scheduler_config: dict, defaults: dict, dtype: torch.dtype | None = torch.float32,
) -> None:
    """Write a weights folder that diffusers' pipeline for such a UNet loads as well.

    tokenizer_folder: copied from there. scheduler_config: the content of scheduler_config.json, its
    `_class_name` included. defaults: as PAPER_DEFAULTS. dtype: of the files; float16 halves them, None leaves
    that of each weight.
    """
    folder = Path(folder)
    for part, model in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        save_network(model, folder / part, dtype)
    write_json(scheduler_config, folder / "scheduler" / "scheduler_config.json")
    for name in TOKENIZER_FILES:
        source = Path(tokenizer_folder) / name
        if source.exists() and source.resolve() != (folder / "tokenizer" / name).resolve():
            with replacing(folder / "tokenizer" / name) as temporary:
                shutil.copyfile(source, temporary)
    write_json(defaults, folder / "defaults.json")
    edits = unet.config.in_channels > unet.config.out_channels
    write_json({
        "_class_name": "StableDiffusionInstructPix2PixPipeline" if edits else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler_config.get("_class_name", "EulerAncestralDiscreteScheduler")],
        "requires_safety_checker": False,
        "safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None],
    }, folder / "model_index.json")


def convert(checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None = None,
            ema: bool = False) -> None:
    """Write a checkpoint: a single file if `target` ends in .safetensors, else a diffusers folder.

    dtype: None keeps that of each tensor. ema: store the UNet a second time, as averaged weights, which
    programs of 2022 read. All is checked before anything is written, and tensors go from file to file one at
    a time. ValueError for a bad checkpoint or target.
    """
    single, target = target.suffix == ".safetensors", target.resolve()
    if target.suffix in (".ckpt", ".pt", ".bin") or target.exists() and (
            single and not target.is_file() or not single and (not target.is_dir() or any(target.iterdir()))):
        raise ValueError(f"{target} is there, or no folder or .safetensors file; name a new one")
    if target == checkpoint.source.resolve():
        raise ValueError(f"{target} is what is read; name another target")
    if ema and not single:
        raise ValueError("--ema-copy is for single files; a folder holds one set of weights")
    models = {part: network.load(None) for part, network in checkpoint.networks.items()}
    if single:
        named = {name: tensor for model in models.values() for name, tensor in to_original(model).items()}
        named |= to_original(models["unet"], ema=True) if ema else {}
        ours = {part: model.config.to_json() for part, model in models.items()}
        ours |= {"schedule": checkpoint.schedule, "defaults": checkpoint.defaults}
        return write_tensors(named, target, dtype, {"nanoip2p": json.dumps(ours)})
    tokenizer_folder, _ = checkpoint.open_tokenizer()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as unfinished:
        save_parts(f"{unfinished}/new", *models.values(), tokenizer_folder, checkpoint.schedule,
                   checkpoint.defaults, dtype)
        Path(unfinished, "new").replace(target)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see cli.run."""
    parser = cli.make_parser(prog="python -m nanoip2p.checkpoint", description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder, a single file, or a name on the Hub")
    parser.add_argument("target", type=Path, nargs="?",
                        help="a new folder, or a .safetensors file; without it, only look")
    parser.add_argument("--dtype", choices=DTYPES, help="of the numbers written (as they are)")
    parser.add_argument("--ema-copy", action="store_true", help="also under the names of averaged weights")
    add_flags(parser)

    def work() -> None:
        args = parser.parse_args(argv)
        checkpoint = open_checkpoint(args.source, args.vae, args.tokenizer, args.raw_weights)
        print(f"{args.source}: {checkpoint.found}")
        for part, network in checkpoint.networks.items():
            model = network.model if args.target else network.load(None)  # to look is to check
            print(f"  {part:<13}{sum(p.numel() for p in model.parameters()) / 1e6:>8.1f} M parameters")
        if args.target:
            convert(checkpoint, args.target, DTYPES.get(args.dtype), args.ema_copy)
            print(f"wrote {args.target}")
            if args.target.suffix == ".safetensors":
                print("a single file has no tokenizer; keep the old one, for --tokenizer")

    return cli.run(work, "interrupted; nothing was written", "close other programs")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of open_checkpoint, for every script that opens one."""
    parser.add_argument("--vae", help="autoencoder to use instead of the checkpoint's: a file or folder")
    parser.add_argument("--tokenizer", help="its folder or name on the Hub, where a single file stands alone")
    parser.add_argument("--raw-weights", action="store_true", default=None,
                        help="of a file with averaged (EMA) weights, take the others")


if __name__ == "__main__":
    sys.exit(main())

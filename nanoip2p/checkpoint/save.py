"""Write a model as a diffusers folder, or as a single file in the original layout."""

import json
import shutil
from pathlib import Path

import torch

from nanoip2p.checkpoint.folder import save_network
from nanoip2p.checkpoint.hub import TOKENIZER_FILES
from nanoip2p.checkpoint.load import Checkpoint
from nanoip2p.checkpoint.single_file import to_original
from nanoip2p.checkpoint.tensors import write_tensors
from nanoip2p.clip import TextEncoder
from nanoip2p.common.files import remove_leftovers, replacing, write_json
from nanoip2p.diffusion import NoiseSchedule
from nanoip2p.pipeline import PAPER_DEFAULTS
from nanoip2p.unet import UNet
from nanoip2p.vae import VAE


def save_parts(folder: str | Path, unet: UNet, vae: VAE, text_encoder: TextEncoder,
               tokenizer_folder: str | Path, scheduler_config: dict, defaults: dict,
               dtype: torch.dtype | None = torch.float32, merged_from: str = "") -> None:
    """Write a weights folder that diffusers can load too.

    tokenizer_folder: folder of the files to copy. scheduler_config: the content of scheduler_config.json.
    defaults: settings as in PAPER_DEFAULTS. dtype: dtype of the files; None keeps each weight's dtype.
    merged_from: see load.Checkpoint.
    """
    folder, resolution = Path(folder), (PAPER_DEFAULTS | defaults)["resolution"]
    if defaults.get("sampler") == "lcm":  # so that diffusers uses this sampler too
        scheduler_config = scheduler_config | {"_class_name": "LCMScheduler"}
    save_network(unet, folder / "unet", dtype, sample_size=resolution // vae.downsampling)
    save_network(vae, folder / "vae", dtype, sample_size=resolution)
    save_network(text_encoder, folder / "text_encoder", dtype)
    write_json(scheduler_config, folder / "scheduler" / "scheduler_config.json")
    for name in TOKENIZER_FILES:
        source, target = Path(tokenizer_folder) / name, folder / "tokenizer" / name
        if source.exists():
            with replacing(target) as temporary:
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
        **({"_merged_from": merged_from} if merged_from else {}),  # diffusers ignores names that begin with _
    }, folder / "model_index.json")


def convert(checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None = None,
            ema: bool = False) -> None:
    """Write a checkpoint to a single file if `target` ends in .safetensors, else to a diffusers folder.

    dtype: None keeps each tensor's dtype. ema: also write the UNet under the names of the EMA weights, which
    older programs read. Checks the checkpoint first. A failed write leaves no partial `target`.
    Deletes temporary files of a killed conversion to the same `target`. A merge never overwrites a file.
    Holds one tensor in memory at a time. Raises ValueError for a bad checkpoint or target.
    """
    single, target = target.suffix.lower() == ".safetensors", target.resolve()
    occupied = target.exists() and ((checkpoint.merged_from or not target.is_file()) if single else
                                    (not target.is_dir() or any(target.iterdir())))
    if occupied or target.suffix.lower() in (".ckpt", ".pt", ".bin"):
        raise ValueError(f"{target} exists, or is neither a folder nor a .safetensors file; name a new one")
    if target == checkpoint.source.resolve():
        raise ValueError(f"{target} is the checkpoint itself; name another target")
    if ema and not single:
        raise ValueError("--ema-copy is for single files; a folder holds one set of weights")
    remove_leftovers(target)
    models = {part: network.load(None) for part, network in checkpoint.networks.items()}
    if single:
        tensors = {name: tensor for model in models.values() for name, tensor in to_original(model).items()}
        tensors |= to_original(models["unet"], ema=True) if ema else {}
        metadata = {part: model.config.to_json() for part, model in models.items()}
        metadata |= {"schedule": checkpoint.schedule, "defaults": checkpoint.defaults}
        # For other programs: keys of the Model Spec, and the empty tensors that marks.py lists
        marks = {"modelspec.merged_from": checkpoint.merged_from} if checkpoint.merged_from else {}
        noise = NoiseSchedule.from_config(checkpoint.schedule)
        if noise.prediction_type == "v_prediction":
            marks["modelspec.prediction_type"] = "v"
            tensors |= dict.fromkeys(("v_pred", "ztsnr")[: 1 + noise.rescale_betas_zero_snr], torch.empty(0))
        return write_tensors(tensors, target, dtype, {"nanoip2p": json.dumps(metadata)} | marks)
    tokenizer_folder, _ = checkpoint.open_tokenizer()
    if target.exists():
        target.rmdir()  # empty
    with replacing(target) as unfinished:
        save_parts(unfinished, *models.values(), tokenizer_folder, checkpoint.schedule, checkpoint.defaults,
                   dtype, checkpoint.merged_from)

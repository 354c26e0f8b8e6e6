"""The original single-file layout: the weight names of the Stable Diffusion and InstructPix2Pix code.

The original numbers the UNet's blocks through all levels (`input_blocks.0` to `.11`). diffusers and nanoip2p
number the levels, and the blocks of each level. The layers of a block have other names too. `original_names`
maps our name of each weight to its original name, for writing. Reading uses the inverse.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoip2p.checkpoint.folder import StoredNetwork, build_without_memory
from nanoip2p.checkpoint.tensors import dtype_names, refuse_names
from nanoip2p.clip import CLIPTextConfig, TextEncoder
from nanoip2p.common.schema import shown
from nanoip2p.unet import UNet, UNetConfig
from nanoip2p.vae import VAE, VAEConfig

PARTS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}
PREFIXES = {UNet: "model.diffusion_model.", VAE: "first_stage_model.",
            TextEncoder: "cond_stage_model.transformer."}
CONV_IN = PREFIXES[UNet] + "input_blocks.0.0.weight"
Read = Callable[..., dict[str, Tensor]]  # reads the tensors of a file, see tensors.read_tensors
SD15 = {"unet": UNetConfig().to_json(), "vae": VAEConfig().to_json(),
        "text_encoder": CLIPTextConfig().to_json()}  # of original files; an editor's UNet has in_channels 8
# Our name -> original name. UNET_LAYERS: layers of the UNet's residual blocks. VAE_NAMES: parts of a name
UNET_LAYERS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
              "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_NAMES = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
             "mid_block.attentions.0": "mid.attn_1", "_blocks": "", "resnets": "block",
             "samplers.0": "sample", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut",
             "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Not weights of the networks: marks (marks.py), the noise schedule, counters, positions, CLIP's projection
IGNORED = re.compile(
    r"v_pred|ztsnr|betas|(log_one_minus_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_|sqrt_)?alphas_cumprod(_prev)?"
    r"|posterior_\w+|logvar|lvlb_weights|scale_factor|model_ema\.(decay|num_updates)"
    r"|first_stage_model\.(loss|model_ema)\..+"
    r"|cond_stage_model\.(logit_scale|.+\.position_ids|.+projection.*)")
# A kind of file that we do not read -> a pattern for "name (shape)" of its tensors. ADDITIONS: files to use
# with a model; a complete checkpoint may hold some of their tensors. SHAPES: names of SD 1.x, other shapes
ADDITIONS = {
    "a LoRA (add it to a model with --lora)": r"lora",
    "a ControlNet": r"^(control_model\.|controlnet_|input_hint_block\.)",
    "a textual inversion (name it with sample.py --embedding)": r"^(emb_params |string_to_param|<)",
}
SHAPES = {
    "an inpainting model": r"^model(\.|_ema\.)diffusion_model\.?input_blocks\.?0\.?0\.?weight \(\d+, 9,",
    "a Stable Diffusion 2.x checkpoint": r"^cond_stage_model\.model\.|attn2\.?to_k\.?weight \(\d+, 1024\)",
}
FAMILIES = SHAPES | {
    "an SDXL checkpoint": r"^(conditioner\.|model\.diffusion_model\.label_emb\.)",
    "a Stable Diffusion 3 checkpoint": r"^(model\.diffusion_model\.)?joint_blocks\.",
    "a Flux checkpoint": r"^(model\.diffusion_model\.)?double_blocks\.",
}
WIDTH = r"(attn2|self_attn)\S{0,20}[qkv](_proj)?\S{0,20}(down|lora_A)\S{0,20} \(\d+, "  # text hidden size
LORAS = {  # relatives of LoRAs, and LoRAs of other models
    "a DoRA": r"dora_scale|lora_magnitude_vector",
    "a LoHa, LoKr or IA3": r"\.(hada_w|lokr_w|ia3_|on_input )",
    "a ControlNet-LoRA": r"^lora_controlnet|lllite",
    "a file of full differences (.diff)": r"\.diff(_b)? ",
    "a LoRA of SDXL": rf"^lora_te[12]_|^text_encoder_2\.|{WIDTH}2048",
    "a LoRA of Stable Diffusion 2.x": rf"{WIDTH}1024",
    "a LoRA of Flux or Stable Diffusion 3": r"^(lora_)?transformer[._]|(double|single|joint)_blocks",
}
FRAGMENTS = {  # files without a UNet in the original's names
    "one network of a diffusers folder (name the folder)": r"^(down_blocks|text_model|decoder\.conv_norm)",
    "an autoencoder alone (name it with --vae)": r"^(first_stage_model\.)?(encoder|decoder)\.",
    "a UNet alone (a whole checkpoint has an autoencoder and a text encoder, too)": r"^input_blocks\.",
}


@cache
def unet_places(config: UNetConfig) -> dict[str, str]:
    """Map our name of each UNet block to its original name, which numbers the blocks of all levels."""
    places = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}
    numbers = config.layers_per_block + 1  # per level. Down: blocks and a downsampler. Up: one block more
    for i, up in enumerate(config.up_block_types):
        for j in range(numbers):
            for k, layers in enumerate(("resnets", "attentions")):
                places[f"down_blocks.{i}.{layers}.{j}"] = f"input_blocks.{1 + i * numbers + j}.{k}"
                places[f"up_blocks.{i}.{layers}.{j}"] = f"output_blocks.{i * numbers + j}.{k}"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * numbers}.0.op"
        slot = 2 if up == "CrossAttnUpBlock2D" else 1  # after the other layers of the level's last block
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{(i + 1) * numbers - 1}.{slot}.conv"
    return places


def unet_name(name: str, config: UNetConfig) -> str:
    """The original name of a UNet weight: block name, layer name, and "weight" or "bias"."""
    places = unet_places(config)
    block = next(block for block in places if name.startswith(block + "."))
    layer, _, leaf = name.removeprefix(block + ".").rpartition(".")
    return ".".join(filter(None, [places[block], UNET_LAYERS.get(layer, layer), leaf]))


def vae_name(name: str, config: VAEConfig) -> str:
    """The original name of a VAE weight. The original numbers the decoder's levels in reverse."""
    last = len(config.block_out_channels) - 1
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{last - int(match[1])}", name)
    for ours, original in VAE_NAMES.items():
        name = name.replace(ours, original)
    return name


def original_names(model: nn.Module) -> dict[str, str]:
    """Map our name of each weight to its original name. The text encoder's names only get a prefix."""
    rename = {UNet: unet_name, VAE: vae_name}.get(type(model), lambda name, config: name)
    return {name: PREFIXES[type(model)] + rename(name, model.config) for name in model.state_dict()}


def ema_name(name: str) -> str:
    """model.diffusion_model.out.0.bias -> model_ema.diffusion_modelout0bias"""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def is_projection(name: str) -> bool:
    """Whether an original name belongs to a 1x1 convolution in the VAE's attention. We use a linear layer."""
    return ".mid.attn_1." in name and name.endswith("weight") and not name.endswith("norm.weight")


def to_original(model: nn.Module, ema: bool = False) -> dict[str, Tensor]:
    """A network's weights, not copied, under their original names (ema: the names of its EMA weights)."""
    names = original_names(model)
    return {ema_name(names[name]) if ema else names[name]:
            tensor[:, :, None, None] if is_projection(names[name]) else tensor
            for name, tensor in model.state_dict().items()}


def from_original(model: nn.Module, tensors: dict[str, Tensor], ema: bool = False) -> dict[str, Tensor]:
    """The inverse of to_original. Returns only the network's tensors, under our names."""
    names = {ema_name(name) if ema else name: ours for ours, name in original_names(model).items()}
    return {names[name]: tensor.flatten(1) if is_projection(name) else tensor
            for name, tensor in tensors.items() if name in names}


def is_average(raw: dict[str, Tensor], averaged: dict[str, Tensor]) -> bool:
    """Whether `averaged` (EMA weights, under our names) can be the average of a training that ended at `raw`.

    Tools that merge checkpoints can leave the EMA of one parent, or zeros, beside merged raw weights. The
    RMS distance must be below the RMS of `raw`, and at most the larger of 0.007 and a quarter of that RMS.
    Adam moves a weight by about the learning rate r per step, in changing directions. An EMA of decay d then
    differs by about r / sqrt(2 (1 - d)): 0.007 for r = 1e-4 and d = 0.9999, as in Stable Diffusion and
    InstructPix2Pix. In runs of train.py, the distance was 0.5 to 0.8 times this value, and at most a twelfth
    of the RMS. The EMA of a closely related model passes. Reads 4096 numbers of each of about 40 matrices.
    """
    names = [name for name in raw if raw[name].ndim > 1 and raw[name].shape == averaged[name].shape
             and not raw[name].is_meta and not averaged[name].is_meta]
    if not names:
        return False
    some = [(tensors[name].flatten()[:4096].float() for tensors in (averaged, raw))
            for name in names[:: max(1, len(names) // 40)]]
    a, b = (torch.cat(numbers) for numbers in zip(*some))
    distance, size = (a - b).square().mean().item(), b.square().mean().item()
    return distance <= max(0.007**2, size / 16) and distance < size


def find_networks(read: Read, path: Path, raw_weights: bool | None = None,
                  configs: dict[str, dict] | None = None,
                  needs_vae: bool = True) -> tuple[str, dict[str, StoredNetwork]]:
    """Open a single file. Returns a description and the three networks (keys of PARTS).

    raw_weights: see load.open_checkpoint. configs: configs that replace Stable Diffusion 1.5's; `convert`
    stores them in its files. needs_vae: whether a file without autoencoder is incomplete. In a complete file,
    unknown tensors beside the networks are ignored, and the description names them. Raises ValueError for a
    file of another family, for other unknown tensors, and for raw_weights=True of an EMA-only file.
    """
    tensors = normalised(read(None), path)
    first = tensors.get(CONV_IN, tensors.get(ema_name(CONV_IN)))
    channels = 8 if first is not None and first.shape[1:2] == (8,) else 4
    configs = SD15 | {"unet": SD15["unet"] | {"in_channels": channels}} | (configs or {})
    models = {part: build_without_memory(cls, configs[part], path) for part, cls in PARTS.items()}
    names = {part: set(original_names(model).values()) for part, model in models.items()}
    names["ema"] = {ema_name(name) for name in names["unet"]}
    has = {part: names[part] <= tensors.keys() for part in names}
    strays = [name for name in tensors if not any(name in known for known in names.values())]
    inside = [name for name in strays if name.startswith((*PREFIXES.values(), "model_ema."))]
    whole = (has["unet"] or has["ema"]) and (has["vae"] or not needs_vae) and has["text_encoder"]
    if not whole or inside:
        begun = any(name.startswith((PREFIXES[UNet], "model_ema.diffusion_model")) for name in tensors)
        refuse_families(tensors, ADDITIONS | FAMILIES | ({} if begun else FRAGMENTS), path)
        if not begun:
            raise ValueError(f"{path} is no Stable Diffusion checkpoint; "
                             f"it holds {', '.join([*tensors][:3])} …")
        refuse_names(path, "has unknown", strays)
    refuse_families(tensors, SHAPES, path)
    if raw_weights and has["ema"] and not has["unet"]:
        raise ValueError(f"{path} has EMA weights only; leave out --raw-weights")
    raw, averaged = (from_original(models["unet"], tensors, ema) for ema in (False, True))
    ema = has["ema"] and not raw_weights and (
        raw_weights is False or not has["unet"] or is_average(raw, averaged))
    why = "" if raw_weights else " (the EMA copy is no average of them; --no-raw-weights uses it)"
    which = ("EMA weights" if ema else f"raw weights{why}" if has["ema"] else
             "raw weights (the EMA copy is incomplete)" if names["ema"] & tensors.keys() else "no EMA copy")
    unet = models["unet"].config
    kind = "an InstructPix2Pix" if unet.in_channels > unet.out_channels else "a Stable Diffusion 1.x"
    more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
    ignored = f", ignoring {', '.join(map(shown, strays[:3]))}{more}" if strays else ""
    description = (f"{kind} checkpoint in the original layout, {unet.in_channels} input channels, {which}, "
                   f"{dtype_names(tensors.values())}{ignored}")

    def read_part(part: str) -> dict[str, Tensor]:
        from_ema = ema and part == "unet"
        prefix = "model_ema." if from_ema else PREFIXES[PARTS[part]]
        return from_original(models[part], normalised(read(prefix), path), from_ema)

    return description, {part: StoredNetwork(model, partial(read_part, part), path)
                         for part, model in models.items()}


def find_vae(read: Read, path: Path, config: dict | None = None) -> StoredNetwork:
    """Open the autoencoder of a whole checkpoint, or of a VAE file with original or diffusers' names.

    config: its config; default: Stable Diffusion 1.5's. ValueError: see find_networks.
    """
    model, prefix = build_without_memory(VAE, config or SD15["vae"], path), PREFIXES[VAE]
    found = normalised(read(None), path)
    complete = set(original_names(model).values()) <= found.keys()
    refuse_families(found, FAMILIES if complete else ADDITIONS | FAMILIES, path)
    names = {prefix + name: name for name in model.state_dict()}  # diffusers' spelling
    names |= {original: name for name, original in original_names(model).items()}

    def read_vae() -> dict[str, Tensor]:
        tensors = normalised(read(prefix if complete else ""), path)
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        alone = {prefix + name: tensor for name, tensor in tensors.items()}
        return {names.get(name, name): tensor.flatten(1) if is_projection(name) else tensor
                for name, tensor in VAE.published_names(normalised(inside or alone, path)).items()}

    return StoredNetwork(model, read_vae, path)


def normalised(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop IGNORED tensors and scalars (no network has a scalar), and normalise the names.

    Some programs add `state_dict.` before names or omit `text_model.`. Raises ValueError if two names of the
    file become the same name.
    """
    short, cleaned = re.compile(rf"^({PREFIXES[TextEncoder]})(embeddings|encoder|final)"), {}
    for spelling, tensor in tensors.items():
        name = short.sub(r"\1text_model.\2", spelling.removeprefix("state_dict."))
        if tensor.ndim and name in cleaned:
            raise ValueError(f"{path}: {name} comes twice, in two spellings")
        if tensor.ndim and not IGNORED.fullmatch(name):
            cleaned[name] = tensor
    return cleaned


def refuse_families(tensors: dict[str, Tensor], families: dict[str, str], path: Path, kind: str = "") -> None:
    """Raise ValueError if a file belongs to one of `families`; the message names the family."""
    content = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    for family, pattern in families.items():
        if re.search(pattern, content, re.MULTILINE):
            raise ValueError(f"{path}: this is {family}; nanoip2p reads {kind}Stable Diffusion 1.x")

"""LoRA files (Hu et al. 2106.09685): merge them into the weights of a model, and write them.

A LoRA of rank r turns the weight W (out, in) of a layer into W + w (alpha / r) up @ down, where `up` is
(out, r), `down` is (r, in), and w is the user's weight. In a convolution, `down` has the size of the kernel.
LyCORIS (LoCon with CP) moves the kernel into a third tensor, `mid` (r, r, k, k). Layouts:

    kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha; lora_te_*.
                The UNet's layers can also have their original names, such as lora_unet_middle_block_1_proj_in
    diffusers   unet.mid_block.attentions.0.proj_in.lora_A.weight, .lora_B.weight; text_encoder.*; alpha is
                in the metadata. Older: .lora.down.weight, .processor.to_q_lora.*, .lora_linear_layer.*
    peft        base_model.model.mid_block.*.lora_A.weight; alpha is in adapter_config.json beside the file
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoip2p.checkpoint import tensors as files
from nanoip2p.checkpoint.single_file import LORAS, PREFIXES, original_names, refuse_families
from nanoip2p.common.cli import split
from nanoip2p.common.files import read_json
from nanoip2p.common.schema import LONGEST, checked, shown
from nanoip2p.pipeline import Model

METADATA = "lora_adapter_metadata"  # diffusers' key of peft's settings, as JSON: {"unet.lora_alpha": 8, ...}
TENSOR = re.compile(  # groups: layer, kind, "alpha"; an unknown name has only the first group
    r"(.*?)(?:[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.[^.]+)?\.weight|\.(alpha))?", re.DOTALL)
PREFIX = re.compile(r"^(base_model_model_|lora_)?(unet_|te_|text_encoder_)?(text_model_)?|_processor")


def file_hash(given: str) -> str:
    """The first 10 digits of the file's SHA-256, as web UIs and Civitai show them."""
    return hashlib.sha256(split(given)[0].read_bytes()).hexdigest()[:10]


def apply_loras(model: Model, given: list[str]) -> list[str]:
    """Merge LoRA files into UNet and text encoder, as diffusers' fuse_lora. Returns a line about each file.

    given: see `split`. Computes in float32, and keeps the dtype and device of the weights. Raises ValueError
    if a layer of a file does not fit the model; then the model is unchanged.
    """
    changes, lines, seen = {}, [], []
    for path, weight in map(split, given):
        layers, line = read_lora(model, path)
        lines.append(f"added {path}{' once more' * (path.resolve() in seen)} at weight {weight:g}: {line}")
        seen.append(path.resolve())
        for place, (scale, factors) in layers.items():
            changes.setdefault(place, []).append((weight * scale, factors))
    for change_them in (False, True):  # the first pass only checks: memory may not hold all results at once
        for (network, name), summands in changes.items():
            layer = network.get_submodule(name)
            merged = layer.weight.detach().float().clone()  # not in place: it may be mapped from a file
            for scale, factors in summands:
                change = _product(**{role: x.to(merged.device, torch.float32) for role, x in factors.items()})
                merged[:, : change.shape[1]] += scale * change.reshape(*change.shape[:2], *merged.shape[2:])
            merged = files.cast(merged, layer.weight.dtype, name)
            files.check_tensors({name: merged}, {name: merged}, Path(" with ".join(given)))
            if change_them:
                layer.weight = nn.Parameter(merged, layer.weight.requires_grad)
    return lines


def _product(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """down (r, in[, k, k]), up (out, r) -> (out, in[, k, k]). With mid (r, r, k, k), down is (r, in)."""
    return torch.tensordot(up, down, 1) if mid is None else torch.einsum("oa,abkl,bi->oikl", up, mid, down)


def _spellings(model: Model) -> dict[str, tuple[nn.Module, str]]:
    """Map each spelling of each layer (underscores for dots, no PREFIX) to (network, our name)."""
    found = {}
    for network in (model.unet, model.text_encoder):
        originals = original_names(network)
        for name, layer in network.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                original = originals[f"{name}.weight"][len(PREFIXES[type(network)]) : -len(".weight")]
                old = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1", name).removesuffix(".0")
                found |= {spelling.removeprefix("text_model.").replace(".", "_"): (network, name)
                          for spelling in (name, original, old)}
    return found


def read_lora(model: Model, path: Path) -> tuple[dict, str]:
    """Return {(network, our name): (alpha / r, arguments of _product)} of a file, and a short description.

    use_rslora: the factor is alpha / sqrt(r). ValueError if a tensor is unknown, unfit or not finite.
    """
    tensors, known, found, strays = files.read_tensors(path), _spellings(model), {}, []
    for spelling, tensor in tensors.items():
        layer, kind, alpha = TENSOR.fullmatch(spelling).groups()
        role = {"A": "down", "B": "up"}.get(kind, kind or alpha)
        place = known.get(PREFIX.sub("", layer.replace(".", "_"))) if role else None
        if place is None:
            strays.append(layer)
        elif role in found.setdefault(place, {}):
            raise ValueError(f"{path}: {place[1]} comes twice, in two spellings")
        else:
            found[place][role] = tensor
    try:
        strays = [*dict.fromkeys(strays)] if tensors else ["no tensor at all"]
        files.refuse_names(path, "has tensors that are no LoRA of a layer of this model:", strays)
        fitted = {place: _fit(*place, parts, path) for place, parts in found.items()}
    except ValueError:
        refuse_families(tensors, LORAS, path, "LoRAs of ")  # a clearer message for a known kind of file
        raise
    layout = {"base": "peft", "lora": "kohya"}.get(next(iter(tensors))[:4], "diffusers")
    own = path.with_name("adapter_config.json")
    settings = read_json(own, {}) if layout == "peft" else files.json_metadata(path, METADATA)
    layers, alphas, notes = {}, [], []
    for (network, name), factors in fitted.items():
        part = "" if layout == "peft" else "unet." if network is model.unet else "text_encoder."
        stored = found[network, name].get("alpha")
        power = 0.5 if settings.get(f"{part}use_rslora") is True else 1
        alpha = _alpha(settings, part, name, path) if stored is None else stored.squeeze().tolist()
        alpha = checked(alpha, float | None, f"{path}: alpha of {name}", 1e-9)
        alphas += [] if alpha is None else [alpha]
        layers[network, name] = 1.0 if alpha is None else alpha / len(factors["down"]) ** power, factors
        if name == "conv_in" and (known := factors["down"].shape[1]) < network.config.in_channels:
            notes.append(f"conv_in: the first {known} of {network.config.in_channels} channels")
    if missing := len(layers) - len(alphas):
        notes.append(f"no alpha for {missing} layers in the file: it is set to the rank, as in diffusers")
    ranks = [len(factors["down"]) for factors in fitted.values()]
    sizes = [f"{word} {' to '.join(f'{number:g}' for number in sorted({min(numbers), max(numbers)}))}"
             for word, numbers in (("rank", ranks), ("alpha", alphas)) if numbers]
    return layers, "; ".join([", ".join([f"{layout} LoRA of {len(layers)} layers", *sizes]), *notes])


def _fit(network: nn.Module, name: str, parts: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Check the tensors of one layer. Returns the arguments of _product, with 1x1 kernels as matrices."""
    given = {f"{role} of {name}": parts[role] for role in ("down", "mid", "up") if role in parts}
    files.check_tensors(given, given, path)  # checks only that the numbers are finite floats
    factors = {role: x.flatten(1) if x.ndim > 2 and x.shape[2:].numel() == 1 else x
               for role, x in parts.items() if role != "alpha"}
    want = tuple(network.get_submodule(name).weight.shape)
    fitting = [want[:2] if want[2:] == (1, 1) else want]
    if name == "conv_in":  # a LoRA of Stable Diffusion has only the first 4 of an editor's 8 channels
        fitting.append((want[0], network.config.out_channels, *want[2:]))
    try:
        shape = _product(**{role: x.to("meta") for role, x in factors.items()}).shape
    except (RuntimeError, TypeError):  # the ranks differ, or one is missing
        shape = ()
    if shape not in fitting or not len(factors["down"]):
        has = ", ".join(f"{part} {tuple(x.shape)}" for part, x in given.items()) or "neither down nor up"
        raise ValueError(f"{path} does not fit {name} {want}: {has}")
    return factors


def _alpha(settings: dict, part: str, name: str, path: Path) -> float | None:
    """The alpha of one layer in peft's settings; None if they have no alpha."""
    alpha = settings.get(f"{part}lora_alpha")
    patterns = checked(settings.get(f"{part}alpha_pattern") or {}, dict, f"{path}: alpha_pattern")
    for pattern in reversed(patterns):  # the first match wins, as in peft, which reads regular expressions
        bare = pattern.removeprefix("^")
        if len(patterns) > LONGEST or not re.fullmatch(r"[\w.]+", bare):
            raise ValueError(f"{path}: alpha_pattern may have {LONGEST:,} layer names, not {shown(pattern)}")
        if bare in (name, name.removeprefix("text_model.")) or name.endswith(f".{pattern}"):
            alpha = patterns[pattern]
    return alpha


def write_lora(path: Path, layers: dict[str, tuple[Tensor, Tensor]], alpha: float,
               kohya: bool = False) -> None:
    """Write a LoRA of the UNet atomically, in diffusers' layout or in kohya's.

    layers: our name of a layer -> (down (r, in[, k, k]), up (out, r[, 1, 1])); its factor is alpha / r.
    """
    tensors, ranks = {}, {name: len(down) for name, (down, _) in layers.items()}
    a, b = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    for name, (down, up) in layers.items():
        begin = f"lora_unet_{name.replace('.', '_')}" if kohya else f"unet.{name}"
        tensors |= {f"{begin}.alpha": torch.tensor(float(alpha))} if kohya else {}
        up = up.reshape(*up.shape[:2], *[1] * (down.ndim - 2))
        tensors |= {f"{begin}.{a}.weight": down, f"{begin}.{b}.weight": up}
    settings = {"unet.r": max(ranks.values()), "unet.lora_alpha": alpha, "unet.target_modules": [*layers],
            "unet.rank_pattern": {f"^{name}": rank for name, rank in ranks.items()}}
    files.write_tensors(tensors, path, metadata=None if kohya else {METADATA: json.dumps(settings)})

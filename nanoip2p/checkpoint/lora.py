"""LoRA files (Hu et al. 2106.09685): merge them into the weights of a model, and write them.

A LoRA of rank r turns the weight W (out, in) of a layer into W + w alpha / r up @ down, where `up` is
(out, r), `down` is (r, in), and w is the user's weight. In a convolution, `down` has the size of the kernel.
LyCORIS (LoCon with CP) moves the kernel into a third tensor, `mid` (r, r, k, k). Common layouts:

    kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
                (or, numbered as in original files, lora_unet_middle_block_1_proj_in); lora_te_text_model_...
    diffusers   unet.mid_block.attentions.0.proj_in.lora_A.weight, .lora_B.weight; text_encoder. ...
                alpha is in the metadata. Older: .lora.down, processor.to_q_lora.down, lora_linear_layer.down
    peft        base_model.model.mid_block. ... .lora_A.weight; alpha is in adapter_config.json beside it

No layout needs a list of names: every name becomes one with underscores, without prefix, and is looked up
among the names of the model's own layers.
"""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoip2p.checkpoint.single_file import PREFIXES, original_names, refuse_families
from nanoip2p.checkpoint.tensors import (
    cast,
    check_tensors,
    read_metadata,
    read_tensors,
    refuse_names,
    write_tensors,
)
from nanoip2p.common.files import read_json
from nanoip2p.common.schema import LONGEST, checked, shown
from nanoip2p.pipeline import Model

METADATA = "lora_adapter_metadata"  # diffusers' key: JSON of peft's LoraConfig, each entry "unet.NAME"
TENSOR = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.[^.]+)?\.weight|\.(alpha))")
PREFIX = re.compile(r"(base_model_model_|lora_)?(unet_|te_|text_encoder_)?")
# What we do not read -> pattern of a "name (shape)" that only this has, see single_file.refuse_families
CONTEXT = r"(attn2|self_attn)\S{0,20}[kv](_proj)?\S{0,20}(down|lora_A)\S{0,20} \(\d+, "  # a width follows
OTHERS = {
    "a DoRA": r"dora_scale|lora_magnitude_vector",
    "a LoHa": r"\.hada_w",
    "a LoKr": r"\.lokr_w",
    "an IA3": r"\.on_input |\.ia3_",
    "a ControlNet-LoRA": r"^lora_controlnet|lllite",
    "a file of full differences (.diff)": r"\.diff(_b)? ",
    "a LoRA of SDXL": rf"^lora_te[12]_|^text_encoder_2\.|{CONTEXT}2048",
    "a LoRA of Stable Diffusion 2.x": rf"{CONTEXT}1024",
    "a LoRA of Flux or Stable Diffusion 3": r"^(lora_)?transformer[._]|(double|single|joint)_blocks",
}


def split(given: str) -> tuple[Path, float]:
    """"FILE" or "FILE:weight" -> (file, weight); without weight 1. A file of the whole name wins.

    Raises ValueError for a weight that is no finite number.
    """
    name, colon, weight = given.rpartition(":")
    if not colon or Path(given).exists():
        return Path(given), 1.0
    try:
        return Path(name), checked(float(weight), float, "weight")
    except ValueError:
        raise ValueError(f"--lora {given}: there is no such file, and {shown(weight)} is no weight; write "
                         "FILE or FILE:weight, such as style.safetensors:0.8") from None


def file_hash(given: str) -> str:
    """The first 10 digits of the file's SHA-256, as web UIs and Civitai show it."""
    return hashlib.sha256(split(given)[0].read_bytes()).hexdigest()[:10]


def apply_loras(model: Model, given: list[str]) -> list[str]:
    """Merge LoRA files into the UNet and the text encoder. Returns one line per file, which says what it is.

    given: "FILE" or "FILE:weight". Computes in float32 and keeps the dtype and device of the weights. Equals
    diffusers' load_lora_weights and fuse_lora. Raises ValueError for a file that does not fit the model in
    all its layers; the model is then unchanged.
    """
    changes, lines, seen = {}, [], set()
    for text in given:
        path, weight = split(text)
        layers, line = read_lora(model, path)
        repeated = ", once more" * (path.resolve() in seen)
        seen.add(path.resolve())
        lines.append(f"added {path} at weight {weight:g}{repeated}: {line}")
        for place, (scale, factors) in layers.items():
            changes.setdefault(place, []).append((weight * scale, factors))
    for check in (True, False):  # compute twice rather than keep a second copy of the weights
        for (network, name), summands in changes.items():
            layer = network.get_submodule(name)
            merged = layer.weight.detach().float().clone()  # never in place: it may be mapped from a file
            for scale, factors in summands:
                change = product(*(factor.to(merged.device, torch.float32) for factor in factors))
                change = change.reshape(*change.shape[:2], *merged.shape[2:])
                merged[:, : change.shape[1]] += scale * change
            merged = cast(merged, layer.weight.dtype, name)
            if check:
                check_tensors({name: merged}, {name: merged}, Path(", ".join(given)))
            else:
                layer.weight = nn.Parameter(merged, layer.weight.requires_grad)
    return lines


def product(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """down (r, in[, k, k]), up (out, r) -> (out, in[, k, k]). With mid (r, r, k, k), down is (r, in)."""
    return torch.tensordot(up, down, 1) if mid is None else torch.einsum("oa,abkl,bi->oikl", up, mid, down)


def places(model: Model) -> dict[str, tuple[nn.Module, str]]:
    """Every spelling of every layer, with underscores and without prefix -> (network, our name)."""
    found = {}
    for network in (model.unet, model.text_encoder):
        for weight, original in original_names(network).items():
            name = weight.removesuffix(".weight")
            if name == weight or not isinstance(network.get_submodule(name), (nn.Linear, nn.Conv2d)):
                continue
            original = original.removeprefix(PREFIXES[type(network)]).removesuffix(".weight")
            old = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1", name).removesuffix(".0")
            for spelling in (name, original, old):
                for short in (spelling, spelling.removeprefix("text_model.")):
                    found[short.replace(".", "_")] = network, name
    return found


def read_lora(model: Model, path: Path) -> tuple[dict, str]:
    """Read a file: (network, our name) -> (alpha / r, (down, up[, mid])); and what it is, in a few words.

    Kernels of 1x1 become matrices. Raises ValueError if a tensor is unknown, does not fit, or is not finite.
    """
    tensors, known, found, strays = read_tensors(path), places(model), {}, []
    for spelling, tensor in tensors.items():
        match = TENSOR.fullmatch(spelling)
        layer, role, alpha = match.groups() if match else (spelling, None, None)
        place = known.get(PREFIX.sub("", layer.replace(".", "_"), 1).replace("_processor", ""))
        if not (match and place):
            strays.append(layer)
            continue
        parts, role = found.setdefault(place, {}), {"A": "down", "B": "up"}.get(role, role or alpha)
        if role in parts:
            raise ValueError(f"{path}: {place[1]} comes twice, in two spellings")
        parts[role] = tensor
    try:
        if not found:
            raise ValueError(f"{path}: no layer in it fits this model; "
                             f"it holds {', '.join([*tensors][:3])} …")
        refuse_names(path, "names layers that this model lacks:", [*dict.fromkeys(strays)])
        factors = {place: _fit(*place, parts, path) for place, parts in found.items()}
    except ValueError:
        refuse_families(tensors, OTHERS, path, "LoRAs of Stable Diffusion 1.x")  # the better reason
        raise
    settings, layers, alphas, notes = _settings(path, tensors), {}, [], []
    for (network, name), (down, *others) in factors.items():
        said = settings["unet" if network is model.unet else "text_encoder"]
        rank, alpha = len(down), _alpha(found[network, name].get("alpha"), said, name, path)
        alphas += [] if alpha is None else [alpha]
        of_rank = rank**0.5 if said.get("use_rslora") is True else rank  # peft's rank-stabilised LoRA
        layers[network, name] = 1.0 if alpha is None else alpha / of_rank, (down, *others)
        if name == "conv_in" and down.shape[1] < network.config.in_channels:
            notes.append(f"conv_in: the first {down.shape[1]} of {network.config.in_channels} channels")
    if missing := len(layers) - len(alphas):
        notes.append(f"no alpha in the file{f' for {missing} layers' * bool(alphas)}: the rank is taken, as "
                     "diffusers does")
    of_text = sum(network is model.text_encoder for network, _ in layers)
    size = _range("rank", [len(down) for down, *_ in factors.values()]) + _range(", alpha", alphas)
    counts = f"{len(layers) - of_text} layers of the UNet, {of_text} of the text encoder"
    return layers, "; ".join([f"a LoRA of {size}, {counts}", *notes])


def _range(word: str, numbers: list) -> str:
    """"rank 4", "rank 4 to 8", or nothing."""
    limits = sorted({min(numbers), max(numbers)}) if numbers else []
    return f"{word} {' to '.join(f'{number:g}' for number in limits)}" if limits else ""


def _fit(network: nn.Module, name: str, parts: dict[str, Tensor], path: Path) -> tuple[Tensor, ...]:
    """Check the tensors of one layer, and return (down, up[, mid])."""
    factors = {f"{role} of {name}": parts[role] for role in ("down", "up", "mid") if role in parts}
    if not {"down", "up"} <= parts.keys():
        raise ValueError(f"{path}: {name} has only {' and '.join(parts)}; a LoRA needs down and up")
    check_tensors(factors, factors, path)  # only whether the numbers are finite floats
    small = [factor.flatten(1) if factor.ndim > 2 and factor.shape[2:].numel() == 1 else factor
             for factor in factors.values()]
    want = tuple(network.get_submodule(name).weight.shape)
    fitting = [want[:2] if math.prod(want[2:]) == 1 else want]
    if name == "conv_in":  # a LoRA of Stable Diffusion knows the first 4 of an editor's 8 channels
        fitting.append((want[0], network.config.out_channels, *want[2:]))
    try:
        change = tuple(product(*(factor.to("meta") for factor in small)).shape)
    except RuntimeError:  # the ranks differ
        change = None
    if change not in fitting or not len(small[0]):
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in factors.items())
        raise ValueError(f"{path} does not fit {name} {want}: {shapes}")
    return tuple(small)


def _settings(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict]:
    """peft's settings of "unet" and "text_encoder": diffusers' metadata, else peft's adapter_config.json."""
    beside = path.with_name("adapter_config.json")
    try:
        said = checked(json.loads(read_metadata(path).get(METADATA, "{}")), dict, METADATA)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is broken ({error})") from None
    if not said and next(iter(tensors)).startswith("base_model."):
        return dict.fromkeys(("unet", "text_encoder"), read_json(beside, missing={}))
    return {part: {key[len(part) + 1 :]: value for key, value in said.items() if key.startswith(f"{part}.")}
            for part in ("unet", "text_encoder")}


def _alpha(stored: Tensor | None, said: dict, name: str, path: Path) -> float | None:
    """The alpha of one layer: `stored` in the file, else what the settings say. None: neither has one."""
    alpha, short = said.get("lora_alpha"), name.removeprefix("text_model.")
    patterns = checked(said.get("alpha_pattern") or {}, dict, f"{path}: alpha_pattern")
    for pattern in reversed(patterns):  # the first counts. peft reads expressions; we read names
        bare = pattern.removeprefix("^")
        if len(patterns) > LONGEST or not re.fullmatch(r"[\w.]+", bare):
            raise ValueError(f"{path}: alpha_pattern has {shown(pattern)}; only names of layers are read")
        if bare in (name, short) or bare == pattern and name.endswith(f".{bare}"):
            alpha = patterns[pattern]
    if stored is not None:
        alpha = stored.item() if stored.numel() == 1 else stored.tolist()
    return checked(alpha, float | None, f"{path}: alpha of {name}", 1e-9)


def write_lora(path: Path, layers: dict[str, tuple[Tensor, Tensor]], alpha: float,
               kohya: bool = False) -> None:
    """Write a LoRA of the UNet atomically, in diffusers' or in kohya's layout.

    layers: our name of a layer -> (down (r, in[, k, k]), up (out, r[, 1, 1])); its factor is alpha / r.
    diffusers' layout keeps alpha, and the ranks, in its metadata; kohya's keeps it in a tensor per layer.
    """
    tensors, ranks, r = {}, {name: len(down) for name, (down, _) in layers.items()}, 1
    for name, (down, up) in layers.items():
        up = up.reshape(*up.shape[:2], *[1] * (down.ndim - 2))
        if kohya:
            base = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up,
                        f"{base}.alpha": torch.tensor(float(alpha))}
        else:
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    [(r, _)] = Counter(ranks.values()).most_common(1)
    said = {"r": r, "lora_alpha": alpha, "target_modules": sorted(layers),
            "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != r}}
    said = {METADATA: json.dumps({f"unet.{key}": value for key, value in said.items()}, indent=2)}
    write_tensors(tensors, path, metadata=None if kohya else said)


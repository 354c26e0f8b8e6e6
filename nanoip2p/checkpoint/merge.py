"""Merge all networks of two or three checkpoints, as the web UIs do: see checkpoint/__main__.py."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nanoip2p.checkpoint.folder import StoredNetwork
from nanoip2p.checkpoint.load import Checkpoint
from nanoip2p.checkpoint.tensors import cast
from nanoip2p.common.files import tidy
from nanoip2p.common.schema import shown
from nanoip2p.diffusion import NoiseSchedule


class Merged(Tensor):
    """A merged tensor without storage: each operation that reads its numbers computes them again."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    def __new__(cls, name: str, share: float, tensors: list[Tensor], dtype: torch.dtype):
        merged = Tensor._make_wrapper_subclass(cls, tensors[0].shape, dtype=dtype)
        merged.recipe = name, share, tensors, dtype
        return merged

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.detach.default:  # modules detach weights; this needs no numbers
            return cls(*args[0].recipe)
        return operation(*tree_map_only(cls, lambda one: merge_tensors(*one.recipe), args), **(kwargs or {}))


def merge_tensors(name: str, share: float, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Merge A and B, or A, B and C, in at least float32, then round to `dtype`.

    Input channels that B or C lacks stay as in A: in conv_in, only an editor has channels for the picture.
    Unchanged numbers keep their bits, even the sign of zero. ValueError if a number is too large for float16.
    """
    result = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32), copy=True)
    common = tuple(slice(min(sizes)) for sizes in zip(*(tensor.shape for tensor in tensors)))
    a, b, *rest = (tensor[common].to(result.dtype) for tensor in (result, *tensors[1:]))
    base = rest[0] if rest else a
    merged = a + share * (b - base) if rest else (1 - share) * a + share * b
    result[common] = torch.where((b == base) | (share == 0), a, merged)
    return cast(result, dtype, name)


def merge(opened: list[Checkpoint], names: list[str], share: float, dtype: torch.dtype | None) -> Checkpoint:
    """The weighted sum of two checkpoints, or A + share (B - C) of three. The settings come from A.

    names: the checkpoints' names, for the formula. dtype: None keeps the dtypes of A. The networks of the
    result read Merged tensors. Raises ValueError if the checkpoints do not fit together.
    """
    (a, b, *c), (ours, *others), width = map(tidy, names), map(traits, opened), "in_channels of the unet"
    for name, theirs in zip((b, *c), others):
        for key, value in theirs.items():
            if value > ours[key] if key == width else value != ours[key]:
                raise ValueError(f"{name} does not fit {a}: {key} is {shown(value)}, not {shown(ours[key])}"
                                 + "; put the editor first" * (key == width))

    def read(part: str) -> dict[str, Tensor]:
        stored = [checkpoint.networks[part].load(None).state_dict() for checkpoint in opened]
        return {name: Merged(name, share, [tensors[name] for tensors in stored], dtype or tensor.dtype)
                for name, tensor in stored[0].items()}

    formula = f"{a} + {share:g} ({b} - {c[0]})" if c else f"{1 - share:g} {a} + {share:g} {b}"
    networks = {part: StoredNetwork(network.model, partial(read, part), Path(formula))
                for part, network in opened[0].networks.items()}
    return replace(opened[0], networks=networks, merged_from=formula)


def traits(checkpoint: Checkpoint) -> dict:
    """The settings that must be equal in merged checkpoints, and in_channels, which may be larger in A."""
    noise = NoiseSchedule.from_config(checkpoint.schedule)
    return {"prediction_type": noise.prediction_type, "noise levels": noise.alphas_cumprod().tolist()} | {
        f"{key} of the {part}": value for part, network in checkpoint.networks.items()
        for key, value in vars(network.model.config).items()
        if key not in ("projection_dim", "eos_token_id")}  # for pooled text embeddings, unused here

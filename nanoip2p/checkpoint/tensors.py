"""Read, check and write files of named tensors.

Reading maps the file into memory: a tensor stays on disk until it is used. Writing needs memory for the
largest tensor only. So a laptop can convert a checkpoint of 4 GB.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nanoip2p.checkpoint.ggufs import PACKED, read_gguf
from nanoip2p.checkpoint.hub import weight_files
from nanoip2p.checkpoint.pickles import read_pickle
from nanoip2p.common.files import listing, read_json, regular, replacing
from nanoip2p.common.schema import checked

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOAT8 = {torch.float8_e4m3fn: "fp8 (E4M3, read as fp16)", torch.float8_e5m2: "fp8 (E5M2, read as fp16)"}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | FLOAT8 | {
    torch.float64: "fp64", PACKED: "Q8_0 (read as fp32)"}
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def read_tensors(path: Path, prefix: str | None = "") -> dict[str, Tensor]:
    """Read a .safetensors file, a pickle (see pickles.py) or a GGUF file: name -> tensor, memory-mapped.

    prefix: see ggufs.read_gguf. Raises ValueError if the file is missing, truncated or of another format.
    """
    if not regular(path).is_file():
        raise ValueError(f"{path} is missing; {listing(path.parent)}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return read_gguf(path, prefix)
    if magic.startswith((b"PK\3\4", b"\x80")) and path.suffix.lower() != ".safetensors":
        return read_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} for any other file."""
    with suppress(SafetensorError, OSError), safe_open(regular(path), "pt") as file:
        return file.metadata() or {}
    return {}


def json_metadata(path: Path, key: str) -> dict:
    """The JSON object under `key` in the metadata, or {} if there is none. ValueError if it is no object."""
    try:
        return checked(json.loads(read_metadata(path).get(key, "{}")), dict, key)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is broken ({error})") from None


def read_weights(folder: Path, raw: bool = False) -> dict[str, Tensor]:
    """Read the files that hub.weight_files selects, else the non_ema files. ValueError: see read_tensors."""
    names = [path.name for path in folder.glob("*")]
    if not (files := weight_files(names, raw=raw) or weight_files(names, raw=True)):
        raise ValueError("diffusion_pytorch_model.safetensors or model.safetensors is missing; "
                         f"{listing(folder)}")
    for index in (folder / name for name in files if name.endswith(".json")):
        shards = checked(read_json(index).get("weight_map"), dict, f"{index}: weight_map")
        files = {Path(checked(shard, str, f"{index}: shard of {name}")).name  # in this folder only
                 for name, shard in shards.items()}
    return {name: tensor for file in sorted(files) for name, tensor in read_tensors(folder / file).items()}


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless names and shapes match `expected` and all numbers are finite floats."""
    refuse_names(path, "has a LoRA; before saving, diffusers' fuse_lora and unload_lora_weights merge it:",
                 [name for name in tensors if ".base_layer." in name])
    refuse_names(path, "lacks", [name for name in expected if name not in tensors])
    refuse_names(path, "has unknown", [name for name in tensors if name not in expected])
    refuse_names(path, "does not fit its configuration:",
                 [f"{name} of {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
                  for name, tensor in tensors.items() if tensor.shape != expected[name].shape])
    refuse_names(path, "needs floating-point numbers of 16, 32 or 64 bits in",
                 [name for name, tensor in tensors.items()
                  if not tensor.is_floating_point() or tensor.itemsize == 1])
    refuse_names(path, "has NaN or infinity in", [name for name in tensors if not _is_finite(tensors[name])])


def refuse_names(path: Path, problem: str, names: list[str]) -> None:
    """Raise ValueError if `names` is not empty. The message shows the first three names."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{path} {problem} {', '.join(names[:3])}{more}")


def dtype_names(tensors: Iterable[Tensor]) -> str:
    """The dtypes of these tensors: "fp16", or "fp32 and fp16"."""
    found = {tensor.dtype for tensor in tensors}
    return " and ".join(name for dtype, name in DTYPE_NAMES.items() if dtype in found)


def _is_finite(tensor: Tensor) -> bool:
    # In pieces, because isfinite allocates. A finite sum shows that all are finite, in a tenth of the time
    return all(piece.sum().isfinite() or piece.isfinite().all() for piece in tensor.flatten().split(2**20))


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert to `dtype`. Raises ValueError if a number exceeds the maximum of `dtype`."""
    result = tensor.to(dtype)
    if (tensor.dtype != dtype and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
            and not _is_finite(result)):
        fit = " or ".join(k for k in ("bf16", "fp32") if tensor.abs().max() <= torch.finfo(DTYPES[k]).max)
        raise ValueError(f"{name} holds numbers beyond the range of {DTYPE_NAMES[dtype]}"
                         + f"; use {fit}" * bool(fit))
    return result


def write_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None,
                  metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, one tensor at a time.

    dtype: dtype of all floating-point tensors in the file; None keeps each tensor's dtype. We do not use the
    safetensors library, because it needs all tensors in memory. The format: an 8-byte length, a JSON header
    of that length, and the bytes of each tensor.
    """
    dtypes = {name: dtype if dtype and tensor.is_floating_point() else tensor.dtype
              for name, tensor in tensors.items()}
    # Largest item size first, so that each tensor begins at a multiple of its item size
    names = sorted(tensors, key=lambda name: -dtypes[name].itemsize)
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0  # transformers requires "pt"
    for name in names:
        begin, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtypes[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = cast(tensors[name].detach().cpu(), dtypes[name], name).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def fingerprint(*networks: nn.Module, begin: bytes = b"") -> str:
    """A hash of `begin` and of the first 16 numbers of each tensor. It is fast, and changes with training."""
    digest = hashlib.sha256(begin)
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tensor.flatten()[:16].tolist()}".encode())
    return digest.hexdigest()[:16]

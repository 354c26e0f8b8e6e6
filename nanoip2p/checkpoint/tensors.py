"""Files of named tensors: read lazily, checked, and written one tensor at a time.

What is read stays on disk until it is used (memory-mapped), and what is written needs memory for its largest
tensor only, so a 4 GB checkpoint can be converted on a laptop.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from nanoip2p.checkpoint.hub import weight_files
from nanoip2p.checkpoint.pickles import read_pickle
from nanoip2p.common.files import read_json, remedy, replacing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOATS = (*DTYPES.values(), torch.float64)
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle (see pickles.py), by name and still on disk.

    Raises ValueError, in one line, when the file is missing, truncated or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy(path.parent)}")
    with path.open("rb") as file:
        pickled = file.read(4).startswith((b"PK\3\4", b"\x80"))
    if pickled and path.suffix.lower() != ".safetensors":
        return read_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that a safetensors file holds beside its tensors; {} for other files, or none."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def find_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a network's folder, in any form of hub.weight_files. ValueError as read_tensors."""
    files = weight_files([path.name for path in folder.glob("*")])
    if not files:
        raise ValueError("diffusion_pytorch_model.safetensors or model.safetensors is missing; "
                         f"{remedy(folder)}")
    for index in (folder / name for name in files if name.endswith(".json")):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
            raise ValueError(f"{index} has no weight_map that names files; fetch it again")
        files = {Path(shard).name for shard in names.values()}
    tensors = {}
    for name in sorted(files):
        tensors |= read_tensors(folder / name)
    return tensors


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """ValueError, naming the first few, when tensors do not fit a network or are not finite."""
    refuse(path, "lacks", [name for name in expected if name not in tensors])
    refuse(path, "has unknown", [name for name in tensors if name not in expected])
    shapes = [
        f"{name} of {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name].shape
    ]
    refuse(path, "does not fit its configuration:", shapes)
    others = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    refuse(path, "needs floating-point numbers of 16, 32 or 64 bits in", others)
    refuse(path, "has NaN or infinity in", [name for name in tensors if not _is_finite(tensors[name])])


def dtype_names(tensors: Iterable[Tensor]) -> str:
    """"fp16", or several in words."""
    kinds = {tensor.dtype for tensor in tensors}
    return " and ".join(name for name, dtype in DTYPES.items() if dtype in kinds)


def _is_finite(tensor: Tensor) -> bool:
    """In pieces, because isfinite copies, and by their sums, which take a tenth of its time."""
    pieces = tensor.flatten().split(2**20)
    return all(piece.sum().isfinite() or piece.isfinite().all() for piece in pieces)


def refuse(path: Path, problem: str, found: list[str]) -> None:
    """ValueError that names the first few of what was found, if anything was."""
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{path} {problem} {', '.join(found[:3])}{more}")


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in `dtype`. ValueError when numbers become infinite: float16 ends at 65504."""
    narrow = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and not _is_finite(narrow):
        raise ValueError(f"{name} holds numbers beyond the range of fp16; use bf16 or fp32")
    return narrow


def write_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None,
                  metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. dtype: of all floating-point tensors, None for as it is.

    The library's own writer wants all bytes in memory at once; the format is an 8-byte length, a JSON header
    of that length, and the tensors one after another.
    """
    def kept(tensor: Tensor) -> torch.dtype:
        return dtype if dtype and tensor.is_floating_point() else tensor.dtype

    # Widest first, so that each tensor begins where its dtype may
    tensors = dict(sorted(tensors.items(), key=lambda item: -kept(item[1]).itemsize))
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0  # transformers insists on "pt"
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * kept(tensor).itemsize
        header[name] = {"dtype": NAMES[kept(tensor)], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            whole = narrowed(tensor.detach().cpu(), kept(tensor), name).contiguous()
            file.write(whole.reshape(-1).view(torch.uint8).numpy())

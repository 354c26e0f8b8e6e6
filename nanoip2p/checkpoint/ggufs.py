"""Read the tensors of GGUF files, as stable-diffusion.cpp writes them. Needs the optional package gguf."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Reads of the header. Stable Diffusion 1.x needs 8,000; a far longer header would fill the memory
MOST_READS = 100_000
PACKED = torch.int8  # dtype of a Q8_0 tensor that was not unpacked; it is on the meta device


def read_gguf(path: Path, prefix: str | None = "") -> dict[str, Tensor]:
    """Read a GGUF file: name -> tensor. The names follow the original layout (see single_file.py).

    F32, F16 and BF16 are memory-mapped. A Q8_0 tensor (blocks of 32 int8 numbers with one scale) becomes
    float32 if its name contains `prefix`; otherwise, or if `prefix` is None, it is a tensor of dtype PACKED
    on the meta device. Raises ValueError for a broken file, another quantisation, or a missing package gguf.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path} is a GGUF file; pip install gguf to read it") from None

    class Reader(gguf.GGUFReader):
        """Stops at the end of the file. The library would read on for as long as a broken header says."""
        reads = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            self.reads += 1
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data) or self.reads > MOST_READS:
                raise ValueError("its header is too long, or it ends too early")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(path, "c")  # copy-on-write: changes in memory never reach the file
        if sum(tensor.n_bytes for tensor in reader.tensors) > path.stat().st_size or reader.byte_order != "I":
            raise ValueError("tensors overlap, or the byte order is not this machine's")
    except Exception as error:  # the library raises many kinds for a broken file
        raise ValueError(f"{path} is damaged or no GGUF file ({error}); fetch it again") from None
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    if unknown := kinds - {"F32", "F16", "BF16", "Q8_0"}:
        raise ValueError(f"{path} holds {', '.join(sorted(unknown))}; nanoip2p reads F32, F16, BF16, Q8_0; "
                         "use a file in one of these formats")

    def read(tensor) -> Tensor:
        shape, kind = tensor.shape.tolist()[::-1], tensor.tensor_type.name
        if kind == "Q8_0" and (prefix is None or prefix not in tensor.name):
            return torch.empty(shape, dtype=PACKED, device="meta")
        data = gguf.dequantize(tensor.data, tensor.tensor_type) if kind == "Q8_0" else tensor.data
        numbers = torch.from_numpy(data)
        return (numbers.view(torch.bfloat16) if kind == "BF16" else numbers).reshape(shape)

    return {tensor.name: read(tensor) for tensor in reader.tensors}

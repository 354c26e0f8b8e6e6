"""PyTorch's pickles (.ckpt, .bin, .pt): their tensors are read, and nothing else in them comes to life.

A pickle is a program that names the functions to call. torch.load(weights_only=True) knows the functions that
tensors need. It refuses a file that names any other, as the checkpoints of Lightning from 2022 do for their
callbacks and configurations. Here each of these names gets a class that does nothing.
"""

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


class _Inert:
    """Stands for any class or function: takes every argument and every state, and does nothing."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save by name: those of its innermost "state_dict", if it has one.

    They are on the CPU, need no gradients, and stay on disk until used (unless the file is compressed, or
    older than PyTorch 1.6). Raises ValueError, in one line, when the file is something else (TorchScript, a
    tar file), is truncated, holds no named tensors, or holds what torch.load can do nothing with: a foreign
    dict or list that is not empty, or in a file older than PyTorch 1.6 any foreign class.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        mapped = zipped and not any(part.compress_type for part in zipfile.ZipFile(path).infolist())
        unknown = get_unsafe_globals_in_checkpoint(path) if zipped else []
        with safe_globals([(_Inert, name) for name in unknown]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, "cpu", weights_only=True, mmap=mapped)
        while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content.pop("state_dict")  # ends even in a dict that holds itself
        tensors = {name: value.detach()
                   for name, value in (content.items() if isinstance(content, dict) else ())
                   if isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided}
        if not tensors:
            raise ValueError("no named tensors in it")
        return tensors
    except Exception as error:  # a broken pickle can raise any
        # torch's advice on other options comes before and after the line that names the fault
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or str(error)
        reason = reason.encode("unicode_escape").decode()  # it may quote the file
        raise ValueError(f"{path} is damaged or no file of torch.save ({reason}); fetch it again") from None

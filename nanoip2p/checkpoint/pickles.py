"""PyTorch's pickles (.ckpt, .bin, .pt): their tensors are taken out, and nothing else in them comes to life.

A pickle is a program that names functions to call. torch.load(weights_only=True) refuses the callbacks and
configurations in Lightning's checkpoints of 2022, and weights_only=False calls whatever a file asks for. Here
the latter works with an unpickler of ours, which knows tensors and dicts; other names stand for nothing.
Plain files are read as strictly by it, so that none needs weights_only=True.
"""

import copyreg
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor


class _Inert:
    """Stands for any class, function or object: whatever a pickle does with it has no effect."""

    def __init__(self, *args, **kwargs):
        self.args = args

    def __call__(self, *args, **kwargs):
        return self

    __setitem__ = __setstate__ = extend = __call__


class _Tensor(_Inert):
    """A tensor as its arguments: storage (within an _Inert), offset, size, stride, and others."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return lambda tensor, *rest: tensor  # anew each time, because a pickle can set its attributes
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Inert

    def __setattr__(self, name, load):
        # torch.load's persistent_load, which for a "module" would read and write files of source code
        super().__setattr__(name, lambda saved: _Inert(load(saved)) if saved[0] == "storage" else _Inert)


PICKLE = SimpleNamespace(
    __name__=__name__, Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load())


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save by name, those of its innermost "state_dict" if it has one.

    On the CPU, without gradients, and left on disk until used (unless the file is of before PyTorch 1.6).
    Raises ValueError, in one line, when the file is something else (TorchScript too), is truncated, or holds
    no named tensors.
    """
    try:
        if tarfile.is_tarfile(path):  # of PyTorch 0.1, and torch.load would unpack it
            raise ValueError("a tar file")
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\3\4"
        # What somebody packed again, compressed, cannot be mapped
        mapped = zipped and not any(part.compress_type for part in zipfile.ZipFile(path).infolist())
        copyreg.clear_extension_cache()  # what others unpickled lies there for every pickle to call
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # comes before torch.load runs TorchScript
            content = torch.load(path, "cpu", PICKLE, weights_only=False, mmap=mapped, encoding="latin1")
        while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content.pop("state_dict")  # ends even in a dict that holds itself
        tensors = {name: _read_tensor(*value.args[:4])
                   for name, value in (content.items() if isinstance(content, dict) else ())
                   if isinstance(name, str) and isinstance(value, _Tensor)}
        if not tensors:
            raise ValueError("no named tensors in it")
        return tensors
    except Exception as error:  # a broken pickle can raise any
        reason = str(error).encode("unicode_escape").decode()  # it may quote the file
        raise ValueError(f"{path} is damaged or no file of torch.save ({reason}); fetch it again") from None
    finally:
        copyreg.clear_extension_cache()


def _read_tensor(storage: _Inert, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    (typed,) = storage.args
    whole = torch.empty(0, dtype=typed.dtype, device="cpu").set_(typed._untyped_storage)
    return whole.as_strided(size, stride, offset)

"""Read the tensors of PyTorch pickles (.ckpt, .bin, .pt) without running any code of the file.

A pickle names the functions to call. torch.load(weights_only=True) calls only the functions that tensors
need, and refuses a file that names other functions or classes. Lightning checkpoints of 2022 name others, for
callbacks and configs. We replace each of these by a class that does nothing. Before torch 2.10, weights_only
does not protect from every file (GHSA-63cw-57p8-fm3p), so with an older torch we read no pickle.
"""

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# Most bytes of tensors per byte of the file, plus FREE bytes. A small file of zeros could fill the memory
MOST_UNPACKED, FREE = 20, 100 * 2**20


class _Inert:
    """Replaces a class or function of a pickle: accepts any arguments and any state, and only keeps them."""

    def __init__(self, *state):
        self.state = state

    __setstate__ = __init__


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a file of torch.save. Returns its named tensors, or the tensors of its innermost "state_dict".

    The tensors are on the CPU, need no gradients, and are memory-mapped (unless the file is compressed or
    older than PyTorch 1.6). Raises ValueError with torch older than 2.10, and for a file that has another
    format (TorchScript, tar), is truncated, has no named tensors, or unpacks to much more than its size. Also
    raises ValueError for content that torch.load cannot read: a non-empty dict or list of an unknown class,
    and any unknown class in a file older than PyTorch 1.6.
    """
    if torch.__version__ < (2, 10):
        raise ValueError(f"{path} is a pickle, which torch {torch.__version__} does not read safely; update "
                         "torch to 2.10 or newer, or take a .safetensors file")
    try:
        zipped, most = zipfile.is_zipfile(path), MOST_UNPACKED * path.stat().st_size + FREE
        parts = zipfile.ZipFile(path).infolist() if zipped else []
        mapped = zipped and not any(part.compress_type for part in parts)
        _check_size(sum(part.file_size for part in parts), most)
        unknown = get_unsafe_globals_in_checkpoint(path) if zipped else []
        with safe_globals([(_Inert, name) for name in unknown]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, "cpu", weights_only=True, mmap=mapped)
        while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content.pop("state_dict")  # pop: the loop ends even if a dict contains itself
        if isinstance(content, dict) and "string_to_param" in content:  # a textual inversion
            words = content["string_to_param"]  # in files of 2022 a ParameterDict, which is read as _Inert
            words = words if isinstance(words, dict) else words.state[0]["_parameters"]
            content = {f"string_to_param.{word}": vectors for word, vectors in words.items()}
        tensors = {name: value.detach()
                   for name, value in (content.items() if isinstance(content, dict) else ())
                   if isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided}
        if not tensors:
            raise ValueError("no named tensors in it")
        _check_size(sum(tensor.nbytes for tensor in tensors.values()), most)  # tensors can share one storage
        return tensors
    except Exception as error:  # a broken pickle can raise any exception
        # torch writes advice before and after the line that names the problem: keep only that line
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or str(error)
        reason = reason.encode("unicode_escape").decode()  # the reason may quote control characters
        raise ValueError(f"{path} is damaged or no file of torch.save ({reason}); fetch it again") from None


def _check_size(unpacked: int, most: int) -> None:
    if unpacked > most:
        raise ValueError(f"it unpacks to {unpacked:.1e} bytes; the limit is {MOST_UNPACKED} times its "
                         f"size plus {FREE:.0e}")

"""How much memory tensors hold, followed from operation to operation, with or without numbers in them."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """The most bytes that storages made inside have held at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {storage._cdata for storage in storages([*args, *(kwargs or {}).values()])}
        made = function(*args, **(kwargs or {}))
        for storage in storages([made]):  # a view, or what was changed in place, is not new
            key, size = storage._cdata, storage.nbytes()
            if key not in before and key not in self.known:
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, size)
        return made

    def forget(self, key: int, size: int) -> None:
        """A storage of so many bytes is gone."""
        self.known.discard(key)
        self.now -= size


def storages(values: list) -> list[torch.UntypedStorage]:
    """Of the tensors among the arguments or results of an operation; some are lists of them."""
    flat = [one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])]
    return [one.untyped_storage() for one in flat if isinstance(one, Tensor) and not one.is_mkldnn]

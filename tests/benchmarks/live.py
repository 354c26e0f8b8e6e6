"""The memory that tensors take, followed from operation to operation; also works on fake tensors."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Counts bytes of the storages that are made inside: `now` alive, and `peak` at the highest."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {storage._cdata for storage in storages([*args, *(kwargs or {}).values()])}
        made = function(*args, **(kwargs or {}))
        for storage in storages([made]):  # a view or a tensor changed in place has an old storage
            key, size = storage._cdata, storage.nbytes()
            if key not in before and key not in self.known:
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, size)
        return made

    def forget(self, key: int, size: int) -> None:
        """A storage of `size` bytes was freed."""
        self.known.discard(key)
        self.now -= size


def storages(values: list) -> list[torch.UntypedStorage]:
    """The storages of all tensors, also in lists, among arguments or results of an operation."""
    flat = [one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])]
    return [one.untyped_storage() for one in flat if isinstance(one, Tensor) and not one.is_mkldnn]

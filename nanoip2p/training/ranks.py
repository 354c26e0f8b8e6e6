"""The ranks (processes) of a training run: one per device under torchrun, otherwise a single one.

Each rank has all weights and trains on its own micro-batches. DistributedDataParallel averages the gradients.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nanoip2p.common.device import pick_device

MAX_WAIT = timedelta(days=1)  # how long a rank waits for a rank that encodes data or samples pictures


@dataclass(frozen=True)
class Ranks:
    """The number of this process, the count of all processes, and the device of this process."""

    rank: int
    count: int
    device: torch.device
    group: object = None  # a gloo group: small messages travel by CPU, and no GPU waits for them

    def largest(self, number: int) -> int:
        """The maximum of `number` over all ranks. Every rank has to call this: it is also a barrier."""
        return int(self._reduced(number, dist.ReduceOp.MAX))

    def mean(self, number: float) -> float:
        """The mean of `number` over all ranks. Every rank has to call this."""
        return self._reduced(number, dist.ReduceOp.SUM) / self.count

    def _reduced(self, number: float, operation) -> float:
        reduced = torch.tensor(number, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(reduced, operation, group=self.group)
        return reduced.item()


@contextmanager
def started(device: str | None) -> Iterator[Ranks]:
    """Join the process group if torchrun started this process. With CUDA, each rank uses its own GPU."""
    count, chosen = int(os.environ.get("WORLD_SIZE", 1)), pick_device(device)
    if count == 1:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, chosen, dist.new_group(backend="gloo", timeout=MAX_WAIT))
    finally:
        dist.destroy_process_group()

"""The ranks (processes) of a training run: one per device under torchrun, otherwise only one.

Each rank has all weights and trains on its own micro-batches. DistributedDataParallel averages the gradients.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count as numbers

import torch
import torch.distributed as dist

from nanoip2p.common.device import pick_device
from nanoip2p.training.signals import SIGNALS, AtOnce, end_loaders

MAX_WAIT = timedelta(days=1)  # how long a rank waits for another one, which may encode data or draw samples
JOIN = timedelta(minutes=5)   # how long ranks wait for the last one to start: a cold disk makes imports slow
TICKS = 10                    # number of heartbeats of a rank within --timeout


@dataclass(frozen=True)
class Ranks:
    """The number of this process (from 0), the number of all processes, and the device of this process."""

    rank: int
    count: int
    device: torch.device
    group: object = None  # of gloo, for small messages: they stay on the CPU, so no GPU waits

    def largest(self, number: int) -> int:
        """The maximum of `number` over all ranks. Every rank has to call this: it is also a barrier."""
        return int(self._reduced(number, dist.ReduceOp.MAX))

    def mean(self, number: float) -> float:
        """The mean of `number` over all ranks. Every rank has to call this."""
        return self._reduced(number, dist.ReduceOp.SUM) / self.count

    def _reduced(self, number: float, operation) -> float:
        reduced = torch.tensor(number, dtype=torch.float64)
        if self.count > 1:
            work = dist.all_reduce(reduced, operation, group=self.group, async_op=True)
            while not work.is_completed():  # `wait` alone would delay the signal handlers
                time.sleep(0.001)
            work.wait()
        return reduced.item()


class Watch:
    """Two threads that work while the main thread is busy. One exchanges heartbeats with the other ranks. The
    other thread ends the process when a rank is silent."""

    def __init__(self, rank: int, count: int, timeout: float):
        """Join the store that the ranks share. timeout: in seconds."""
        # A separate connection: the main thread may be waiting in the connection of the process group
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=JOIN)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.rank, self.timeout, self.keys = rank, timeout, [f"{attempt} lives {n}" for n in range(count)]
        # For each rank: its last heartbeat, and the ticks since then (seconds would pass during Ctrl-Z)
        self.beats, self.silent = [b""] * count, [0] * count
        self.left, self.failed = threading.Event(), False
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()
        threading.Thread(target=self.judge, daemon=True).start()

    def listen(self) -> None:
        """Send and receive heartbeats. If the store is lost, this thread ends, and all ranks seem silent."""
        with suppress(RuntimeError):
            for number in numbers():
                self.store.set(self.keys[self.rank], "left" if self.left.is_set() else str(number))
                for rank, key in enumerate(self.keys):
                    if self.store.check([key]) and (beat := self.store.get(key)) != self.beats[rank]:
                        self.beats[rank], self.silent[rank] = beat, 0
                if self.beats[self.rank] == b"left":
                    return
                self.left.wait(self.timeout / TICKS)

    def judge(self) -> None:
        """End this process if a rank is silent, or has left although this rank needs it."""
        while not self.left.wait(self.timeout / TICKS):
            for rank, beat in enumerate(self.beats):
                self.silent[rank] += (TICKS if self.failed else 0) if beat == b"left" else 1
            lost = [f"rank {rank}" for rank, ticks in enumerate(self.silent) if ticks >= TICKS - 2]
            if f"rank {self.rank}" in lost:  # the store is lost, because the process that hosts it has ended
                lost = ["rank 0" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else "torchrun"]
            if lost and not self.left.is_set():
                SIGNALS.append(signal.SIGTERM)  # so that Lasting does not wait for a full pipe
                print(f"error: {', '.join(lost)} ended or was stopped (--timeout {self.timeout:g} s); "
                      "go on with --resume, from the last checkpoint", file=sys.stderr)
                end_loaders()
                os._exit(2)  # sys.exit would end only this thread; the main thread may wait for ever

    def leave(self) -> None:
        """Tell the other ranks that this rank ends, and stop watching them."""
        self.left.set()
        self.listener.join(1)


@contextmanager
def started(device: str | None, timeout: float) -> Iterator[Ranks]:
    """Join the process group if torchrun started this process. With CUDA, each rank uses its own GPU.

    timeout: if a rank sends no heartbeat for so many seconds, the other ranks end.
    """
    count, chosen = int(os.environ.get("WORLD_SIZE", 1)), pick_device(device)
    if count == 1:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")  # ValueError: more processes than GPUs
        torch.cuda.set_device(chosen)
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C then ends a wait for other ranks
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=JOIN))
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=count)
        group, watch = dist.new_group(backend="gloo", timeout=MAX_WAIT), Watch(rank, count, timeout)
    except RuntimeError as error:
        raise ValueError(f"the {count} ranks could not join (each waits {JOIN}): {error}") from None
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        yield Ranks(rank, count, chosen, group)
        watch.leave()
    except AtOnce:  # a normal exit would wait for the group's threads, and these for a stopped rank
        print("stopped; go on with --resume, from the last checkpoint", file=sys.stderr)
        os._exit(130)
    except (KeyboardInterrupt, ValueError):
        watch.leave()
        raise
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError):
            print(f"rank {rank}: {error}", file=sys.stderr)
            watch.failed = True  # if a dead rank is the cause, the watch names it and ends this process
            time.sleep(timeout)
        raise
    finally:
        dist.destroy_process_group()

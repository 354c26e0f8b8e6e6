"""The samples of a training run.

Sample i of optimizer step s has the number n = s * batch + i. All random numbers of sample n are a function
of (seed, n). So sample n does not depend on the rank, the worker, the micro-batch or a restart.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nanoip2p.dataset.layouts import Item, Pair, load_picture
from nanoip2p.images import to_tensor
from nanoip2p.tokenizer import Tokenizer


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch visits `count` items: (count,) int64."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def draw(seed: int, number: int, shape: tuple[int, int, int], timesteps: int) -> dict:
    """All random numbers of sample `number`, on the CPU. shape: the latents' shape (C, h, w).

    Returns `posterior` and `noise`, standard normal of this shape; `timestep`, an integer in [0, timesteps);
    and `which`, `flip` and `drop`, uniform in [0, 1).
    """
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    which, flip, drop = torch.rand(3, generator=generator)
    return {
        "which": which, "flip": flip, "drop": drop,
        "timestep": torch.randint(timesteps, (), generator=generator),
        "posterior": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
    }


class Pictures:
    """Loads pairs as pictures and token ids, for a run without a cache.Cache."""

    def __init__(self, resolution: int, tokenizer: Tokenizer):
        self.resolution, self.tokenizer = resolution, tokenizer

    def get(self, pair: Pair, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Before and after (3, H, W) in [-1, 1], and token ids (77,). ValueError for a broken picture."""
        before, after = (to_tensor(load_picture(picture, self.resolution, flip))
                         for picture in (pair.before, pair.after))
        return before, after, self.tokenizer([pair.edit])[0]


class Samples(Dataset):
    """Sample n as a dict: its random numbers, and one pair of its item.

    source: Pictures or Cache. flips: mirror half of the pairs. shape, timesteps: see `draw`. skip_bad: if a
    picture is broken, use the next item. Without skip_bad, the sample is then {"error": reason}.
    """

    def __init__(self, items: list[Item], source, seed: int, flips: bool, shape: tuple[int, int, int],
                 timesteps: int, skip_bad: bool = False):
        self.items, self.source, self.seed, self.flips = items, source, seed, flips
        self.shape, self.timesteps, self.skip_bad = shape, timesteps, skip_bad

    def __getitem__(self, number: int) -> dict:
        drawn, skipped, count = draw(self.seed, number, self.shape, self.timesteps), [], len(self.items)
        epoch, place = divmod(number, count)
        places = order(self.seed, epoch, count)
        for further in range(count if self.skip_bad else 1):
            item = self.items[places[(place + further) % count]]
            pair = item[int(float(drawn["which"]) * len(item))]
            try:
                before, after, text = self.source.get(pair, self.flips and bool(drawn["flip"] < 0.5))
                return drawn | {"before": before, "after": after, "text": text, "skipped": skipped,
                                "name": f"{number} ('{pair.edit}' on {pair.before})"}
            except ValueError as error:
                skipped.append(str(error))
        return {"error": f"{skipped[0]} (--skip-bad leaves such pairs out)"}


def collate(samples: list[dict]) -> dict:
    """Stack samples to tensors (B, ...), and join the `skipped` lists; or return the first error dict."""
    if errors := [sample for sample in samples if "error" in sample]:
        return errors[0]
    skipped = [reason for sample in samples for reason in sample.pop("skipped")]
    return default_collate(samples) | {"skipped": skipped}


def sample_numbers(first: int, last: int, accumulate: int, batch: int, rank: int,
                   ranks: int) -> Iterator[list[int]]:
    """Yield this rank's sample numbers of optimizer steps first ... last - 1, one list per micro-batch."""
    for micro in range(first * accumulate, last * accumulate):
        begin = (micro * ranks + rank) * batch
        yield list(range(begin, begin + batch))


def validation_batches(samples: Samples, count: int, batch: int) -> Iterator[dict]:
    """Yield the samples 0 ... count - 1, without conditioning dropout, with evenly spaced timesteps."""
    for numbers in torch.arange(count).split(batch):
        timesteps = (numbers + 0.5) * samples.timesteps / count
        yield collate([samples[number] for number in numbers.tolist()]) | {
            "drop": torch.ones(len(numbers)), "timestep": timesteps.long()}

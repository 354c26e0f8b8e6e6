"""The samples of a training run.

Sample i of optimizer step s has the number n = s * (samples per step) + i. All random numbers of sample n are
a function of (seed, n). So sample n does not depend on the rank, the worker, the micro-batch or a restart.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nanoip2p.dataset.layouts import Item, Pair, load_picture
from nanoip2p.images import to_tensor
from nanoip2p.tokenizer import Tokenizer


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch visits the items: a permutation (count,) of 0 ... count - 1."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def draw(seed: int, number: int, shape: tuple[int, int, int], timesteps: int) -> dict:
    """All random numbers of sample `number`, on the CPU. shape: of the latents, (C, h, w).

    `posterior` and `noise` are standard normal, of this shape. `timestep` is an integer in [0, timesteps).
    `which` (chooses a pair of the item), `flip` and `drop` are uniform in [0, 1).
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


def load_pair(resolution: int, tokenizer: Tokenizer, pair: Pair, flip: bool) -> tuple[Tensor, ...]:
    """Before and after (3, H, W) in [-1, 1], and token ids (77,). ValueError for a broken picture."""
    before, after = (to_tensor(load_picture(picture, resolution, flip))
                     for picture in (pair.before, pair.after))
    return before, after, tokenizer([pair.edit])[0]


class Samples(Dataset):
    """samples[n] is a dict: the random numbers of sample n, and one pair of its item.

    get(pair, flip): `load_pair` or Cache.get. flips: mirror half of the pairs. shape, timesteps: see `draw`.
    A sample of a broken picture is {"error": reason}, or with skip_bad the sample of the next sound item.
    """

    def __init__(self, items: list[Item], get: Callable, seed: int, flips: bool, shape: tuple[int, int, int],
                 timesteps: int, skip_bad: bool = False):
        self.items, self.get, self.seed, self.flips = items, get, seed, flips
        self.shape, self.timesteps, self.skip_bad = shape, timesteps, skip_bad

    def __getitem__(self, number: int) -> dict:
        drawn, skipped, count = draw(self.seed, number, self.shape, self.timesteps), [], len(self.items)
        epoch, place = divmod(number, count)
        places = order(self.seed, epoch, count)
        for ahead in range(count if self.skip_bad else 1):
            item = self.items[places[(place + ahead) % count]]
            pair = item[int(float(drawn["which"]) * len(item))]
            try:
                before, after, text = self.get(pair, self.flips and bool(drawn["flip"] < 0.5))
                return drawn | {"before": before, "after": after, "text": text, "skipped": skipped,
                                "name": f"{number} ('{pair.edit}' on {pair.before})"}
            except ValueError as error:
                skipped.append(str(error))
        advice = "no other pair is sound" if self.skip_bad else "--skip-bad leaves out such pairs"
        return {"error": f"{skipped[0]} ({advice})"}


def collate(samples: list[dict]) -> dict:
    """Stack samples to tensors (B, ...), and join their `skipped` lists. If one is an error, return it."""
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
    """Yield batches of samples 0 ... count - 1, with evenly spaced timesteps and no dropped conditions."""
    for numbers in torch.arange(count).split(batch):
        timesteps = (numbers + 0.5) * samples.timesteps / count
        yield collate([samples[number] for number in numbers.tolist()]) | {
            "drop": torch.ones(len(numbers)), "timestep": timesteps.long()}

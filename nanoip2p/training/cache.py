"""Stored latents: every picture and every text is encoded once, and training only reads rows.

    store.json                    what the rows are of; a store of anything else is refused
    texts-00000.safetensors       texts (n, 77, D) float16; the first of all is the empty text
    pictures-00000.safetensors    moments (n, F, 2C, h, w) float16: mean and log-variance, unscaled, so that
                                  targets can be sampled anew. F = 2 with flips: mirrored pictures are encoded
Distinct texts and pictures have a row each, by first appearance. A file appears whole and is not made again.
"""

import hashlib
import json
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from nanoip2p.checkpoint.tensors import write_tensors
from nanoip2p.common.files import read_json, remedy, write_json
from nanoip2p.dataset.layouts import Pair, Picture, load_picture, stamp
from nanoip2p.images import to_tensor

SHARD = 512  # rows: 16 MB of pictures (256 pixels, flips) or 60 MB of texts, and no more is held in memory
Shard = namedtuple("Shard", "path tensor shape items")  # name of the tensor, shape of a row, what rows are of


class Stored:
    """An open store. DataLoader workers get it by fork or pickle; only the rows asked for leave the disk.

    broken: picture -> why it has no row.
    """

    def __init__(self, shards: list[Shard]):
        self.shards, self.broken, self.files = shards, {}, {}
        self.rows = {item: (shard, row) for shard in shards for row, item in enumerate(shard.items)}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"files": {}}  # each process maps them itself

    def get(self, pair: Pair, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Moments before and after, (2C, h, w), and text (77, D): float32, CPU. ValueError for `broken`."""
        return self._row(pair.before, int(flip)), self._row(pair.after, int(flip)), self._row(pair.edit)

    def _row(self, item: str | Picture, *within: int) -> Tensor:
        if item in self.broken:
            raise ValueError(self.broken[item])
        shard, row = self.rows[item]
        file = self.files[shard.path] = self.files.get(shard.path) or safe_open(shard.path, "pt")
        return file.get_slice(shard.tensor)[(row, *within)].float()

    def check(self, shard: Shard) -> None:
        """Map a shard and note its broken pictures. ValueError, in one line, when it is damaged."""
        try:
            file = self.files[shard.path] = safe_open(shard.path, "pt")
            rows = file.get_slice(shard.tensor)
            if (rows.get_dtype(), *rows.get_shape()) != ("F16", len(shard.items), *shard.shape):
                raise ValueError(f"{rows.get_dtype()} of {rows.get_shape()}")
            broken = json.loads(file.metadata()["broken"])
            self.broken |= {shard.items[int(row)]: reason for row, reason in broken.items()}
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{shard.path} is damaged ({error}); delete that file and run again") from None


def open_stored(folder: Path, pairs: list[Pair], vae, text_encoder, tokenizer, resolution: int, flips: bool,
                skip_bad: bool = False, begin: bool = False) -> Stored:
    """Open what `store` made. ValueError: of something else, damaged or, without `begin`, incomplete."""
    texts = list(dict.fromkeys(["", *(pair.edit for pair in pairs)]))
    pictures = list(dict.fromkeys(picture for pair in pairs for picture in (pair.before, pair.after)))
    words = (text_encoder.config, tokenizer.backend.to_str(), tokenizer.start, tokenizer.end, tokenizer.pad)
    _check_key(folder, begin, {
        "autoencoder": _hash(vae.config, vae), "text encoder": _hash((words, tokenizer.length), text_encoder),
        "dataset": _hash([texts, pictures, [*map(_stamp, pictures)]]), "resolution": resolution,
        "flips": flips})
    channels, side = vae.config.latent_channels, resolution // vae.downsampling
    kinds = (("texts", "texts", (tokenizer.length, text_encoder.config.hidden_size), texts),
             ("pictures", "moments", (1 + flips, 2 * channels, side, side), pictures))
    shards = [Shard(folder / f"{name}-{i // SHARD:05d}.safetensors", *about, items[i : i + SHARD])
              for name, *about, items in kinds for i in range(0, len(items), SHARD)]
    stored = Stored(shards)
    for shard in shards:
        if shard.path.exists():
            stored.check(shard)
        elif not begin:
            raise ValueError(f"{shard.path} is missing; run again to make it")
    if stored.broken and not skip_bad:
        raise ValueError(f"{folder} was made without {len(stored.broken)} broken pictures, the first: "
                         f"{[*stored.broken.values()][0]}; --skip-bad goes on without them")
    return stored


@torch.no_grad()
def store(folder: Path, pairs: list[Pair], vae, text_encoder, tokenizer, resolution: int, flips: bool,
          skip_bad: bool = False, rank: int = 0, ranks: int = 1, progress: bool = True) -> None:
    """Write what is missing of this rank's shards (rank, rank + ranks, ...), with the networks as they are.

    ValueError as open_stored, and for a folder that cannot be written, numbers beyond float16, and a broken
    picture; with skip_bad its row is NaN, and the shard's metadata says why."""
    weight, ids_device, broken = vae.quant_conv.weight, next(text_encoder.parameters()).device, {}

    def image(picture: Picture) -> Tensor:
        try:
            return to_tensor(load_picture(picture, resolution))                    # (3, R, R)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{error}; --skip-bad goes on without it") from None
            broken[picture] = str(error)
            return torch.full((3, resolution, resolution), torch.nan)

    def moments(images: Tensor) -> Tensor:
        images = images.to(weight.device, weight.dtype)
        both = (images, images.flip(-1))[: 1 + flips]
        return torch.stack([torch.cat(vae.encode(x), 1) for x in both], 1)         # (B, F, 2C, h, w)

    size = max(1, min(64, 2**21 // resolution**2))  # 32 pictures of 256 pixels, for the sake of memory
    steps = {"texts": (lambda text: tokenizer([text])[0], lambda ids: text_encoder(ids.to(ids_device)), 64),
             "moments": (image, moments, size)}
    try:
        stored = open_stored(folder, pairs, vae, text_encoder, tokenizer, resolution, flips, skip_bad, True)
        mine = stored.shards[rank::ranks]
        todo = [shard for shard in mine if shard.path not in stored.files]
        total, rest = (sum(len(shard.items) for shard in shards) for shards in (mine, todo))
        with tqdm(total=total, initial=total - rest, desc="encoding", disable=not (progress and todo)) as bar:
            for shard in todo:
                rows = _encode(shard.items, *steps[shard.tensor], bar)
                for item, row in zip(shard.items, rows):
                    if item not in broken and not row.isfinite().all():
                        raise ValueError(f"{item}: its encoding is NaN or beyond float16; try fp32 weights")
                why = json.dumps({i: broken[item] for i, item in enumerate(shard.items) if item in broken})
                write_tensors({shard.tensor: rows}, shard.path, metadata={"broken": why})
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error}); the same command goes on later") from None


def _encode(items: list, load: Callable, encode: Callable, size: int, bar: tqdm) -> Tensor:
    """A row for each item, while threads load the next `size` of them."""
    batches, rows = [items[i : i + size] for i in range(0, len(items), size)], []
    with ThreadPoolExecutor(8) as pool:
        ahead = pool.map(load, batches[0])
        for following in [*batches[1:], []]:
            loaded, ahead = torch.stack(list(ahead)), pool.map(load, following)
            rows.append(encode(loaded).half().cpu())
            bar.update(len(loaded))
    return torch.cat(rows)


def _stamp(picture: Picture) -> tuple | None:
    with suppress(OSError):  # what is not there is told when it is to be loaded
        return stamp(picture)


def _hash(facts, network: nn.Module | None = None) -> str:
    """Of facts and of all weights: half a second for those of Stable Diffusion 1.5."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in network.state_dict().items() if network else ():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _check_key(folder: Path, begin: bool, key: dict) -> None:
    """ValueError, in one line, when store.json is not of `key`. begin: write it where there is none."""
    path = folder / "store.json"
    if begin and not path.exists():
        if any(folder.glob("[!.]*")) and not path.exists():  # still: another rank may have been quicker
            raise ValueError(f"{folder} has no store.json; choose another --cache ({remedy(folder)})")
        write_json(key, path)
    made = read_json(path)
    for part in (part for part in key if made.get(part) != key[part]):
        what = part if isinstance(key[part], str) else f"transform ({part} {made.get(part)}, not {key[part]})"
        raise ValueError(f"{folder} was made with another {what}; choose another --cache or delete it")

"""A cache of encoded pictures and texts. Each is encoded once, before training, which reads only the cache.

    cache.json                    hashes of the data and of the encoders
    texts-00000.safetensors       hidden states (n, 77, D) float16; row 0 of this file is the empty text
    pictures-00000.safetensors    moments (n, F, 2C, h, w) float16: mean and log variance, unscaled.
                                  F = 2 with flips: the picture and its mirror image
Each distinct text and picture has one row. Rows are in order of first use. Files are written atomically.
"""

import hashlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nanoip2p.checkpoint.tensors import fingerprint, write_tensors
from nanoip2p.common.files import claim_folder
from nanoip2p.dataset.layouts import Pair, Picture, load_picture, stamp
from nanoip2p.images import to_tensor
from nanoip2p.pipeline import Model

SHARD = 256  # rows per file: 8 MB of pictures (256 pixels, flips) or 30 MB of texts
Shard = namedtuple("Shard", "path tensor items shape")  # path, name of the tensor, its rows, shape of a row


class Cache:
    """A cache folder. `fill` writes its files, `open` checks them, `get` reads the rows of a pair.

    A DataLoader worker can receive the open cache by fork or by pickle. It reads only the rows it needs.
    """

    def __init__(self, folder: Path, pairs: list[Pair], model: Model, resolution: int, flips: bool,
                 skip_bad: bool = False):
        """Reserve the folder. ValueError if the folder holds a cache of other data or other encoders.

        flips: also encode mirror images. skip_bad: allow broken pictures; `get` raises ValueError for them.
        """
        vae, text_encoder, tokenizer = model.vae, model.text_encoder, model.tokenizer
        texts = list(dict.fromkeys(["", *(pair.edit for pair in pairs)]))
        pictures = list(dict.fromkeys(picture for pair in pairs for picture in (pair.before, pair.after)))
        content = [*map(tokenizer.clean, texts)], [*map(stamp, pictures)]
        begin = (text_encoder.config, tokenizer.backend.to_str(), tokenizer.start, tokenizer.end,
                 tokenizer.pad, tokenizer.length)
        claim_folder(folder, "cache.json", {
            "autoencoder": fingerprint(vae, begin=repr(vae.config).encode()),
            "text encoder": fingerprint(text_encoder, begin=repr(begin).encode()),
            "dataset": hashlib.sha256(repr(content).encode()).hexdigest()[:16],
            "resolution": resolution, "flips": flips,
            "reading": 2}, "--cache")  # a version: increase it when the code reads its input differently
        side = resolution // vae.downsampling
        kinds = (("texts", "texts", texts, [tokenizer.length, text_encoder.config.hidden_size]),
                 ("pictures", "moments", pictures, [1 + flips, 2 * vae.config.latent_channels, side, side]))
        self.shards = [
            Shard(folder / f"{name}-{i // SHARD:05d}.safetensors", tensor, items[i : i + SHARD], shape)
            for name, tensor, items, shape in kinds for i in range(0, len(items), SHARD)]
        self.rows = {item: (shard, row) for shard in self.shards for row, item in enumerate(shard.items)}
        self.resolution, self.flips, self.skip_bad = resolution, flips, skip_bad
        self.files = {}  # the mapped file of each shard

    def __getstate__(self) -> dict:
        return self.__dict__ | {"files": {}}  # open files cannot be pickled; the worker opens its own

    @torch.no_grad()
    def fill(self, model: Model, rank: int = 0, ranks: int = 1) -> None:
        """Write the missing files of this rank: files number rank, rank + ranks, ...

        ValueError if an encoding exceeds float16, or if a picture is broken (with skip_bad, its row is NaN).
        """
        def moments(images: Tensor) -> Tensor:
            images = images.to(model.vae.quant_conv.weight)                          # (B, 3, R, R)
            both = (images, images.flip(-1))[: 1 + self.flips]
            return torch.stack([torch.cat(model.vae.encode(x), 1) for x in both], 1)  # (B, F, 2C, h, w)

        size = max(1, min(64, 2**21 // self.resolution**2))  # batch size: 32 pictures of 256 pixels
        steps = {"texts": (lambda text: model.tokenizer([text])[0],
                           lambda ids: model.text_encoder(ids.to(model.device)), 64),
                 "moments": (self._image, moments, size)}
        todo = [shard for shard in self.shards[rank::ranks] if not shard.path.exists()]
        total, hidden = sum(len(shard.items) for shard in todo), rank > 0 or not todo
        with tqdm(total=total, desc="encoding", disable=hidden) as bar, ThreadPoolExecutor(8) as pool:
            for path, tensor, items, _ in todo:
                load, encode, size = steps[tensor]
                loaded, rows = pool.map(load, items), []
                while batch := list(islice(loaded, size)):
                    rows.append(encode(torch.stack(batch)).half().cpu())
                    sound = torch.stack([one.isfinite().all() for one in batch])     # (B,)
                    if not rows[-1][sound].isfinite().all():
                        raise ValueError(f"{path}: an encoding is NaN or beyond float16; try fp32 weights")
                    bar.update(len(batch))
                write_tensors({tensor: torch.cat(rows)}, path)

    def _image(self, picture: Picture) -> Tensor:
        try:
            return to_tensor(load_picture(picture, self.resolution))                 # (3, R, R)
        except ValueError as error:
            if not self.skip_bad:
                raise ValueError(f"{error}; --skip-bad leaves out its pairs") from None
            return torch.full((3, self.resolution, self.resolution), torch.nan)

    def open(self) -> "Cache":
        """Memory-map all files and return self. ValueError if a file is missing or damaged."""
        for path, tensor, items, shape in self.shards:
            if not path.is_file():
                raise ValueError(f"{path} is missing; run again to write it")
            try:
                self.files[path] = safe_open(path, "pt")
                stored = self.files[path].get_slice(tensor)
                if (stored.get_shape(), stored.get_dtype()) != ([len(items), *shape], "F16"):
                    raise ValueError(f"it holds {stored.get_dtype()} {stored.get_shape()}")
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete that file and run again") from None
        return self

    def get(self, pair: Pair, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of both pictures, (2C, h, w) each, and hidden states of the text (77, D), in float32."""
        return self.row(pair.before, int(flip)), self.row(pair.after, int(flip)), self.row(pair.edit)

    def row(self, item: str | Picture, *within: int) -> Tensor:
        """The row of a picture or text. within: indices into the row. ValueError if the picture is broken."""
        shard, row = self.rows[item]
        file = self.files[shard.path] = self.files.get(shard.path) or safe_open(shard.path, "pt")
        content = file.get_slice(shard.tensor)[(row, *within)].float()
        if not content.isfinite().all():
            raise ValueError(f"{item} was broken when this cache was made")
        return content

"""Training pairs: what there is, in the layouts people have or rendered on the spot, and one transform.

`read_data` finds, in a folder or as the file itself:

    seeds.json        the original's layout: 0000000/prompt.json, 0000000/<seed>_0.jpg, 0000000/<seed>_1.jpg
    pairs.jsonl       {"input": path, "edit": text, "output": path}, paths relative to its folder; also with
                      captions of both pictures, "input_caption" and "output_caption"
    *.parquet         also in data/, with the columns of one of three datasets on the Hub, see COLUMNS
    edit_turns.json   MagicBrush: with images/<id>/ beside it, also in train/, dev/ and test/
"""

import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from threading import Lock

from PIL import Image, ImageOps
from tqdm import tqdm

from nanoip2p.common.files import read_json, read_rows, remedy
from nanoip2p.images import fit, open_image
from nanoip2p.world.scenes import Scene

SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}  # as the original, contiguous
OWN_SPLIT = re.compile(r"(?:^|/)(?:(dev|val|validation)|(test))[-./]")  # dev/..., data/dev-00000...
COLUMNS = (  # picture before, instruction, picture after
    ("original_image", "edit_prompt", "edited_image"),  # timbrooks/instructpix2pix-clip-filtered
    ("input_image", "edit_prompt", "edited_image"),     # fusing/instructpix2pix-1000-samples
    ("source_img", "instruction", "target_img"),        # osunlp/MagicBrush
)
PROMPTS = ("original_prompt", "edited_prompt")  # captions, in the first of them
CAPTIONS = ("input_caption", "output_caption")  # the same in pairs.jsonl
ONE_AT_A_TIME = Lock()


@dataclass(frozen=True)
class Cell:
    """A picture inside a parquet file; rows are counted from 0 through all its row groups."""

    file: Path
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}, column {self.column}"


Picture = Path | Scene | Cell


@dataclass(frozen=True)
class Pair:
    """One example: a picture, an instruction, the edited picture; captions of both, if the data has them."""

    before: Picture
    edit: str
    after: Picture
    captions: tuple[str, str] | None = None


Item = tuple[Pair, ...]  # the pairs of one prompt; training draws one of them at each visit, as the original


def read_data(source: str | Path, split: str = "train", skip_bad: bool = False) -> list[Item]:
    """The items of a split, one of SPLITS, in order; no items for a split that is empty, unless it is train.

    A dataset with files of its own for dev or test keeps its splits; any other is cut contiguously. Raises
    ValueError for an unknown layout, a broken list, a text, column or picture that is missing, and an empty
    train split. skip_bad: pairs whose pictures are missing are left out, with a warning that counts them.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"there is no {source} to read training pairs from")
    items = _with_pictures(_read(source, split), skip_bad)
    if not items and split == "train":
        raise ValueError(f"{source} has no pairs in its train split (the first 90%, if it comes unsplit)")
    return items


def _read(source: Path, split: str) -> list[Item]:
    if (source / "seeds.json").exists():
        return _original(source, SPLITS[split])
    for path in (source, source / "pairs.jsonl"):
        if path.suffix == ".jsonl" and path.exists():
            return _jsonl(path, SPLITS[split])
    files = sorted([*source.glob("*.parquet"), *source.glob("data/*.parquet")])
    if files or source.suffix == ".parquet":
        return _parquet(*_own_split(source, files or [source], split))
    files = sorted([*source.glob("edit_turns.json"), *source.glob("*/edit_turns.json")])
    if files:
        return _magicbrush(*_own_split(source, files, split))
    raise ValueError(f"{source} is no training data: that is a .jsonl or .parquet file, or a folder with "
                     "seeds.json, pairs.jsonl, *.parquet (also in data/) or edit_turns.json (also in train/ "
                     f"and dev/); {remedy(source)}")


def _own_split(root: Path, files: list[Path], split: str) -> tuple[list[Path], tuple[float, float]]:
    """The files that hold the split, and its share of their pairs."""
    names = [OWN_SPLIT.search(file.relative_to(root).as_posix()) for file in files]
    if not any(names):
        return files, SPLITS[split]
    theirs = ["train" if not name else "validation" if name[1] else "test" for name in names]
    return [file for file, own in zip(files, theirs) if own == split], (0.0, 1.0)


def _cut(rows: list, share: tuple[float, float]) -> list:
    return rows[int(share[0] * len(rows)) : int(share[1] * len(rows))]


def _texts(row, keys: tuple[str, ...], where: str) -> list[str]:
    row = row if isinstance(row, dict) else {}
    for key in keys:
        if not isinstance(row.get(key), str):
            raise ValueError(f'{where}: no text under "{key}"; it has {", ".join(row) or "nothing"}')
    return [row[key] for key in keys]


def _captions(row, keys: tuple[str, str]) -> tuple[str, str] | None:
    texts = tuple(row.get(key) if isinstance(row, dict) else None for key in keys)
    return texts if all(isinstance(text, str) for text in texts) else None


def _original(root: Path, share: tuple[float, float]) -> list[Item]:
    """A prompt without surviving pictures has no seeds and is skipped, after the split as in the original."""
    items = []
    for entry in _cut(read_json(root / "seeds.json", kind=list), share):
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, list]:
            raise ValueError(f'{root / "seeds.json"}: {entry!r} is not ["0000000", ["seed", ...]]')
        folder, seeds = root / entry[0], entry[1]
        if seeds:
            prompt = read_json(folder / "prompt.json")
            edit, = _texts(prompt, ("edit",), str(folder / "prompt.json"))
            captions = _captions(prompt, ("input" if "input" in prompt else "caption", "output"))
            items.append(tuple(Pair(folder / f"{s}_0.jpg", edit, folder / f"{s}_1.jpg", captions)
                               for s in seeds))
    return items


def _jsonl(path: Path, share: tuple[float, float]) -> list[Item]:
    root, keys = path.parent, ("input", "edit", "output")
    rows = [(*_texts(row, keys, f"{path}, line {number}"), _captions(row, CAPTIONS))
            for number, row in read_rows(path)]
    return [(Pair(root / before, edit, root / after, captions),)
            for before, edit, after, captions in _cut(rows, share)]


def _magicbrush(files: list[Path], share: tuple[float, float]) -> list[Item]:
    items = []
    for path in files:
        told = read_json(path.with_name("global_descriptions.json"), missing={})
        for number, row in enumerate(read_json(path, kind=list)):
            before, edit, after = _texts(row, ("input", "instruction", "output"), f"{path}, entry {number}")
            name = before.split("-")[0]  # 242679-input.png is in images/242679
            folder, captions = path.parent / "images" / name, _captions(told.get(name, {}), (before, after))
            items.append((Pair(folder / before, edit, folder / after, captions),))
    return _cut(items, share)


def _parquet(files: list[Path], share: tuple[float, float]) -> list[Item]:
    items = []
    for path in files:
        with _open_parquet(path) as file:
            schema = file.schema_arrow
            columns = next((columns for columns in COLUMNS if set(columns) <= set(schema.names)), None)
            if not columns or not all("binary" in str(schema.field(name).type) for name in columns[::2]):
                raise ValueError(f"{path} has the columns {', '.join(schema.names)}; known, with "
                                 f"pictures as bytes, {' | '.join(', '.join(names) for names in COLUMNS)}")
            before, edit, after = columns
            known = [edit, *(name for name in PROMPTS if name in schema.names)]
            rows = file.read(columns=known, use_threads=False).to_pylist()
        for row, texts in enumerate(rows):
            text, = _texts(texts, (edit,), f"{path} row {row}")
            pictures = Cell(path, row, before), Cell(path, row, after)
            items.append((Pair(pictures[0], text, pictures[1], _captions(texts, PROMPTS)),))
    return _cut(items, share)


@contextmanager
def _open_parquet(path: Path) -> Iterator:
    """A pyarrow.parquet.ParquetFile. It is opened for every read, because it must not cross a fork."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} is read by a package that is not installed; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None


@lru_cache(maxsize=1024)
def _group_starts(path: Path) -> list[int]:
    with _open_parquet(path) as file:
        groups = range(file.metadata.num_row_groups)
        return list(accumulate((file.metadata.row_group(group).num_rows for group in groups), initial=0))


@lru_cache(maxsize=4)  # before and after, of this row group and of the next, where some threads are already
def _column(path: Path, group: int, column: str):
    with _open_parquet(path) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


def _content(cell: Cell) -> BytesIO:
    starts = _group_starts(cell.file)
    group = bisect_right(starts, cell.row) - 1
    with ONE_AT_A_TIME:  # or threads that miss the same group would all read it
        content = _column(cell.file, group, cell.column)[cell.row - starts[group]].as_py()
    return BytesIO(content.get("bytes") if isinstance(content, dict) else content)  # of None: no picture


def _with_pictures(items: list[Item], skip_bad: bool) -> list[Item]:
    """What is left without the pairs that lack a file; these raise ValueError unless skip_bad."""
    missing = {pair: path for item in items for pair in item for path in (pair.after, pair.before)
               if isinstance(path, Path) and not os.path.isfile(path)}
    if not missing:
        return items
    told = f"there is no picture {next(iter(missing.values()))}"
    if not skip_bad:
        raise ValueError(f"{told} (pairs that lack one: {len(missing)}); --skip-bad leaves them out")
    warnings.warn(f"pairs left out: {len(missing)}; for the first {told}", stacklevel=3)
    kept = (tuple(pair for pair in item if pair not in missing) for item in items)
    return [item for item in kept if item]


def load_picture(picture: Picture, resolution: int, flip: bool = False) -> Image.Image:
    """A square RGB picture: the short side resized to `resolution` (LANCZOS), the middle kept.

    flip: mirrored. Raises ValueError naming the file, row and column that is missing, broken or no picture.
    """
    if isinstance(picture, Scene):
        image = picture.render(resolution)
    else:
        image = open_image(picture, _content(picture) if isinstance(picture, Cell) else None)
        image = fit(image, (resolution, resolution))
    return ImageOps.mirror(image) if flip else image


def stamp(picture: Picture) -> tuple:
    """What stays the same while a picture does: a file's name, size and time of change, or a scene's repr."""
    if isinstance(picture, Scene):
        return (repr(picture),)
    if isinstance(picture, Cell):
        return (*stamp(picture.file), picture.row, picture.column)
    status = picture.stat()
    return (str(picture), status.st_size, status.st_mtime_ns)


def broken_pictures(source: str | Path, resolution: int) -> tuple[int, int, list[str]]:
    """Open everything: how many pictures and sound pairs there are, and what is wrong."""
    with warnings.catch_warnings(record=True) as missing:
        items = [item for split in SPLITS for item in read_data(source, split, skip_bad=True)]
    pairs, broken = [pair for item in items for pair in item], {}
    pictures = dict.fromkeys(picture for pair in pairs for picture in (pair.before, pair.after))
    for picture in tqdm(pictures, desc="opening pictures", unit="picture"):
        try:
            load_picture(picture, resolution)
        except ValueError as error:
            broken[picture] = str(error)
    sound = sum(not {pair.before, pair.after} & broken.keys() for pair in pairs)
    return len(pictures), sound, [*(str(warning.message) for warning in missing), *broken.values()]

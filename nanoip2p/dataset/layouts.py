"""Read training pairs from disk, and load and resize pictures. `read_data` reads these layouts:

    seeds.json        the original layout: 0000000/prompt.json, 0000000/<seed>_0.jpg, 0000000/<seed>_1.jpg
    pairs.jsonl       {"input": path, "edit": text, "output": path}, paths relative to its folder; optionally
                      with captions of both pictures, "input_caption" and "output_caption"
    *.parquet         (or data/*.parquet) with the columns of one of three datasets on the Hub, see COLUMNS
    edit_turns.json   (or in train/, dev/, test/) MagicBrush, with its images/<id>/ beside the file

The paths in pairs.jsonl, which users write themselves, may lead anywhere. Those in the other layouts, which
users download, stay in their folder.
"""

import re
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from threading import Lock

from PIL import Image, ImageOps
from tqdm import tqdm

from nanoip2p.common.files import inside, listing, read_json, read_rows, regular
from nanoip2p.common.schema import checked
from nanoip2p.images import fit, open_image
from nanoip2p.world.scenes import Scene

SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}  # as in the original
OWN_SPLIT = re.compile(r"(?:^|/)(?:(dev|val|validation)|(test))[-./]")  # dev/..., data/dev-00000...
COLUMNS = (  # picture before, instruction, picture after
    ("original_image", "edit_prompt", "edited_image"),  # timbrooks/instructpix2pix-clip-filtered
    ("input_image", "edit_prompt", "edited_image"),     # fusing/instructpix2pix-1000-samples
    ("source_img", "instruction", "target_img"),        # osunlp/MagicBrush
)
PARQUET_CAPTIONS = ("original_prompt", "edited_prompt")  # in the first of these datasets
MOST_ROWS = 5_000_000  # of a parquet file: the largest dataset of edits has 4 million. A row takes 0.7 kB
# Bytes of a parquet row group before compression: 1 GB, or this multiple of the file, because pictures do not
# compress further. A file that claims more is a decompression bomb
GROUP_BYTES, GROUP_MULTIPLE = 2**30, 10
READ_LOCK = Lock()  # without the lock, threads that need the same row group would each read it


@dataclass(frozen=True)
class Cell:
    """A picture inside a parquet file."""

    file: Path
    group: int   # row group
    row: int     # within the row group
    column: str
    number: int  # row within the file, for messages

    def __str__(self) -> str:
        return f"{self.file} row {self.number}, column {self.column}"


Picture = Path | Scene | Cell


@dataclass(frozen=True)
class Pair:
    """One example: input picture, instruction, edited picture, and both captions if the data has them."""

    before: Picture
    edit: str
    after: Picture
    captions: tuple[str, str] | None = None


Item = tuple[Pair, ...]  # the pairs of one prompt; each epoch draws one pair, as in the original


def read_data(source: str | Path, split: str = "train", skip_bad: bool = False) -> list[Item]:
    """The items of a split (a key of SPLITS), in order.

    A dataset with separate dev or test files keeps its splits. Other datasets are cut into contiguous splits.
    Raises ValueError for an unknown layout, a broken file, a missing text, column or picture, and an empty
    train split. skip_bad: skip the pairs with a missing picture, and warn with their number.
    """
    items = _read(Path(source), split)
    missing = [p for p in _pictures(items) if isinstance(p, Path) and not p.is_file()]
    if missing:
        problem, sound = f"there is no picture {missing[0]}", _without(items, set(missing))
        count = sum(map(len, items)) - sum(map(len, sound))
        if not skip_bad:
            raise ValueError(f"{problem} (pairs that lack one: {count}); --skip-bad leaves them out")
        warnings.warn(f"pairs left out: {count}; for the first {problem}", stacklevel=2)
        items = sound
    if not items and split == "train":
        raise ValueError(f"{source} has no pairs in its train split (the first 90%, or its split files)")
    return items


def _pictures(items: list[Item]) -> dict[Picture, None]:
    """The distinct pictures, in order."""
    return dict.fromkeys(picture for item in items for pair in item for picture in (pair.after, pair.before))


def _without(items: list[Item], bad: Set[Picture]) -> list[Item]:
    """The items without the pairs that have a bad picture."""
    kept = (tuple(pair for pair in item if not {pair.before, pair.after} & bad) for item in items)
    return [item for item in kept if item]


def _read(source: Path, split: str) -> list[Item]:
    if not source.exists():
        raise ValueError(f"there is no {source} to read training pairs from")
    if (source / "seeds.json").exists():
        return _original(source / "seeds.json", split)
    single = {".jsonl": _jsonl, ".parquet": _parquet}.get(source.suffix)
    for reader, *patterns in ((_jsonl, "pairs.jsonl"), (_parquet, "*.parquet", "data/*.parquet"),
                              (_magicbrush, "edit_turns.json", "*/edit_turns.json")):
        files = [source] if reader is single else sorted(
            file for pattern in patterns for file in source.glob(pattern))
        own = [OWN_SPLIT.search(file.relative_to(source).as_posix()) for file in files]
        if any(own):
            splits = ["train" if not match else "validation" if match[1] else "test" for match in own]
            files = [file for file, its_split in zip(files, splits) if its_split == split]
            return [item for file in files for item in reader(file)]
        if files:
            return _cut([item for file in files for item in reader(file)], split)
    raise ValueError(f"{source} is no training data: that is a .jsonl or .parquet file, or a folder with "
                     "seeds.json, pairs.jsonl, *.parquet (also in data/) or edit_turns.json (also in train/ "
                     f"and dev/); {listing(source)}")


def _texts(row, keys: tuple[str, ...], where: str) -> list[str]:
    row = row if isinstance(row, dict) else {}
    for key in keys:
        if not isinstance(row.get(key), str):
            raise ValueError(f'{where}: no text under "{key}"; it has {", ".join(row) or "nothing"}')
    return [checked(row[key], str, f"{where}: {key}") for key in keys]


def _captions(row, keys: tuple[str, str], where: str) -> tuple[str, str] | None:
    found = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)
    return tuple(_texts(row, keys, where)) if found else None


def _cut(rows: list, split: str) -> list:
    begin, end = SPLITS[split]
    return rows[int(begin * len(rows)) : int(end * len(rows))]


def _original(path: Path, split: str) -> list[Item]:
    """As in the original: split all prompts first, then skip the prompts without pairs."""
    items = []
    for entry in _cut(read_json(path, kind=list), split):
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, list]:
            raise ValueError(f'{path}: {entry!r:.80} is not ["0000000", ["seed", ...]]')
        folder, seeds = inside(path.parent, entry[0]), checked(entry[1], list[str | int], f"{path}: seeds")
        if seeds:
            where = folder / "prompt.json"
            prompt = read_json(where)
            edit, = _texts(prompt, ("edit",), where)
            captions = _captions(prompt, ("input" if "input" in prompt else "caption", "output"), where)
            items.append(tuple(Pair(inside(path.parent, f"{entry[0]}/{s}_0.jpg"), edit,
                                    inside(path.parent, f"{entry[0]}/{s}_1.jpg"), captions) for s in seeds))
    return items


def _jsonl(path: Path) -> Iterator[Item]:
    for number, row in read_rows(path, ".jsonl"):
        where = f"{path}, line {number}"
        before, edit, after = _texts(row, ("input", "edit", "output"), where)
        captions = _captions(row, ("input_caption", "output_caption"), where)
        yield (Pair(path.parent / before, edit, path.parent / after, captions),)


def _magicbrush(path: Path) -> Iterator[Item]:
    descriptions = read_json(path.with_name("global_descriptions.json"), missing={})
    for number, row in enumerate(read_json(path, kind=list)):
        where = f"{path}, entry {number}"
        before, edit, after = _texts(row, ("input", "instruction", "output"), where)
        name = before.split("-")[0]  # 242679-input.png is in images/242679
        captions = _captions(descriptions.get(name), (before, after), where)
        pictures = [inside(path.parent, f"images/{name}/{picture}") for picture in (before, after)]
        yield (Pair(pictures[0], edit, pictures[1], captions),)


def _parquet(path: Path) -> Iterator[Item]:
    with _open_parquet(path) as file:
        schema, number = file.schema_arrow, 0
        columns = next((columns for columns in COLUMNS if set(columns) <= set(schema.names)), None)
        if not columns or not all("binary" in str(schema.field(name).type) for name in columns[::2]):
            raise ValueError(f"{path} has the columns {', '.join(schema.names)}; readable, with pictures "
                             f"as bytes: {' | '.join(', '.join(names) for names in COLUMNS)}")
        before, edit, after = columns
        texts = [edit, *(name for name in PARQUET_CAPTIONS if name in schema.names)]
        for group in range(file.num_row_groups):
            columns = _read_group(file, path, group, texts).columns
            for row, values in enumerate(zip(*columns)):  # one by one: all texts together can take many GB
                found, where = dict(zip(texts, [value.as_py() for value in values])), f"{path} row {number}"
                instruction, = _texts(found, (edit,), where)
                cells = [Cell(path, group, row, column, number) for column in (before, after)]
                yield (Pair(cells[0], instruction, cells[1], _captions(found, PARQUET_CAPTIONS, where)),)
                number += 1


@contextmanager
def _open_parquet(path: Path) -> Iterator:
    """Open a pyarrow.parquet.ParquetFile. Close it soon: an open one must not be used after a fork.

    Raises ValueError for a file beyond MOST_ROWS or GROUP_BYTES, and for errors of pyarrow in the block.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"to read {path}, first pip install pyarrow") from None
    try:
        about = parquet.read_metadata(regular(path))
        groups = range(about.num_row_groups)
        largest = max([about.row_group(group).total_byte_size for group in groups], default=0)
        most = max(GROUP_BYTES, GROUP_MULTIPLE * path.stat().st_size)
        if about.num_rows > MOST_ROWS or largest > most:
            raise ValueError(f"{path} has {about.num_rows} rows and {largest} bytes in a row group; at most "
                             f"{MOST_ROWS} rows and {most} bytes are read; split it")
        # A value that repeats stays in its dictionary: written out for each row, it could take many GB
        texts = [i for i in range(about.num_columns) if about.schema.column(i).physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, memory_map=True, metadata=about, read_dictionary=texts) as file:
            yield file
    except (OSError, LookupError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None


def _read_group(file, path: Path, group: int, columns: list[str]):
    """Read columns of a row group as a pyarrow.Table whose values exist and are valid."""
    try:
        table = file.read_row_group(group, columns, use_threads=False)
    except OSError as error:
        # The column's encoding has no dictionary, so pyarrow cannot read it with read_dictionary. The
        # metadata lists the encodings, but pyarrow 26 aborts the process if that list is broken
        if "DeltaLengthByteArray" not in str(error):
            raise
        with type(file)(path, memory_map=True, metadata=file.metadata) as plain:
            table = plain.read_row_group(group, columns, use_threads=False)
    table.validate(full=True)
    if table.num_rows != file.metadata.row_group(group).num_rows:
        raise OSError(f"row group {group} lacks rows")
    return table


@lru_cache(maxsize=4)  # the two picture columns of two successive row groups
def _column(path: Path, group: int, column: str):
    with _open_parquet(path) as file:
        return _read_group(file, path, group, [column]).column(0)


def _content(cell: Cell) -> BytesIO:
    with READ_LOCK:
        column = _column(cell.file, cell.group, cell.column)
        content = column[cell.row].as_py() if cell.row < len(column) else None  # the file can have changed
    content = content.get("bytes") if isinstance(content, dict) else content
    return BytesIO(content if isinstance(content, bytes) else b"")  # open_image refuses an empty file


def load_picture(picture: Picture, resolution: int, flip: bool = False) -> Image.Image:
    """Load a square RGB picture: short side resized to `resolution` (LANCZOS), then centre-cropped.

    The original squeezes pictures that are not square, in training and in its metrics.
    flip: mirror the picture. Raises ValueError for a missing or broken picture; names the file, row, column.
    """
    if isinstance(picture, Scene):
        image = picture.render(resolution)
    else:
        image = open_image(picture, _content(picture) if isinstance(picture, Cell) else None)
        image = fit(image, (resolution, resolution))
    return ImageOps.mirror(image) if flip else image


def stamp(picture: Picture) -> tuple:
    """A cache key that changes with the picture: a scene's repr, or a file's name, size and time."""
    if isinstance(picture, Scene):
        return (repr(picture),)
    if isinstance(picture, Cell):
        return (*stamp(picture.file), picture.number, picture.column)
    status = picture.stat()
    return (str(picture), status.st_size, status.st_mtime_ns)


def broken_pictures(source: str | Path, resolution: int) -> tuple[int, int, list[str]]:
    """Open every picture of every split. Returns (number of pictures, number of good pairs, messages)."""
    with warnings.catch_warnings(record=True) as missing:
        items = [item for split in SPLITS for item in read_data(source, split, skip_bad=True)]
    pictures, broken = _pictures(items), {}
    for picture in tqdm(pictures, desc="opening pictures", unit="picture"):
        try:
            load_picture(picture, resolution)
        except ValueError as error:
            broken[picture] = str(error)
    problems = [*(str(warning.message) for warning in missing), *broken.values()]
    return len(pictures), sum(map(len, _without(items, broken.keys()))), problems

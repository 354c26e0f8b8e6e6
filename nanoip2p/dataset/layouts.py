"""Read training pairs from disk, and load and resize pictures. `read_data` reads these layouts:

    seeds.json        the original layout: 0000000/prompt.json, 0000000/<seed>_0.jpg, 0000000/<seed>_1.jpg
    pairs.jsonl       {"input": path, "edit": text, "output": path}, paths relative to its folder; optionally
                      with captions of both pictures, "input_caption" and "output_caption"
    *.parquet         (or data/*.parquet) with the columns of a dataset on the Hub, see tables.COLUMNS
    edit_turns.json   (or in train/, dev/, test/) MagicBrush, with its images/<id>/ beside the file
    *.tar             (or data/*.tar) of webdataset: x.input.jpg, x.edit.txt, x.output.jpg (or see COLUMNS)
    metadata.jsonl    (.csv or .parquet; or in train/, test/) an image folder of `datasets`

Users write pairs.jsonl themselves, so its paths may lead anywhere. Users download the other layouts, so paths
in these must stay in their folder.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from nanoip2p.common.files import inside, listing, read_json
from nanoip2p.common.schema import checked
from nanoip2p.dataset import tables
from nanoip2p.dataset.tables import COLUMNS, Cell, Member, Names
from nanoip2p.images import fit, open_image
from nanoip2p.world.scenes import Scene

SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}  # as in the original
METADATA = [f"{folder}metadata.{kind}" for folder in ("", "*/") for kind in ("jsonl", "csv", "parquet")]
PARQUET, TAR = ("".join(f"[{x}{x.upper()}]" for x in kind) for kind in ("parquet", "tar"))  # in any case
OWN_SPLIT = re.compile(r"(?:^|/)(?:(dev|val|validation)|(test))[-./]")  # dev/..., data/dev-00000...

Picture = Path | Scene | Cell | Member


@dataclass(frozen=True)
class Pair:
    """One example: input picture, instruction, edited picture, and both captions if the data has them."""

    before: Picture
    edit: str
    after: Picture
    captions: tuple[str, str] | None = None


class FileError(ValueError):
    """A file cannot be read, or only its first rows can be read."""


Item = tuple[Pair, ...]  # the pairs of one prompt; each epoch draws one pair, as in the original


def read_data(source: str | Path, split: str = "train", skip_bad: bool = False,
              columns: Sequence[str] | None = None) -> list[Item]:
    """The items of a split (a key of SPLITS), in order.

    A dataset with separate dev or test files keeps its splits. Other datasets are cut into contiguous splits.
    Raises ValueError for an unknown layout, a broken file, a missing text, column or picture, and an empty
    train split. skip_bad: leave out rows that cannot be read and pairs with a missing picture, and warn of
    their number. columns: names of input, edit and output in a table, in place of COLUMNS.
    """
    items, counts, problems = _survey(source, split, skip_bad, columns)
    if problems and not skip_bad:
        raise ValueError(f"{problems[0]} ({told(counts)}); --skip-bad leaves them out")
    if problems:
        warnings.warn(f"left out of the {split} split ({told(counts)}); the first: {problems[0]}",
                      stacklevel=2)
    if not items and split == "train":
        raise ValueError("; ".join([f"{source} has no pairs in its train split. Without dev or test files, "
                                    "this is the first 90%, so give at least 2 pairs", *problems[:1]]))
    return items


def told(counts: dict[str, int]) -> str:
    """The counts that are not 0, in words: "reason: count, reason: count"."""
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items() if count)


def _survey(source: str | Path, split: str | None, skip_bad: bool,
            columns: Sequence[str] | None) -> tuple[list[Item], dict[str, int], list[str]]:
    """The sound items of a split (None: all), the numbers left out by reason, a message for each problem."""
    rows = _read(Path(source), split, skip_bad, columns and tuple(columns))
    bad = [row for row in rows if isinstance(row, ValueError)]
    cut_off = sum(isinstance(row, FileError) for row in bad)
    items = [row for row in rows if row and not isinstance(row, ValueError)]
    missing = [p for p in _pictures(items) if isinstance(p, Path) and not p.is_file()]
    sound = without(items, set(missing))
    counts = {"rows that cannot be read": len(bad) - cut_off,
              "files that cannot be read to their end": cut_off,
              "pairs that lack a picture": sum(map(len, items)) - sum(map(len, sound))}
    return sound, counts, [*map(str, bad)] + [f"there is no picture {picture}" for picture in missing]


def _pictures(items: list[Item]) -> dict[Picture, None]:
    """The distinct pictures, in order."""
    return dict.fromkeys(picture for item in items for pair in item for picture in (pair.before, pair.after))


def without(items: list[Item], bad: Set[Picture]) -> list[Item]:
    """The items without the pairs that have a bad picture."""
    kept = (tuple(pair for pair in item if not {pair.before, pair.after} & bad) for item in items)
    return [item for item in kept if item]


def _read(source: Path, split: str | None, skip_bad: bool, columns: Names | None) -> list[Item | ValueError]:
    """Find the layout, and read the rows of a split: their items and, with skip_bad, also their errors."""
    if not source.exists():
        raise ValueError(f"there is no {source} to read training pairs from")
    for layout in ((_original, "seeds.json"), (_table, "pairs.jsonl"),
                   (_table, f"*.{PARQUET}", f"data/*.{PARQUET}"),
                   (_magicbrush, "edit_turns.json", "*/edit_turns.json"),
                   (_table, f"*.{TAR}", f"data/*.{TAR}"), (_table, *METADATA)):
        reader, *patterns = layout
        if files := sorted(file for pattern in patterns for file in source.glob(pattern)):
            break
    else:
        reader, files = _table, [source]
        if source.suffix.lower() not in (".jsonl", ".csv", ".parquet", ".tar"):
            raise ValueError(f"{source} is no training data; give a .jsonl, .csv, .parquet or .tar file, or "
                             "a folder with seeds.json, pairs.jsonl, *.parquet or *.tar (also in data/), "
                             "edit_turns.json or metadata.jsonl, .csv or .parquet (these also in train/ and "
                             f"dev/); {listing(source)}")
    if columns and reader is not _table:
        raise ValueError(f"{source}: --columns is for .jsonl, .csv, .parquet and .tar files only; leave it "
                         "out")
    own = [OWN_SPLIT.search(file.relative_to(source).as_posix()) for file in files]
    if any(own):
        splits = ["train" if not match else "validation" if match[1] else "test" for match in own]
        files = [file for file, its_split in zip(files, splits) if split in (its_split, None)]
    rows = [row for file in files for row in _made(reader(file, columns, split), skip_bad)]
    return rows if any(own) or reader is _original else _cut(rows, split)


def _made(rows: Iterator[Callable[[], Item]], skip_bad: bool) -> Iterator[Item | ValueError]:
    """Yield the item of each row. skip_bad: yields errors of rows and of the file instead of raising them."""
    if not skip_bad:
        yield from (make() for make in rows)
        return
    try:
        for make in rows:
            try:
                yield make()
            except ValueError as error:
                yield error
    except ValueError as error:
        yield FileError(error)


def _text(row, key: str, where: str) -> str:
    row = row if isinstance(row, dict) else {}
    if not isinstance(row.get(key), str):
        raise ValueError(f'{where}: no text under "{key}"; it has {", ".join(row) or "nothing"}')
    return checked(row[key], str, f"{where}: {key}")


def _captions(row, keys: tuple[str, str], where: str) -> tuple[str, str] | None:
    found = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)
    return tuple(_text(row, key, where) for key in keys) if found else None


def _cut(rows: list, split: str | None) -> list:
    begin, end = SPLITS[split] if split else (0, 1)
    return rows[int(begin * len(rows)) : int(end * len(rows))]


def _original(path: Path, _columns: None, split: str) -> Iterator[Callable[[], Item]]:
    """As in the original: split all prompts first, then skip the prompts without pairs."""
    def item(entry) -> Item:
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, list]:
            raise ValueError(f'{path}: {entry!r:.80} is not ["0000000", ["seed", ...]]')
        folder, seeds = inside(path.parent, entry[0]), checked(entry[1], list[str | int], f"{path}: seeds")
        if not seeds:
            return ()
        where = folder / "prompt.json"
        prompt = read_json(where)
        edit = _text(prompt, "edit", where)
        captions = _captions(prompt, ("input" if "input" in prompt else "caption", "output"), where)
        return tuple(Pair(inside(path.parent, f"{entry[0]}/{s}_0.jpg"), edit,
                          inside(path.parent, f"{entry[0]}/{s}_1.jpg"), captions) for s in seeds)

    return (partial(item, entry) for entry in _cut(read_json(path, kind=list), split))


def _magicbrush(path: Path, _columns: None, _split: str) -> Iterator[Callable[[], Item]]:
    descriptions = read_json(path.with_name("global_descriptions.json"), missing={})

    def item(row, where: str) -> Item:
        before, edit, after = (_text(row, key, where) for key in ("input", "instruction", "output"))
        name = before.split("-")[0]  # 242679-input.png is in images/242679
        captions = _captions(descriptions.get(name), (before, after), where)
        pictures = [inside(path.parent, f"images/{name}/{picture}") for picture in (before, after)]
        return (Pair(pictures[0], edit, pictures[1], captions),)

    for number, row in enumerate(read_json(path, kind=list)):
        yield partial(item, row, f"{path}, entry {number}")


def _table(path: Path, columns: Names | None, _split: str) -> Iterator[Callable[[], Item]]:
    return (partial(_from_row, row, path, columns) for row in tables.table_rows(path, columns))


def _from_row(row: tuple[str, dict] | ValueError, path: Path, columns: Names | None) -> Item:
    """The pairs of a row of a table: one for each wording of the edit, and one for an inverse edit."""
    if isinstance(row, ValueError):
        raise row
    where, row = row
    names = tables.chosen(tuple(row), columns) or columns or COLUMNS[-1]
    # A pairs.jsonl, or a table like it: the user wrote it, so its pictures may lie outside its folder
    own = names == COLUMNS[-1] and path.suffix.lower() == ".jsonl" and path.stem.lower() != "metadata"
    pictures, edit = [], names[1]
    for name in names[::2]:
        if isinstance(row.get(name), (Cell, Member)):
            pictures.append(row[name])
            continue
        if path.suffix.lower() == ".tar":
            raise ValueError(f'{where}: no picture "{name}"; it has {", ".join(row)}')
        picture = _text(row, name, where)
        try:
            pictures.append(path.parent / picture if own else tables.beside(path, picture))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    several = isinstance(row.get(edit), list) and row[edit]
    edits = checked(row[edit], list[str], f"{where}: {edit}") if several else [_text(row, edit, where)]
    captions = next((_captions(row, keys, where) for keys in tables.CAPTIONS if keys[0] in row), None)
    pairs = [Pair(pictures[0], text, pictures[1], captions) for text in edits]
    if isinstance(row.get(f"inverse_{edit}"), str):  # of HQ-Edit
        inverse = _text(row, f"inverse_{edit}", where)
        pairs.append(Pair(pictures[1], inverse, pictures[0], captions and captions[::-1]))
    return tuple(pairs)


def load_picture(picture: Picture, resolution: int, flip: bool = False) -> Image.Image:
    """Load a square RGB picture: short side resized to `resolution` (LANCZOS), then centre-cropped.

    The original squeezes pictures that are not square, in training and in its metrics.
    flip: mirror the picture. Raises ValueError, with file, row and column, for a missing or broken picture.
    """
    if isinstance(picture, Scene):
        image = picture.render(resolution)
    else:
        content = tables.content(picture) if isinstance(picture, Cell | Member) else None
        image = fit(open_image(picture, content), (resolution, resolution))
    return ImageOps.mirror(image) if flip else image


def stamp(picture: Picture) -> tuple:
    """A cache key that changes with the picture: a scene's repr, or a file's name, size and time."""
    if isinstance(picture, Scene):
        return (repr(picture),)
    if isinstance(picture, Cell):
        return (*stamp(picture.file), picture.number, picture.column)
    if isinstance(picture, Member):
        return (*stamp(picture.file), picture.offset)
    status = picture.stat()
    return (str(picture), status.st_size, status.st_mtime_ns)


def broken_pictures(source: str | Path, resolution: int, columns: Sequence[str] | None = None
                    ) -> tuple[int, int, dict[str, int], list[str], set[Picture]]:
    """Open every picture of every split.

    Returns the numbers of pictures and of sound pairs, the numbers left out by reason, messages, and the
    broken pictures.
    """
    items, counts, problems = _survey(source, None, True, columns)
    pictures, broken = _pictures(items), {}
    for picture in tqdm(pictures, desc="opening pictures", unit="picture"):
        try:
            load_picture(picture, resolution)
        except ValueError as error:
            broken[picture] = str(error)
    pairs = sum(map(len, without(items, broken.keys())))
    counts["pairs with a broken picture"] = sum(map(len, items)) - pairs
    return len(pictures), pairs, counts, problems + [*broken.values()], {*broken}

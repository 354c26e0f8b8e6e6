"""Tables of pairs, row by row: .jsonl, .csv, .parquet and .tar. Pictures stay in their file until needed.

Names in a downloaded table cannot lead out of its folder. Names in a .tar are never used as paths.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from itertools import chain, groupby, islice
from pathlib import Path
from threading import Lock

from nanoip2p.common.files import LONGEST_LINE, inside, read_rows, regular

Names = tuple[str, str, str]
COLUMNS = (  # picture before, instruction, picture after
    ("original_image", "edit_prompt", "edited_image"),  # timbrooks/instructpix2pix-clip-filtered
    ("input_image", "edit_prompt", "edited_image"),     # fusing/instructpix2pix-1000-samples
    ("source_img", "instruction", "target_img"),        # osunlp/MagicBrush
    ("source_image", "edit_prompt", "edited_image"),    # BleachNick/UltraEdit
    ("input_image", "edit", "output_image"),            # UCSC-VLAA/HQ-Edit; "input" is a caption there
    ("src_img", "edited_prompt_list", "edited_img"),    # TIGER-Lab/OmniEdit: several instructions a pair
    ("local_input_image", "text", "output_image"),      # Pico-Banana, after its map_openimage_url_to_local.py
    ("input", "edit", "output"),                        # pairs.jsonl
)
CAPTIONS = (("original_prompt", "edited_prompt"), ("source_caption", "target_caption"),
            ("input_caption", "output_caption"))  # of the first dataset, UltraEdit and pairs.jsonl
MOST_ROWS = 5_000_000  # of a file: the largest dataset of edits has 4 million. A row takes 0.7 kB
# The most bytes of a parquet row group before compression: 1 GB, or 10 times the size of the file. Pictures
# hardly compress further, so a file that claims more is a decompression bomb
GROUP_BYTES, GROUP_MULTIPLE = 2**30, 10
READ_LOCK = Lock()  # without the lock, threads that need the same row group would each read it
MOST_PARTS = 100  # members of a .tar that make a row
MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # key and extension, as webdataset splits them


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


@dataclass(frozen=True)
class Member:
    """A picture inside a .tar file."""

    file: Path
    offset: int
    size: int  # in bytes
    name: str

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


@lru_cache(maxsize=16)
def chosen(names: tuple[str, ...], columns: Names | None) -> Names | None:
    """The names of input, edit and output among `names`: `columns`, or the first of COLUMNS that is there.

    `x_file_name` stands for `x`, as in the image folders of `datasets`.
    """
    found = {name.removesuffix("_file_name"): name for name in names} | {name: name for name in names}
    there = (wanted for wanted in ([columns] if columns else COLUMNS) if found.keys() >= set(wanted))
    return next((tuple(found[name] for name in wanted) for wanted in there), None)


def beside(file: Path, name: str) -> Path:
    """The path of a picture that a table names. Raises ValueError if it is outside the table's folder."""
    if os.path.isabs(name):  # `datasets` writes absolute paths
        relative = os.path.relpath(name, os.path.realpath(file.parent))
        name = name if relative.split(os.sep)[0] == os.pardir else relative  # `inside` refuses absolute names
    return inside(file.parent, name)


def table_rows(path: Path, columns: Names | None) -> Iterator[tuple[str, dict] | ValueError]:
    """Yield (place for messages, values) of each row, or the ValueError of a bad row.

    A picture is a Cell, a Member, or a text with its path. Raises ValueError for a bad file.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    if path.suffix.lower() == ".tar":  # neighbouring members with the same key make a row, as in webdataset
        for key, members in groupby(_members(path), lambda member: member[0]):
            yield _unpacked(path, key, [member[1:] for member in islice(members, MOST_PARTS + 1)])
        return
    problems = []
    for number, row in chain(read_rows(path, problems=problems), [(0, None)]):
        while problems:
            yield ValueError(f"{path}, {problems.pop(0)}; correct or delete that line")
        if row is not None:
            yield f"{path}, line {number}", row


def _parquet_rows(path: Path, columns: Names | None) -> Iterator[tuple[str, dict]]:
    with _open_parquet(path) as file:
        schema, number = file.schema_arrow, 0
        names = chosen(tuple(schema.names), columns)
        kinds = [str(schema.field(name).type) for name in (names or ())[::2]]
        if not names or not all("binary" in kind or "string" in kind for kind in kinds):
            known = " | ".join(", ".join(names) for names in COLUMNS)
            raise ValueError(f"{path} has the columns {', '.join(schema.names)}; wanted, with pictures "
                             f"as bytes or paths: {', '.join(columns or [known])}"
                             + "; or name yours with --columns" * (not columns))
        cells = [name for name, kind in zip(names[::2], kinds) if "binary" in kind or "struct" in kind]
        wanted = {*names, f"inverse_{names[1]}", *(name for pair in CAPTIONS for name in pair)} - {*cells}
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            nulls = {leaf.path_in_schema: leaf.statistics and leaf.statistics.null_count
                     for leaf in map(about.column, range(about.num_columns))}
            # Read a picture column only if it may hold paths: reading pictures takes too long here
            paths = {name for name in cells if name not in nulls and nulls.get(f"{name}.bytes") != 0}
            texts = [name for name in schema.names if name in wanted | paths]
            table = _read_group(file, path, group, texts).columns
            for row, values in enumerate(zip(*table)):  # one by one, as all texts together can take many GB
                found = dict(zip(texts, [value.as_py() for value in values]))
                for name in cells:
                    cell = found.get(name) if isinstance(found.get(name), dict) else {}
                    named = cell.get("bytes") is None and isinstance(cell.get("path"), str) and cell["path"]
                    found[name] = named or Cell(path, group, row, name, number)
                yield f"{path} row {number}", found
                number += 1


def _members(path: Path) -> Iterator[tuple[str, str, bytes | Member]]:
    """Yield (key, extension, content) of each file in a .tar. ValueError if the .tar is damaged."""
    path, count = regular(path), 0
    try:
        with tarfile.open(path, "r:") as file:
            while member := file.next():
                file.members.clear()  # to save memory: tarfile would keep all of them
                count += 1
                if member.size < 0 or member.sparse is not None or count > MOST_ROWS:
                    raise tarfile.ReadError("the last member is damaged or sparse, or there are over "
                                            f"{MOST_ROWS}")
                if not (match := MEMBER.fullmatch(member.name)) or not member.isreg():
                    continue
                content = Member(path, member.offset_data, member.size, member.name)
                if match[2].lower().endswith(("txt", "json")):
                    content = file.extractfile(member).read(LONGEST_LINE + 1)
                yield match[1], match[2].lower(), content
            file.fileobj.seek(file.offset)  # tarfile stops at a damaged header without an error
            blocks = iter(partial(file.fileobj.read, 2**20), b"")
            if next(blocks, b"cut off").strip(b"\0") or any(block.strip(b"\0") for block in blocks):
                raise tarfile.ReadError("there is no end mark")
    except (OSError, tarfile.TarError, ValueError, ArithmeticError, LookupError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as .tar, or is cut off or damaged after {count} members: "
                         f"{error}; unpack .gz first, or fetch it again") from None


def _unpacked(path: Path, key: str, parts: list[tuple]) -> tuple[str, dict] | ValueError:
    """(place, row) of a key, or a ValueError. The row has x.input.jpg as `input` and as `input.jpg`."""
    row, where = {}, f"{path}: {key}"
    if len(parts) > MOST_PARTS:
        return ValueError(f"{where} has more than {MOST_PARTS} members")
    for name, content in parts:
        if name in row:
            return ValueError(f"{where}.{name} is there twice")
        if isinstance(content, bytes):
            try:
                if len(content) > LONGEST_LINE:
                    raise ValueError(f"longer than {LONGEST_LINE:,} bytes")
                content = json.loads(content) if name.endswith("json") else content.decode().strip()
            except (ValueError, RecursionError) as error:
                return ValueError(f"{where}.{name} cannot be read: {error}")
        inner = content if isinstance(content, dict) else {name.rpartition(".")[0] or name: content}
        row |= {key: value for key, value in inner.items() if key not in row} | {name: content}
    return where, row


@contextmanager
def _open_parquet(path: Path) -> Iterator:
    """Open a pyarrow.parquet.ParquetFile for a short time: an open one must not be used after a fork.

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
        # Repeated values stay in a dictionary: written out for each row, they could take many GB
        texts = [i for i in range(about.num_columns) if about.schema.column(i).physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, memory_map=True, metadata=about, read_dictionary=texts) as file:
            yield file
    except (OSError, LookupError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None


def _read_group(file, path: Path, group: int, columns: list[str]):
    """Read columns of a row group as a pyarrow.Table. Raises an error for missing rows or invalid values."""
    try:
        table = file.read_row_group(group, columns, use_threads=False)
    except OSError as error:
        # pyarrow cannot read delta-encoded columns with read_dictionary. The metadata names the encoding,
        # but a broken list of encodings in it makes pyarrow 26 abort the process
        if "ByteArrayDecoder" not in str(error):
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


def content(picture: Cell | Member) -> BytesIO:
    """The bytes of a picture. Raises ValueError if the parquet file cannot be read."""
    if isinstance(picture, Member):
        with picture.file.open("rb") as file:
            file.seek(picture.offset)
            return BytesIO(file.read(picture.size))
    with READ_LOCK:
        column = _column(picture.file, picture.group, picture.column)
        value = column[picture.row].as_py() if picture.row < len(column) else None  # None: the file changed
    if isinstance(value, dict):
        value = value.get("bytes")
    return BytesIO(value if isinstance(value, bytes) else b"")  # open_image refuses an empty file

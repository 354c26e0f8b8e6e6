"""Atomic writes, readers that report a bad file as a one-line ValueError, and the search for weights."""

import csv
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate, count
from pathlib import Path
from typing import BinaryIO

CHECKOUT = Path(__file__).resolve().parents[2]  # root of the repository, which holds the nano weights
LONGEST_LINE = 2**20  # bytes in a line of a JSONL, CSV or text file; a caption with its edit needs 5,000
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and surrogates


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. The file or folder that the block writes there replaces `path`.

    If the block fails, `path` is unchanged. Creates missing folders. Raises ValueError if `path` is a folder
    or a device. If the disk is full, raises an OSError that names `path`.
    """
    path = regular(path, "name another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_hidden(path)}{os.getpid()}.tmp")
    try:
        with full_disk_named(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # if it is a folder
        temporary.unlink(missing_ok=True)


def _hidden(path: Path) -> str:
    """How the names of this machine's temporary files of `path` begin."""
    # With the leading dot, *.png does not match the file. With the host name, two machines that share a disk
    # write different files, even if their processes have the same id
    return f".{path.name[:60]}.{os.uname().nodename[:20]}."


def remove_leftovers(path: Path) -> None:
    """Delete temporary files of `replacing(path)` that killed processes of this machine left."""
    for temporary in path.parent.glob(f"{glob.escape(_hidden(path))}*.tmp"):
        with suppress(ValueError, OverflowError, PermissionError):  # no process id; another user's process
            try:
                os.kill(int(temporary.name.split(".")[-2]), 0)  # signal 0 only checks that the process exists
            except ProcessLookupError:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Name the path, and the folder that needs room, in the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = OSError(f"{path} cannot be written: {os.strerror(error.errno)}; make room in {path.parent}")
        full.errno = error.errno  # an outer `replacing` checks it, and then names its own path
        raise full from None


def regular(path: str | Path, advice: str = "save its content to a file first") -> Path:
    """Return the path. ValueError if it is there, but no plain file: reading a FIFO may never end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; {advice}")
    return path


def check_writable(path: str | Path) -> None:
    """Raise ValueError if `replacing(path)` cannot write. Call this before a long computation."""
    try:
        path = regular(path, "name another output")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def unique_stems(paths: list[str]) -> list[str]:
    """Stems of output files, unique even if case is ignored: a/house.png, b/House.jpg -> house, House-2."""
    stems = {}
    for stem in (Path(path).stem for path in paths):
        names = (stem if k == 1 else f"{stem}-{k}" for k in count(1))
        name = next(name for name in names if name.lower() not in stems)
        stems[name.lower()] = name
    return list(stems.values())


def read_json(path: Path, missing: dict | None = None, kind: type = dict) -> dict | list:
    """The JSON object (or list) in a file, or `missing` if there is no file. ValueError for a bad file."""
    try:
        content = json.loads(regular(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise ValueError(f"{path} is missing; {listing(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not a {kind.__name__}")
    return content


def write_json(content: dict | list, path: Path) -> None:
    """Write JSON atomically: after an error, the old file is unchanged."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def listing(folder: Path) -> str:
    """A text that lists the files in `folder`, for error messages about a missing file."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    found = sorted(entry.name for entry in folder.iterdir())
    return f"{folder} holds {', '.join(found[:6]) or 'nothing'}"


def tidy(text: str) -> str:
    """Put the text on one line and make it valid UTF-8: a lone surrogate becomes a question mark."""
    return " ".join(text.encode(errors="replace").decode().split())


def fold(text: str) -> str:
    """Normalise a caption to find duplicates: lower case, single spaces, no punctuation at the ends."""
    return tidy(text).strip(" .!?").lower()


def read_rows(path: Path, kind: str | None = None, problems: list[str] | None = None,
              appended: bool = False) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, row) for each row of a file. Skips blank lines.

    kind: ".jsonl", ".csv" or ".txt" (each line becomes {"input": line}); default: the file's suffix.
    problems: a list to which each bad line adds a message. If None, a bad line raises ValueError. An
    unreadable file or .csv line always does. appended: skip an incomplete last line of a killed `append`.
    """
    kind = (kind or path.suffix).lower()
    try:
        with regular(path).open("rb") as file:
            if kind == ".csv":
                yield from _csv_rows(_lines(file), path)
            else:
                yield from _parse(_lines(file), path, kind == ".jsonl", problems, appended)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines with their line breaks. Of a line far longer than LONGEST_LINE, yields only the end."""
    rest = b""
    while block := file.read(LONGEST_LINE):
        *lines, rest = (rest + block).splitlines(keepends=True)
        yield from lines
        if len(rest) > 2 * LONGEST_LINE:  # _text will refuse it: keep the end only, to save memory
            rest = rest[-LONGEST_LINE - 1 :]
    if rest:
        yield rest


def _text(line: bytes) -> str:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes")
    return line.decode().removeprefix("\ufeff")


def _csv_rows(lines: Iterator[bytes], path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.DictReader(map(_text, lines), restkey="", restval="")
    try:
        yield from ((reader.line_num, row) for row in reader)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} cannot be read after line {reader.line_num}: {error}") from None


def _parse(lines: Iterator[bytes], path: Path, is_json: bool, problems: list | None,
           appended: bool) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, start=1):
        if appended and _is_cut(line):
            continue
        try:
            if text := _text(line).strip():
                row = json.loads(text) if is_json else {"input": text}
                if not isinstance(row, dict):
                    raise ValueError(f"but a {type(row).__name__}")
                yield number, row
        except (ValueError, RecursionError) as error:
            reason = f"line {number} is not {'a JSON object' if is_json else 'UTF-8'} ({error})"
            if problems is None:
                raise ValueError(f"{path}, {reason}; correct or delete that line") from None
            problems.append(reason)


def mend_last_line(path: Path) -> None:
    """Repair a file after a killed `append`: delete an incomplete last row, or add a missing line break."""
    if path.exists():
        with regular(path).open("rb+") as file:
            last = deque(_lines(file), maxlen=1).pop() if path.stat().st_size else b"\n"
            if _is_cut(last):
                file.truncate(file.tell() - len(last))
            elif not last.endswith(b"\n"):
                file.write(b"\n")


def _is_cut(line: bytes) -> bool:
    """Whether this line is an incomplete row, which a killed `append` left."""
    if line.endswith(b"\n") or not b'{"'.startswith(line[:2]):
        return False
    with suppress(ValueError, RecursionError):
        json.loads(line)
        return False
    return True


def append(path: Path, row: dict) -> None:
    """Append a row to a .jsonl file. A killed process or a full disk can leave an incomplete last line."""
    with full_disk_named(path), regular(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def claim_folder(folder: Path, marker: str, job: dict, flag: str, notes: dict | None = None) -> None:
    """Reserve a folder for one job: write `job` as JSON to folder/marker, or compare it if that file exists.

    flag: the command-line flag of the folder. notes: further entries of the file, which are not compared.
    Several processes of one job may call this at once. Raises ValueError if the folder holds another job, or
    files but no marker.
    """
    path, job = folder / marker, json.loads(json.dumps(job))  # tuples become lists, as in the file
    foreign = sorted(entry.name for entry in folder.glob("[!.]*"))
    if not path.exists():  # check after the glob, or files of another process of this job look foreign
        if foreign:
            raise ValueError(f"{folder} holds {foreign[0]} but no {marker}; choose another {flag}")
        write_json((notes or {}) | job, path)
    for key, found, value in _differences(read_json(path), job):
        begun = f"begun with {key} = {found}, not {value}" if len(str(value)) <= 12 else (
            f"not begun with the same {key}")
        raise ValueError(f"{folder} was {begun}; use the same setting, or another {flag}")


def _differences(there: dict, wanted: dict) -> Iterator[tuple]:
    """Yield (key, its value in `there`, its value in `wanted`) for each entry of `wanted` that differs."""
    for key, value in wanted.items():
        found = there.get(key)
        if isinstance(value, dict) and isinstance(found, dict):
            yield from _differences(found, value)
        elif found != value:
            yield key, found, value


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Try to lock a file, and yield whether this process holds the lock. Creates a missing file.

    wait: wait until the lock is free. The system frees the lock of a dead process. Uses lockf, because forked
    data loaders would inherit a lock of flock. The lock excludes other processes, not other threads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        held = False
        with suppress(BlockingIOError, PermissionError):  # the error depends on the system
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held


def inside(root: Path, name: str) -> Path:
    """The path root/name, where `name` comes from data. Raises ValueError if the path leads out of `root`.

    `root` itself may be a link. Links in `root` may point to other places in it. In the Hub's cache, where
    all files are links, they may also point into the cache folder of that repository.
    """
    path, parts = root / name, Path(name).parts
    if not parts or "//" in f"/{name}" or ".." in parts or CONTROL.search(name):
        raise ValueError(f"{root}: its data names {name!r}, which is not a file inside the folder")
    if any(map(os.path.islink, accumulate((str(root), *parts), os.path.join))):  # faster than resolve
        top = Path(os.path.realpath(root))
        hub = [up.parent for up in top.parents if up.name == "snapshots" and (up.parent / "blobs").is_dir()]
        if not Path(os.path.realpath(path)).is_relative_to(hub[0] if hub else top):
            raise ValueError(f"{path} is a link that leads out of {root}; copy the file, or write a "
                             "pairs.jsonl, which may name any path")
    return path


def find_weights(name: str | Path) -> str | Path:
    """The path of `name` in the working directory, else in the checkout, else `name` itself, as a Hub name.

    Raises ValueError if a name that begins with weights/ does not exist: the nano weights are not on the Hub.
    """
    for path in (Path(name), CHECKOUT / name):
        if path.exists():
            return path
    if str(name).startswith("weights/"):
        raise ValueError(f"there is no {name} here or in {CHECKOUT}; name other weights (scripts: --weights)")
    return name


def is_shipped(name: str) -> bool:
    """Whether `name` lies in the folder weights/ of the working directory or of the checkout."""
    return any((root / name).exists() and (root / name).resolve().is_relative_to((root / "weights").resolve())
               for root in (Path(), CHECKOUT))

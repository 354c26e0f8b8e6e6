"""Files that are written whole or not at all, and read with one clear line about what is wrong in them."""

import csv
import fcntl
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` when the block succeeds.

    Makes missing folders. ValueError if `path` is a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file that can be replaced; name another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within a file system. Hidden from *.png. With the
    # name of the host: processes on two machines that share a disk can have the same number.
    temporary = path.with_name(f".{path.name[:60]}.{os.uname().nodename[:20]}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise ValueError before an hour's work if `replacing(path)` could not write there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            usable = not path.exists() or path.is_file()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    if not usable:
        raise ValueError(f"{path} is not a file that can be replaced; name another output")


def read_json(path: Path, missing: dict | None = None, kind: type = dict) -> dict | list:
    """The JSON object (or list) in a file, or `missing` if there is no file. ValueError for a bad file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise ValueError(f"{path} is missing; {remedy(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not a {kind.__name__}")
    return content


def write_json(content: dict | list, path: Path) -> None:
    """Write JSON; if that fails, the file stays as it was."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remedy(folder: Path) -> str:
    """The files in `folder`, in words, for messages about a missing one."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    found = sorted(entry.name for entry in folder.iterdir())
    return f"{folder} holds {', '.join(found[:6]) or 'nothing'}"


def tidy(text: str) -> str:
    """The text on one line and valid in UTF-8: a lone surrogate becomes a question mark."""
    return " ".join(text.encode(errors="replace").decode().split())


def fold(text: str) -> str:
    """The text without case, extra spaces and final stop: equal for captions that say the same."""
    return tidy(text).strip(" .!?").lower()


def read_rows(path: Path, kind: str | None = None,
              problems: list[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Line number (from 1) and content of every row of a file, without blank lines.

    kind: ".jsonl", ".csv" or ".txt" (lines become {"input": line}); by default the file's suffix.
    ValueError for an unreadable file or a bad line; `problems` collects messages about bad lines instead.
    """
    kind = (kind or path.suffix).lower()
    try:
        content = path.read_bytes()
        if kind == ".csv":
            file = io.StringIO(content.decode("utf-8-sig"), newline="")
            reader = csv.DictReader(file, restkey="", restval="")
            yield from ((reader.line_num, row) for row in reader)
            return
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    yield from _parse(content, path, kind == ".jsonl", problems)


def _parse(content: bytes, path: Path, is_json: bool, problems: list | None) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig")
            if text.strip():
                row = json.loads(text) if is_json else {"input": text}
                if not isinstance(row, dict):
                    raise ValueError(f"but a {type(row).__name__}")
                yield number, row
        except (ValueError, RecursionError) as error:
            reason = f"line {number} is not {'JSON of one object' if is_json else 'UTF-8'} ({error})"
            if problems is None:
                raise ValueError(f"{path}, {reason}; correct or delete that line") from None
            problems.append(reason)


def read_jsonl(path: Path) -> list[dict]:
    """The rows that `append` wrote to a file, without an incomplete last line; [] if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    return [row for _, row in _parse(_complete(content), path, True, None)]


def mend_last_line(path: Path) -> None:
    """Prepare a file for `append` after a kill: delete an incomplete last line, or add its line break."""
    if path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(_complete(path.read_bytes()))


def _complete(content: bytes) -> bytes:
    """Without an incomplete last line, which begins as a JSON object, and with a final line break."""
    end = content.rfind(b"\n") + 1
    last = content[end:]
    try:
        json.loads(last or b"0")
        return content + b"\n" if last else content
    except (ValueError, RecursionError):
        return content[:end] if b'{"'.startswith(last[:2]) else content


def append(path: Path, row: dict) -> None:
    """Add a row to a .jsonl file. A kill or a full disk can leave an incomplete last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def claim_folder(folder: Path, marker: str, job: dict, flag: str, notes: dict | None = None) -> None:
    """Reserve a folder for one job: write `job` as JSON to folder/marker, or compare it with what is there.

    flag: the option that names the folder. notes: entries for people, not compared. Several processes of one
    job may call this at once. ValueError if the folder holds another job or other files.
    """
    path, job = folder / marker, json.loads(json.dumps(job))  # tuples become lists, as in the file
    foreign = sorted(entry.name for entry in folder.glob("[!.]*"))
    if not path.exists():  # looked up after the other files, because another process may write it now
        if foreign:
            raise ValueError(f"{folder} holds {foreign[0]} but no {marker}; choose another {flag}")
        write_json({**(notes or {}), **job}, path)
    if difference := _difference(read_json(path), job):
        raise ValueError(f"{folder} was begun with {difference}; use the same setting, or another {flag}")


def _difference(there: dict, wanted: dict) -> str | None:
    """The first entry of `wanted` that differs in `there`, in words."""
    for key, value in wanted.items():
        found = there.get(key)
        if isinstance(value, dict) and isinstance(found, dict):
            if difference := _difference(found, value):
                return difference
        elif found != value:
            return f"other {key}" if len(str(value)) > 12 else f"{key} = {found}, not {value}"
    return None


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Try to lock a file, which is made if it is missing; yields whether this process holds the lock.

    wait: until the holder releases it; the system does so for a process that dies. lockf, not flock, because
    forked data loaders would inherit flock's lock. Within one process a lock excludes nobody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        held = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):  # either one, depending on the system
            held = False
        yield held

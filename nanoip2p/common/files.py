"""Files that are written whole or not at all, and read with one clear line about what is wrong in them."""

import csv
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` when the block succeeds.

    If the block fails or is interrupted, `path` stays as it was. Makes missing folders. Raises ValueError if
    `path` is not a plain file (but a folder or /dev/null).
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file that can be replaced; name another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise ValueError now, and not after an hour's work, if `replacing(path)` could not write there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _beside(path).touch()
        _beside(path).unlink()
        usable = not path.exists() or path.is_file() and os.access(path, os.W_OK)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    if not usable:
        raise ValueError(f"{path} is not a file that can be replaced; name another output")


def _beside(path: Path) -> Path:
    # In the same folder: a rename is atomic only within a file system. Hidden: *.png skips it. With the name of
    # the host: processes on two machines that share a disk can have the same number.
    return path.with_name(f".{path.name[:60]}.{os.uname().nodename[:20]}.{os.getpid()}.tmp")


def read_json(path: Path, missing: dict | None = None, kind: type = dict) -> dict | list:
    """The JSON object (or list) in a file, or `missing` if there is no file.

    Raises ValueError for a broken file, another kind of content, and without `missing` for an absent file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise ValueError(f"{path} is missing; {remedy(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not {wanted}")
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
    return f"{folder} holds {', '.join(found[:6]) or 'nothing'}{' …' if len(found) > 6 else ''}"


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
    Raises ValueError, naming the line, for a line that is not a JSON object or not UTF-8; with `problems`,
    appends the message to that list instead and goes on.
    """
    kind = (kind or path.suffix).lower()
    if kind == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, restkey="", restval="")
                yield from ((reader.line_num, row) for row in reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    else:
        yield from _parse(path.read_bytes(), path, "JSON" if kind == ".jsonl" else "UTF-8", problems)


def _parse(content: bytes, path: Path, kind: str, problems: list[str] | None) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig")
            if text.strip():
                row = json.loads(text) if kind == "JSON" else {"input": text}
                if not isinstance(row, dict):
                    raise ValueError(f"holds a JSON {type(row).__name__}, not an object")
                yield number, row
        except (ValueError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else f"is not {kind} ({error})"
            if problems is None:
                raise ValueError(f"{path}, line {number} {reason}; correct or delete that line") from None
            problems.append(f"line {number} {reason}")


def read_jsonl(path: Path) -> list[dict]:
    """The rows that `append` wrote to a file; none if there is no such file.

    Leaves out a last line that is incomplete because the process was killed. ValueError as read_rows.
    """
    content = path.read_bytes() if path.exists() else b""
    return [row for _, row in _parse(content[: _complete(content)], path, "JSON", None)]


def mend_last_line(path: Path) -> None:
    """Prepare a file for `append` after a kill: delete an incomplete last line, or add its line break."""
    content = path.read_bytes() if path.exists() else b""
    if _complete(content) < len(content):
        os.truncate(path, _complete(content))
    elif content and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _complete(content: bytes) -> int:
    """Bytes before an incomplete last line: the beginning of a JSON object, without a line break."""
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last or "0")
    except (ValueError, RecursionError):
        return len(content) - len(last) if b'{"'.startswith(last[:2]) else len(content)
    return len(content)


def append(path: Path, row: dict) -> None:
    """Add a row to a .jsonl file; if the disk is full, the file stays as it was."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def claim_folder(folder: Path, marker: str, job: dict, flag: str, notes: dict | None = None) -> None:
    """Reserve a folder for one job: write `job` as JSON to folder/marker, or compare it with what is there.

    job: settings that decide what the folder will hold. notes: further entries for people, never compared.
    flag: the option that names the folder, for messages. Several processes of one job may call this at once.
    Raises ValueError, naming the first setting that differs, if the folder belongs to another job, and if it
    holds files but no marker.
    """
    path, job = folder / marker, json.loads(json.dumps(job))  # tuples become lists, as in the file
    if not path.exists():
        foreign = sorted(entry.name for entry in folder.glob("[!.]*"))
        if foreign and not path.exists():  # another process of this job may just have written it
            raise ValueError(f"{folder} holds {foreign[0]} but no {marker}; choose another {flag}")
        write_json({**(notes or {}), **job}, path)
    if difference := _difference(read_json(path), job):
        raise ValueError(f"{folder} was begun with {difference}; use the same setting, or another {flag}")


def _difference(there: dict, wanted: dict) -> str | None:
    """The first entry of `wanted` that `there` lacks or has otherwise, in words."""
    for key, value in wanted.items():
        found = there.get(key) if isinstance(there, dict) else None
        if isinstance(value, dict) and (difference := _difference(found, value)):
            return difference
        if not isinstance(value, dict) and found != value:
            return f"another {key}" if len(str(value)) > 30 else f"{key} = {found}, not {value}"
    return None


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Try to lock a file, which is made if it is missing; yields whether this process holds the lock.

    wait: until the process that holds it lets go. The system frees the lock of a process that dies. It is
    lockf's lock: flock's would pass to forked processes that load data, and outlive the process that took it.
    Within one process it does not exclude: a second call succeeds, and its end frees the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except (BlockingIOError, PermissionError):  # either one, depending on the system
            held = False
        yield held


# Old names, until their callers are merged
rows_of = read_jsonl


def finished(path: Path, keys: tuple[str, ...]) -> set[str]:
    """Old: the captions, folded, of a file that an earlier run wrote."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(row.get(key), str) for key in keys):
            raise ValueError(f"{path}, line {number} is not {{{', '.join(keys)}}}; name another --out")
    mend_last_line(path)
    return {fold(row["input"]) for row in rows}

"""Files: what is read may be missing or broken, and what is written is never seen half done."""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there takes its place when the block succeeds.

    When the block fails or is interrupted, the temporary file goes and `path` is as it was. Missing folders
    are made. Raises ValueError for something that is there and no plain file (a folder, /dev/null).
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
    """Raise ValueError now, and not after an hour's work, when `replacing(path)` could not write there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _beside(path).touch()
        _beside(path).unlink()
        there = path.exists()  # fails for a name that is too long
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    if there and not (path.is_file() and os.access(path, os.W_OK)):
        raise ValueError(f"{path} is not a file that can be replaced; name another output")


def _beside(path: Path) -> Path:
    # Same folder, because a rename is atomic only within one file system. Hidden, so that *.png skips it. The
    # host's name, because processes on two machines that share a disk may have one number.
    return path.with_name(f".{path.name[:60]}.{os.uname().nodename[:20]}.{os.getpid()}.tmp")


def read_json(path: Path, missing: dict | None = None, kind: type = dict) -> dict | list:
    """The JSON object (or list) in a file, or `missing`. ValueError if there is none or it is broken."""
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
    """Write JSON, or leave the file as it was."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remedy(folder: Path) -> str:
    """What to do about a file that is not in `folder`."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    found = sorted(entry.name for entry in folder.iterdir())
    return f"{folder} holds {', '.join(found[:6]) or 'nothing'}{' …' if len(found) > 6 else ''}"


BEGINNING = b'{"input": "'  # of every line that is written here


def tidy(text: str) -> str:
    """On one line, and sayable in UTF-8: a lone surrogate becomes a question mark."""
    return " ".join(text.encode(errors="replace").decode().split())


def fold(text: str) -> str:
    """What two captions have in common that are the same but for case, spaces and the final stop."""
    return tidy(text).strip(" .!?").lower()


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and content of every row of .jsonl, .csv or text; lines of a text are under "input".

    Raises ValueError naming the line that is not a JSON object, or the file that is not UTF-8.
    """
    kind = path.suffix.lower()
    try:
        with path.open(encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind == ".csv":
                reader = csv.DictReader(file, restkey="", restval="")
                yield from ((reader.line_num, row) for row in reader)
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line) if kind == ".jsonl" else {"input": line}
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number} is not a JSON object")
                yield number, row
    except (csv.Error, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); mend or delete that line") from None


def rows_of(path: Path) -> list[dict]:
    """The rows of .jsonl, none where there is no such file. ValueError as read_rows."""
    return [row for _, row in read_rows(path)] if path.exists() else []


def finished(path: Path, keys: tuple[str, ...]) -> set[str]:
    """The captions, folded, in a JSONL file that an earlier run wrote; a last line torn by a kill is mended.

    Raises ValueError, and changes nothing, when a line is not an object of strings under `keys`.
    """
    *lines, rest = (path.read_bytes() if path.exists() else b"").split(b"\n")
    torn = rest
    if rest and not (BEGINNING.startswith(rest[: len(BEGINNING)]) and _parse(rest) is None):
        lines, torn = [*lines, rest], b""
    rows = [_parse(line) for line in lines]
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)):
            raise ValueError(f"{path}, line {number} is not {{{', '.join(keys)}}}; name another --out")
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    elif rest:
        with path.open("ab") as file:
            file.write(b"\n")
    return {fold(row["input"]) for row in rows}


def _parse(line: bytes):
    """What a line of JSON holds, or None: no beginning of an object is JSON by itself."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def append(path: Path, row: dict) -> None:
    """Add a line, or, when the disk is full, nothing."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise

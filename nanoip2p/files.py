"""Files: what is read may be missing or broken, and what is written is never seen half done."""

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

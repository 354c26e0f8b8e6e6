"""Names of output files, if the user gave none."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


def slug(text: str, empty: str) -> str:
    """Turn a text, which may come from a stranger, into a part of a file name: its letters and digits.

    The result has hyphens between words, and at most 80 bytes. empty: the result if nothing is left.
    """
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " "
                   for letter in unicodedata.normalize("NFKC", text))
    return "-".join(kept.split()).encode()[:80].decode(errors="ignore").strip("-") or empty


@contextmanager
def unused(path: str) -> Iterator[str]:
    """Yield the first free name: `path`, or `path` with -2, -3 ... after its stem.

    An empty file reserves the name until the block replaces it. If the block fails, that file is deleted.
    """
    for k in count(1):
        free = Path(path) if k == 1 else Path(path).with_stem(f"{Path(path).stem}-{k}")
        with suppress(FileExistsError):
            free.open("x").close()
            break
    try:
        yield str(free)
    except BaseException:
        free.unlink()
        raise

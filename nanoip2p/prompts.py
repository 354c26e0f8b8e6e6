"""Prompts on disk: captions as they come, and triplets (caption, instruction, edited caption) made of them.

The file of triplets only grows, a line at a time, so that a run may be killed at any moment: see `finished`
and `append`. `write_scenes` draws triplets from the nano world's grammar, where there is no language model.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from nanoip2p.files import replacing
from nanoip2p.scenes import pick, random_scene, seen_edits

BEGINNING = b'{"input": "'  # of every line that is written here


def tidy(text: str) -> str:
    """On one line, and sayable in UTF-8: a lone surrogate becomes a question mark."""
    return " ".join(text.encode(errors="replace").decode().split())


def fold(text: str) -> str:
    """What two captions have in common that are the same but for case, spaces and the final stop."""
    return tidy(text).strip(" .!?").lower()


def read_captions(path: Path, column: str | None = None) -> tuple[list[dict], int]:
    """Captions from a text file (one a line), .jsonl or .csv, each once, as {"input"} or {"input", "url"}.

    column: the key or column of the caption ("input" or "caption" by default). Also returns how many were
    left out because caption or url had come before. ValueError names the line that has no caption.
    """
    keys = (column,) if column else ("input", "caption")
    captions, seen, repeats = [], set(), 0
    for place, row in read_rows(path):
        text = next((row[key] for key in keys if key in row), None)
        if not isinstance(text, str):
            names = ", ".join(row) or "nothing"
            raise ValueError(f"{path}, line {place}: no text under {' or '.join(keys)} (--column); "
                             f"there is {names}")
        url = row.get("url") or row.get("URL")
        caption = {"input": tidy(text), **({"url": str(url)} if url else {})}
        marks = {fold(text), *([("url", str(url))] if url else [])}
        if not fold(text):
            continue
        if seen & marks:
            repeats += 1
        else:
            captions.append(caption)
            seen |= marks
    return captions, repeats


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


def draw_scenes(n: int, seed: int) -> list[dict]:
    """`n` distinct triplets of the nano world, a function of the seed: such as training may see."""
    generator, rows = torch.Generator().manual_seed(seed), {}
    while len(rows) < n:
        scene = random_scene("train", int(torch.randint(2**31, (), generator=generator)))
        edits = seen_edits(scene)
        if not edits:
            continue
        kind = pick(sorted({edit.kind for edit in edits}), generator)  # there are many more ways to add
        edit = pick([edit for edit in edits if edit.kind == kind], generator)
        row = (scene.caption(), pick(edit.instructions[:-1], generator), edit.caption)
        rows.setdefault(row, dict(zip(("input", "edit", "output"), row)))
    return list(rows.values())


def write_scenes(out: Path, n: int, seed: int) -> None:
    """Write `draw_scenes`; a file that holds the first of them grows, more or others: ValueError."""
    text = "".join(json.dumps(row) + "\n" for row in draw_scenes(n, seed)).encode()
    there = out.read_bytes() if out.exists() else b""
    if not text.startswith(there):
        holds = "more captions" if there.startswith(text) else "other captions"
        raise ValueError(f"{out} holds {holds} than these {n} of --seed {seed}; name another --out")
    with replacing(out) as temporary:
        temporary.write_bytes(text)

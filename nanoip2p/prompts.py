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
from nanoip2p.scenes import pick, random_scene


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
    for place, row in _rows(path):
        text = next((row[key] for key in keys if key in row), None)
        if not isinstance(text, str):
            names = ", ".join(row) or "nothing"
            raise ValueError(f"{path}, line {place}: no text under {' or '.join(keys)} (--column); "
                             f"there is {names}")
        url = row.get("url") or row.get("URL")
        caption = {"input": tidy(text), **({"url": str(url)} if url else {})}
        marks = {fold(text), *([("url", str(url))] if url else [])}
        if fold(text) and not seen & marks:
            captions.append(caption)
        elif fold(text):
            repeats += 1
        seen |= marks
    return captions, repeats


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and content of every row; lines of a text file are under "input"."""
    kind = path.suffix.lower()
    try:
        with path.open(encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind == ".csv":
                reader = csv.DictReader(file, restkey="", restval="")
                yield from ((reader.line_num, row) for row in reader)
                return
            for number, line in enumerate(file, start=1):
                row = json.loads(line) if kind == ".jsonl" and line.strip() else {"input": line}
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                yield number, row
    except (csv.Error, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def finished(path: Path, keys: tuple[str, ...]) -> set[str]:
    """The captions, folded, in a JSONL file that an earlier run wrote; a last line torn by a kill is mended.

    Raises ValueError, and changes nothing, when a line is not an object of strings under `keys`.
    """
    def record(line: bytes) -> dict | None:
        try:
            row = json.loads(line)
            return row if all(isinstance(row[key], str) for key in keys) else None
        except (ValueError, LookupError, TypeError, RecursionError):
            return None

    *lines, rest = (path.read_bytes() if path.exists() else b"").split(b"\n")
    rows = [record(line) for line in lines]
    torn = record(rest) is None
    if None in rows or (torn and not b'{"input": "'.startswith(rest[:11])):
        number = rows.index(None) + 1 if None in rows else len(rows) + 1
        raise ValueError(f"{path}, line {number} is not {{{', '.join(keys)}}}; name another --out")
    if rest and torn:
        os.truncate(path, path.stat().st_size - len(rest))
    elif rest:
        rows.append(record(rest))
        with path.open("ab") as file:
            file.write(b"\n")
    return {fold(row["input"]) for row in rows}


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
    """`n` distinct triplets of the nano world, a function of the seed, in wordings that training may see."""
    generator, rows = torch.Generator().manual_seed(seed), {}
    while len(rows) < n:
        scene = random_scene("train", int(torch.randint(2**31, (), generator=generator)))
        kind = pick(sorted({edit.kind for edit in scene.edits()}), generator)  # there are most ways to add
        edit = pick(scene.edits(kind), generator)
        row = (scene.caption(), pick(edit.instructions[:-1], generator), edit.caption)
        rows.setdefault(row, dict(zip(("input", "edit", "output"), row)))
    return list(rows.values())


def write_scenes(out: Path, n: int, seed: int) -> None:
    """Write `draw_scenes`; a file that holds the first of them grows, one that holds others: ValueError."""
    text = "".join(json.dumps(row) + "\n" for row in draw_scenes(n, seed)).encode()
    if out.exists() and not text.startswith(out.read_bytes()):
        raise ValueError(f"{out} holds other captions than these {n} of --seed {seed}; name another --out")
    with replacing(out) as temporary:
        temporary.write_bytes(text)

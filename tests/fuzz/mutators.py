"""Change a valid input at random: bytes, JSON values, rows of JSON lines, the header of a safetensors file.

Every change comes from a `random.Random`, so a seed repeats it.
"""

import copy
import io
import json
import os
import random
import struct
from pathlib import Path

from PIL import Image, PngImagePlugin

from nanoip2p.common import recipes

NUMBERS = (0, -1, 1, 2, 77, 2**31, 10**7, 10**9, 2**63, 10**30, -10**400, 0.5, -0.0, 1e-320, 1e308,
           float("nan"), float("inf"), -float("inf"))
TEXTS = ("", "x", "77", "null", "../../victim/x", "/etc/hostname", "..", ".", "a\x1b[2Jb\x07", "a\nb\rc",
         "\x00", "\ud800", "é" * 300, "a" * 100_000, "--", "-h", "a/b", "owner/name", "https://example.invalid/x")
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, {"x": {"y": []}})


def value(rng: random.Random):
    """A value that is probably of the wrong type or out of range."""
    kind = rng.randrange(5)
    if kind == 4:
        deep = rng.choice((3, 100, 300))
        return json.loads("[" * deep + "]" * deep) if rng.random() < 0.5 else [value(rng) for _ in range(3)]
    return rng.choice((NUMBERS, TEXTS, OTHERS, (*NUMBERS, *TEXTS, *OTHERS))[kind])


def places(content, path=()):
    """The paths of all values inside `content`, that of itself first."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(
        content, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def json_value(rng: random.Random, content):
    """A copy with one to three values replaced, dropped, renamed, doubled or swapped."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *outer, last = rng.choice([path for path in places(content) if path] or [(None,)])
        if last is None:
            return value(rng)
        inside = content
        for key in outer:
            inside = inside[key]
        change = rng.random()
        if change < 0.65:
            inside[last] = value(rng)
        elif change < 0.8:
            del inside[last]
        elif isinstance(inside, dict):
            inside[rng.choice((f"{last}x", str(last)[:-1], "_" + str(last), "unknown"))] = inside[last]
        else:
            inside.insert(rng.randrange(len(inside) + 1), copy.deepcopy(inside[last]))
    return value(rng) if rng.random() < 0.03 else content


def raw(rng: random.Random, content: bytes) -> bytes:
    """Bytes with some flipped, cut, doubled, zeroed or inserted."""
    content = bytearray(content)
    if rng.random() < 0.03:
        return rng.choice((b"", b"[" * 10**5, b'{"a":' * 10**5, b"\x80\x02]q.", bytes(64), b"PK\3\4"))
    for _ in range(rng.choice((1, 1, 2, 8))):
        begin = rng.randrange(len(content) + 1)
        end = min(len(content), begin + rng.choice((1, 4, 64, 10**6)))
        change = rng.randrange(5)
        if change == 0 and begin < len(content):
            content[begin] ^= 1 << rng.randrange(8)
        elif change == 1:
            del content[begin:end]
        elif change == 2:
            content[begin:begin] = content[begin:end]
        elif change == 3:
            content[begin:end] = bytes(end - begin)
        else:
            content[begin:begin] = rng.choice(
                (b"\x00", b"\xff\xfe", b"\n", b"\x1b[2J", b"{", b"]", b'"', b"9" * 30))
    return bytes(content)


def dumps(content) -> bytes:
    """JSON as Python writes it: with NaN and Infinity, and lone surrogates as escapes."""
    return json.dumps(content).encode()


def lines(rng: random.Random, content: bytes) -> bytes:
    """JSON lines with one of them changed, cut or doubled."""
    rows = content.splitlines()
    i = rng.randrange(len(rows))
    change = rng.random()
    rows[i] = dumps(json_value(rng, json.loads(rows[i]))) if change < 0.8 else raw(rng, rows[i])
    rows += [rows[i]] * (change > 0.95)
    return b"\n".join(rows) + b"\n" * (change < 0.9)


def safetensors_header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with a changed header of the right length."""
    length, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if "nanoip2p" in metadata and rng.random() < 0.7:
        metadata["nanoip2p"] = json.dumps(json_value(rng, json.loads(metadata["nanoip2p"])))
    else:
        header = json_value(rng, header)
    text = dumps(header)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def recipe(rng: random.Random, content: bytes) -> bytes:
    """A PNG, or an XMP packet, whose recipe is changed."""
    image = Image.open(io.BytesIO(content))
    if image.format == "WEBP":
        packet, file = image.info["xmp"], io.BytesIO()
        changed = rng.choice((recipes.to_xmp(json_value(rng, json.loads(recipes.from_xmp(packet)))),
                              raw(rng, packet)))
        image.save(file, "WEBP", lossless=True, xmp=changed)
        return file.getvalue()
    text = PngImagePlugin.PngInfo()
    text.add_text("nanoip2p", dumps(json_value(rng, json.loads(image.text["nanoip2p"]))).decode())
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=text)
    return file.getvalue()


def parquet(rng: random.Random, content: bytes) -> bytes:
    """A parquet file with a column of another type, name or content, in another encoding."""
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.parquet.read_table(io.BytesIO(content))
    names, i, n = table.column_names, rng.randrange(table.num_columns), len(table)
    change = rng.random()
    if change < 0.6:
        cell = rng.choice((None, 1.5, True, [b"x"], [], b"\xff", {"bytes": 7}, {"path": b"x"},
                           {"bytes": None}, {"bytes": {"bytes": b"x"}}, {"bytes": [b"x"]},
                           "a" * 100_000, "\x1b[2J"))
        table = table.set_column(i, names[i], pyarrow.array([cell] * n))
    elif change < 0.8:
        table = table.rename_columns([*names[:i], rng.choice((*names, "", "x\x1b[2J")), *names[i + 1 :]])
    else:
        table = table.drop_columns([names[i]]) if change < 0.9 else table.slice(0, rng.randrange(n))
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        table, file, rng.choice((None, 1, 2)), use_dictionary=rng.random() < 0.5,
        compression=rng.choice(("none", "snappy", "zstd")), write_statistics=rng.random() < 0.5)
    return file.getvalue()


STRUCTURED = {".json": lambda rng, content: dumps(json_value(rng, json.loads(content))), ".jsonl": lines,
              ".safetensors": safetensors_header, ".parquet": parquet}


def change_file(path: Path, rng: random.Random) -> None:
    """Change a file in place, by its suffix: three of four times in its structure, else in its bytes.

    Rarely it becomes a FIFO, a device or a folder.
    """
    if rng.random() < 0.02:
        path.unlink()
        return rng.choice((os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")))(path)
    content = path.read_bytes()
    change = STRUCTURED.get(path.suffix, raw) if rng.random() < 0.75 else raw
    if path.name in ("recipe.png", "recipe.webp") and change is raw and rng.random() < 0.75:
        change = recipe
    try:
        changed = change(rng, content)
    except Exception:  # the first of two changes broke the structure
        changed = raw(rng, content)
    path.write_bytes(changed)

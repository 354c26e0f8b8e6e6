"""Check the types and ranges of values where they enter: files and callers can hand over anything."""

import math
import reprlib
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nanoip2p.common.files import read_rows

LONGEST = 10_000  # items of a list, characters of a text: far more than any model's setting has
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object",
         Callable: "a function", types.NoneType: "null"}


def checked(value, kind, where: str, least: float = -math.inf, most: float = math.inf, longest=LONGEST):
    """Return `value` if it is of `kind`, else raise ValueError: "<where> = <value> should be <kind>".

    kind: a key of NAMES, list[...], tuple[...], or a union (A | None). A whole number is a valid float, a
    bool is no number; a list becomes a tuple if `kind` is a tuple. least, most: the range of `value`, or of
    each item of a list. longest: of lists and texts. NaN and infinity are refused; dicts are not looked into.
    """
    try:
        return _converted(value, kind, least, most, longest)
    except (ValueError, OverflowError):
        if isinstance(value, (str, list)) and len(value) > longest:
            raise ValueError(f"{where} is {len(value):,} long; at most {longest:,} are read") from None
        raise ValueError(f"{where} = {shown(value)} should be {_described(kind, least, most)}") from None


def shown(value) -> str:
    """A value for a message, at most 41 characters: the shape of an array or tensor."""
    if isinstance(shape := getattr(value, "shape", None), tuple) and shape:
        return f"{type(value).__name__} {tuple(shape)}"
    text = reprlib.repr(value)  # not repr: the value may be deeply nested
    return text if len(text) <= 40 else text[:40] + "…"


def checked_rows(path: Path, kinds: dict[str, tuple], appended: bool = True) -> list[dict]:
    """The checked rows of a .jsonl file (read_rows); [] without a file. kinds: key -> (kind, least, most)."""
    rows = read_rows(path, ".jsonl", appended=appended) if path.exists() else ()
    return [row | {key: checked(row.get(key), kind, f"{path}, row {number}: {key}", *limits)
                   for key, (kind, *limits) in kinds.items()} for number, (_, row) in enumerate(rows, 1)]


def _converted(value, kind, least: float, most: float, longest: float):
    """`value` as `kind`. Raises ValueError or OverflowError, without a message, if that is impossible."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in args:
            with suppress(ValueError, OverflowError):
                return _converted(value, option, least, most, longest)
        raise ValueError
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)) or len(value) > longest:
            raise ValueError
        return origin(_converted(item, args[0], least, most, longest) for item in value)
    value = float(value) if kind is float and type(value) is int else value
    if not isinstance(value, kind) or kind is str and len(value) > longest:
        raise ValueError
    if kind in (int, float) and (type(value) is bool or not least <= value <= most or math.isinf(value)):
        raise ValueError
    return value


def _described(kind, least: float, most: float) -> str:
    """The words for a kind: "a whole number from 1 to 64"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_described(option, least, most) for option in args)
    if origin in (list, tuple):
        return f"a list, each item {_described(args[0], least, most)}"
    limits = f" from {least:g}" * (least > -math.inf) + f" to {most:g}" * (most < math.inf)
    return NAMES[kind] + limits * (kind in (int, float))

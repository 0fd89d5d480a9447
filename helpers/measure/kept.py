"""Frozen records kept as JSON: written whole, and checked field by field when read."""

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin

from helpers.checkpointing import Plan

# What a value in a JSON file should be, in words, and a test of it.
_KINDS = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number from 0 up", lambda value: type(value) is int and value >= 0),
    float: ("a number above 0", lambda v: type(v) in (int, float) and v > 0),
    str: ("a text", lambda value: isinstance(value, str) and value != ""),
    dict: ("an object", lambda value: isinstance(value, dict)),
    tuple: ("a list", lambda value: isinstance(value, list | tuple)),
}

_EMPTY = {"unknown": ()}  # what is left out where it is so


def to_json(value: object) -> object:
    """Make what ``json`` can write of a record; empty and uncompared fields go."""
    if isinstance(value, Plan):
        return [list(segment) for segment in value.segments]
    if is_dataclass(value):
        kept = {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
        return {k: to_json(one) for k, one in kept.items() if one or k not in _EMPTY}
    return tuple(map(to_json, value)) if isinstance(value, tuple) else value


def from_json(kind: object, value: object, where: str) -> object:
    """Rebuild what ``to_json`` made, also after a trip by a file, and check its kind.

    Args:
        kind: a frozen dataclass, or the annotation of a field of one.
        where: what errors begin with.

    Raises:
        ValueError: names the field that is missing, or of another kind.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None else from_json(inner[0], value, where)
    if is_dataclass(kind):
        value = {"segments": value} if kind is Plan else value
        kinds = {f.name: f.type for f in fields(kind) if f.compare}
        if isinstance(value, dict):
            value = {k: empty for k, empty in _EMPTY.items() if k in kinds} | value
        held = _fields(kinds, value, where)
        try:
            return kind(**held)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
    if origin is Literal:
        _check(value in inner, f"one of {', '.join(map(repr, inner))}", value, where)
        return value
    words, fits = _KINDS[origin or kind]
    _check(fits(value), words, value, where)
    if origin is dict:
        return _fields(dict.fromkeys(get_args(inner[0]), inner[1]), value, where)
    if origin is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        _check(len(kinds) == len(value), f"a list of {len(kinds)}", value, where)
        places = (f"{where} {place}" for place in range(1, len(value) + 1))
        return tuple(map(from_json, kinds, value, places))
    return value


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place first, so that it is whole there or not at all.

    Raises:
        OSError: if there is no room for it; what was there before stays.
    """
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _fields(kinds: dict[str, object], values: object, where: str) -> dict:
    """Rebuild the fields of an object, which has these and no others."""
    _check(isinstance(values, dict), "an object", values, where)
    for name in kinds:
        if name not in values:
            raise ValueError(f"{where} lacks the field {name!r}")
    for name in values:
        if name not in kinds:
            raise ValueError(f"{where} has a field {name!r}, which none has")
    return {
        name: from_json(kind, values[name], f"{where}, {name!r}")
        for name, kind in kinds.items()
    }


def _check(fits: bool, words: str, value: object, where: str) -> None:
    if not fits:
        found = repr(value)
        found = found if len(found) < 60 else f"{found[:57]}…"
        raise ValueError(f"{where} should be {words}, and is {found}")

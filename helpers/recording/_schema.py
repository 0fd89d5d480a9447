"""Which fields a recording has, and of what kind each one is."""

from collections.abc import Callable
from typing import NamedTuple

from helpers.recording._set import MODELS, OPTIMIZERS, PRECISIONS
from helpers.timeline import CATEGORIES

FORMAT = "activation checkpointing recording 1"


class RecordingError(ValueError):
    """A file is no recording, or not the one that is wanted; says why."""


class Kind(NamedTuple):
    """A kind of value: what it should be, in words, and a test of it."""

    words: str
    fits: Callable[[object], bool]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_plan(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(segment, list) and segment and all(map(_is_text, segment))
        for segment in value
    )


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_bytes_by_category(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(CATEGORIES)
        and all(map(_is_whole, value.values()))
    )


def _one_of(*values: object) -> Kind:
    return Kind(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


def _or_null(kind: Kind) -> Kind:
    return Kind(
        f"{kind.words}, or null", lambda value: value is None or kind.fits(value)
    )


TEXT = Kind("a text", _is_text)
YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number from 0 up", _is_whole)
NUMBER = Kind("a number above 0", _is_number)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
PLAN = Kind("a list of segments, each a list of names", _is_plan)

RECORDING = {
    "format": TEXT,
    "gpu": TEXT,
    "driver": TEXT,
    "cuda": TEXT,
    "torch": TEXT,
    "date": TEXT,
    "processors": WHOLE,
    "threads": WHOLE,
    "settings": Kind(
        "an object with 'repeats' and 'warmup', two whole numbers",
        lambda value: (
            isinstance(value, dict)
            and set(value) == {"repeats", "warmup"}
            and all(map(_is_whole, value.values()))
        ),
    ),
    "made_up": YES_OR_NO,
    "cases": LIST,
    "searches": LIST,
}
_STEP = {
    "model": _one_of(*MODELS),
    "settings": OBJECT,
    "optimizer": _one_of(*OPTIMIZERS),
    "precision": _one_of(*PRECISIONS),
}
CASE = _STEP | {
    "rows": WHOLE,
    "outcome": _one_of("measured", "out of memory"),
    "predicted": OBJECT,
    "measured": _or_null(OBJECT),
    "base_ms": _or_null(NUMBER),
}
SEARCH = _STEP | {
    "plan": PLAN,
    "limit_bytes": WHOLE,
    "predicted_rows": WHOLE,
    "measured_rows": WHOLE,
}
REPORT = {
    "peak_bytes": WHOLE,
    "after_forward_bytes": WHOLE,
    "baseline_bytes": WHOLE,
    "categories": Kind(
        f"an object with a whole number for each of {', '.join(CATEGORIES)}",
        _is_bytes_by_category,
    ),
    "step_ms": _or_null(NUMBER),
    "step_ms_quartiles": _or_null(Kind("a list of two numbers", _is_pair)),
    "forward_flops": WHOLE,
    "recompute_flops": WHOLE,
    "device": _one_of("cpu", "cuda"),
    "source": _one_of("measured", "predicted"),
    "plan": PLAN,
    "repeats": WHOLE,
    "allocator_peak_bytes": WHOLE,
    "padding_bytes": WHOLE,
    "workspace_bytes": WHOLE,
    "reserved_bytes": WHOLE,
}


def check(values: object, fields: dict[str, Kind], where: str) -> None:
    """Raise a RecordingError that names the field unless all are there and fit."""
    if not isinstance(values, dict):
        raise RecordingError(f"{where} should be an object, and is {_short(values)}")
    for name in fields:
        if name not in values:
            raise RecordingError(f"{where} lacks the field {name!r}")
    for name, value in values.items():
        if name not in fields:
            raise RecordingError(f"{where} has a field {name!r}, which none has")
        if not _fits(fields[name], value):
            raise RecordingError(
                f"{where}: {name!r} should be {fields[name].words}, and is "
                f"{_short(value)}"
            )


def _fits(kind: Kind, value: object) -> bool:
    try:
        return kind.fits(value)
    except TypeError:  # a list where one of some texts should be
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"

"""The numbers of one training step, measured or predicted, in one frozen record.

Records go to JSON and back, and what comes back is checked, field by field.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Literal, get_args, get_origin

from helpers.checkpointing import Plan
from helpers.timeline import CATEGORIES, Timeline
from helpers.units import format_bytes, format_flops, format_ms

# What a value in a JSON file should be, in words, and a test of it.
_KINDS = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number from 0 up", lambda value: type(value) is int and value >= 0),
    float: ("a number above 0", lambda v: type(v) in (int, float) and v > 0),
    str: ("a text", lambda value: isinstance(value, str) and value != ""),
    dict: ("an object", lambda value: isinstance(value, dict)),
    tuple: ("a list", lambda value: isinstance(value, list | tuple)),
}


def to_json(value: object) -> object:
    """Make what ``json`` can write of a record; fields not compared are left out."""
    if isinstance(value, Plan):
        return [list(segment) for segment in value.segments]
    if is_dataclass(value):
        kept = [f.name for f in fields(value) if f.compare]
        return {name: to_json(getattr(value, name)) for name in kept}
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
    if kind is Plan:
        segments = from_json(tuple[tuple[str, ...], ...], value, where)
        return _made(Plan, {"segments": segments}, where)
    if is_dataclass(kind):
        kinds = {f.name: f.type for f in fields(kind) if f.compare}
        return _made(kind, _fields(kinds, value, where), where)
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


def _made(kind: type, values: dict, where: str) -> object:
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check(fits: bool, words: str, value: object, where: str) -> None:
    if not fits:
        found = repr(value)
        found = found if len(found) < 60 else f"{found[:57]}…"
        raise ValueError(f"{where} should be {words}, and is {found}")


@dataclass(frozen=True)
class StepReport:
    """Memory, work and time of one training step under one plan."""

    peak_bytes: int  # the most bytes alive at once during the step
    after_forward_bytes: int  # alive between the loss and backward
    baseline_bytes: int  # alive before the forward pass: parameters, state, batch
    categories: dict[Literal[CATEGORIES], int]  # what is alive at the peak
    step_ms: float | None  # median; None when predicted
    step_ms_quartiles: tuple[float, float] | None
    forward_flops: int  # matrix products and convolutions alone
    recompute_flops: int  # forward work done a second time, during backward
    device: str
    source: Literal["measured", "predicted", "recorded"]
    plan: Plan = Plan()
    repeats: int = 0  # how many runs the median is of
    # Of the device's allocator; all but the first are measured on CUDA alone.
    allocator_peak_bytes: int = 0  # most it counts: peak_bytes and kernels' scratch
    padding_bytes: int = 0  # by how much its blocks are larger than what is asked for
    workspace_bytes: int = 0  # cuBLAS's own, in neither peak
    reserved_bytes: int = 0  # most that it took from the GPU, for all
    timeline: Timeline | None = field(default=None, repr=False, compare=False)

    @property
    def scratch_bytes(self) -> int:
        """By how much kernels' scratch makes the allocator's peak higher."""
        return max(0, self.allocator_peak_bytes - self.peak_bytes)

    def to_dict(self) -> dict:
        """Make a dict that ``json`` can write; the timeline is left out."""
        return to_json(self)

    @classmethod
    def from_dict(cls, values: dict) -> "StepReport":
        """Rebuild a report from what ``to_dict`` made, also after a trip by JSON.

        Raises:
            ValueError: names the field that is missing, or of another kind.
        """
        return from_json(cls, values, "a report")

    def rows(self) -> dict[str, str]:
        """Say everything in words, a row a quantity."""
        rows = {
            "plan": str(self.plan),
            "peak": f"{format_bytes(self.peak_bytes)} ({self.peak_bytes:,} B)",
            "after forward": format_bytes(self.after_forward_bytes),
            "before forward": format_bytes(self.baseline_bytes),
            "alive at the peak": ", ".join(
                f"{category.replace('_', ' ')} {format_bytes(n_bytes)}"
                for category, n_bytes in self.categories.items()
                if n_bytes
            ),
            "scratch of kernels": f"{format_bytes(self.scratch_bytes)} on top",
            "forward": format_flops(self.forward_flops),
            "recompute": format_flops(self.recompute_flops),
        }
        if self.source == "predicted" or not self.scratch_bytes:
            del rows["scratch of kernels"]  # it differs from one GPU to the next
        if self.step_ms is not None:
            low, high = self.step_ms_quartiles
            rows["step"] = (
                f"{format_ms(self.step_ms)} (half of {self.repeats} runs between "
                f"{format_ms(low)} and {format_ms(high)})"
            )
        return rows

    def __repr__(self) -> str:
        lines = [f"StepReport, {self.source} for {self.device}"]
        lines += [f"  {name:<18} {value}" for name, value in self.rows().items()]
        return "\n".join(lines)

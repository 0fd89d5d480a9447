"""What a training step is made of: all that it refers to, and may change."""

import collections
import contextlib
import dis
import functools
import random
import sys
import types
from collections.abc import Iterable, Iterator

import torch

_LISTS = list, tuple, set, frozenset, collections.deque
_PLAIN = frozenset((int, float, bool, str, bytes, type, type(None)))
_DATA = torch.utils.data.Dataset, torch.utils.data.DataLoader
_NAMESPACES = "types", "argparse"  # the standard library's, of what a reader puts in


def parts_of(*values: object) -> list[object]:
    """List values and what they refer to at any depth, each thing once.

    Of a module, an optimizer, or any other object, what it holds; of a function, what
    it closes over, or finds among its module's names. What the standard library has
    made for the whole process, loggers say, and data sets have no parts here.
    """
    found: dict[int, object] = {}
    left = [*values]
    while left:
        value = left.pop()
        if id(value) not in found:
            found[id(value)] = value
            left += [part for part in _inside(value) if type(part) not in _PLAIN]
    return [*found.values()]


def has_parts(value: object) -> bool:
    """Say whether a step can change a thing, and it can be copied."""
    if isinstance(value, types.FunctionType):
        return not _is_library(value)
    kinds = torch.Tensor, dict, *_LISTS, types.MethodType, functools.partial
    if isinstance(value, (*kinds, torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.ndarray | numpy.random.Generator):
        return True
    return attributes(value) is not None


def attributes(value: object) -> dict | None:
    """Return the attributes of an object that is part of a step."""
    kind = type(value)
    if _is_standard(kind) and kind.__module__ not in _NAMESPACES:
        return None
    closed = isinstance(value, (type, *_DATA))
    return None if closed else getattr(value, "__dict__", None)


def _is_standard(kind: object) -> bool:
    return (kind.__module__ or "").partition(".")[0] in sys.stdlib_module_names


def _is_library(function: types.FunctionType) -> bool:
    return _is_standard(function) or (function.__module__ or "").startswith("torch.")


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, torch.Tensor):
        hooks = value._backward_hooks, value._post_accumulate_grad_hooks
        return (value.grad, *hooks) if value.is_leaf else ()
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, _LISTS):
        return value
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.FunctionType):
        if _is_library(value):
            return ()
        given = value.__defaults__, value.__kwdefaults__, *(value.__closure__ or ())
        return *given, *named_in(value).values()
    if isinstance(value, types.CellType):
        return contents(value)
    own = attributes(value)
    return [] if own is None else [own]


def contents(cell: types.CellType) -> list[object]:
    """List what a function's cell holds, which may be nothing yet."""
    with contextlib.suppress(ValueError):
        return [cell.cell_contents]
    return []


def named_in(function: types.FunctionType) -> dict[str, object]:
    """Find what a function looks up among its module's names.

    Functions of other modules are not the step's own.
    """
    around = function.__globals__
    names = {name for code in _codes(function) for name in code.co_names}
    return {
        name: around[name]
        for name in names & around.keys()
        if getattr(around[name], "__globals__", around) is around
    }


def written_in(function: types.FunctionType) -> dict[str, object]:
    """Find what a function sets among its module's names."""
    steps = [step for code in _codes(function) for step in dis.get_instructions(code)]
    names = {step.argval for step in steps if step.opname == "STORE_GLOBAL"}
    around = function.__globals__
    return {name: around[name] for name in names & around.keys()}


def _codes(function: types.FunctionType) -> Iterator[types.CodeType]:
    """Yield a function's code, and that of functions that it makes."""
    left = [function.__code__]
    while left:
        code = left.pop()
        left += [one for one in code.co_consts if isinstance(one, types.CodeType)]
        yield code

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
from torch import nn

_LISTS = list, tuple, set, frozenset, collections.deque
PLAIN = frozenset((int, float, bool, str, bytes, type, type(None)))
_CHANGED = dict, *_LISTS, types.MethodType, functools.partial, random.Random
_CHANGED += torch.Generator, torch.Tensor  # the most usual first
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
            left += [part for part in _inside(value) if type(part) not in PLAIN]
    return [*found.values()]


def of_classes(model: nn.Module) -> list[object]:
    """List the classes of a model's modules that are no package's, and what is in them.

    What their functions find among a module's names is shared by all models.
    """
    kinds = {type(module) for module in model.modules()}
    return [part for kind in kinds for part in _own_of(kind)]


def _own_of(kind: type) -> list[object]:
    own = _own_bases(kind)
    held = {n: value for base in own for n, value in vars(base).items()}
    plain = [value for name, value in held.items() if not name.startswith("__")]
    return [*own, *(getattr(value, "__func__", value) for value in plain)]


@functools.cache
def _own_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if not is_package(base.__module__)]


def is_package(name: str) -> bool:
    """Say whether a module was installed, or came with Python."""
    if name.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def has_parts(value: object) -> bool:
    """Say whether a step can change a thing, and it can be copied."""
    if isinstance(value, _CHANGED):
        return True
    if isinstance(value, types.FunctionType):
        return not _is_library(value)
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
    if isinstance(value, dict):  # first, because most things are one
        return [*value, *value.values()]
    if isinstance(value, torch.Tensor):
        hooks = value._backward_hooks, value._post_accumulate_grad_hooks
        return (value.grad, *hooks) if value.is_leaf else ()
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
    if isinstance(value, functools._lru_cache_wrapper):
        return (value.__wrapped__,)
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
    around, names = function.__globals__, _names(function.__code__)
    return {
        name: around[name]
        for name in names & around.keys()
        if getattr(around[name], "__globals__", around) is around
    }


def written_in(function: types.FunctionType) -> dict[str, object]:
    """Find what a function sets among its module's names."""
    around, names = function.__globals__, _written_names(function.__code__)
    return {name: around[name] for name in names & around.keys()}


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    return frozenset(name for one in _codes(code) for name in one.co_names)


@functools.cache
def _written_names(code: types.CodeType) -> frozenset[str]:
    steps = [step for one in _codes(code) for step in dis.get_instructions(one)]
    return frozenset(s.argval for s in steps if s.opname == "STORE_GLOBAL")


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code, and that of functions that it makes."""
    left = [code]
    while left:
        code = left.pop()
        left += [one for one in code.co_consts if isinstance(one, types.CodeType)]
        yield code

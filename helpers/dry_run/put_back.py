"""How what a step may change is put back: everything but the numbers in tensors."""

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from helpers.checkpointing import Undo
from helpers.dry_run.parts import (
    contents,
    has_parts,
    is_package,
    of_classes,
    parts_of,
    written_in,
)
from helpers.timeline import local


def ways_back(parts: Iterable[object]) -> list[Callable]:
    """List for each part that can change what puts it back."""
    return [back for part in parts if (back := _way_back(part))]


def put_back(ways: list[Callable]) -> None:
    """Put each thing back, and once; one that cannot be keeps no other from it.

    Called again after an interrupt it does the rest.
    """
    failed = []
    while ways:
        try:
            ways[-1]()
        except Exception as error:
            failed.append(error)
        ways.pop()
    if failed:
        raise failed[0]


def keep_shared(undo: Undo, model: nn.Module) -> None:
    """Put back, at a block's end, what a model's classes share with other models."""
    if held := of_classes(model):
        ways = ways_back(parts_of(*held))
        for _ in range(2):  # an interrupt may end the first
            undo.callback(put_back, ways)


_HOLDING = dict, list


def keep_attributes(undo: Undo, model: nn.Module) -> None:
    """Put back what modules hold at a block's end: tensors replaced, lists grown."""
    own = [*map(vars, model.modules())]
    held = [one for each in own for one in each.values() if isinstance(one, _HOLDING)]
    empty = [one for one in held if not one]  # most are
    kept = [(one, one.copy()) for one in (*own, *held) if one]
    parameters = [one for each in own for one in each["_parameters"].values()]
    gradients = [(one, one.grad) for one in parameters if one is not None]
    for _ in range(2):  # an interrupt may end the first
        undo.callback(_as_before, empty, kept, gradients)


def _as_before(empty: list, kept: list[tuple], gradients: list[tuple]) -> None:
    for value in empty:
        if value:
            value.clear()
    for value, before in kept:
        if not _same(value, before):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(before)
    for parameter, gradient in gradients:
        parameter.grad = gradient
    for each in (empty, kept, gradients):
        each.clear()  # a second time there is nothing to do


def _same(value: dict | list, before: dict | list) -> bool:
    """Say whether both hold the same things, which are looked at where they are two."""
    try:
        return value == before
    except (RuntimeError, TypeError, ValueError):  # tensors, arrays
        return False


def refill(part: object, before: object) -> None:
    """Fill a dict, a set, a list or a deque again, unless it holds the same things."""
    if _held(part) != _held(before):
        part.clear()
        fill = part.extend if isinstance(part, list | deque) else part.update
        fill(before)


def _held(part: object) -> list[int]:
    values = part.values() if isinstance(part, dict) else ()
    return [*map(id, part), *map(id, values)]


def _way_back(part: object) -> Callable | None:
    numpy = sys.modules.get("numpy")
    if isinstance(part, torch.Tensor):
        return _of_tensor(part)
    if isinstance(part, dict | set | list | deque):
        return partial(refill, part, part.copy())
    if isinstance(part, types.CellType):
        return partial(_fill, part, contents(part))
    if isinstance(part, types.FunctionType) and has_parts(part):
        return partial(part.__globals__.update, written_in(part))
    if isinstance(part, functools._lru_cache_wrapper):
        return partial(_forget, part, part.cache_info().misses)
    if isinstance(part, type) and not is_package(part.__module__):
        return partial(_of_class, part, dict(vars(part)))
    if isinstance(part, torch.Generator):
        return partial(part.set_state, part.get_state())
    if isinstance(part, random.Random):
        return partial(part.setstate, part.getstate())
    if numpy and isinstance(part, numpy.random.Generator):
        own = part.bit_generator
        return partial(setattr, own, "state", own.state)
    if numpy and isinstance(part, numpy.ndarray) and part.flags.writeable:
        return partial(part.__setitem__, ..., part.copy())
    return None


def _fill(cell: types.CellType, before: list) -> None:
    for value in before:
        cell.cell_contents = value


def _forget(cached: Callable, misses: int) -> None:
    """Empty a function's cache if something was added; it makes the rest again."""
    if cached.cache_info().misses != misses:
        cached.cache_clear()


def _of_class(kind: type, before: dict) -> None:
    for name in vars(kind).keys() - before.keys():
        delattr(kind, name)
    for name, value in before.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def _of_tensor(tensor: torch.Tensor) -> Callable | None:
    """Tell how a leaf is given its storage again, its gradient, and its place in
    autograd.
    """
    if not tensor.is_leaf or tensor.is_meta or tensor.is_inference():
        return None
    data, grad, requires_grad = tensor.detach(), tensor.grad, tensor.requires_grad

    def back() -> None:
        if not tensor.is_leaf:
            tensor.detach_()
        is_plain = tensor.layout is torch.strided and local(tensor) is tensor
        if is_plain and not tensor.is_set_to(data):
            tensor.data = data
        tensor.requires_grad_(requires_grad).grad = grad

    return back

"""Training steps are run for good; then all that they may have changed is put back."""

import contextlib
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from helpers.checkpointing import Undo
from helpers.dry_run.parts import contents, has_parts, parts_of, written_in
from helpers.measure._cpu_limit import uncounted
from helpers.timeline import local, tensors_in


@contextlib.contextmanager
def left_as_found(model: nn.Module, trains: bool, *others: object) -> Iterator[None]:
    """Put back what training steps change: parameters, buffers, gradients, attributes.

    The copies lie in host memory, and count neither on a GPU nor under a limit.

    Args:
        trains: whether parameters change, too.
        others: what else the steps are made of: a batch, an optimizer, a loss, a step.
            What these refer to is put back as well.
    """
    parameters = list(model.parameters())
    unchanged = [parameter.grad for parameter in parameters]  # they are taken away
    if not trains:
        unchanged += parameters
    with Undo() as undo:
        parts = parts_of(model, *others)
        backs = [back for part in parts if (back := _back(part))]
        backs += _saved(parts, set(map(id, unchanged)))
        for _ in range(2):  # an interrupt may end the first
            undo.callback(_put_back, backs)
        for parameter in parameters:
            parameter.grad = None
        yield


@uncounted()
def _put_back(backs: list[Callable]) -> None:
    for back in backs:
        back()


def _back(part: object) -> Callable | None:
    """Tell how to put a thing back, but for the numbers in a tensor."""
    numpy = sys.modules.get("numpy")
    if isinstance(part, torch.Tensor):
        return _tensor_back(part)
    if isinstance(part, dict | set):
        return partial(_refill, part, part.update, part.copy())
    if isinstance(part, list | deque):
        return partial(_refill, part, part.extend, part.copy())
    if isinstance(part, types.CellType):
        return partial(_fill, part, contents(part))
    if isinstance(part, types.FunctionType) and has_parts(part):
        return partial(part.__globals__.update, written_in(part))
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


def _refill(part: object, fill: Callable, before: object) -> None:
    """Fill a dict, a set, a list or a deque again, unless it holds the same things."""
    if _held(part) != _held(before):
        part.clear()
        fill(before)


def _fill(cell: types.CellType, before: list) -> None:
    for value in before:
        cell.cell_contents = value


def _held(part: object) -> list[int]:
    values = part.values() if isinstance(part, dict) else ()
    return [*map(id, part), *map(id, values)]


def _tensor_back(tensor: torch.Tensor) -> Callable | None:
    """Tell how a leaf is given its storage again, its gradient, and its place in
    autograd.
    """
    data, grad, requires_grad = tensor.detach(), None, tensor.requires_grad

    def back() -> None:
        if not tensor.is_leaf:
            tensor.detach_()
        is_plain = tensor.layout is torch.strided and local(tensor) is tensor
        if is_plain and not tensor.is_set_to(data):
            tensor.data = data
        tensor.requires_grad_(requires_grad).grad = grad

    if not tensor.is_leaf:
        return None
    grad = tensor.grad
    return back


@uncounted()
def _saved(parts: list[object], unchanged: set[int]) -> list[Callable]:
    """Copy the storages of tensors to the host; of sparse ones, their parts'."""
    found = {}
    for part in parts:
        if isinstance(part, torch.Tensor) and id(part) not in unchanged:
            for tensor in tensors_in(local(part)):
                if not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage
    return [
        partial(one.copy_, one.cpu() if one.is_cuda else one.clone())
        for one in found.values()
    ]

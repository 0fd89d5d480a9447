"""Copies of what a step is made of, that lie elsewhere: a model, its batch, its loss.

``copy.deepcopy`` makes them, and every tensor's copy is asked for here.
"""

import copy
import types
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from helpers.checkpointing import Undo

# What a function of a step may refer to and change, and takes a copy of.
_HELD = (
    torch.Tensor,
    nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
    list,
    dict,
    set,
)


class Copies:
    """Copies values of any kind; what comes twice is copied once.

    Args:
        change: makes each tensor's copy.
    """

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.asked = _Asked(change)
        self.memo: dict[int, object] = {}  # deepcopy's: what was copied, by address

    def of(self, value: object) -> object:
        """Copy a value: a model, a batch, an optimizer of that model, a function.

        An optimizer begins anew, without state. A function is another one if it refers
        to something that is copied.

        Raises:
            ValueError: for an optimizer of another model.
        """
        if value is None:
            return None
        if isinstance(value, torch.optim.Optimizer):
            return self._optimizer(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        made = self._copied(value)
        if isinstance(value, nn.Module):
            self._copy_hooks(value, made)
        return made

    def _copy_hooks(self, model: nn.Module, made: nn.Module) -> None:
        """Give parameters their own hooks again, which no copy of a tensor has."""
        pairs = zip(model.parameters(), made.parameters(), strict=True)
        for old, new in pairs:
            for hook in (getattr(old, "_backward_hooks", None) or {}).values():
                new.register_hook(self.of(hook))
            for hook in (old._post_accumulate_grad_hooks or {}).values():
                new.register_post_accumulate_grad_hook(self.of(hook))

    def _optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if id(optimizer) in self.memo:
            return self.memo[id(optimizer)]
        made = self.memo[id(optimizer)] = object.__new__(type(optimizer))
        own = {**vars(optimizer), "state": defaultdict(dict)}
        vars(made).update(self._copied(own))
        return made

    def _copied(self, value: object) -> object:
        with Undo() as undo:
            undo.enter_context(self.asked)
            return copy.deepcopy(value, self.memo)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Copy what a function closes over, or finds among its module's names."""
        if id(function) in self.memo:
            return self.memo[id(function)]
        self.memo[id(function)] = function  # for one that calls itself
        cells = function.__closure__ or ()
        names = {*_names(function.__code__)} & function.__globals__.keys()
        named = {name: function.__globals__[name] for name in names}
        named = {n: (value, self._held(value, function)) for n, value in named.items()}
        closed = [self._cell(cell, function) for cell in cells]
        named = {name: new for name, (old, new) in named.items() if new is not old}
        if named or any(new is not old for new, old in zip(closed, cells, strict=True)):
            made = types.FunctionType(
                function.__code__,
                function.__globals__ | named,
                function.__name__,
                function.__defaults__,
                tuple(closed),
            )
            made.__kwdefaults__ = function.__kwdefaults__
            self.memo[id(function)] = made
        return self.memo[id(function)]

    def _cell(self, cell: types.CellType, owner: types.FunctionType) -> types.CellType:
        try:
            held = cell.cell_contents
        except ValueError:  # it is empty so far
            return cell
        made = self._held(held, owner)
        return cell if made is held else types.CellType(made)

    def _held(self, value: object, owner: types.FunctionType) -> object:
        """Copy what a function refers to, where a step may change it."""
        if isinstance(value, types.FunctionType):
            return self.of(value) if value.__globals__ is owner.__globals__ else value
        if not isinstance(value, _HELD):
            return value
        try:
            return self.of(value)
        except (TypeError, NotImplementedError):  # it holds a file, or a lock
            return value


class _Asked(TorchFunctionMode):
    """Answers ``deepcopy`` for tensors; a parameter is cloned by its own class."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__deepcopy__ or func is torch.Tensor.clone:
            return self.change(args[0])
        return func(*args, **(kwargs or {}))


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function looks up, also inside those that it makes."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)

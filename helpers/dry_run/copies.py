"""Copies of what a step is made of, that lie elsewhere: a model, its batch, its loss.

``copy.deepcopy`` makes them, and every tensor's copy is asked for here.
"""

import copy
import copyreg
import functools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from helpers.checkpointing import Undo
from helpers.dry_run.parts import PLAIN, contents, has_parts, named_in, parts_of


class Copies:
    """Copies values of any kind; what comes twice is copied once.

    Args:
        change: makes each tensor's copy.
    """

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.asked = _Asked(change)
        self.memo: dict[int, object] = {}  # deepcopy's: what was copied, by address
        self.hooked: set[int] = set()  # tensors whose copies have their hooks
        self._kept: list[nn.Module] = []

    def keep(self, model: nn.Module) -> None:
        """Let a model, which is where copies are, stay itself in what refers to it."""
        self._kept.append(model)

    def of(self, value: object) -> object:
        """Copy a value: a model, a batch, an optimizer of that model, a function.

        An optimizer begins anew, without state. A function is another one, that refers
        to copies. What cannot be copied, a lock say, stays itself.

        Raises:
            ValueError: for an optimizer of another model.
        """
        if value is None or id(value) in self.memo:
            return self.memo.get(id(value))
        if type(value) is torch.Tensor and value.is_leaf and not _has_more(value):
            self.memo[id(value)] = made = self.asked.change(value)
            return made
        while self._kept:
            model = self._kept.pop()
            self.memo |= {id(part): part for part in (model, *model.parameters())}
        if isinstance(value, torch.optim.Optimizer):
            return self._optimizer(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            given = self.of(value.args), self.of(value.keywords)
            return functools.partial(self.of(value.func), *given[0], **given[1])
        return self._copied(value)

    def _optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if id(optimizer) in self.memo:
            return self.memo[id(optimizer)]
        made = self.memo[id(optimizer)] = object.__new__(type(optimizer))
        own = {**vars(optimizer), "state": defaultdict(dict)}
        is_wrapped = own.pop("step", None)  # by a scheduler; it runs the other one
        vars(made).update(self._copied(own))
        if is_wrapped:
            made.step = functools.partial(type(made).step, made)
            made.step._wrapped_by_lr_sched = made._opt_called = True
        return made

    def _copied(self, value: object) -> object:
        """Copy by ``deepcopy``, but for what it leaves out or cannot copy."""
        parts = parts_of(value)
        for part in parts:
            if isinstance(part, torch.optim.Optimizer | types.FunctionType):
                self.of(part)
            elif isinstance(part, torch.Generator):
                self.memo.setdefault(id(part), part.clone_state())
            elif not has_parts(part) and not isinstance(part, types.CellType):
                self.memo[id(part)] = part  # a cell is its function's affair
        with Undo() as undo:
            undo.enter_context(self.asked)
            self._copy_modules(parts)
            made = copy.deepcopy(value, self.memo)
        for part in parts:
            if isinstance(part, torch.Tensor) and part.is_leaf:
                self._copy_hooks(part)
        return made

    def _copy_modules(self, parts: list[object]) -> None:
        """Copy modules as ``deepcopy`` does, in a third of its time.

        Most of what a module holds is a dict of hooks that has none.
        """
        memo, left = self.memo, []
        for part in parts:
            if id(part) not in memo and _is_usual(type(part)):
                memo[id(part)] = made = object.__new__(type(part))
                left.append((part, made))
        for part, made in left:
            state = dict(part.__getstate__())
            for name, held in state.items():
                if type(held) in _EMPTY and not held:
                    state[name] = memo.setdefault(id(held), type(held)())
                elif type(held) not in PLAIN:
                    state[name] = copy.deepcopy(held, memo)
            made.__setstate__(state)

    def _copy_hooks(self, tensor: torch.Tensor) -> None:
        """Give a tensor's copy its hooks, which no copy has."""
        made = self.memo.get(id(tensor), tensor)
        if made is tensor or id(tensor) in self.hooked:
            return
        self.hooked.add(id(tensor))
        for hook in (tensor._backward_hooks or {}).values():
            made.register_hook(self.of(hook))
        for hook in (tensor._post_accumulate_grad_hooks or {}).values():
            made.register_post_accumulate_grad_hook(self.of(hook))

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Copy a function if anything is copied that it refers to."""
        if id(function) in self.memo:
            return self.memo[id(function)]
        if not has_parts(function):
            return function
        cells, around = function.__closure__ or (), function.__globals__.copy()
        memo = self.memo  # two functions may close over the same
        closed = tuple(memo.setdefault(id(cell), types.CellType()) for cell in cells)
        made = types.FunctionType(function.__code__, around, closure=closed)
        made = functools.update_wrapper(made, function)
        self.memo[id(function)] = made  # what it refers to may refer to it
        given = function.__defaults__, function.__kwdefaults__
        made.__defaults__, made.__kwdefaults__ = map(self._held, given)
        around.update((n, self._held(one)) for n, one in named_in(function).items())
        for cell, new in zip(cells, closed, strict=True):
            for held in contents(cell):
                new.cell_contents = self._held(held)
        return made

    def _held(self, value: object) -> object:
        """Copy what a function refers to, where a step may change it."""
        return self.of(value) if has_parts(value) else value


_EMPTY = dict, OrderedDict, set
_OF_COPYING = "__reduce_ex__", "__reduce__", "__getstate__", "__new__"


@functools.cache
def _is_usual(kind: type) -> bool:
    """Say whether ``deepcopy`` would copy a module by its attributes alone."""
    if not issubclass(kind, nn.Module) or hasattr(kind, "__deepcopy__"):
        return False
    ways = [getattr(kind, name) is getattr(nn.Module, name) for name in _OF_COPYING]
    slots = [vars(base).get("__slots__") for base in kind.__mro__]
    return all(ways) and not any(slots) and kind not in copyreg.dispatch_table


def _has_more(tensor: torch.Tensor) -> bool:
    hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    return bool(tensor.grad is not None or hooks)


class _Asked(TorchFunctionMode):
    """Answers ``deepcopy`` for tensors; a parameter is cloned by its own class."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__deepcopy__ or func is torch.Tensor.clone:
            return self.change(args[0])
        return func(*args, **(kwargs or {}))

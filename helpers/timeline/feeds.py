"""Who feeds whom: the calls of a model's modules in one forward pass.

Neighbours can share a segment where each is fed what the one before returns, and
nobody else uses that. Inside a segment it is not there any more: a model that uses it
gets the segment's output instead, and nobody is told.
"""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from helpers.checkpointing import Undo, follows, listed_after, marks
from helpers.timeline import tensors_in


class Call(NamedTuple):
    """One call of a module; of what it is given and returns nothing is kept alive."""

    name: str
    turn: int  # how many calls were over when it began
    again: bool  # whether backward runs it
    fed: object  # its first argument
    others: list  # marks of all others
    given: list[weakref.ref]  # the storages of all
    in_place: bool  # whether it changes one
    returned: object
    output: weakref.ref | None  # the storage of the first tensor that it returns
    nodes: range  # autograd's numbers of its nodes, which count up as nodes are made
    last_node: int | None  # the one that made its output


@contextlib.contextmanager
def hooked(
    model: nn.Module,
    names: Iterable[str],
    enter: Callable,
    leave: Callable,
    first: tuple[bool, bool] = (False, False),
) -> Iterator[None]:
    """Call functions around each call of some modules, inside a ``with`` block.

    Args:
        enter: called with name, module, args and kwargs.
        leave: called with the same and the output; also where the module fails.
        first: whether each comes before the hooks that a module has.
    """

    with Undo() as undo:
        for name in names:
            module, how = model.get_submodule(name), {"with_kwargs": True}
            hook, how["prepend"] = functools.partial(enter, name), first[0]
            undo.callback(module.register_forward_pre_hook(hook, **how).remove)
            hook, how["prepend"] = functools.partial(leave, name), first[1]
            how["always_call"] = True
            undo.callback(module.register_forward_hook(hook, **how).remove)
        yield


class Feeds:
    """Follows calls, and says of neighbours whether one feeds the other."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, list(names)
        self.calls: dict[str, list[Call]] = {}  # by name
        self.in_turn: list[Call] = []  # as forward made them
        self.used_elsewhere: set[str] = set()  # see following_chain
        self._begun: list[tuple[int, int, list[int]]] = []

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Follow the calls inside a ``with`` block."""
        return hooked(self.model, self.names, self._enter, self._leave)

    @contextlib.contextmanager
    def following_chain(self) -> Iterator[None]:
        """Follow a chain's calls, and find those whose output not only the next uses.

        Only what autograd sees is found.

        Raises:
            ValueError: at the block's end, if a name is not called once, in its turn,
                with what the one before returns.
        """
        with hooked(self.model, [""], _nothing, self._leave_model), self.watching():
            yield
        if fault := self._fault_of_chain():
            raise ValueError(f"these layers are no chain: {fault}")

    def in_place(self) -> set[str]:
        """Name the modules that change their input."""
        return {call.name for call in self.in_turn if call.in_place}

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        turn, node = len(self.in_turn), torch.autograd._get_sequence_nr()
        self._begun.append((turn, node, _versions(tensors_in((args, kwargs)))))

    def _leave(self, name, module, args: tuple, kwargs: dict, output: object) -> None:
        turn, first_node, versions = self._begun.pop()
        fed, *others = args or (None,)
        given, made = list(tensors_in((args, kwargs))), next(tensors_in(output), None)
        last = getattr(made, "grad_fn", None)
        call = Call(
            name,
            turn,
            again=torch._C._current_graph_task_id() != -1,
            fed=_reference(fed),
            others=marks(tuple(others), kwargs),
            given=[weakref.ref(tensor.untyped_storage()) for tensor in given],
            in_place=_versions(given) != versions,
            returned=_reference(output),
            output=None if made is None else weakref.ref(made.untyped_storage()),
            nodes=range(first_node, torch.autograd._get_sequence_nr()),
            last_node=last._sequence_nr() if last else None,
        )
        self.calls.setdefault(name, []).append(call)
        if not call.again:
            self.in_turn.append(call)

    def break_between(self, before: str, after: str) -> str:
        """Say why two neighbours cannot share a segment; "" if they can."""
        calls = [self.calls.get(name, []) for name in (before, after)]
        times = [len(found) for found in calls]
        if follows(self.model, before, after) and times[0] == times[1] > 0:
            return ""
        if times != [1, 1]:
            return f"{before!r} and {after!r} are not called once each"
        if not listed_after(self.model, before, after):
            return f"{before!r} and {after!r} are not in one list"
        (one,), (other,) = calls
        if not isinstance(one.returned, weakref.ref):
            return f"{before!r} does not return a tensor"
        if other.fed is not one.returned:
            return f"{after!r} is not fed what {before!r} returns"
        if other.others != one.others:
            return f"{after!r} is given other arguments than {before!r}"
        return ""

    def _fault_of_chain(self) -> str:
        """Say where the names, called in turn, do not feed each other; "" if they do.

        What is handed on may be a view, or one of several outputs.
        """
        for place, call in enumerate(self.in_turn):
            before = self.in_turn[place - 1]
            if call.name in self.names[:place]:
                return f"{call.name!r} is called twice"
            if call.turn != place or self.names[place : place + 1] != [call.name]:
                return f"{call.name!r} is called out of its turn"
            if place and before.output not in call.given:
                return f"{call.name!r} is not fed what {before.name!r} returns"
        missing = self.names[len(self.in_turn) :]
        return f"{missing[0]!r} is not called" if missing else ""

    def _leave_model(self, *call: object) -> None:
        """Walk the graph of the model's output, from nodes to those that they use."""
        after = {
            one.last_node: (one.name, following.nodes)
            for one, following in itertools.pairwise(self.in_turn)
        }
        seen = set()
        edges = [(-1, tensor.grad_fn) for tensor in tensors_in(call[-1])]
        while edges:
            user, node = edges.pop()
            if node is None:
                continue
            number = node._sequence_nr()
            name, users = after.get(number, ("", ()))
            if name and user not in users:
                self.used_elsewhere.add(name)
            if node not in seen:
                seen.add(node)
                edges += [(number, used) for used, _ in node.next_functions]


def _nothing(*call: object) -> None:
    """Do nothing before a call."""


def _reference(value: object) -> object:
    """Refer to a tensor without keeping it alive: one tensor, one reference."""
    return weakref.ref(value) if isinstance(value, torch.Tensor) else type(value)


def _versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """List how often each tensor has been changed in place, where that is counted."""
    return [x._version for x in tensors if not x.is_inference()]

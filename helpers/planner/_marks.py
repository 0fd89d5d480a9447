"""Watch one training step and mark where each layer of a chain begins and ends.

A mark is a place in the log of storages allocated and freed, so that the level
between two marks can be read off when the step is over.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from helpers.planner._uses import Numbers, node_number, used_elsewhere
from helpers.timeline import Allocation, Tracker, tensors_in

BEFORE = "(before)"  # what a model does before the first layer of a chain inside it

FREED_EARLY = ("free", "forward")


class Mark(NamedTuple):
    """A moment: how many events came before it, and how many FLOPs."""

    place: int
    forward_flops: int
    recompute_flops: int


@dataclass
class MarkedStep:
    """One step: where each stage began and ended, and how many bytes were alive.

    Recomputing is not marked. A stage's backward begins where its output's gradient
    is there, and ends where its input's is.
    """

    names: Sequence[str]
    tracker: Tracker
    joined: bool = False  # then the first of a ModuleList's runs its neighbours as well
    starts: dict[str, Mark] = field(default_factory=dict)
    ends: dict[str, Mark] = field(default_factory=dict)
    gradients: dict[str, Mark] = field(default_factory=dict)  # of its output
    inputs: dict[str, Allocation] = field(default_factory=dict)
    outputs: dict[str, list[Allocation]] = field(default_factory=dict)
    in_place: set[str] = field(default_factory=set)  # they change their input
    used_elsewhere: set[str] = field(default_factory=set)  # besides by the next one
    nodes: dict[str, Numbers] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)
    backward_end: Mark | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    late: list[nn.Parameter] = field(
        default_factory=list
    )  # no gradient before BEFORE's
    fault: str = ""
    levels: list[int] = field(default_factory=list)  # before each event; at the end
    brief: set[Allocation] = field(default_factory=set)  # see _brief

    def record(self, step: Callable[[], object], model: nn.Module) -> None:
        """Run the step.

        Raises:
            ValueError: if a stage is not called once, with what the one before returns.
        """
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        with contextlib.ExitStack() as stack:
            for hook in self._hooks(model):
                stack.callback(hook.remove)
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(self.tracker.watching())
            step()
        missing = [name for name in self.names if name not in self.outputs]
        if self.fault or missing:
            fault = self.fault or f"{missing[0]!r} is not called"
            raise ValueError(f"these layers are no chain: {fault}")
        if self.backward_end is None:
            raise ValueError(
                f"backward does not reach {self.names[-1]!r}, nor any layer before it, "
                "so there is nothing to plan"
            )
        self.levels = self.levels_without()
        self.brief = self._brief()

    def levels_without(self, beside: Collection[Allocation] = ()) -> list[int]:
        """List the bytes alive before each event and at the end, but for a few."""
        changes = (
            0 if it in beside else it.bytes if kind == "alloc" else -it.bytes
            for kind, it, _ in self.tracker.log
        )
        first = sum(it.bytes for it in self.tracker.before)
        return list(itertools.accumulate(changes, initial=first))

    def _brief(self) -> set[Allocation]:
        """Find what lies beside the chain in forward, and is gone before backward.

        A second output may do so: of a checkpointed layer nothing else saves it.
        """
        events = self.tracker.log[self.starts[BEFORE].place :]
        made = {it for kind, it, _ in events if kind == "alloc"}
        gone = {it for kind, it, phase in events if (kind, phase) == FREED_EARLY}
        chain = {*self.inputs.values(), *self.outputs[self.names[-1]][:1]}
        return made & gone - chain

    def peak(self, start: int, stop: int) -> int:
        """Find the highest level between two places."""
        return max(self.levels[start : stop + 1])

    @functools.cached_property
    def end(self) -> int:
        """The place where the last stage's caller has let go of its input."""
        log, end = self.tracker.log, self.ends[self.names[-1]].place
        while end < len(log) and log[end][0] == "free":
            end += 1
        return end

    def output_bytes(self, name: str) -> int:
        """Count a stage's output, and what else it made and returns for longer."""
        first, last = self.starts[name].place, self.ends[name].place
        made = {it for kind, it, _ in self.tracker.log[first:last] if kind == "alloc"}
        outputs = self.outputs[name]
        found = {*outputs[:1], *made.intersection(outputs)} - self.brief
        return sum(it.bytes for it in found if it.phase != "before")

    def peak_after_start(self, name: str) -> int:
        """Find a stage's forward peak, from the level at its start."""
        start = self.starts[name].place
        return self.peak(start, self.ends[name].place) - self.levels[start]

    def backward_marks(self, name: str) -> tuple[Mark, Mark]:
        """Find where a stage's backward begins and ends."""
        before = dict(zip(self.names, [BEFORE, *self.names], strict=False))
        return tuple(
            self.gradients.get(stage, self.backward_end)
            for stage in (name, before.get(name))
        )

    def levels_in(
        self, name: str, phase: str, stays: Allocation | None = None
    ) -> list[int]:
        """List the levels in a stage's backward that events of one phase reach.

        Args:
            stays: what is to be counted on, also when it has been freed there.
        """
        start, stop = (mark.place for mark in self.backward_marks(name))
        found, more = [], 0
        for place in range(start, stop):
            kind, allocation, event_phase = self.tracker.log[place]
            if kind == "free" and allocation is stays:
                more = allocation.bytes
            if event_phase == phase:
                found.append(self.levels[place + 1] + more)
        return found

    def frees_input_in_backward(self, name: str) -> bool:
        """Say whether no other stage keeps its input until that one's backward."""
        start, stop = (mark.place for mark in self.backward_marks(name))
        given = self.inputs.get(name)
        events = self.tracker.log[start:stop]
        return any(kind == "free" and it is given for kind, it, _ in events)

    def _hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        def begin_model(module: nn.Module, args: tuple) -> None:
            self.starts[BEFORE] = self._mark()

        yield model.register_forward_pre_hook(begin_model)
        yield model.register_forward_hook(
            lambda module, args, output: self._find_used_elsewhere(output)
        )
        for name in self.names:
            module = model.get_submodule(name)
            yield module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: self._begin(name, args, kwargs),
                with_kwargs=True,
            )
            yield module.register_forward_hook(
                lambda module, args, kwargs, output, name=name: self._end(
                    name, output, args, kwargs
                ),
                with_kwargs=True,
            )

    def _mark(self) -> Mark:
        flops = self.tracker.flops
        return Mark(len(self.tracker.log), flops["forward"], flops["recompute"])

    def _allocations(self, value: object) -> list[Allocation]:
        """Find the storages of the tensors in a value."""
        addresses = (tensor.untyped_storage()._cdata for tensor in tensors_in(value))
        found = dict.fromkeys(self.tracker.alive.get(address) for address in addresses)
        return [allocation for allocation in found if allocation is not None]

    def _begin(self, name: str, args: tuple, kwargs: dict) -> None:
        if torch._C._current_graph_task_id() != -1 or self._given_back(name):
            return
        given = self._allocations((args, kwargs))
        before = next(reversed(self.outputs), None)
        if self.fault:
            pass
        elif name in self.ends:
            self.fault = f"{name!r} is called twice"
        elif name != self.names[len(self.outputs) - bool(self.outputs)]:
            self.fault = f"{name!r} is called out of its turn"
        elif before and not set(self.outputs[before][:1]) & set(given):
            self.fault = f"{name!r} is not fed what {before!r} returns"
        if before is None:
            self._end(BEFORE, (args, kwargs))
        if given:
            self.inputs[name] = given[0]
        self.versions = _versions(args, kwargs)
        self.starts[name] = self._mark()
        self.nodes[name] = Numbers(torch.autograd._get_sequence_nr())

    def _end(self, name: str, output: object, *given: object) -> None:
        if torch._C._current_graph_task_id() != -1 or self._given_back(name):
            return
        if given and _versions(*given) != self.versions:
            self.in_place.add(name)
        self.ends[name] = self._mark()
        self.outputs[name] = self._allocations(output)
        if name in self.nodes:
            end = torch.autograd._get_sequence_nr()
            numbers = self.nodes[name]._replace(end=end, output=node_number(output))
            self.nodes[name] = numbers
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._gradient_is_there(name))

    def _find_used_elsewhere(self, output: object) -> None:
        self.used_elsewhere = used_elsewhere(output, self.nodes)

    def _given_back(self, name: str) -> bool:
        return self.joined and name in self.ends

    def _gradient_is_there(self, name: str) -> None:
        self.gradients.setdefault(name, self._mark())
        if name == BEFORE:
            self.late = [p for p in self.parameters if p.grad is None]
        if self.backward_end is None:
            self._end_backward()
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.backward_end = self._mark()


def _versions(*given: object) -> list[int]:
    """List how often each tensor has been changed in place."""
    return [tensor._version for tensor in tensors_in(given)]

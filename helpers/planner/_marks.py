"""Watch one training step and mark where each layer of a chain begins and ends.

A mark is a place in the log of storages allocated and freed, so that the level
between two marks can be read off when the step is over.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from helpers.timeline import Allocation, Tracker, tensors_in
from helpers.timeline.feeds import hooked

BEFORE = "(before)"  # what a model does before the first layer of a chain inside it


class Span(NamedTuple):
    """Two places in the log, and the FLOPs between: of forward, or of recompute."""

    start: int
    stop: int
    flops: int


@dataclass(frozen=True)
class Marks:
    """One step that is over: where each stage began and ended, and what was alive.

    Recomputing is not marked. A stage's backward begins where its output's gradient
    is there, and ends where its input's is.
    """

    before_bytes: int  # alive when the step began
    log: Sequence[tuple[str, Allocation, str]]
    forward: dict[str, Span]  # by stage, BEFORE first
    backward: dict[str, Span]
    inputs: dict[str, Allocation]
    outputs: dict[str, list[Allocation]]
    late: frozenset[nn.Parameter]  # without gradient until BEFORE's output has one

    def levels_without(self, beside: Collection[Allocation]) -> list[int]:
        """List the bytes alive before each event and at the end, but for a few."""
        changes = (
            0 if it in beside else it.bytes if kind == "alloc" else -it.bytes
            for kind, it, _ in self.log
        )
        return list(itertools.accumulate(changes, initial=self.before_bytes))

    @functools.cached_property
    def levels(self) -> list[int]:
        return self.levels_without(())

    @functools.cached_property
    def lasting(self) -> list[int]:
        """The levels without what is brief."""
        return self.levels_without(self.brief)

    @functools.cached_property
    def brief(self) -> set[Allocation]:
        """What lies beside the chain in forward, and is gone before backward.

        A second output may do so: of a checkpointed layer nothing else saves it.
        """
        events = self.log[self.forward[BEFORE].start :]
        made = {it for kind, it, _ in events if kind == "alloc"}
        gone = {it for kind, it, at in events if (kind, at) == ("free", "forward")}
        last = self.outputs[next(reversed(self.forward))]
        return made & gone - {*self.inputs.values(), *last[:1]}

    def end(self, name: str) -> int:
        """Find where the next stage begins, or the loss, its caller's input let go."""
        following = dict(itertools.pairwise(self.forward)).get(name)
        if following:
            return self.forward[following].start
        end = self.forward[name].stop
        while end < len(self.log) and self.log[end][0] == "free":
            end += 1
        return end

    def peak(self, start: int, stop: int, *_: int) -> int:
        """Find the highest level between two places."""
        return max(self.levels[start : stop + 1])

    def forward_peak(self, name: str) -> int:
        """Find a stage's forward peak, from the level at its start."""
        return self.peak(*self.forward[name]) - self.levels[self.forward[name].start]

    def output_bytes(self, name: str) -> int:
        """Count a stage's output, and what else it made and returns for longer."""
        start, stop, _ = self.forward[name]
        made = {it for kind, it, _ in self.log[start:stop] if kind == "alloc"}
        outputs = self.outputs[name]
        found = {*outputs[:1], *made.intersection(outputs)} - self.brief
        return sum(it.bytes for it in found if it.phase != "before")

    def frees_input(self, name: str, start: int, stop: int, *_: int) -> bool:
        """Say whether a stage's input is freed between two places."""
        given, events = self.inputs.get(name), self.log[start:stop]
        return any(kind == "free" and it is given for kind, it, _ in events)

    def levels_in(
        self, name: str, phase: str, stays: Allocation | None = None
    ) -> list[int]:
        """List the levels in a stage's backward that events of one phase reach.

        Args:
            stays: what is to be counted on, also when it has been freed there.
        """
        found, more = [], 0
        start, stop, _ = self.backward[name]
        for place, (kind, it, at) in enumerate(self.log[start:stop], start + 1):
            if kind == "free" and it is stays:
                more = it.bytes
            if at == phase:
                found.append(self.levels[place] + more)
        return found


def watch(
    step: Callable[[], object], model: nn.Module, names: list[str], tracker: Tracker
) -> Marks:
    """Run one step and mark the layers of a chain.

    Raises:
        ValueError: if backward does not reach any.
    """
    watcher = _Watcher(model, names, tracker)
    with (
        hooked(model, ["", *names], watcher.enter, watcher.leave),
        torch.autograd.set_multithreading_enabled(False),
        tracker.watching(),
    ):
        step()
    if watcher.backward_end is None:
        raise ValueError(
            f"backward does not reach {names[-1]!r}, nor any layer before it, so there "
            "is nothing to plan"
        )
    return watcher.marks()


Mark = tuple[int, dict[str, int]]


class _Watcher:
    """Takes notes while a step runs. A mark: events so far, and FLOPs by phase."""

    def __init__(self, model: nn.Module, names: list[str], tracker: Tracker) -> None:
        self.tracker, self.stages = tracker, [BEFORE, *names]
        self.parameters = {p for p in model.parameters() if p.requires_grad}
        self.starts: dict[str, Mark] = {}
        self.ends: dict[str, Mark] = {}
        self.gradients: dict[str, Mark] = {}  # of their outputs
        self.backward_end: Mark | None = None
        self.inputs: dict[str, Allocation] = {}
        self.outputs: dict[str, list[Allocation]] = {}
        self.late: set[nn.Parameter] = set()

    def marks(self) -> Marks:
        """Freeze the notes."""
        stages, end = self.stages, self.backward_end
        there = [self.gradients.get(name) for name in stages]
        first = next((i for i, mark in enumerate(there) if mark), len(there))
        there[:first] = [end] * first
        for place in reversed(range(first, len(there))):
            if there[place] is None:  # of a view that is written on: as the next one's
                there[place] = there[place + 1] if there[place + 1 :] else there[first]
        ends = zip(stages, there, [end, *there], strict=False)
        return Marks(
            sum(it.bytes for it in self.tracker.before),
            tuple(self.tracker.log),
            {n: _span(self.starts[n], self.ends[n], "forward") for n in stages},
            {name: _span(begin, end, "recompute") for name, begin, end in ends},
            self.inputs,
            self.outputs,
            frozenset(self.late),
        )

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._is_again(name):
            return
        if name and not self.outputs:
            self._made(BEFORE, (args, kwargs))
        if name and (given := self._allocations((args, kwargs))):
            self.inputs[name] = given[0]
        self.starts[name or BEFORE] = self._mark()

    def leave(self, name, module, args: tuple, kwargs: dict, output: object) -> None:
        if name and not self._is_again(name):
            self._made(name, output)

    def _is_again(self, name: str) -> bool:
        """Say whether a layer is recomputed, or handed on what a neighbour has made."""
        return torch._C._current_graph_task_id() != -1 or name in self.ends

    def _made(self, name: str, output: object) -> None:
        """Note that a stage's output is there, and wait for its gradient."""
        self.ends[name] = self._mark()
        self.outputs[name] = self._allocations(output)
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._gradient_is_there(name))

    def _mark(self) -> Mark:
        return len(self.tracker.log), dict(self.tracker.flops)

    def _allocations(self, value: object) -> list[Allocation]:
        """Find the storages of the tensors in a value."""
        addresses = (tensor.untyped_storage()._cdata for tensor in tensors_in(value))
        found = dict.fromkeys(self.tracker.alive.get(address) for address in addresses)
        return [allocation for allocation in found if allocation is not None]

    def _gradient_is_there(self, name: str) -> None:
        self.gradients.setdefault(name, self._mark())
        if name == BEFORE:
            self.late = {p for p in self.parameters if p.grad is None}
        if self.backward_end is None:
            self._end_backward()
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.backward_end = self._mark()


def _span(begin: Mark, end: Mark, phase: str) -> Span:
    return Span(begin[0], end[0], end[1][phase] - begin[1][phase])

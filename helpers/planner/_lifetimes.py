"""Watch one training step in which nothing saved for backward stays alive.

Whatever autograd saves is let go at once, and in backward an empty tensor of the same
shape stands in for it. So the log shows how long Python itself holds each storage, and
notes beside it say who would have held it longer: which nodes, inside which calls of
modules, and until when. From these follows what any plan would do, without running it.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from helpers.checkpointing import Undo, segments_of
from helpers.timeline import Allocation, Tracker, counting, tensors_in
from helpers.timeline.feeds import Feeds, hooked

STAND_IN = "stand-in"  # the phase of what is no storage of the step's own
JOINED = 1_500  # joined runs of one list of modules, more or less


@dataclass(eq=False)
class Call:
    """One call of a module in forward; places are lengths of the log."""

    name: str
    start: int
    start_flops: int
    given: list[Allocation]
    stop: int = -1
    end: int = -1  # one past the last call inside, in the order of their starts


@dataclass(eq=False)
class Saved:
    """One tensor that a node saves, from packing to the node's end."""

    made: Allocation | None  # its storage; None where that was there before the step
    call: int  # the innermost call that was running; −1 for none
    packed: int
    packed_flops: int
    unpacked: int = -1
    dropped: int = -1  # where its node needs what it has unpacked no more
    released: int = -1


@dataclass(frozen=True)
class Lifetimes:
    """One step that is over."""

    before_bytes: int
    log: list[tuple[str, Allocation, str]]
    calls: list[Call]
    saved: list[Saved]
    feeds: Feeds


def watch_lifetimes(
    step: Callable[[], object], model: nn.Module, tracker: Tracker
) -> Lifetimes:
    """Run one step, and note how long each storage is wanted, and by whom."""
    names = [name for name, _ in model.named_modules()]
    feeds, watcher = Feeds(model, names), _Watcher(tracker)
    hooks = torch.autograd.graph.saved_tensors_hooks(watcher.pack, watcher.unpack)
    with Undo() as undo:
        undo.enter_context(feeds.watching())
        undo.enter_context(hooked(model, names, watcher.enter, watcher.leave))
        undo.enter_context(torch.autograd.set_multithreading_enabled(False))
        undo.enter_context(tracker.watching())
        undo.enter_context(hooks)
        step()
    watcher.close()
    before_bytes = sum(it.bytes for it in tracker.before if it.phase != STAND_IN)
    return Lifetimes(before_bytes, tracker.log, watcher.calls, watcher.saved, feeds)


class _Held:
    """What a node holds instead of a tensor; its end is the end of the saving."""

    __slots__ = ("note", "tensor", "like", "__weakref__")

    def __init__(self, note: Saved, tensor: torch.Tensor) -> None:
        self.note, self.tensor, self.like = note, None, None
        if note.made is None or not tensor.is_meta:
            self.tensor = tensor
        else:
            self.like = tuple(tensor.shape), tensor.stride(), tensor.dtype


class _Watcher:
    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.log = tracker, tracker.log
        self.calls: list[Call] = []
        self.saved: list[Saved] = []
        self.running: list[int] = []
        self.stands_for: dict[Allocation, Saved] = {}
        self.ends: dict[int, weakref.ref] = {}

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if _in_backward():
            return
        given = [self._made(tensor) for tensor in tensors_in((args, kwargs))]
        flops = self.tracker.flops["forward"]
        call = Call(name, len(self.log), flops, [it for it in given if it])
        self.running.append(len(self.calls))
        self.calls.append(call)
        self._mark()

    def leave(self, name: str, *_: object) -> None:
        if _in_backward():
            return
        call = self.calls[self.running.pop()]
        call.stop, call.end = len(self.log), len(self.calls)
        self._mark()

    def _mark(self) -> None:
        """Make the next place another one: nothing is allocated or freed."""
        self.log.append(("free", Allocation(0, (), STAND_IN, "", ""), "forward"))

    def _made(self, tensor: torch.Tensor) -> Allocation | None:
        """Find a tensor's storage, if the step has made it."""
        found = self.tracker.alive.get(tensor.untyped_storage()._cdata)
        if found in self.stands_for:
            return self.stands_for[found].made
        return None if found is None or found.phase == "before" else found

    def pack(self, tensor: torch.Tensor) -> _Held:
        call = -1 if _in_backward() or not self.running else self.running[-1]
        flops = self.tracker.flops["forward"]
        note = Saved(self._made(tensor), call, len(self.log), flops)
        held = _Held(note, tensor)
        self.saved.append(note)
        self.ends[id(note)] = weakref.ref(held, lambda _: self._release(note))
        return held

    def unpack(self, held: _Held) -> torch.Tensor:
        note = held.note
        if note.unpacked < 0:
            note.unpacked = len(self.log)
            self._mark()
        if held.tensor is not None:
            return held.tensor
        shape, stride, dtype = held.like
        with Undo() as undo:
            undo.callback(counting.reset, counting.set(()))
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if tensor.untyped_storage().nbytes():
            made = self.tracker.follow(
                tensor.untyped_storage(), shape, STAND_IN, "", ""
            )
            self.stands_for[made] = note
        return tensor

    def close(self) -> None:
        """Say when each saving ended; at the step's end, if not before."""
        for place, (_, it, _) in enumerate(self.log):
            if it in self.stands_for:
                self.stands_for[it].dropped = place
        for note in self.saved:
            note.released = len(self.log) if note.released < 0 else note.released
            note.dropped = note.released if note.dropped < 0 else note.dropped

    def _release(self, note: Saved) -> None:
        note.released = len(self.log)
        self._mark()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def joined_runs(
    watched: Lifetimes, called: dict[str, list[int]]
) -> Iterator[tuple[str, ...]]:
    """Yield runs of two and more neighbours that can share a segment."""
    feeds = watched.feeds

    def joins(one: str, other: str) -> bool:
        return not feeds.break_between(one, other)

    for parent, module in feeds.model.named_modules():
        if isinstance(module, nn.Sequential) and parent not in called:
            continue  # its children are called by somebody else
        names = [f"{parent}.{child}".lstrip(".") for child in module._modules]
        names = [name for name in names if name in called]
        for run in segments_of(names, joins).segments:
            for length in _lengths(len(run)):
                for first in range(len(run) - length + 1):
                    yield run[first : first + length]


def _lengths(n: int) -> Iterator[int]:
    """Yield lengths of joined runs: all in a short chain, else fewer of long ones."""
    length = 2
    while length <= n:
        yield length
        length += max(1, length * n * n // (4 * JOINED))

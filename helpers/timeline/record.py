"""What one training step allocates and frees, in order, and what is alive when."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from helpers.timeline.operators import (
    CATEGORIES,
    Allocation,
    Observer,
    Requests,
    call,
    categorise,
    no_scratch,
    state_tensors,
    tensors_in,
)
from helpers.timeline.tracker import Tracker
from helpers.units import format_bytes


class Event(NamedTuple):
    """One storage allocated or freed; ``level_bytes`` are alive right after it."""

    kind: str  # "alloc" | "free"
    allocation: Allocation
    phase: str  # in which it happened
    level_bytes: int


@dataclass(frozen=True)
class Peak:
    """What is alive at the step's peak: bytes by category, and the largest tensors.

    ``event`` is the largest allocation on the last way up to it; None where the step
    allocates and frees nothing.
    """

    peak_bytes: int
    event: Event | None
    categories: dict[str, int]
    tensors: tuple[Allocation, ...] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"peak {format_bytes(self.peak_bytes)} before the step"]
        if self.event:
            made = self.event.allocation
            where = f" in {made.module}" if made.module else ""
            lines = [
                f"peak {format_bytes(self.peak_bytes)} in {self.event.phase}: "
                f"{made.op}{where} allocates {format_bytes(made.bytes)}"
            ]
        return "\n".join(lines + [f"  {tensor}" for tensor in self.tensors])


class Timeline:
    """What one step allocated and freed. Made by ``record_timeline``."""

    def __init__(
        self,
        before: list[Allocation],
        log: list[tuple[str, Allocation, str]],
        flops: dict[str, int],
        scratch: Sequence[tuple[int, int, bool, Requests]] = (),
    ) -> None:
        self.flops = flops  # by phase: matrix products and convolutions
        self.before = before  # what was there before the step
        # How many events came before an operator's outputs and with them, whether in
        # backward's thread, and what was taken.
        self.scratch = scratch
        level = sum(allocation.bytes for allocation in before)
        self.events: list[Event] = []
        for kind, allocation, phase in log:
            level += allocation.bytes if kind == "alloc" else -allocation.bytes
            self.events.append(Event(kind, allocation, phase, level))
        self._start_bytes = self._level_before(0)

    def _level_before(self, place: int) -> int:
        if place == 0:
            return sum(allocation.bytes for allocation in self.before)
        return self.events[place - 1].level_bytes

    def _first(self, wanted: Callable[[Event], bool]) -> int:
        """Find the first event that is wanted; the number of events if none is."""
        places = (i for i, event in enumerate(self.events) if wanted(event))
        return next(places, len(self.events))

    @functools.cached_property
    def first_allocation(self) -> int:
        """Place of the first allocation: what comes before is zero_grad."""
        return self._first(lambda event: event.kind == "alloc")

    @functools.cached_property
    def forward_end(self) -> int:
        """Place of backward's first event."""
        return self._first(lambda event: event.phase in ("backward", "recompute"))

    @property
    def baseline_bytes(self) -> int:
        """Bytes alive before the forward pass, gradients already dropped."""
        return self._level_before(self.first_allocation)

    @property
    def after_forward_bytes(self) -> int:
        """Bytes alive between the loss and backward."""
        return self._level_before(self.forward_end)

    @functools.cached_property
    def peak_place(self) -> int:
        """Place of the event that reaches the peak first; −1 for the start."""
        levels = [self._start_bytes, *(event.level_bytes for event in self.events)]
        return levels.index(max(levels)) - 1

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once during the step."""
        return self._level_before(self.peak_place + 1)

    def at_peak(self, largest: int = 8) -> Peak:
        """Say what is alive at the peak.

        Args:
            largest: how many tensors to name, the largest first.
        """
        alive = dict.fromkeys(self.before)
        for event in self.events[: self.peak_place + 1]:
            if event.kind == "alloc":
                alive[event.allocation] = None
            else:
                del alive[event.allocation]
        categories = dict.fromkeys(CATEGORIES, 0)
        for allocation in alive:
            categories[allocation.category] += allocation.bytes
        tensors = sorted(alive, key=lambda allocation: -allocation.bytes)[:largest]
        return Peak(self.peak_bytes, self._cause(), categories, tuple(tensors))

    def _cause(self) -> Event | None:
        """Find the largest allocation of the layer that runs when the peak is reached.

        The last one is often 512 bytes on top, and would explain nothing.
        """
        if not self.events:
            return None
        last = cause = self.events[max(self.peak_place, 0)]
        for event in reversed(self.events[: max(self.peak_place, 0)]):
            if event.phase != last.phase:
                break
            if event.kind == "alloc":
                if event.allocation.module != last.allocation.module:
                    break
                if event.allocation.bytes > cause.allocation.bytes:
                    cause = event
        return cause

    def kept_bytes(self) -> dict[str, int]:
        """Bytes that each layer, a child of the model, leaves alive for backward."""
        kept: dict[str, int] = {}
        for kind, allocation, _, _ in self.events:
            if kind == "alloc" and allocation.category == "activation":
                layer = allocation.module.partition(".")[0]
                kept[layer] = kept.get(layer, 0) + allocation.bytes
        return kept

    def levels(self) -> dict[str, list[int]]:
        """Bytes alive in each category, at the start and after every event."""
        now = dict.fromkeys(CATEGORIES, 0)
        for allocation in self.before:
            now[allocation.category] += allocation.bytes
        rows = {category: [n_bytes] for category, n_bytes in now.items()}
        for kind, allocation, _, _ in self.events:
            sign = 1 if kind == "alloc" else -1
            now[allocation.category] += sign * allocation.bytes
            for category, row in rows.items():
                row.append(now[category])
        return rows

    @property
    def fixed_bytes(self) -> int:
        """Parameters, gradients and optimizer state when the step is over.

        They are there with any batch and any plan.
        """
        last = {category: row[-1] for category, row in self.levels().items()}
        return last["parameter"] + last["gradient"] + last["optimizer_state"]

    def __repr__(self) -> str:
        peak, after = map(format_bytes, (self.peak_bytes, self.after_forward_bytes))
        event = self._cause()
        where = f"in {event.phase}" if event else "before the step"
        return (
            f"Timeline({len(self.events)} events, peak {peak} {where}, "
            f"after forward {after})"
        )


def record_timeline(
    step: Callable[[], object],
    model: nn.Module,
    *,
    batch: object = None,
    optimizer: torch.optim.Optimizer | None = None,
    devices: Iterable[str] | None = None,
    run: Callable = call,
    scratch: Callable = no_scratch,
    observers: Iterable[Observer] = (),
) -> Timeline:
    """Run ``step`` once and record every storage that it allocates and frees.

    Works on CPU, CUDA and meta tensors. Storages that exist before the step count as
    soon as they are known (the model's at once, others when an operator reads them).

    Args:
        step: a whole training step of ``model``, called without arguments.
        batch: tensors of the step's input, nested in tuples or lists.
        optimizer: the step's optimizer, where there is one.
        devices: which tensors count; default: those on the model's own device.
        run: runs an operator, as ``run(func, args, kwargs)``; default: just calls it.
        scratch: tells what an operator takes besides tensors, in bytes, as
            ``scratch(func, args, kwargs)``.
        observers: are told of operators and storages.

    Backward runs on the calling thread meanwhile, so this is no way to time a step.
    """
    if devices is None:
        first = next(model.parameters(), None)
        devices = ("cpu" if first is None else first.device.type,)
    tracker = Tracker(model, frozenset(devices), run, scratch, observers)
    tracker.expect("input", tensors_in(batch))
    if optimizer is not None:
        tracker.expect("optimizer_state", state_tensors(optimizer))
    with torch.autograd.set_multithreading_enabled(False), tracker.watching():
        step()
    categorise(tracker.log)
    return Timeline(tracker.before, tracker.log, tracker.flops, tracker.scratch)

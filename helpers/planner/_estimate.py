"""Say what plans of a module tree would need, from one watched step, without a run.

A storage that forward makes is alive as long as Python holds it; after that while one
of its savers does, the nodes that keep it for backward, and while it is an input of a
checkpointed segment whose backward is not over. A saver inside a segment holds nothing
in forward. When backward comes to the segment its forward runs again, and what it saves
is there a second time, until each of its savers is done. Autograd runs nodes in the
opposite order of their making, under every plan, so that what backward makes comes and
goes as in the watched step.

Plans are rows of a table, and a few hundred are estimated in a few milliseconds.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from helpers.planner._lifetimes import STAND_IN, Lifetimes, Saved, joined_runs
from helpers.planner.chain import on_cpu
from helpers.timeline import Allocation

ROWS = 256  # plans that are estimated at once


@dataclass(eq=False)
class Run:
    """One time that a segment's modules are called; places are those of the log."""

    first: int  # place of the first call
    end: int  # one past the last call inside
    start: int
    stop: int
    begin: int  # where backward comes to it, and it runs again
    until: int  # where its backward is over, and its inputs are let go
    flops: int  # of running it again, as far as the last tensor that is saved
    again_bytes: int  # that are there again afterwards
    spike_bytes: int  # more than that at once while it runs again
    given: list[Allocation]


@dataclass(eq=False)
class Unit:
    """What may be one segment: a module, or neighbours, with all times it is called."""

    names: tuple[str, ...]
    runs: list[Run] = field(default_factory=list)
    cost: int = 0

    def effect(self) -> tuple:
        """Tell units of another effect from this one."""
        own = "begin until flops again_bytes spike_bytes".split()
        return tuple(
            (*(getattr(run, name) for name in own), *run.given) for run in self.runs
        )


class Estimate:
    """Peaks of plans, each a row of the units that are checkpointed in it."""

    def __init__(self, watched: Lifetimes) -> None:
        self.watched, self.units = watched, []
        self.made_at: dict[Allocation, int] = {}
        self.free_at: dict[Allocation, int] = {}
        self.made_in: dict[Allocation, int] = {}  # the innermost call; or one past all
        starts = {call.start: number for number, call in enumerate(watched.calls)}
        stops = {call.stop for call in watched.calls}
        running = [len(watched.calls)]
        for place, (kind, it, _) in enumerate(watched.log):
            if place in starts:
                running.append(starts[place])
            elif place in stops:
                running.pop()
            elif it.phase != STAND_IN and kind == "alloc":
                self.made_at[it], self.made_in[it] = place, running[-1]
            elif it.phase != STAND_IN:
                self.free_at[it] = place
        self.savers_in: dict[int, list[Saved]] = defaultdict(list)  # by call
        for saved in watched.saved:
            self.savers_in[saved.call].append(saved)

    # Units ----------------------------------------------------------------------------

    def unit(self, names: Sequence[str], calls: Iterable[tuple[int, int]]) -> Unit:
        """Describe what checkpointing neighbours does.

        Args:
            calls: places of the first and the last module's call, each time.
        """
        runs = [self._run(*pair) for pair in calls]
        unit = Unit(tuple(names), [run for run in runs if run])
        unit.cost = sum(run.flops for run in unit.runs)
        return unit

    def _run(self, first: int, last: int) -> Run | None:
        """Describe one time; None where backward has nothing to run again."""
        opening, closing = self.watched.calls[first], self.watched.calls[last]
        calls = range(first, closing.end)
        saved = [it for call in calls for it in self.savers_in.get(call, ())]
        used = [it.unpacked for it in saved if it.unpacked >= 0]
        if not used:
            return None
        final = max(saved, key=lambda it: it.packed)
        inside = {it.made for it in saved if self.made_in.get(it.made, -1) in calls}
        again_bytes = sum(it.bytes for it in inside)
        most_bytes = self._most_again(inside, opening.start, final.packed)
        return Run(
            first,
            closing.end,
            opening.start,
            closing.stop,
            begin=min(used),
            until=max(it.released for it in saved),
            flops=final.packed_flops - opening.start_flops,
            again_bytes=again_bytes,
            spike_bytes=max(most_bytes - again_bytes, 0),
            given=list(dict.fromkeys(opening.given)),
        )

    def _most_again(self, held: set[Allocation], start: int, stop: int) -> int:
        """Find the most bytes at once of what running a forward again makes."""
        level = most = 0
        made = set()
        for kind, it, _ in self.watched.log[start:stop]:
            if kind == "alloc":
                made.add(it)
                level += it.bytes
                most = max(most, level)
            elif it in made and it not in held:
                level -= it.bytes
        return most

    # Plans ----------------------------------------------------------------------------

    def offer(self, units: list[Unit]) -> None:
        """Take the units that plans are made of, and lay out the tables for them."""
        self.units, calls = units, self.watched.calls
        costs = [unit.cost for unit in units]
        self.costs = torch.tensor(costs, dtype=torch.float64, device="cpu")
        runs = [(row, run) for row, unit in enumerate(units) for run in unit.runs]
        self.run_unit = on_cpu(row for row, _ in runs)
        size = len(runs), len(calls) + 1  # the last is no call
        self.covers = torch.zeros(*size, device="cpu")
        for row, (_, run) in enumerate(runs):
            self.covers[row, run.first : run.end] = row + 1  # antichains: one a call
        held = {it.made for it in self.watched.saved}
        held |= {it for _, run in runs for it in run.given}
        held = [it for it in self.made_at if it in held]
        place_of = {it: place for place, it in enumerate(held)}
        end = len(self.watched.log)
        self.bytes = on_cpu(it.bytes for it in held)
        self.made = on_cpu(self.made_at[it] for it in held)
        self.free = on_cpu(self.free_at.get(it, end) for it in held)
        self.held_made_in = on_cpu(self.made_in[it] for it in held)
        savers = [it for it in self.watched.saved if it.made in place_of]
        self.saver_of = on_cpu(place_of[it.made] for it in savers)
        self.saver_call = on_cpu(it.call % self.covers.shape[1] for it in savers)
        self.released = on_cpu(it.released for it in savers)
        self.dropped = on_cpu(it.dropped for it in savers)
        given = [
            (place_of[it], row, run.until)
            for row, (_, run) in enumerate(runs)
            for it in run.given
            if it in place_of
        ]
        self.given_of, self.given_run, self.given_until = (
            on_cpu(row[column] for row in given) for column in range(3)
        )
        self.begin, self.again, self.spike = (
            on_cpu(getattr(run, name) for _, run in runs)
            for name in ("begin", "again_bytes", "spike_bytes")
        )
        self._squeeze()

    def _squeeze(self) -> None:
        """Join the places between which no plan makes a difference."""
        changes = [self.watched.before_bytes]
        for kind, it, _ in self.watched.log:
            n_bytes = 0 if it.phase == STAND_IN else it.bytes
            changes.append(n_bytes if kind == "alloc" else -n_bytes)
        levels = on_cpu(changes).cumsum(0)
        calls = [
            place for call in self.watched.calls for place in (call.start, call.stop)
        ]
        ends = [self.free + 1, self.released + 1, self.dropped + 1]
        ends += [self.given_until + 1]
        ends += [self.begin, self.begin + 1, on_cpu([0, *calls])]
        self.places = torch.cat(ends).unique()
        self.places = self.places[self.places < len(levels)]
        joined = torch.searchsorted(
            self.places, torch.arange(len(levels), device="cpu"), right=True
        )
        self.levels = torch.zeros_like(self.places)
        self.levels.scatter_reduce_(0, joined - 1, levels, "amax", include_self=False)
        self.free_end, self.begin_at = self.at(self.free + 1), self.at(self.begin)

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """Say which column of the table has a place of the log."""
        return torch.searchsorted(self.places, places, right=True) - 1

    def peaks(self, plans: torch.Tensor) -> torch.Tensor:
        """Estimate the peaks of plans, P × units."""
        return torch.cat([self.rows(part)[0].amax(1) for part in plans.split(ROWS)])

    def rows(self, plans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """List the most bytes alive at each place, and until when storages are held.

        Returns:
            Bytes, P × places; and places of the log, P × storages.
        """
        n, is_run = len(plans), plans[:, self.run_unit]
        cover = is_run.float() @ self.covers  # the run around each call, or 0
        saver_cover = cover[:, self.saver_call]
        held = self.free.repeat(n, 1)
        again = torch.full_like(held, -1)
        outside = torch.where(saver_cover == 0, self.released, -1)
        held.scatter_reduce_(1, self.saver_of.expand(n, -1), outside, "amax")
        given = torch.where(is_run[:, self.given_run], self.given_until, -1)
        held.scatter_reduce_(1, self.given_of.expand(n, -1), given, "amax")
        inside = cover[:, self.held_made_in]  # the run that makes a storage again
        same = (saver_cover > 0) & (saver_cover == inside[:, self.saver_of])
        until = torch.where(same, self.dropped, -1)
        again.scatter_reduce_(1, self.saver_of.expand(n, -1), until, "amax")
        changes = torch.zeros(n, len(self.places) + 1, dtype=torch.int64, device="cpu")
        longer = torch.where(held > self.free, self.bytes, 0)
        changes.scatter_add_(1, self.free_end.expand(n, -1), longer)
        changes.scatter_add_(1, self._end(held), -longer)
        changes.scatter_add_(
            1, self._end(again), torch.where(again < 0, 0, -self.bytes)
        )
        begins = is_run * self.again
        changes.scatter_add_(1, self.begin_at.expand(n, -1), begins)
        levels = changes.cumsum(1)[:, :-1] + self.levels
        levels.scatter_add_(1, self.begin_at.expand(n, -1), is_run * self.spike)
        return levels, held

    def _end(self, until: torch.Tensor) -> torch.Tensor:
        """Say which column comes after a place; a last one is after them all."""
        beyond = until >= int(self.places[-1])
        return torch.where(beyond, len(self.places), self.at(until + 1))


def offered(estimate: Estimate) -> list[Unit]:
    """List the segments that plans may be made of."""
    feeds, called = estimate.watched.feeds, {}
    for place, call in enumerate(estimate.watched.calls):
        called.setdefault(call.name, []).append(place)
    names = [(name,) for name in called if name]
    names += joined_runs(estimate.watched, called)
    units: dict[tuple, Unit] = {}
    cannot_start = feeds.in_place()
    for segment in names:
        if segment[0] in cannot_start:
            continue
        calls = zip(called[segment[0]], called[segment[-1]], strict=True)
        unit = estimate.unit(segment, calls)
        if any(run.again_bytes for run in unit.runs):
            units.setdefault(unit.effect(), unit)  # one of those that are as good
    return list(units.values())

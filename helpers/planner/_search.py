"""Search plans of a module tree by their estimated peaks and costs.

Where they are few, every plan is estimated. Else forward is cut at each place where a
call begins or ends, and read as a chain: from one place to the next it is kept, or a
segment leads to its own end. Labels (need, cost) as in ``helpers.planner._fronts`` find
plans for all budgets at once. They take it that a segment holds the same whatever is
checkpointed beside it, which is not quite so: what they find is estimated whole, and
bettered by changing single segments.
"""

from collections.abc import Iterator

import torch

from helpers.checkpointing import Plan
from helpers.planner._estimate import Estimate
from helpers.planner._fronts import Front, thinned, unbeaten
from helpers.planner.chain import NEVER, on_cpu

FEW = 40_000  # plans that are all estimated
LABELS, RATIO = 300, 1.002  # labels from which on those of like cost are dropped
NEIGHBOURS, ROUNDS = 600, 12


class Pool:
    """Plans that have been looked at, each once, with estimated peaks and costs.

    Args:
        extra_bytes: what a step needs beside its tensors; taken to be the same for all.
    """

    def __init__(self, estimate: Estimate, extra_bytes: int = 0) -> None:
        self.estimate, n = estimate, len(estimate.units)
        self.extra_bytes = extra_bytes
        self.costs_of = on_cpu(unit.cost for unit in estimate.units)
        covers = torch.zeros(n, estimate.covers.shape[1], device="cpu")
        covers.index_add_(0, estimate.run_unit, (estimate.covers > 0).float())
        self.conflicts = covers @ covers.T > 0
        self.plans = _no(0, n)
        self.peaks = self.costs = self.sizes = on_cpu([])
        self.confirmed = _no(0)
        self.seen: set[bytes] = set()
        rows = self._every_plan()
        self.is_whole = rows is not None
        self.add(rows if self.is_whole else self._first_plans())
        if not self.is_whole:
            self._go_down()

    def add(self, plans: torch.Tensor) -> torch.Tensor:
        """Estimate the plans that are new; return their places."""
        new = []
        for place, key in enumerate(plans.numpy()):
            key = key.tobytes()
            if key not in self.seen:
                self.seen.add(key)
                new.append(place)
        plans, start = plans[new], len(self.plans)
        if new:
            self.plans = torch.cat([self.plans, plans])
            peaks = self.estimate.peaks(plans) + self.extra_bytes
            self.peaks = torch.cat([self.peaks, peaks])
            self.costs = torch.cat([self.costs, (plans * self.costs_of).sum(1)])
            self.sizes = torch.cat([self.sizes, plans.sum(1)])
            new = _no(len(plans))
            self.confirmed = torch.cat([self.confirmed, new])
        return torch.arange(start, len(self.plans), device="cpu")

    def _every_plan(self) -> torch.Tensor | None:
        """List all plans, if they are few."""
        apart = [
            sum(1 << other for other, meets in enumerate(row) if not meets)
            for row in self.conflicts.tolist()
        ]
        n = len(apart)
        found, plans = [(0, (1 << n) - 1)], []
        while found:
            plan, free = found.pop()
            plans.append(plan)
            if len(plans) + len(found) > FEW:
                return None
            while free:
                unit = free.bit_length() - 1
                free ^= 1 << unit
                found.append((plan | 1 << unit, free & apart[unit]))
        rows = [[plan >> unit & 1 for unit in range(n)] for plan in plans]
        return torch.tensor(rows, device="cpu").bool()

    def plan(self, place: int) -> Plan:
        """Make a plan of a row, its segments in the order of their calls."""
        units = zip(self.estimate.units, self.plans[place].tolist(), strict=True)
        chosen = [unit for unit, is_in in units if is_in]
        chosen.sort(key=lambda unit: unit.runs[0].first)
        return Plan(tuple(unit.names for unit in chosen))

    def confirm(self, place: int, peak_bytes: int) -> None:
        """Take the peak that a dry run has found."""
        self.peaks[place], self.confirmed[place] = peak_bytes, True

    # Many plans -----------------------------------------------------------------------

    def _first_plans(self) -> torch.Tensor:
        """List plans to begin with: none, and those of a chain's labels."""
        n = len(self.estimate.units)
        rows = [_no(1, n)]
        return torch.cat([*rows, *Labels(self.estimate).plans()])

    def neighbours(self, plan: torch.Tensor) -> torch.Tensor:
        """List the plans that have one segment more, less, or another one instead."""
        n = len(plan)
        alone = torch.eye(n, dtype=torch.bool, device="cpu")
        inside = alone[plan]
        # A new segment takes the place of those that it meets.
        added = (plan & ~self.conflicts | alone)[~plan]
        removed = plan & ~inside
        swapped = added[None] & ~inside[:, None]
        return torch.cat([removed, added, swapped.reshape(-1, n)])

    def _go_down(self) -> None:
        """Look for a lower least peak, from the lowest one on."""
        for _ in range(ROUNDS):
            lowest = int(self.peaks.argmin())
            plans = self.neighbours(self.plans[lowest])[: 4 * NEIGHBOURS]
            self.add(plans)
            if self.peaks.min() == self.peaks[lowest]:
                break

    def better(self, budget_bytes: int, shift_bytes: int = 0) -> None:
        """Look for cheaper plans that fit, round the cheapest one so far."""
        for _ in range(0 if self.is_whole else ROUNDS):
            place = self.cheapest(budget_bytes, shift_bytes)
            if place is None:
                return
            plans = self.neighbours(self.plans[place])
            costs = (plans * self.costs_of).sum(1)
            cheaper = costs < self.costs[place]
            cheaper |= (costs == self.costs[place]) & (plans.sum(1) < self.sizes[place])
            order = costs[cheaper].argsort(descending=True, stable=True)
            self.add(plans[cheaper][order[:NEIGHBOURS]])
            if self.cheapest(budget_bytes, shift_bytes) == place:
                return

    def cheapest(self, budget_bytes: int, shift_bytes: int = 0) -> int | None:
        """Find the cheapest plan that fits, of the fewest segments, by estimate.

        Args:
            shift_bytes: by which dry runs are above estimates.
        """
        peaks = self.peaks + shift_bytes * ~self.confirmed
        places = (peaks <= budget_bytes).nonzero()[:, 0]
        if not len(places):
            return None
        for values in (self.costs, self.sizes, self.peaks):
            places = places[values[places] == values[places].min()]
        return int(places[0])

    def front(self) -> list[int]:
        """List the places of plans that no other beats, the lowest peak first."""
        best, found = NEVER * 4, []
        order = self.peaks.argsort(stable=True)
        for values in (self.sizes, self.costs, self.peaks):
            order = order[values[order].argsort(stable=True)]
        for place, cost in zip(order.tolist(), self.costs[order].tolist(), strict=True):
            if cost < best:
                best = cost
                found.append(place)
        return found


class Labels:
    """Read one pass of forward and backward as a chain, and find its front."""

    def __init__(self, estimate: Estimate) -> None:
        self.estimate, n = estimate, len(estimate.units)
        plain = _no(1, n)
        levels, held = estimate.rows(plain)
        self.plain, self.held = levels[0], held[0]
        self.start, self.stop = self._pass()
        saved = [
            it for it in estimate.watched.saved if self.start <= it.packed < self.after
        ]
        unpacked = [it.unpacked for it in saved if it.unpacked >= 0]
        self.turn = min(unpacked, default=self.stop)
        self.saved = sorted(saved, key=lambda it: -it.packed)

    def _pass(self) -> tuple[int, int]:
        """Find the outermost calls, without a backward between, that hold the peak."""
        watched, groups, end = self.estimate.watched, [], -1
        backwards = sorted(it.unpacked for it in watched.saved)
        for call in watched.calls:
            if call.stop < end:
                continue
            if groups and not any(groups[-1][1] < b < call.start for b in backwards):
                groups[-1][1] = call.stop
            else:
                groups.append([call.start, call.stop])
            end = call.stop
        starts = [start for start, _ in groups[1:]] + [len(watched.log)]
        peak = int(self.estimate.places[self.plain.argmax()])
        held = [place for place, end in enumerate(starts) if peak < end]
        place = held[0] if held else len(groups) - 1
        self.after = starts[place]
        return tuple(groups[place])

    def plans(self) -> Iterator[torch.Tensor]:
        """Yield a row for each label before the first place."""
        cuts, fronts, edges = self._fronts()
        n = len(self.estimate.units)
        ends = [front.end.tolist() for front in fronts]
        labels = [front.label.tolist() for front in fronts]
        for label in range(len(ends[0])):
            plan, place = _no(1, n), 0
            while place + 1 < len(cuts):
                edge, label = ends[place][label], labels[place][label]
                if edge < 0:
                    place += 1
                else:
                    plan[0, edge] = True
                    place = edges[edge]
            yield plan

    def _fronts(self) -> tuple[list[int], list[Front], dict[int, int]]:
        """Find the labels before each place, from the end on."""
        cuts, estimate = self._cuts(), self.estimate
        place_of = {cut: place for place, cut in enumerate(cuts)}
        levels, held = estimate.rows(
            torch.eye(len(estimate.units), dtype=torch.bool, device="cpu")
        )
        until = self._until(cuts)
        before = self._holds(self.held[None], cuts)[0].tolist()
        edges, starting = {}, {}
        for row, unit in enumerate(estimate.units):
            runs = [run for run in unit.runs if run.start in place_of]
            if len(runs) == 1 and runs[0].stop in place_of:
                edges[row] = place_of[runs[0].stop]
                starting.setdefault(place_of[runs[0].start], []).append(row)
        costs = self._whole_costs(len(cuts))
        last = len(cuts) - 1
        need = self._most(self.plain, cuts[last], until[last]) - before[last]
        nothing = on_cpu([0])
        fronts = [Front(on_cpu([need]), nothing, nothing, nothing)]
        for place in reversed(range(last)):
            after = fronts[-1]
            need = self._need(self.plain, cuts, until, place, place + 1) - before[place]
            more = before[place + 1] - before[place]
            options = [_before(after, need, more, 0, -1)]
            for row in starting.get(place, ()):
                end = edges[row]
                need = self._need(levels[row], cuts, until, place, end) - before[place]
                holds = self._holds(held[row : row + 1], [cuts[end]])
                more = int(holds[0, 0]) - before[place]
                front = fronts[last - end]
                options.append(_before(front, need, more, costs[row], row))
            front = unbeaten(options, NEVER, NEVER)
            if len(front.need) > LABELS:
                front = thinned(front, RATIO, len(cuts) + 1)
            fronts.append(front)
        return cuts, fronts[::-1], edges

    def _cuts(self) -> list[int]:
        calls = self.estimate.watched.calls
        places = {place for call in calls for place in (call.start, call.stop)}
        return sorted(it for it in places if self.start <= it <= self.stop)

    def _until(self, cuts: list[int]) -> list[int]:
        """Say for each cut where backward has come to it."""
        found, place, until = [], 0, self.turn - 1
        for cut in reversed(cuts):
            while place < len(self.saved) and self.saved[place].packed >= cut:
                until = max(until, self.saved[place].released)
                place += 1
            found.append(until)
        return found[::-1]

    def _holds(self, held: torch.Tensor, cuts: list[int]) -> torch.Tensor:
        """Count what was made before each cut and is there in backward: P × cuts."""
        sums = ((held > self.turn) * self.estimate.bytes).cumsum(1)
        sums = torch.nn.functional.pad(sums, (1, 0))
        return sums[:, torch.searchsorted(self.estimate.made, on_cpu(cuts))]

    def _most(self, levels: torch.Tensor, start: int, stop: int) -> int:
        first, last = self.estimate.at(on_cpu([start, stop])).tolist()
        return int(levels[first : last + 1].max())

    def _need(self, levels, cuts, until, place: int, end: int) -> int:
        """Find the most bytes while forward, or backward, is between two cuts."""
        forward = self._most(levels, cuts[place], cuts[end])
        backward = self._most(levels, min(until[end] + 1, until[place]), until[place])
        return max(forward, backward)

    def _whole_costs(self, unit: int) -> list[int]:
        """Scale costs so that they add up, and count 1 for each segment."""
        costs = [unit.cost for unit in self.estimate.units]
        scale = max(1, sum(costs) * (unit + 1) // 2**60 + 1)
        return [cost // scale * (unit + 1) + 1 for cost in costs]


def _no(*size: int) -> torch.Tensor:
    return torch.zeros(*size, dtype=torch.bool, device="cpu")


def _before(after: Front, need: int, more: int, cost: int, end: int) -> Front:
    """Put a piece before labels: what it needs, holds and costs itself."""
    places = torch.ones_like(after.need).cumsum(0) - 1
    needs = (after.need + more).clamp(min=need)
    return Front(needs, after.cost + cost, torch.full_like(needs, end), places)


def unbeaten_of(rows: list[tuple]) -> list[tuple]:
    """Keep what costs less than all that peak lower, of rows in order of peaks."""
    found: list[tuple] = []
    for row in rows:
        if not found or row[1] < found[-1][1]:
            found.append(row)
    return found

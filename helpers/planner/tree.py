"""Choose what to checkpoint in any model, for a budget of bytes.

**What may be ticked.** A segment is any module whose forward is called, at any depth,
or a run of neighbours that feed each other in one Sequential or ModuleList; never one
inside another. Left out is what could save nothing, what changes its input, and what
inspection knows to give other gradients (``offered``).

**What a plan needs.** One step is watched in which nothing stays saved
(``_lifetimes``); from it follow the peak and the cost of any plan (``_estimate``). A
dry run has the last word: no plan is returned that was not predicted (``_judge``).

**How it is searched.** All plans where they are few, else those that a chain of pieces
would choose, and their neighbours (``_search``). A chain that is the model, or lies in
it, is solved exactly beside that (``best``), and the cheaper answer is taken.

Module trees: as ``torch.distributed._tools.sac_ilp``, which leaves the choice to an
integer program. Pieces and labels: Beaumont et al., arXiv 1911.13214, see ``chain``.
"""

from collections.abc import Callable, Collection, Iterator

from torch import nn

from helpers.checkpointing import Plan
from helpers.measure import StepReport
from helpers.planner._estimate import Estimate, offered
from helpers.planner._judge import Judge, named
from helpers.planner._search import Pool, unbeaten_of
from helpers.planner._stage_times import Clock
from helpers.planner.best import InfeasibleBudget, best_plan, pareto, whole_bytes
from helpers.planner.chain import Chain
from helpers.planner.profiling import profile
from helpers.units import parse_bytes

TRIES, EVENTS = 24, 200_000  # dry runs that go astray, more of them in short steps
LAST = 6  # of them where a plan fits, and estimates are not quite what runs say
LONG, GAP = 200, 0.015  # stages from which on a chain is solved within a gap
SHORT = 32  # up to which all plans are looked at anew, for what a card needs


def plan_for(
    model: nn.Module | Callable[[], nn.Module],
    batch: object,
    budget: int | str,
    *,
    parent: str | None = None,
    measured: bool = False,
    tensors: bool = False,
    **settings: object,
) -> StepReport:
    """Find a plan of least recomputation that fits the budget, as a dry run says.

    >>> import torch
    >>> from helpers.models import uniform_mlp
    >>> x = torch.empty(8192, 1024, device="meta")  # a shape without data
    >>> print(plan_for(uniform_mlp, x, "500 MiB", gpu="H100").plan)
    layer1+layer2+layer3+layer4

    Args:
        model, batch: as in ``predict``; any model that can be predicted.
        budget: bytes, or "8 GiB", "512 MiB", "1.5 GB", for the report's
            ``needed_bytes``: on CUDA all that the allocator takes, with whole blocks,
            kernels' scratch and cuBLAS's workspace, which differ from card to card.
        parent: plan for the children of this Sequential or ModuleList alone.
        measured: least time, as measured on the device, instead of fewest FLOPs; the
            report is of its measurement then, and has ``step_ms``.
        tensors: whether the budget is for ``peak_bytes`` alone, as in the labs.
        settings: of ``predict``: loss, optimizer, autocast, step, device, gpu.

    Raises:
        InfeasibleBudget: if no plan fits; says the least that one needs, and what else
            would help.
        ValueError: for a budget that is none; for a model that cannot be predicted.
    """
    budget_bytes = parse_bytes(budget)
    how = {"parent": parent, "measured": measured, "tensors": tensors}
    return Planner(model, batch, **how, **settings).best(budget_bytes)


def front_for(
    model: nn.Module | Callable[[], nn.Module],
    batch: object,
    points: int | None = None,
    **options: object,
) -> list[StepReport]:
    """Find the plans that no other beats in both bytes and cost, by a dry run each.

    They come in order of what they need; the last one recomputes nothing.

    Args:
        points: how many budgets to plan for, evenly spaced from the least to that
            without checkpointing; default: all that the search has found.
        model, batch, options: as in ``plan_for``.
    """
    if points is not None and (not isinstance(points, int) or points < 1):
        raise ValueError(f"points is a whole number from 1 up, not {points!r}")
    return Planner(model, batch, **options).front(points)


class Planner:
    """Plans for one model, whose steps are watched once for all budgets.

    Args:
        among: the names of modules that may be ticked; default: all.
        Others: as in ``plan_for``.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        batch: object,
        *,
        parent: str | None = None,
        among: Collection[str] | None = None,
        measured: bool = False,
        tensors: bool = False,
        **settings: object,
    ) -> None:
        self.judge = Judge(model, batch, settings, tensors)
        self.plain, self.size_of = self.judge.plain, self.judge.size_of
        self.extra_bytes = self.size_of(self.plain) - self.plain.peak_bytes
        self.parent, self.clock = parent, Clock(self.judge) if measured else None
        self.among = named(self.judge.model, among)
        self.banned: set[tuple[str, ...]] = set()
        self.chain = self._chain()
        self._pool: Pool | None = None
        self.shift_bytes = self.low_bytes = 0  # dry runs less estimates: most, least

    def _chain(self) -> Chain | None:
        judge = self.judge
        how = {"parent": self.parent, **judge.of_step, "measured": bool(self.clock)}
        model = self.clock.model if self.clock else judge.model
        try:
            chain = profile(model, judge.batch, **how)
        except ValueError:
            if self.parent is not None:
                raise
            return None
        return chain if self._may(chain.names) else None

    def _may(self, names: Collection[str]) -> bool:
        """Say whether all these modules may be ticked."""
        return self.among is None or self.among.issuperset(names)

    @property
    def is_simple(self) -> bool:
        """Whether the chain says it all: nothing inside its layers is called for."""
        if self.chain is None or self.parent is not None:
            return self.parent is not None
        if self.among is not None:
            return self.among <= {*self.chain.names}
        model = self.judge.model
        layers = model._modules.values()
        whole = type(model).forward is nn.Sequential.forward
        return whole and not any(layer._modules for layer in layers)

    @property
    def pool(self) -> Pool:
        """The plans of the module tree that have been looked at."""
        if self._pool is None:
            estimate = Estimate(self.judge.watch())
            is_wrong = self.judge.is_wrong
            may = [unit for unit in offered(estimate) if self._may(unit.names)]
            may = [unit for unit in may if unit.names not in self.banned]
            units = [unit for unit in may if not is_wrong(Plan((unit.names,)))]
            if self.clock:
                self.clock.price(units)
            estimate.offer(units)
            self._pool = Pool(estimate, self.extra_bytes)
            excess_bytes = self.size_of(self.plain) - int(self._pool.peaks[0])
            self.shift_bytes = self.low_bytes = excess_bytes
        return self._pool

    def cost(self, plan: Plan) -> float:
        """What a plan that was found adds: FLOPs, or milliseconds where measured."""
        if self.clock:
            return self.clock.added_ms[plan]
        return self.judge.report(plan).recompute_flops

    # One budget -----------------------------------------------------------------------

    def best(self, budget_bytes: int | str) -> StepReport:
        """Find the cheapest plan that fits.

        Raises:
            InfeasibleBudget: if none does.
        """
        budget_bytes = whole_bytes(budget_bytes)
        found = self._fitting(budget_bytes)
        if not found:
            raise self._infeasible(budget_bytes)
        return min(self._timed(found), key=lambda report: self.cost(report.plan))

    def _fitting(self, budget_bytes: int) -> list[StepReport]:
        """Find plans that fit, one of which is the cheapest; none if none does."""
        if self.size_of(self.plain) <= budget_bytes:
            return [self.plain]
        found = [self._of_chain(budget_bytes)]
        if not (self.is_simple and found[0]):
            found.append(self._of_tree(budget_bytes))
        return [report for report in found if report]

    def _timed(self, reports: list[StepReport]) -> list[StepReport]:
        """Measure the steps of reports, where time is what counts."""
        plans = [report.plan for report in reports]
        return self.clock.measured(plans) if self.clock else reports

    def _of_chain(self, budget_bytes: int) -> StepReport | None:
        """Find the chain's best plan; None where it needs more than its sums say."""
        if self.chain is None:
            return None
        gap = GAP if len(self.chain) > LONG else 0
        room_bytes = budget_bytes - min(self.extra_bytes, self.plain.workspace_bytes)
        for _ in range(TRIES):
            try:
                plan = best_plan(self.chain, room_bytes, gap=gap)
            except InfeasibleBudget:
                return None
            report = self.judge.report(plan)
            if not report:
                return None
            if (over_bytes := self.size_of(report) - budget_bytes) <= 0:
                return report
            room_bytes -= over_bytes
        return None

    def _of_tree(self, budget_bytes: int) -> StepReport | None:
        """Find the cheapest plan of the module tree."""
        found, tried = None, 0
        while tried < TRIES:
            pool = self.pool
            # At first as if no other estimate were worse than the best one so far.
            is_late = not found and 2 * tried > TRIES
            shift_bytes = self.shift_bytes if is_late else self.low_bytes
            pool.better(budget_bytes, shift_bytes)
            place = pool.cheapest(budget_bytes, shift_bytes)
            if place is None:
                break
            is_new = not pool.confirmed[place]
            report, tried = self._confirmed(place), tried + 1
            if report and self.size_of(report) <= budget_bytes:
                found, tried = report, max(tried, TRIES - LAST * is_new)
        return found or self._of_lowest(budget_bytes)

    def _of_lowest(self, budget_bytes: int) -> StepReport | None:
        """Look at the lowest plans themselves, where no estimate is low enough."""
        events = len(self.pool.estimate.watched.log)
        for tried in range(max(TRIES, EVENTS // events)):
            pool, judge = self.pool, self.judge
            places = (~pool.confirmed).nonzero()[:, 0]
            if not len(places):
                break
            lowest = min(map(self.size_of, judge.reports))
            place = int(places[pool.peaks[places].argmin()])
            is_exact = tried > 2 and self.low_bytes == self.shift_bytes
            if is_exact and pool.peaks[place] + self.low_bytes >= lowest:
                break
            self._confirmed(place)
        fit = [it for it in self.judge.reports if self.size_of(it) <= budget_bytes]
        return min(fit, key=lambda report: report.recompute_flops, default=None)

    def _confirmed(self, place: int) -> StepReport | None:
        """Predict a plan of the pool, and learn from it how good estimates are."""
        pool = self.pool
        plan = pool.plan(place)
        report = self.judge.report(plan)
        if report is None:  # leave out what cannot be run again, and begin anew
            segments = {*plan.segments}
            alone = {it for it in segments if self.judge.report(Plan((it,))) is None}
            self.banned |= alone or segments
            self._pool = None
            return None
        excess_bytes = self.size_of(report) - int(pool.peaks[place])
        self.shift_bytes = max(self.shift_bytes, excess_bytes)
        self.low_bytes = min(self.low_bytes, excess_bytes)
        pool.confirm(place, self.size_of(report))
        return report

    def _infeasible(self, budget_bytes: int) -> InfeasibleBudget:
        from helpers.planner._advice import what_would_help

        judge, size_of = self.judge, self.size_of
        least = min(judge.reports, key=size_of)
        given = judge.model, judge.batch, least, judge.settings
        return InfeasibleBudget(
            budget_bytes, size_of(least), what_would_help(*given, size_of)
        )

    # All budgets ----------------------------------------------------------------------

    def front(self, points: int | None = None) -> list[StepReport]:
        """Find the plans that no other beats; see ``front_for``."""
        offers = unbeaten_of(sorted(self._offers(points), key=lambda it: it[:2]))
        found = [report for *_, plan in offers if (report := self.judge.report(plan))]
        if not self.is_simple or (self.extra_bytes and len(self.chain) <= SHORT):
            found += [
                one for size in self._budgets(points) for one in self._fitting(size)
            ]
        reports = self._timed(found) if self.clock else self.judge.reports
        rows = [(self.size_of(it), self.cost(it.plan), it) for it in reports]
        return [it[2] for it in unbeaten_of(sorted(rows, key=lambda it: it[:2]))]

    def _offers(self, points: int | None) -> Iterator[tuple[int, float, Plan]]:
        """Yield plans for the front, with peaks and costs as the sums say."""
        if self.chain is not None:
            gap = GAP if len(self.chain) > LONG else 0
            for peak_bytes, cost, plan in pareto(self.chain, points, gap=gap):
                yield peak_bytes + self.extra_bytes, cost, plan
            if self.is_simple:
                return
        pool, unit = self.pool, 1e6 if self.clock else 1
        for place in pool.front() if points is None else ():
            peak_bytes = int(pool.peaks[place]) + self.shift_bytes
            yield peak_bytes, int(pool.costs[place]) / unit, pool.plan(place)

    def _budgets(self, points: int | None) -> list[int]:
        """List the budgets that a front is planned for: evenly spaced, or of its plans.

        The lowest plan is looked for first, since estimates are the same for all cards.
        """
        self._of_lowest(0)
        sizes = sorted({self.size_of(report) for report in self.judge.reports})
        if points is None:
            is_exact = self.low_bytes == self.shift_bytes
            return [] if is_exact else sizes
        low, high = sizes[0], self.size_of(self.plain)
        step = (high - low) / max(points - 1, 1)
        return [*sizes, *(low + round(step * point) for point in range(points))]

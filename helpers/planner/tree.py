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
from helpers.planner._estimate import Estimate, Unit
from helpers.planner._judge import Judge
from helpers.planner._lifetimes import joined_runs
from helpers.planner._search import Pool, unbeaten_of
from helpers.planner.best import InfeasibleBudget, best_plan, pareto
from helpers.planner.chain import Chain
from helpers.planner.profiling import profile
from helpers.units import parse_bytes

TRIES, EVENTS = 24, 200_000  # dry runs that go astray, more of them in short steps
LONG, GAP = 200, 0.015  # stages from which on a chain is solved within a gap


def plan_for(
    model: nn.Module | Callable[[], nn.Module],
    batch: object,
    budget: int | str,
    *,
    parent: str | None = None,
    measured: bool = False,
    **settings: object,
) -> StepReport:
    """Find a plan of least recomputation that fits the budget, as a dry run says.

    >>> import torch
    >>> from helpers.models import uniform_mlp
    >>> x = torch.empty(8192, 1024, device="meta")  # a shape without data
    >>> print(plan_for(uniform_mlp, x, "400 MiB").plan)
    layer1+layer2+layer3+layer4

    Args:
        model, batch: as in ``predict``; any model that can be predicted.
        budget: bytes, or "8 GiB", "512 MiB", "1.5 GB", for ``peak_bytes``, the tensors.
            On CUDA the report's ``workspace_bytes`` come on top, and what its
            ``allocator_peak_bytes`` has more: leave room for them.
        parent: plan for the children of this Sequential or ModuleList alone.
        measured: least time, as measured on the device, instead of fewest FLOPs.
        settings: of ``predict``: loss, optimizer, autocast, step, device, gpu.

    Raises:
        InfeasibleBudget: if no plan fits; says the least that one needs, and what else
            would help.
        ValueError: for a budget that is none; for a model that cannot be predicted.
    """
    budget_bytes = parse_bytes(budget)
    planner = Planner(model, batch, parent=parent, measured=measured, **settings)
    return planner.best(budget_bytes)


def front_for(
    model: nn.Module | Callable[[], nn.Module],
    batch: object,
    points: int | None = None,
    **options: object,
) -> list[StepReport]:
    """Find the plans that no other beats in both peak and cost, by a dry run each.

    They come in order of their peaks; the last one recomputes nothing.

    Args:
        points: how many budgets to plan for, evenly spaced from the least peak to the
            one without checkpointing; default: all that the search has found.
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
        **settings: object,
    ) -> None:
        self.judge = Judge(model, batch, settings)
        self.plain = self.judge.plain
        self.parent, self.measured = parent, measured
        self.among = None if among is None else frozenset(among)
        self.banned: set[tuple[str, ...]] = set()
        self.chain = self._chain()
        self._pool: Pool | None = None
        self._cost_of: dict[tuple[str, ...], int] = {}  # of segments, where measured
        self.shift_bytes = self.low_bytes = 0  # dry runs less estimates: most, least

    def _chain(self) -> Chain | None:
        judge = self.judge
        how = {"parent": self.parent, **judge.of_step, "measured": self.measured}
        model = judge.given if self.measured else judge.model
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
            if self.measured:
                self._take_times(units)
            estimate.offer(units)
            self._pool = Pool(estimate)
            excess_bytes = self.plain.peak_bytes - int(self._pool.peaks[0])
            self.shift_bytes = self.low_bytes = excess_bytes
        return self._pool

    def _take_times(self, units: list[Unit]) -> None:
        """Make nanoseconds, measured on the device, the costs of units."""
        from helpers.planner._stage_times import segments_ms

        judge = self.judge
        missing = [unit.names for unit in units if unit.names not in self._cost_of]
        model = judge.given if isinstance(judge.given, nn.Module) else judge.given()
        times = segments_ms(missing, model, judge.batch, judge.of_step)
        self._cost_of |= {names: round(ms * 1e6) for names, ms in times.items()}
        for unit in units:
            unit.cost = self._cost_of[unit.names]

    def cost(self, plan: Plan) -> float:
        """What a plan that was found adds: FLOPs, or milliseconds where measured."""
        if not self.measured:
            return self.judge.report(plan).recompute_flops
        if all(segment in self._cost_of for segment in plan.segments):
            return sum(self._cost_of[segment] for segment in plan.segments) / 1e6
        return self.chain.recompute_cost(plan)

    # One budget -----------------------------------------------------------------------

    def best(self, budget_bytes: int) -> StepReport:
        """Find the cheapest plan that fits.

        Raises:
            InfeasibleBudget: if none does.
        """
        if self.plain.peak_bytes <= budget_bytes:
            return self.plain
        found = [self._of_chain(budget_bytes)]
        if not (self.is_simple and found[0]):
            found.append(self._of_tree(budget_bytes))
        found = [report for report in found if report]
        if not found:
            raise self._infeasible(budget_bytes)
        return min(found, key=lambda report: self.cost(report.plan))

    def _of_chain(self, budget_bytes: int) -> StepReport | None:
        """Find the chain's best plan; None where it needs more than its sums say."""
        if self.chain is None:
            return None
        gap = GAP if len(self.chain) > LONG else 0
        try:
            plan = best_plan(self.chain, budget_bytes, gap=gap)
        except InfeasibleBudget:
            return None
        report = self.judge.report(plan)
        return report if report and report.peak_bytes <= budget_bytes else None

    def _of_tree(self, budget_bytes: int) -> StepReport | None:
        """Find the cheapest plan of the module tree."""
        for tried in range(TRIES):
            pool = self.pool
            # At first as if no other estimate were worse than the best one so far.
            shift_bytes = self.shift_bytes if 2 * tried > TRIES else self.low_bytes
            pool.better(budget_bytes, shift_bytes)
            place = pool.cheapest(budget_bytes, shift_bytes)
            if place is None:
                break
            report = self._confirmed(place)
            if report and report.peak_bytes <= budget_bytes:
                return report
        return self._of_lowest(budget_bytes)

    def _of_lowest(self, budget_bytes: int) -> StepReport | None:
        """Look at the lowest plans themselves, where no estimate is low enough."""
        events = len(self.pool.estimate.watched.log)
        for tried in range(max(TRIES, EVENTS // events)):
            pool, judge = self.pool, self.judge
            places = (~pool.confirmed).nonzero()[:, 0]
            if not len(places):
                break
            lowest = min(report.peak_bytes for report in judge.reports)
            place = int(places[pool.peaks[places].argmin()])
            is_exact = tried > 2 and self.low_bytes == self.shift_bytes
            if is_exact and pool.peaks[place] + self.low_bytes >= lowest:
                break
            self._confirmed(place)
        fit = [it for it in self.judge.reports if it.peak_bytes <= budget_bytes]
        return min(fit, key=lambda report: self.cost(report.plan), default=None)

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
        excess_bytes = report.peak_bytes - int(pool.peaks[place])
        self.shift_bytes = max(self.shift_bytes, excess_bytes)
        self.low_bytes = min(self.low_bytes, excess_bytes)
        pool.confirm(place, report.peak_bytes)
        return report

    def _infeasible(self, budget_bytes: int) -> InfeasibleBudget:
        from helpers.planner._advice import what_would_help

        judge = self.judge
        least = min(judge.reports, key=lambda it: it.peak_bytes)
        helps = what_would_help(judge.model, judge.batch, least, judge.settings)
        return InfeasibleBudget(budget_bytes, least.peak_bytes, helps)

    # All budgets ----------------------------------------------------------------------

    def front(self, points: int | None = None) -> list[StepReport]:
        """Find the plans that no other beats; see ``front_for``."""
        offers = sorted(self._offers(points), key=lambda it: it[:2])
        self.judge.predict_all(it[2] for it in unbeaten_of(offers))
        reports = self.judge.reports
        rows = [(it.peak_bytes, self.cost(it.plan), it) for it in reports]
        return [it[2] for it in unbeaten_of(sorted(rows, key=lambda it: it[:2]))]

    def _offers(self, points: int | None) -> Iterator[tuple[int, float, Plan]]:
        """Yield plans for the front, with peaks and costs as the sums say."""
        if self.chain is not None:
            gap = GAP if len(self.chain) > LONG else 0
            yield from pareto(self.chain, points, gap=gap)
            if self.is_simple:
                return
        pool = self.pool
        places = pool.front() if points is None else self._spread(points)
        for place in places:
            peak_bytes = int(pool.peaks[place]) + self.shift_bytes
            unit = 1e6 if self.measured else 1
            yield peak_bytes, int(pool.costs[place]) / unit, pool.plan(place)

    def _spread(self, points: int) -> Iterator[int]:
        """Plan for budgets that are evenly spaced."""
        pool = self.pool
        low, high = int(pool.peaks.min()), int(pool.peaks[0])
        for point in range(points):
            budget_bytes = low + round((high - low) * point / max(points - 1, 1))
            pool.better(budget_bytes)
            yield pool.cheapest(budget_bytes)


# What may be ticked -------------------------------------------------------------------


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

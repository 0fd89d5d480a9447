"""Choose what to checkpoint in any model, for a budget of bytes.

**What may be ticked.** A segment is any module whose forward is called, at any depth,
or a run of neighbours that feed each other in one Sequential or ModuleList; never one
inside another. Left out is what could not save anything, and a module that changes its
input, which cannot be run again (``offered``).

**What a plan needs.** One step is watched in which nothing stays saved
(``_lifetimes``); from it follow the peak and the cost of any plan (``_estimate``). A
dry run has the last word: no plan is returned that has not been predicted.

**How it is searched.** All plans where they are few, else those that a chain of pieces
would choose, and their neighbours (``_search``). A chain that is the model, or lies in
it, is solved exactly beside that (``best``), and the cheaper answer is taken.

Module trees: as ``torch.distributed._tools.sac_ilp``, which leaves the choice to an
integer program. Pieces and labels: Beaumont et al., arXiv 1911.13214, see ``chain``.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed, segments_of
from helpers.dry_run import as_on, meta_model
from helpers.measure import StepReport, predict, report_of, training_step
from helpers.planner._estimate import Estimate, Unit
from helpers.planner._lifetimes import Lifetimes, watch_lifetimes
from helpers.planner._search import Pool
from helpers.planner.best import InfeasibleBudget, best_plan, pareto
from helpers.planner.chain import Chain
from helpers.planner.profiling import profile
from helpers.timeline import Tracker, state_tensors, tensors_in
from helpers.units import parse_bytes

JOINED = 1_500  # joined runs of one list of modules that are offered, some more or less
TRIES = 24  # dry runs of plans that need a little more than they should


def plan_for(
    model: nn.Module | Callable[[], nn.Module],
    batch: object,
    budget: int | str,
    *,
    parent: str | None = None,
    **settings: object,
) -> StepReport:
    """Find a plan of least recomputation that fits the budget, as a dry run says.

    >>> from helpers.models import uniform_mlp
    >>> x = torch.empty(8192, 1024, device="meta")  # a shape without data
    >>> print(plan_for(uniform_mlp, x, "400 MiB").plan)
    layer1+layer2+layer3+layer4

    Args:
        model, batch: as in ``predict``; any model that can be predicted.
        budget: bytes, or "8 GiB", "512 MiB", "1.5 GB".
        parent: plan for the children of this Sequential or ModuleList alone.
        settings: of ``predict``: loss, optimizer, autocast, step, device.

    Raises:
        InfeasibleBudget: if no plan fits; says the least that one needs, and what else
            would help.
        ValueError: for a budget that is none; for a model that cannot be predicted.
    """
    budget_bytes = parse_bytes(budget)
    return Planner(model, batch, parent=parent, **settings).best(budget_bytes)


def front_for(
    model: nn.Module | Callable[[], nn.Module],
    batch: object,
    points: int | None = None,
    *,
    parent: str | None = None,
    **settings: object,
) -> list[StepReport]:
    """Find the plans that no other beats in both peak and recomputation, dry run each.

    They come in order of their peaks; the last one recomputes nothing.

    Args:
        points: how many budgets to plan for, evenly spaced from the least peak to the
            one without checkpointing; default: all that the search has found.
        model, batch, parent, settings: as in ``plan_for``.
    """
    return Planner(model, batch, parent=parent, **settings).front(points)


class Planner:
    """Plans for one model, whose steps are watched once for all budgets."""

    def __init__(self, model, batch, *, parent=None, **settings) -> None:
        is_made = isinstance(model, nn.Module)
        self.model, self.batch = model if is_made else meta_model(model), batch
        self.parent, self.settings = parent, settings
        self.reports: dict[Plan, StepReport | None] = {}
        self.banned: set[tuple[str, ...]] = set()
        self.plain = predict(self.model, batch, **settings)
        self.reports[Plan()] = self.plain
        self.chain = self._chain()
        self._pool: Pool | None = None
        self.shift_bytes = 0  # by which dry runs are above the estimates, at most

    def _chain(self) -> Chain | None:
        try:
            return profile(self.model, self.batch, parent=self.parent, **self.settings)
        except ValueError:
            if self.parent is not None:
                raise
            return None

    @property
    def is_simple(self) -> bool:
        """Whether the chain says it all: there is little inside its layers."""
        if self.parent is not None:
            return True
        layers = self.model._modules.values()
        whole = type(self.model).forward is nn.Sequential.forward
        return whole and all(sum(1 for _ in it.modules()) <= 4 for it in layers)

    @property
    def pool(self) -> Pool:
        """The plans of the module tree that have been looked at."""
        if self._pool is None:
            estimate = Estimate(self._watch())
            estimate.offer(offered(estimate, self.banned))
            self._pool = Pool(estimate)
            self.shift_bytes = self.plain.peak_bytes - int(self._pool.peaks[0])
        return self._pool

    def _watch(self) -> Lifetimes:
        """Watch one step in which nothing stays saved."""
        with self._steps() as (imagined, step, model, batch, made):
            tracker = Tracker(model, imagined.devices, imagined.run)
            tracker.expect("input", tensors_in(batch))
            tracker.expect("optimizer_state", state_tensors(made) if made else ())
            return watch_lifetimes(step, model, tracker)

    @contextlib.contextmanager
    def _steps(self) -> Iterator[tuple]:
        """Make steps as ``predict`` runs them, after a first one, which others repeat."""
        settings = {"loss": None, "optimizer": None, "autocast": None, "step": None}
        settings |= {"device": "cuda"} | self.settings
        with as_on(settings["device"], settings["autocast"]) as imagined:
            given = self.model, self.batch, settings["loss"], settings["step"]
            model, batch, loss, own = imagined.stand_ins(*given)
            made = imagined.optimizer(settings["optimizer"], model)
            step = training_step(model, batch, loss, made, settings["autocast"], own)
            if made or own:  # the first step makes what stays
                imagined.record(step, model, batch, made)
            yield imagined, step, model, batch, made
            model.zero_grad(set_to_none=True)

    def report(self, plan: Plan) -> StepReport | None:
        """Predict a step under a plan; None where it cannot be run so."""
        if plan not in self.reports:
            try:
                report = predict(self.model, self.batch, plan, **self.settings)
            except ValueError:
                report = None
            self.reports[plan] = report
        return self.reports[plan]

    def predict_all(self, plans: Iterable[Plan]) -> None:
        """Predict steps under many plans, with one copy of the model for them all."""
        with self._steps() as (imagined, step, model, batch, made):
            for plan in plans:
                if plan not in self.reports:
                    try:
                        with checkpointed(model, plan):
                            timeline = imagined.record(step, model, batch, made)
                        given = plan, imagined.device, "predicted"
                        self.reports[plan] = report_of(timeline, *given)
                    except ValueError:
                        self.reports[plan] = None

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
        return min(found, key=lambda it: it.recompute_flops)

    def _of_chain(self, budget_bytes: int) -> StepReport | None:
        """Find the chain's best plan; None where it needs more than its sums say."""
        if self.chain is None:
            return None
        try:
            plan = best_plan(self.chain, budget_bytes)
        except InfeasibleBudget:
            return None
        report = self.report(plan)
        return report if report and report.peak_bytes <= budget_bytes else None

    def _of_tree(self, budget_bytes: int) -> StepReport | None:
        """Find the cheapest plan of the module tree."""
        tried = 0
        while True:
            pool = self.pool
            pool.better(budget_bytes - self.shift_bytes)
            place = pool.cheapest(budget_bytes - self.shift_bytes)
            if place is None or tried == TRIES:
                return self._of_lowest(budget_bytes)
            report = self._confirmed(place)
            if report and report.peak_bytes <= budget_bytes:
                return report
            tried += 1

    def _of_lowest(self, budget_bytes: int) -> StepReport | None:
        """Look at the lowest plans themselves, where no estimate is low enough."""
        for _ in range(TRIES):
            pool = self.pool
            places = (~pool.confirmed).nonzero()[:, 0]
            if not len(places):
                break
            place = int(places[pool.peaks[places].argmin()])
            lowest = min(it.peak_bytes for it in self.reports.values() if it)
            if pool.peaks[place] + min(self.shift_bytes, 0) >= lowest:
                break
            self._confirmed(place)
        fits = [
            it for it in self.reports.values() if it and it.peak_bytes <= budget_bytes
        ]
        return min(fits, key=lambda it: it.recompute_flops, default=None)

    def _confirmed(self, place: int) -> StepReport | None:
        """Predict a plan of the pool, and learn from it how good estimates are."""
        pool = self.pool
        plan = pool.plan(place)
        report = self.report(plan)
        if report is None:
            self._ban(plan)
            return None
        estimate = int(pool.peaks[place])
        self.shift_bytes = max(self.shift_bytes, report.peak_bytes - estimate)
        pool.confirm(place, report.peak_bytes)
        return report

    def _ban(self, plan: Plan) -> None:
        """Leave out the segments that cannot be run again, and begin anew."""
        alone = {it for it in plan.segments if self.report(Plan((it,))) is None}
        self.banned |= alone or set(plan.segments)
        self._pool = None

    def _infeasible(self, budget_bytes: int) -> InfeasibleBudget:
        from helpers.planner._advice import what_would_help

        reports = [report for report in self.reports.values() if report]
        least = min(reports, key=lambda it: it.peak_bytes)
        given = self.model, self.batch, least, self.settings
        return InfeasibleBudget(budget_bytes, least.peak_bytes, what_would_help(*given))

    # All budgets ----------------------------------------------------------------------

    def front(self, points: int | None = None) -> list[StepReport]:
        """Find the plans that no other beats; see ``front_for``."""
        offers = sorted(self._offers(points), key=lambda it: it[:2])
        self.predict_all(it[2] for it in unbeaten_of(offers))
        reports = [report for report in self.reports.values() if report]
        rows = [(it.peak_bytes, it.recompute_flops, it) for it in reports]
        return [it[2] for it in unbeaten_of(sorted(rows, key=lambda it: it[:2]))]

    def _offers(self, points: int | None) -> Iterator[tuple[int, float, Plan]]:
        """Yield plans for the front, with peaks and costs as the sums say."""
        if self.chain is not None:
            yield from pareto(self.chain, points)
            if self.is_simple:
                return
        pool = self.pool
        places = pool.front() if points is None else self._spread(points)
        for place in places:
            peak_bytes = int(pool.peaks[place]) + self.shift_bytes
            yield peak_bytes, int(pool.costs[place]), pool.plan(place)

    def _spread(self, points: int) -> Iterator[int]:
        """Plan for budgets that are evenly spaced."""
        pool = self.pool
        low, high = int(pool.peaks.min()), int(pool.peaks[0])
        for point in range(points):
            budget_bytes = low + round((high - low) * point / max(points - 1, 1))
            pool.better(budget_bytes)
            yield pool.cheapest(budget_bytes)


def unbeaten_of(rows: list[tuple]) -> list[tuple]:
    """Keep what costs less than all that peak lower, of rows in order of peaks."""
    found: list[tuple] = []
    for row in rows:
        if not found or row[1] < found[-1][1]:
            found.append(row)
    return found


# What may be ticked -------------------------------------------------------------------


def offered(estimate: Estimate, banned: set[tuple[str, ...]]) -> list[Unit]:
    """List the segments that plans may be made of."""
    feeds, called = estimate.watched.feeds, {}
    for place, call in enumerate(estimate.watched.calls):
        called.setdefault(call.name, []).append(place)
    names = [(name,) for name in called if name]
    names += joined_runs(estimate.watched, called)
    units: dict[tuple, Unit] = {}
    cannot_start = feeds.in_place()
    for segment in names:
        if segment[0] in cannot_start or segment in banned:
            continue
        calls = zip(called[segment[0]], called[segment[-1]], strict=True)
        unit = estimate.unit(segment, calls)
        if any(run.again_bytes for run in unit.runs):
            units.setdefault(unit.effect(), unit)  # one of those that are as good
    return list(units.values())


def joined_runs(
    watched: Lifetimes, called: dict[str, list[int]]
) -> Iterator[tuple[str, ...]]:
    """Yield runs of two and more neighbours that can share a segment."""
    feeds = watched.feeds
    for parent, module in feeds.model.named_modules():
        if isinstance(module, nn.Sequential) and parent not in called:
            continue  # its children are called by somebody else
        names = [f"{parent}.{child}".lstrip(".") for child in module._modules]
        names = [name for name in names if name in called]
        joins = feeds.break_between
        for run in segments_of(names, lambda one, two: not joins(one, two)).segments:
            for length in _lengths(len(run)):
                for first in range(len(run) - length + 1):
                    yield run[first : first + length]


def _lengths(n: int) -> Iterator[int]:
    """Yield lengths of joined runs: all in a short chain, else fewer of long ones."""
    length = 2
    while length <= n:
        yield length
        length += max(1, length * n * n // (4 * JOINED))

"""Choose which layers to checkpoint, in which segments, for a budget of bytes.

The problem has a knapsack in it, so that no method is fast on every chain; but labels
that no other beats stay few on chains of layers, and the answers are exact. It is that
of Beaumont et al., "Optimal checkpointing for heterogeneous chains" (ACM TOMS 2024,
arXiv 1911.13214), without nested segments.
"""

import math
import warnings
from fractions import Fraction

import torch

from helpers.checkpointing import Plan
from helpers.planner._fronts import Front, TooManyLabels, find_fronts, one_thread
from helpers.planner.chain import NEVER, Chain, on_cpu
from helpers.units import format_bytes, parse_bytes

LONG, ROUGH_GAP = 200, 0.25  # stages from which on a rough plan comes first
LAST_GAP = 0.02  # where the best plan would take too long to find


class InfeasibleBudget(ValueError):
    """No plan fits the budget; ``minimum_bytes`` is the least that one does."""

    def __init__(
        self, budget_bytes: int, minimum_bytes: int, what_helps: str = ""
    ) -> None:
        super().__init__(
            f"no plan fits into {format_bytes(budget_bytes)} ({budget_bytes:,} B); the "
            f"least that works is {format_bytes(minimum_bytes)} ({minimum_bytes:,} B)"
            + (f"; {what_helps}" if what_helps else "")
        )
        self.minimum_bytes = minimum_bytes


@one_thread()
def best_plan(chain: Chain, budget_bytes: int | str, *, gap: float = 0.0) -> Plan:
    """Find the plan of least recompute cost whose peak fits the budget.

    Of plans that cost the same it is one of the lowest peak, and of those one with the
    fewest segments.

    Args:
        budget_bytes: bytes, or "8 GiB".
        gap: 0.01 for a plan that costs at most 1 % more than the best, found sooner
            in a long chain: its cost / 1.01 bounds the cost of every plan that fits.

    Raises:
        InfeasibleBudget: if no plan fits; says what is the least that does.

    Where sizes double from stage to stage, nearly every plan has its own budget; then
    the gap is 2 %, and a warning says so.
    """
    least, budget_bytes = least_peak_bytes(chain), whole_bytes(budget_bytes)
    if budget_bytes < least:
        raise InfeasibleBudget(budget_bytes, least)
    room_bytes, most = budget_bytes - chain.static_bytes, NEVER
    if len(chain) > LONG:  # a rough plan bounds the cost of what to look at
        most = _most(chain, find_fronts(chain, room_bytes, ROUGH_GAP), gap)
    try:
        fronts = find_fronts(chain, room_bytes, gap, most)
    except TooManyLabels:
        fronts = find_fronts(chain, room_bytes, LAST_GAP, most, stride=1)
        try:
            most = _most(chain, fronts, gap)
            fronts = find_fronts(chain, room_bytes, gap, most)
        except TooManyLabels:
            _warn_of_a_gap()
    return _plan_of(chain, fronts, _distinct(chain, fronts[0])[-1])


def _most(chain: Chain, fronts: list[Front], gap: float) -> int:
    """Bound the cost of labels by that of a plan, with any number of segments."""
    cost = int(fronts[0].cost[-1])
    cost += len(chain) - cost % (len(chain) + 1)
    return math.ceil(cost * Fraction(1 + gap))


def whole_bytes(budget_bytes: int | str) -> int:
    """Take any whole number, also one that no plan fits; read a text.

    Raises:
        ValueError: if it is neither.
    """
    is_whole = isinstance(budget_bytes, int) and not isinstance(budget_bytes, bool)
    return budget_bytes if is_whole else parse_bytes(budget_bytes)


def _warn_of_a_gap() -> None:
    warnings.warn(
        "the sizes of this chain's stages double, so that there are too many plans to "
        f"compare; what is found costs at most {100 * LAST_GAP:g} % more than the best",
        stacklevel=4,
    )


@one_thread()
def pareto(
    chain: Chain, points: int | None = None, *, gap: float = 0.0
) -> list[tuple[int, float, Plan]]:
    """Find the plans that no other beats: (peak_bytes, recompute_cost, plan).

    They come in order of their peaks, the last one at no cost.

    Args:
        points: how many budgets to plan for, evenly spaced from the least peak to the
            one at no cost; default: all plans on the front.
        gap: as in ``best_plan``.
    """
    try:
        fronts = find_fronts(chain, NEVER, gap)
    except TooManyLabels:
        fronts = find_fronts(chain, NEVER, LAST_GAP, stride=1)
        _warn_of_a_gap()
    places, needs = _distinct(chain, fronts[0]), fronts[0].need
    if points is not None and points < len(places):
        low, high = needs[places[0]].item(), needs[places[-1]].item()
        step = (high - low) / max(points - 1, 1)
        budgets = on_cpu(low + round(step * point) for point in range(points))
        found = torch.searchsorted(needs[places], budgets, right=True) - 1
        places = [places[place] for place in sorted({*found.tolist()})]
    fronts = [front._replace(end=front.end.tolist()) for front in fronts]
    fronts = [front._replace(label=front.label.tolist()) for front in fronts]
    plans = [_plan_of(chain, fronts, place) for place in places]
    peaks = (needs[places] + chain.static_bytes).tolist()
    return [
        (peak, chain.recompute_cost(plan), plan)
        for peak, plan in zip(peaks, plans, strict=True)
    ]


def least_peak_bytes(chain: Chain) -> int:
    """Find the lowest peak of all plans."""
    after = [chain.loss_need(False)]
    ending = [NEVER] * len(chain)
    for first in reversed(range(len(chain))):
        loss = first + 1 == len(chain)
        ending[first] = chain.loss_need(True) if loss else after[-1]
        held = chain.segment_held[first] + on_cpu(ending)
        segments = torch.maximum(chain.segment_needs[first], held)
        kept = max(chain.kept_needs[first], after[-1] + chain.kept[first])
        after.append(min(kept, int(segments.min())))
    return max(chain.static_bytes + after[-1], chain.other_peak_bytes)


def _distinct(chain: Chain, front: Front) -> list[int]:
    """List the labels that cost less than those before, segments not counted."""
    costs = (front.cost // (len(chain) + 1)).tolist()
    return [i for i, cost in enumerate(costs) if not i or cost < costs[i - 1]]


def _plan_of(chain: Chain, fronts: list[Front], label: int) -> Plan:
    """Follow a label from the first stage to the last."""
    segments, first = [], 0
    while first < len(chain):
        end, label = int(fronts[first].end[label]), int(fronts[first].label[label])
        if end > 0:
            segments.append((first, end - 1))
        first = abs(end)
    return chain.plan(segments)

"""Find what the rest of a chain needs and costs, from its end to its start.

Each stage gets a front of labels (need, cost): with so many bytes above H, it and what
follows can be run at that cost. A piece before a label makes another, (max(own need,
need + what it holds), cost + its own): all sums of ``helpers.planner.chain`` only grow
with H, so a label which another beats is not needed any more, and nothing is lost by
dropping it. The front before the first stage is the answer for every budget at once.

Beaumont et al. (arXiv 1911.13214) fill a table of memory slots, into which bytes are
rounded; labels need no slots, and are exact to the byte.
"""

import contextlib
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import torch

from helpers.checkpointing import Undo
from helpers.planner.chain import NEVER, Chain, on_cpu

STRIDE = 16  # stages between two places where a part of the gap is spent
MANY = 100_000  # labels from which on a plan without a gap is given up


class TooManyLabels(Exception):
    """Sizes that double make plans that no other beats, twice as many a stage."""


class Front(NamedTuple):
    """L labels before one stage, the least need first, and how to go on from each.

    Every field is a row of L whole numbers.
    """

    need: torch.Tensor  # bytes that the rest of the chain needs
    cost: torch.Tensor
    end: torch.Tensor  # the stage after the first piece; below 0 where that is kept
    label: torch.Tensor  # place of the label to go on from there


class _Segments:
    """Labels at which a segment can end, for the stages that could begin it.

    A label is dropped for good as soon as another of no higher need and cost belongs
    to a segment that never needs more, whichever stage begins it.

    Args:
        needs: of a segment l..r, N × N: row l, column r.
    """

    def __init__(self, needs: torch.Tensor) -> None:
        self.needs = needs
        self.floor = needs.cummin(0).values  # over all stages that could begin it
        longer = needs.flip(1).cummin(1).values.flip(1)
        self.shortest_needs_least = (needs.triu() <= longer.triu()).all(0).tolist()
        self.need = self.cost = self.next = self.last = self.label = on_cpu([])

    def add(self, last: int, need: torch.Tensor, cost: torch.Tensor, most: int) -> None:
        """Add the labels of segments that end with stage ``last``."""
        if not len(need):
            return
        place = torch.searchsorted(need, self.need, right=True) - 1
        beaten = (place >= 0) & (cost[place.clamp(min=0)] <= self.cost)
        if not self.shortest_needs_least[last]:
            needs = self.needs[: last + 1]
            beaten &= (needs[:, last : last + 1] <= needs).all(0)[self.last]
        # Of one segment's labels below its own need, the last one costs least.
        beaten |= self.next <= self.floor[last][self.last]
        beaten |= self.cost > most
        following = torch.cat([need[1:], on_cpu([NEVER])])
        added = need, cost, following, torch.full_like(need, last)
        for name, new in zip(("need", "cost", "next", "last"), added, strict=True):
            setattr(self, name, torch.cat([getattr(self, name)[~beaten], new]))
        places = torch.ones_like(need).cumsum(0) - 1
        self.label = torch.cat([self.label[~beaten], places])

    def before(self, first: int, cost_before: int) -> Front:
        """List the labels of the segments that begin with stage ``first``."""
        need = torch.maximum(self.need, self.needs[first][self.last])
        return Front(need, self.cost - cost_before, self.last + 1, self.label)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Leave other cores alone: rows this short are sorted sooner by one."""
    with Undo() as undo:
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        yield


def find_fronts(
    chain: Chain, room_bytes: int, gap: float, most: int = NEVER, stride: int = STRIDE
) -> list[Front]:
    """Find the labels before each stage, from the end on.

    Args:
        room_bytes, most: what the stages may need together, and cost.
        stride: how many stages lie between two where a part of the gap is spent.

    Raises:
        TooManyLabels: if there are too many, without a gap.
    """
    n, nothing = len(chain), on_cpu([0])
    room = [room_bytes - held for held in _least_held(chain, room_bytes)]
    full, last = _whole_costs(chain)
    cost_before = [sum(full[:place]) for place in range(n)]
    segments = _Segments(chain.segment_needs)
    # Less where a segment is nothing but views; but then it is of no use.
    held = chain.segment_held.max(0).values
    fronts = [Front(on_cpu([chain.loss_need(False)]), nothing, nothing, nothing)]
    ending = Front(on_cpu([chain.loss_need(True)]), nothing, nothing, nothing)
    thinning = range(0, n, stride)
    for first in reversed(range(n)):
        cost = ending.cost + (cost_before[first] + last[first])
        segments.add(first, ending.need + held[first], cost, cost_before[first] + most)
        after = fronts[-1]
        need = (after.need + chain.kept[first]).clamp(min=chain.kept_needs[first])
        places = torch.ones_like(need).cumsum(0) - 1
        kept = Front(need, after.cost, torch.full_like(need, -first - 1), places)
        begun = segments.before(first, cost_before[first])
        ending = unbeaten([kept, begun], room[first], most)
        if gap and first in thinning:
            ending = thinned(ending, (1 + gap) ** (1 / len(thinning)), n + 1)
        if len(ending.need) > MANY and not gap:
            raise TooManyLabels
        fronts.append(ending)
    other = chain.other_peak_bytes - chain.static_bytes
    need = fronts[-1].need.clamp(min=other)
    fronts[-1] = unbeaten([fronts[-1]._replace(need=need)], max(room[0], other), most)
    return fronts[::-1]


def unbeaten(options: list[Front], room: int, most: int) -> Front:
    """Keep the labels that fit, and that need less or cost less than every other."""
    all_of = Front(*map(torch.cat, zip(*options, strict=True)))
    order = ((all_of.need <= room) & (all_of.cost <= most)).nonzero()[:, 0]
    order = order[torch.argsort(all_of.need[order], stable=True)]
    cost = all_of.cost[order]
    lower = torch.ones_like(cost, dtype=torch.bool)
    lower[1:] = cost[1:] < cost.cummin(0).values[:-1]
    order = order[lower]
    need = all_of.need[order]
    last = torch.ones_like(need, dtype=torch.bool)  # of those that need as much
    last[:-1] = need[1:] > need[:-1]
    return Front(*(column[order[last]] for column in all_of))


def thinned(front: Front, ratio: float, unit: int) -> Front:
    """Keep one label of those whose costs differ by less than ``ratio``.

    It is the one that needs least. The others are gone, but what is left costs at
    most ``ratio`` times as much.
    """
    cost = (front.cost // unit).double().clamp(min=0.1)
    bucket = (cost.log() / math.log(ratio)).floor()
    first = torch.ones_like(bucket, dtype=torch.bool)
    first[1:] = bucket[1:] != bucket[:-1]
    return Front(*(column[first] for column in front))


def _least_held(chain: Chain, room_bytes: int) -> list[int]:
    """Find the fewest bytes that can be held before each stage, and at the end."""
    held = [0]
    ending = torch.full_like(chain.segment_needs[0], NEVER)
    for stage in range(len(chain)):
        fits = held[stage] + chain.segment_needs[stage] <= room_bytes
        segments = held[stage] + chain.segment_held[stage]
        ending = torch.where(fits, torch.minimum(ending, segments), ending)
        kept = held[stage] + chain.kept[stage]
        fits = held[stage] + chain.kept_needs[stage] <= room_bytes
        held.append(min(int(ending[stage]), kept if fits else NEVER))
    return held


def _whole_costs(chain: Chain) -> tuple[list[int], list[int]]:
    """Turn costs into whole numbers times n + 1, and count 1 for each segment.

    Whole numbers add up the same in any order, so that equal costs are equal, and the
    number of segments decides between those. Milliseconds lose less than any clock.
    """
    n = len(chain)
    full = [Fraction(stage.recompute_cost) for stage in chain.stages]
    last = [Fraction(stage.last_recompute_cost) for stage in chain.stages]
    unit = Fraction(
        math.gcd(*(cost.numerator for cost in full + last)) or 1,
        math.lcm(*(cost.denominator for cost in full + last)),
    )
    unit = max(unit, sum(full + last) * (n + 1) / 2**59)  # all in all below NEVER
    full = [round(cost / unit) * (n + 1) for cost in full]
    return full, [round(cost / unit) * (n + 1) + 1 for cost in last]

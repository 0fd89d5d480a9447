"""Chains to plan for, and every plan of one, counted without the planner's code."""

import random
from collections.abc import Iterator

from helpers.planner import Chain, Stage

Pieces = list[tuple[int, int, bool]]  # (first, last, checkpointed)


def every_plan(chain: Chain, start: int = 0) -> Iterator[Pieces]:
    """Cut a chain in every way that its stages allow."""
    stages = chain.stages
    if start == len(stages):
        yield []
        return
    for rest in every_plan(chain, start + 1):
        yield [(start, start, False), *rest]
    for last in range(start, len(stages) * stages[start].starts):
        if last > start and not stages[last].joins:
            break
        for rest in every_plan(chain, last + 1):
            yield [(start, last, True), *rest]


def peak_bytes(chain: Chain, pieces: Pieces) -> int:
    """Find a plan's peak by the sums as they are written down, one by one."""
    stages = chain.stages

    def gradients(after: int) -> int:
        later = (stage.gradient_bytes for stage in stages[after + 1 :])
        return chain.backward_bytes + sum(later)

    held, peaks = 0, [chain.other_peak_bytes - chain.static_bytes]
    for first, last, checkpointed in pieces:
        if not checkpointed:
            stage = stages[first]
            peaks.append(held + stage.forward_peak_bytes)
            peaks.append(held + gradients(first) + stage.backward_peak_bytes)
            held += stage.kept_bytes
            continue
        held += chain.per_segment_bytes
        again, output = 0, 0
        for place in range(first, last + 1):
            stage = stages[place]
            before = stages[place - 1].output_bytes if place > first else 0
            peaks.append(held + before + stage.forward_peak_bytes)
            forward = stage.forward_peak_bytes
            if place == last:
                forward = stage.last_forward_peak_bytes
            gradient = gradients(last) + stages[last].output_bytes
            peaks.append(held + gradient + again + forward)
            peaks.append(held + gradients(place) + again + stage.backward_peak_bytes)
            again += stage.kept_bytes
            output = stage.output_bytes
        held += output
    freed = stages[-1].output_bytes if pieces[-1][2] else 0
    beside = chain.loss_beside_bytes if pieces[-1][2] else 0
    loss = max(chain.loss_forward_bytes + beside, chain.loss_backward_bytes - freed)
    return chain.static_bytes + max(*peaks, held + loss)


def recompute_cost(chain: Chain, pieces: Pieces) -> float:
    costs = 0
    for first, last, checkpointed in pieces:
        if checkpointed:
            full = chain.stages[first:last]
            costs += sum(stage.recompute_cost for stage in full)
            costs += chain.stages[last].last_recompute_cost
    return costs


def whole_front(chain: Chain) -> list[tuple[int, float, int]]:
    """Find (peak, cost, segments) of the plans that no other beats, one by one."""
    points = sorted(
        (
            peak_bytes(chain, pieces),
            recompute_cost(chain, pieces),
            sum(checkpointed for _, _, checkpointed in pieces),
        )
        for pieces in every_plan(chain)
    )
    front = points[:1]
    for point in points:
        if point[1] < front[-1][1]:
            front.append(point)
    return front


def tiny_chain(n: int, seed: int) -> Chain:
    """Make a chain of small whole numbers, in which much is equal."""
    pick = random.Random(seed).randint
    stages = [
        Stage(
            f"layer{place}",
            output_bytes=pick(0, 4),
            kept_bytes=pick(0, 9),
            forward_peak_bytes=pick(1, 12),
            backward_peak_bytes=pick(1, 25),
            gradient_bytes=pick(0, 3),
            recompute_cost=pick(2, 6),
            last_recompute_cost=pick(0, 2),
            last_forward_peak_bytes=pick(0, 9),
            starts=pick(0, 9) > 0,
            joins=pick(0, 9) > 0,
        )
        for place in range(n)
    ]
    return Chain(
        tuple(stages),
        static_bytes=pick(0, 9),
        loss_forward_bytes=pick(0, 9),
        loss_backward_bytes=pick(0, 9),
        per_segment_bytes=pick(0, 1),
        backward_bytes=pick(0, 2),
        other_peak_bytes=pick(0, 40),
        loss_beside_bytes=pick(0, 4),
    )


def mixed_chain(n: int, seed: int = 0, kept: float = 8) -> Chain:
    """Make a chain of unequal layers with bytes, gradients and FLOPs as networks have.

    Args:
        kept: up to how many times its output a layer keeps besides.
    """
    chance = random.Random(seed)
    stages, before = [], chance.randint(2_000, 40_000)
    for place in range(n):
        output = chance.randint(2_000, 40_000)
        keeps = output + int(output * chance.uniform(kept / 8, kept))
        forward = keeps + chance.randint(0, output)
        gradient = chance.randint(100, 20_000)
        backward = keeps + output + before + gradient + chance.randint(0, output)
        cost = chance.randint(10**6, 10**8)
        blocks = (output, keeps, forward, backward, gradient)
        stages.append(
            Stage(
                f"layer{place}",
                *(512 * count for count in blocks),
                cost,
                last_recompute_cost=int(cost * chance.uniform(0.3, 1)),
                last_forward_peak_bytes=512 * (forward - chance.randint(0, output)),
            )
        )
        before = output
    return Chain(
        tuple(stages),
        static_bytes=sum(stage.gradient_bytes for stage in stages),
        loss_forward_bytes=512 * before,
        loss_backward_bytes=1024 * before,
    )


def equal_chain(n: int, kept: int = 1) -> Chain:
    """Make a chain of equal layers, outputs of 1, for which there are closed forms."""
    stage = 1, kept, kept, kept + 2, 0, 1
    return Chain(
        tuple(Stage(f"layer{place}", *stage) for place in range(n)),
        loss_forward_bytes=1,
        loss_backward_bytes=1,
    )

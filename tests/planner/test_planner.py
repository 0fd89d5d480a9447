"""The planner against every plan there is, closed forms, and the bounds it claims."""

import dataclasses
import math
import random
from fractions import Fraction

import pytest
import torch

from helpers.checkpointing import Plan
from helpers.planner import (
    Chain,
    InfeasibleBudget,
    Stage,
    best_plan,
    least_peak_bytes,
    pareto,
)
from helpers.planner.chain import NEVER
from tests.planner.chains import (
    equal_chain,
    every_plan,
    mixed_chain,
    peak_bytes,
    recompute_cost,
    tiny_chain,
    whole_front,
)


def of_pieces(chain: Chain, pieces) -> Plan:
    return chain.plan([(first, last) for first, last, inside in pieces if inside])


def point_of(chain: Chain, plan: Plan) -> tuple[int, float, int]:
    return chain.peak_bytes(plan), chain.recompute_cost(plan), len(plan.segments)


def published(per_stage: dict[str, list[int]]) -> Chain:
    """Make PLANNING's first instance: three layers, every number different."""
    columns = zip(*per_stage.values(), strict=True)
    return Chain(
        tuple(Stage(f"layer{i}", *numbers) for i, numbers in enumerate(columns)),
        static_bytes=23,
        loss_forward_bytes=10,
        loss_backward_bytes=20,
    )


THREE = published(
    {
        "output": [10, 26, 42],
        "kept": [16, 35, 110],
        "forward": [19, 46, 128],
        "backward": [50, 103, 191],
        "gradient": [1, 2, 13],
        "cost": [27, 5, 16],
    }
)


@pytest.mark.parametrize("seed", range(12))
def test_peak_and_cost_are_the_sums_as_written_down(seed):
    chain = tiny_chain(6, seed)
    for pieces in every_plan(chain):
        plan = of_pieces(chain, pieces)
        assert chain.peak_bytes(plan) == peak_bytes(chain, pieces)
        assert chain.recompute_cost(plan) == recompute_cost(chain, pieces)


@pytest.mark.parametrize("n", range(1, 10))
def test_front_and_best_plan_against_every_plan(n):
    for seed in range(12 if n < 7 else 3):
        for chain in (tiny_chain(n, seed), mixed_chain(n, seed)):
            expected = whole_front(chain)
            found = pareto(chain)
            assert [(*point[:2], len(point[2].segments)) for point in found] == expected
            assert all(point_of(chain, p)[:2] == (peak, c) for peak, c, p in found)
            assert least_peak_bytes(chain) == expected[0][0]
            for place in range(0, len(expected), 1 + len(expected) // 4):
                peak = expected[place][0]
                following = expected[place + 1 : place + 2]
                for budget in (peak, following[0][0] - 1 if following else peak + 99):
                    plan = best_plan(chain, budget)
                    assert point_of(chain, plan) == expected[place]


@pytest.mark.parametrize("seed", range(30))
def test_front_of_layers_that_share_and_free_their_inputs(seed):
    chance, plain = random.Random(seed), tiny_chain(6, seed)
    stages = [
        dataclasses.replace(
            stage,
            kept_bytes=0 if shares else stage.kept_bytes + 4,
            freed_input_bytes=0 if shares else chance.randint(0, 4),
            shares_input=shares,
            starts=stage.starts and not shares,
            first_forward_peak_bytes=chance.randint(0, 12),
            first_backward_peak_bytes=chance.randint(0, 25),
            later_backward_peak_bytes=chance.randint(0, 25),
            output_gradient_bytes=chance.randint(0, 4),
        )
        for stage in plain.stages
        for shares in [chance.random() < 0.3]
    ]
    chain = dataclasses.replace(plain, stages=tuple(stages))
    plans = [of_pieces(chain, pieces) for pieces in every_plan(chain)]
    points = sorted(point_of(chain, plan) for plan in plans)
    expected = [
        p
        for i, p in enumerate(points)
        if p[1] < min((q[1] for q in points[:i]), default=NEVER)
    ]
    assert [point_of(chain, plan) for _, _, plan in pareto(chain)] == expected


def test_front_where_segments_must_not_start_or_join():
    stuck = Chain([Stage(f"x{i}", 1, 4, 4, 6, 0, 1, starts=False) for i in range(4)])
    assert [plan for _, _, plan in pareto(stuck)] == [Plan()]
    alone = Chain([Stage(f"x{i}", 1, 4, 4, 6, 0, 1, joins=False) for i in range(4)])
    assert all(len(s) == 1 for _, _, plan in pareto(alone) for s in plan.segments)
    with pytest.raises(ValueError, match="x0.x1 cannot be one segment"):
        alone.peak_bytes(Plan((("x0", "x1"),)))


def test_three_unequal_layers():
    costs = {
        budget: THREE.recompute_cost(best_plan(THREE, budget))
        for budget in (240, 252, 255, 256, 258, 264, 265)
    }
    expected = {240: 32, 252: 32, 255: 32, 256: 5, 258: 5, 264: 5, 265: 0}
    assert costs == expected
    with pytest.raises(InfeasibleBudget, match="the least that works is 240 B"):
        best_plan(THREE, 239)


@pytest.mark.parametrize(
    ("n", "kept", "store_all", "least", "cost"),
    [
        (8, 1, 10, 6, 6),
        (32, 1, 34, 10, 29),
        (100, 1, 102, 16, 97),
        (8, 16, 130, 25, 7),
        (100, 16, 1602, 66, 99),
    ],
)
def test_equal_layers(n, kept, store_all, least, cost):
    chain = equal_chain(n, kept)
    front = pareto(chain)
    assert chain.peak_bytes(Plan()) == store_all
    assert front[0][:2] == (least, cost)


@pytest.mark.parametrize("n", [32, 50, 128, 200])
def test_least_peak_grows_as_the_root_of_twice_the_length(n):
    # Segments that shrink by 1 from k on hold k(k + 1)/2 layers in k places.
    assert abs(least_peak_bytes(equal_chain(n)) - (math.sqrt(2 * n) + 2)) < 1


def test_fronts_fall():
    for chain in (mixed_chain(40), equal_chain(40, 16)):
        front = pareto(chain)
        peaks, costs, _ = zip(*front, strict=True)
        assert list(peaks) == sorted(set(peaks))
        assert list(costs) == sorted(set(costs), reverse=True)
        assert front[-1] == (chain.peak_bytes(Plan()), 0, Plan())


def test_points_are_the_best_of_budgets_evenly_spaced():
    chain = mixed_chain(24)
    front, points = pareto(chain), pareto(chain, 50)
    assert set(points) <= set(front) and 40 <= len(points) <= 50
    assert points[0] == front[0] and points[-1] == front[-1]
    low, high = front[0][0], front[-1][0]
    for place in (7, 20, 33):
        budget = low + round((high - low) / 49 * place)
        assert max(point for point in front if point[0] <= budget) in points
    assert pareto(chain, 1) == front[:1]
    assert pareto(chain, len(front) + 5) == front


def test_minimum_bytes_is_feasible_and_one_byte_less_is_not():
    for chain in (mixed_chain(20), tiny_chain(9, 1), equal_chain(60, 16)):
        with pytest.raises(InfeasibleBudget) as caught:
            best_plan(chain, 0)
        minimum = caught.value.minimum_bytes
        assert chain.peak_bytes(best_plan(chain, minimum)) == minimum
        with pytest.raises(InfeasibleBudget, match=f"{minimum:,} B") as caught:
            best_plan(chain, minimum - 1)
        assert caught.value.minimum_bytes == minimum


def test_the_optimizers_peak_is_a_floor():
    chain = Chain(THREE.stages, static_bytes=23, other_peak_bytes=500)
    assert pareto(chain) == [(500, 0, Plan())]
    with pytest.raises(InfeasibleBudget) as caught:
        best_plan(chain, 499)
    assert caught.value.minimum_bytes == 500


@pytest.mark.parametrize(("n", "gap"), [(60, 0.1), (60, 0.015), (210, 0.015)])
def test_cost_is_within_the_gap_of_the_exact_one(n, gap):
    chain = mixed_chain(n, kept=1)
    exact, rough = pareto(chain, 5), dict(p[:2] for p in pareto(chain, gap=gap))
    for peak, cost, _ in exact:
        within = best_plan(chain, peak, gap=gap)
        assert chain.peak_bytes(within) <= peak
        for found in (
            chain.recompute_cost(within),
            min(cost for other, cost in rough.items() if other <= peak),
        ):
            assert cost <= found <= Fraction(1 + gap) * cost


def test_a_gap_leaves_fewer_labels():
    exact, rough = (pareto(mixed_chain(64), gap=gap) for gap in (0, 0.05))
    assert len(rough) < len(exact) / 2


def test_a_rough_plan_first_changes_nothing(monkeypatch):
    chain = mixed_chain(48, kept=1)
    budgets = [point[0] for point in pareto(chain, 12)]
    expected = [best_plan(chain, budget) for budget in budgets]
    monkeypatch.setattr("helpers.planner.best.LONG", 0)
    found = [best_plan(chain, budget) for budget in budgets]
    points = [[point_of(chain, plan) for plan in plans] for plans in (found, expected)]
    assert points[0] == points[1]


def test_costs_in_milliseconds_add_up_in_any_order():
    stages = [Stage(f"x{i}", 1, 3, 3, 5, 0, 0.1) for i in range(9)]
    front = pareto(Chain(tuple(stages), loss_forward_bytes=1))
    whole = [Stage(f"x{i}", 1, 3, 3, 5, 0, 1) for i in range(9)]
    expected = pareto(Chain(tuple(whole), loss_forward_bytes=1))
    assert [(p, plan) for p, _, plan in front] == [(p, plan) for p, _, plan in expected]


def test_huge_costs_do_not_overflow():
    stages = [Stage(f"x{i}", 1, 3, 3, 5, 0, 10**19 + i) for i in range(9)]
    front = pareto(Chain(tuple(stages), loss_forward_bytes=1))
    assert front[0][1] > 10**19 and front[-1][1] == 0


def test_every_answer_is_the_same_with_another_default_device():
    expected = pareto(mixed_chain(12))
    with torch.device("meta"):
        assert pareto(mixed_chain(12)) == expected


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((("nobody",),)), "no stage named 'nobody'; this chain has: layer0"),
        (Plan((("layer0", "layer2"),)), "no run of neighbours"),
        (Plan((("layer0",), ("layer0", "layer1"))), "no run of neighbours"),
        (Plan((("layer1", "layer0"),)), "no run of neighbours"),
    ],
)
def test_plans_that_do_not_fit_the_chain(plan, message):
    with pytest.raises(ValueError, match=message):
        THREE.peak_bytes(plan)


def test_segments_may_come_in_any_order():
    there, back = (("layer0",), ("layer2",)), (("layer2",), ("layer0",))
    assert THREE.peak_bytes(Plan(there)) == THREE.peak_bytes(Plan(back))


def test_a_chain_without_stages_or_with_one_twice():
    with pytest.raises(ValueError, match="at least one stage"):
        Chain(())
    with pytest.raises(ValueError, match="same name"):
        Chain(THREE.stages + THREE.stages[:1])


def test_a_chain_says_what_it_is():
    assert "3 stages layer0 … layer2" in repr(THREE)
    assert "265 B" in repr(THREE)


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("n", [16, 32])
def test_fractions_of_costs_lose_no_plan(n, kept):
    """Early stop makes the last of a segment cheap, as milliseconds are measured."""

    def chain(unit: float) -> Chain:
        chance = random.Random(n)
        costs = [chance.randint(10**6, 10**7) / unit for _ in range(n)]
        stages = (
            Stage(f"s{i}", 1, kept, kept, kept + 2, 0, cost, last_recompute_cost=0.0)
            for i, cost in enumerate(costs)
        )
        return Chain(tuple(stages), loss_forward_bytes=1, loss_backward_bytes=1)

    whole, parts = chain(1), chain(3e6)
    least = least_peak_bytes(parts)
    assert pareto(parts)[0][0] == pareto(whole)[0][0] == least
    expected = whole.recompute_cost(best_plan(whole, least))
    found = parts.recompute_cost(best_plan(parts, least))
    assert found * 3e6 == pytest.approx(expected)


def doubling_chain(n: int) -> Chain:
    stages = (
        Stage(f"s{i}", max(1, 2**i // 8), 2**i, 2**i + 5, 2**i + 9, 0, 2**i + i)
        for i in range(n)
    )
    return Chain(tuple(stages), loss_forward_bytes=1, loss_backward_bytes=1)


def test_sizes_that_double():
    """Nearly every plan has its own budget: exact where short, or a gap is said."""
    chain = doubling_chain(12)
    assert len(pareto(chain)) > 200
    chain = doubling_chain(32)
    least, most = least_peak_bytes(chain), chain.peak_bytes(Plan())
    for part in (0, 0.1, 0.5):
        budget = least + int((most - least) * part)
        assert chain.peak_bytes(best_plan(chain, budget)) <= budget
    with pytest.warns(UserWarning, match="at most 2 % more than the best"):
        points = pareto(chain, 10)
    assert points[0][0] == least and points[-1][1] == 0
    for peak, cost, plan in points:
        exact = chain.recompute_cost(best_plan(chain, peak))
        assert cost <= 1.02 * exact and chain.peak_bytes(plan) == peak


@pytest.mark.parametrize("cost", [math.nan, math.inf, -1, "3", None])
def test_costs_that_are_none(cost):
    with pytest.raises(ValueError, match="recompute_cost of stage 'a' is a number"):
        Stage("a", 1, 1, 1, 1, 0, cost)


@pytest.mark.parametrize("budget", [math.nan, math.inf, "8 apples", None, True])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match="memory is a whole number of bytes"):
        best_plan(doubling_chain(3), budget)


@pytest.mark.parametrize("budget", [0, -5])
def test_budgets_that_are_too_small(budget):
    with pytest.raises(InfeasibleBudget, match="the least that works is"):
        best_plan(doubling_chain(3), budget)

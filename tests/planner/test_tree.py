"""Plans for any model: estimates against dry runs, choices against every plan."""

import random
from collections.abc import Iterator

import pytest
from torch import nn

from helpers.checkpointing import Plan
from helpers.measure import StepReport, measure, predict
from helpers.planner import InfeasibleBudget, Planner, front_for, plan_for
from tests.planner.zoo import LARGE, SMALL

MODELS = SMALL | LARGE


def called(model: nn.Module, batch: object) -> list[str]:
    """Name the modules whose forward is called, in the order of their names."""
    found = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: found.add(name))
        for name, module in model.named_modules()
    ]
    predict(model, batch, device="cpu")
    for hook in hooks:
        hook.remove()
    return [name for name, _ in model.named_modules() if name in found - {""}]


def every_plan(names: list[str]) -> Iterator[list[str]]:
    """List all choices of modules of which none lies in another."""
    if not names:
        yield []
        return
    first, *others = names
    yield from every_plan(others)
    apart = [name for name in others if not name.startswith(f"{first}.")]
    yield from ([first, *plan] for plan in every_plan(apart))


def try_all(model: nn.Module, batch: object, **settings) -> list[StepReport]:
    """Predict a step under every plan that can be run."""
    reports = []
    for names in every_plan(called(model, batch)):
        try:
            reports.append(predict(model, batch, Plan.alone(names), **settings))
        except ValueError:
            pass
    return reports


def budgets_between(low: int, high: int, count: int) -> list[int]:
    return [low + (high - low) * step // count for step in range(count)]


@pytest.mark.parametrize("name", SMALL)
def test_every_plan(name):
    """No plan is missed that fits, and none costs 5 % less than the one chosen."""
    make, batch = SMALL[name]
    model, settings = make(), {"device": "cpu"}
    names = called(model, batch)
    assert 4 <= len(names) <= 14
    reports = try_all(model, batch, **settings)
    least = min(report.peak_bytes for report in reports)
    planner = Planner(model, batch, **settings)
    for budget in {report.peak_bytes for report in reports}:
        fitting = [it for it in reports if it.peak_bytes <= budget]
        cost = min(report.recompute_flops for report in fitting)
        found = planner.best(budget)
        assert found.peak_bytes <= budget
        assert found.recompute_flops <= 1.05 * cost
        assert found == predict(model, batch, found.plan, **settings)
    with pytest.raises(InfeasibleBudget) as error:
        for budget in range(least - 1, 0, -512):  # neighbours joined may need less
            planner.best(budget)
    assert (
        error.value.minimum_bytes == planner.best(error.value.minimum_bytes).peak_bytes
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", MODELS)
def test_estimates_are_what_dry_runs_say(name, device):
    make, batch = MODELS[name]
    planner = Planner(make(), batch, device=device)
    pool, chance = planner.pool, random.Random(0)
    for place in chance.sample(range(len(pool.plans)), min(len(pool.plans), 12)):
        report = planner.judge.report(pool.plan(place))
        if report:
            assert report.peak_bytes == pool.peaks[place], report.plan
            assert report.recompute_flops == pool.costs[place], report.plan


@pytest.mark.parametrize("name", MODELS)
def test_what_is_measured_fits_the_budget(name):
    make, batch = MODELS[name]
    model = make()
    planner = Planner(model, batch, device="cpu")
    front = planner.front(4)
    for budget in budgets_between(front[0].peak_bytes, planner.plain.peak_bytes, 3):
        report = planner.best(budget)
        assert measure(model, batch, report.plan, repeats=0).peak_bytes <= budget

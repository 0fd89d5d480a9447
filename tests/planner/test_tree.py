"""Plans for any model: estimates against dry runs, choices against every plan."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.checkpointing import Plan
from helpers.measure import StepReport, measure, predict
from helpers.models.architectures import GPT, Block, UNet
from helpers.planner import (
    InfeasibleBudget,
    Planner,
    front_for,
    pareto,
    plan_for,
    profile,
)
from helpers.units import format_bytes
from tests.planner.table import called, every_plan
from tests.planner.zoo import LARGE, SMALL, ids

MODELS = SMALL | LARGE


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


@pytest.mark.parametrize("gpu", ["H100", "T4"])
@pytest.mark.parametrize("name", ["two levels", "siamese", "mixer", "block"])
def test_every_plan_in_what_a_card_needs(name, gpu):
    """On CUDA a budget is for whole blocks, scratch and workspaces, too."""
    make, batch = SMALL[name]
    model, settings = make(), {"gpu": gpu, "optimizer": torch.optim.AdamW}
    reports = try_all(model, batch, **settings)
    planner = Planner(model, batch, **settings)
    for budget in {report.needed_bytes for report in reports}:
        fitting = [it for it in reports if it.needed_bytes <= budget]
        found = planner.best(budget)
        assert found.peak_bytes < found.needed_bytes <= budget
        least_cost = min(report.recompute_flops for report in fitting)
        assert found.recompute_flops <= 1.05 * least_cost


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", MODELS)
def test_estimates_are_what_dry_runs_say(name, device):
    make, batch = MODELS[name]
    planner = Planner(make(), batch, device=device, tensors=True)
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


def penalty(model, batch, optimizer):
    """Train on the loss and on the gradient that the input has."""
    x = batch.detach().requires_grad_()
    loss = torch.tanh(model(x)).sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()


def accumulate(model, batch, optimizer):
    """Update after two halves of the batch."""
    optimizer.zero_grad()
    for part in batch.chunk(2):
        model(part).square().mean().backward()
    optimizer.step()


STEPS = [(penalty, None), (accumulate, torch.optim.AdamW)]


@pytest.mark.parametrize(("step", "optimizer"), STEPS)
def test_a_step_of_ones_own(step, optimizer):
    make, batch = SMALL["siamese"]
    model, settings = make(), {"step": step, "optimizer": optimizer, "device": "cpu"}
    reports = try_all(model, batch, **settings)
    planner = Planner(model, batch, **settings)
    for budget in {report.peak_bytes for report in reports}:
        fitting = [it for it in reports if it.peak_bytes <= budget]
        found = planner.best(budget)
        assert found.peak_bytes <= budget
        least_cost = min(report.recompute_flops for report in fitting)
        assert found.recompute_flops <= 1.05 * least_cost


def test_a_chain_costs_what_the_best_chain_does():
    with torch.device("meta"):
        model = nn.Sequential(*[Block(64, 4) for _ in range(6)])
    batch = torch.empty(4, 32, 64, device="meta")
    chain, planner = profile(model, batch), Planner(model, batch, tensors=True)
    for peak, cost, _ in pareto(chain, 6):
        found = planner.best(peak)
        assert found.peak_bytes <= peak and found.recompute_flops <= cost


def test_front_goes_from_the_least_peak_to_no_recomputation():
    make, batch = LARGE["ResNet"]
    front = front_for(make, batch, 10)
    peaks = [report.needed_bytes for report in front]
    costs = [report.recompute_flops for report in front]
    assert peaks == sorted(peaks) and costs == sorted(costs, reverse=True)
    assert 5 <= len(front) and costs[-1] == 0
    with pytest.raises(InfeasibleBudget) as error:
        plan_for(make, batch, peaks[0] - 1)
    assert error.value.minimum_bytes == peaks[0]
    assert front[0] == predict(make, batch, front[0].plan)


def test_what_else_would_help():
    make, batch = lambda: GPT(2, 32, 4, 50, 64), ids(8, 64)
    how = {"optimizer": torch.optim.AdamW, "tensors": True}
    with pytest.raises(InfeasibleBudget) as error:
        plan_for(make, batch, "1 KiB", **how)
    planner = Planner(make, batch, **how)
    least = planner.best(error.value.minimum_bytes)
    sgd = predict(make, batch, least.plan, optimizer=torch.optim.SGD)
    assert error.value.minimum_bytes == least.peak_bytes
    assert f"{format_bytes(sgd.peak_bytes)} with plain SGD" in str(error.value)
    assert "with half the batch" in str(error.value)


class Twice(nn.Module):
    """Calls one Sequential twice, as siamese and tied encoders do."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(6)]
        self.tower, self.head = nn.Sequential(*layers), nn.Linear(width, 8)

    def forward(self, x):
        return self.head(self.tower(self.tower(x)))


@pytest.mark.parametrize("where", [{"device": "cpu"}, {"gpu": "H100"}])
def test_neighbours_that_are_called_twice_are_joined(where):
    model, batch = Twice(), torch.empty(4096, 64, device="meta")
    names = [f"tower.{place}" for place in range(6)]
    by_hand = predict(model, batch, Plan((names[:3], names[3:])), **where)
    found = plan_for(model, batch, by_hand.needed_bytes, **where)
    assert found.recompute_flops <= by_hand.recompute_flops
    assert any(len(segment) > 1 for segment in found.plan.segments)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.one = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.other = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.other(F.gelu(self.one(self.norm(x))))


class Shared(nn.Module):
    """What a card needs beside its tensors differs from plan to plan."""

    def __init__(self, width: int = 100) -> None:
        super().__init__()
        self.f, self.g = Residual(width), Residual(width)
        self.head = nn.Linear(width, width)

    def forward(self, x):
        return self.head(self.f(self.g(self.f(x)).sigmoid()))


def stem() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Conv2d(8, 16, 3, 2), nn.GELU(), nn.Flatten())


CARDS = {
    "H100": (Shared, torch.empty(5000, 100, device="meta")),
    "T4": (stem, torch.empty(64, 3, 64, 64, device="meta")),
}


@pytest.mark.parametrize("gpu", CARDS)
@pytest.mark.parametrize("points", [None, 5])
def test_nothing_that_is_planned_beats_a_front(gpu, points):
    make, batch = CARDS[gpu]
    front = front_for(make, batch, points, gpu=gpu)
    assert len({report.needed_bytes for report in front}) == len(front)
    for report in front:
        again = plan_for(make, batch, report.needed_bytes, gpu=gpu)
        assert again.recompute_flops == report.recompute_flops
    with pytest.raises(InfeasibleBudget) as error:
        plan_for(make, batch, front[0].needed_bytes - 1, gpu=gpu)
    assert error.value.minimum_bytes == front[0].needed_bytes


class Counted(nn.Module):
    """A layer that does something else each time that it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(32, 512), 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.linear(x) * self.calls).sum(-1, keepdim=True) * x


def test_no_plan_is_proposed_that_gives_other_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(Counted(), nn.Linear(32, 512), nn.Tanh())
    batch = torch.randn(64, 32)
    plan = Plan.alone(["0"])
    plain = predict(model, batch, device="cpu").peak_bytes
    assert predict(model, batch, plan, device="cpu").peak_bytes < plain
    planner = Planner(model, batch, device="cpu")
    assert all("0" not in report.plan.names for report in planner.front())
    with pytest.raises(InfeasibleBudget):
        planner.best(plain // 2)


def test_least_time_as_measured():
    make, batch = LARGE["U-Net"]
    planner = Planner(make(), batch, device="cpu", measured=True)
    front = planner.front(3)
    report = planner.best(front[0].needed_bytes)
    assert report.plan.segments and report.source == "measured"
    assert report.step_ms > 0 and abs(planner.cost(report.plan)) < 1000
    assert planner.best(planner.plain.peak_bytes).plan == Plan()


@pytest.mark.parametrize("among", ["nope", ["0", "nope"], [5]])
def test_a_module_that_is_not_there(among):
    with pytest.raises(ValueError, match="there is none named (5|'nope')"):
        Planner(*SMALL["tuples"], among=among)


def test_a_budget_in_words_for_a_planner():
    assert Planner(*SMALL["loop"], device="cpu").best("1 GiB").plan == Plan()


def test_a_sequential_without_layers():
    with pytest.raises(InfeasibleBudget, match="the least that works"):
        plan_for(nn.Sequential(), torch.randn(100, 64).requires_grad_(), 1000)


@pytest.mark.parametrize(
    "budget",
    ["8 apples", "", "GiB", None, True, 0, -1, 1.5, float("nan"), float("inf"), 2**70],
)
def test_a_budget_that_is_none(budget):
    with pytest.raises(ValueError, match="memory is a whole number of bytes above 0"):
        plan_for(*SMALL["loop"], budget)


def test_nothing_to_tick():
    with pytest.raises(InfeasibleBudget, match="the least that works"):
        plan_for(nn.Linear(8, 8), torch.randn(4, 8), 100)


@pytest.mark.parametrize("name", ["tuples", "mixer"])
def test_neighbours_in_one_segment_need_less_than_any_alone(name):
    make, batch = SMALL[name]
    model = make()
    alone = min(it.peak_bytes for it in try_all(model, batch, device="cpu"))
    lowest = front_for(model, batch, device="cpu")[0]
    assert lowest.peak_bytes < alone
    assert any(len(segment) > 1 for segment in lowest.plan.segments)


@pytest.mark.parametrize("name", ["U-Net", "GPT"])
def test_a_default_device_of_the_reader_s_changes_nothing(name):
    made = {"U-Net": (UNet, torch.randn(4, 3, 32, 32))}
    made["GPT"] = lambda: GPT(2, 32, 2, 40, 64), torch.randint(0, 40, (8, 64))
    front = front_for(*made[name])
    assert len(front) > 2
    with torch.device("meta"):
        assert front_for(*made[name]) == front

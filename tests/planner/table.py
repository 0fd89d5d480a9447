"""What the planner finds for many models, beside other ways to choose, as a table."""

import time
from collections.abc import Iterator

import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.measure import measure, training_step
from helpers.models.architectures import UNet
from helpers.planner import InfeasibleBudget, Planner
from helpers.units import format_bytes
from tests.planner.zoo import LARGE, MORE, SMALL, from_timm, from_transformers

HEADER = f"{'model':<24}{'modules':>8}{'budget':>12}{'recompute':>11}{'all plans':>11}"
HEADER += f"{'greedy':>9}{'each':>9}{'predicted':>12}{'measured':>12}{'seconds':>9}"


def called(model: nn.Module, batch: object) -> list[str]:
    """Name the modules whose forward is called, in the order of their names."""
    found = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: found.add(name))
        for name, module in model.named_modules()
    ]
    training_step(model, batch)()  # a real one, as a dry run notes nothing here
    model.zero_grad()
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


def least_cost(planner: Planner, plans: list[Plan], budget: int) -> int | None:
    """Find the least cost of plans that fit; None if none does."""
    reports = map(planner.judge.report, plans)
    fit = [it for it in reports if it and it.peak_bytes <= budget]
    return min((it.recompute_flops for it in fit), default=None)


def greedy(planner: Planner, budget: int) -> int | None:
    """Tick the modules that keep most bytes for a FLOP, until the plan fits."""
    estimate, pool = planner.pool.estimate, planner.pool
    units = [unit for unit in estimate.units if len(unit.names) == 1]

    def rate(unit) -> float:
        return sum(run.again_bytes for run in unit.runs) / (unit.cost + 1)

    plan = torch.zeros(1, len(estimate.units), dtype=torch.bool)
    for unit in sorted(units, key=rate, reverse=True):
        if estimate.peaks(plan)[0] <= budget:
            break
        place = estimate.units.index(unit)
        plan[0, place] = not (plan[0] & pool.conflicts[place]).any()
    fits = estimate.peaks(plan)[0] <= budget
    return int((plan * pool.costs_of).sum()) if fits else None


def each(planner: Planner, budget: int) -> int | None:
    """Tick every block: the children of the longest list, or of the model."""
    model = planner.judge.model
    lists = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    ]
    _, parent = max(lists, key=lambda it: it[0], default=(0, ""))
    units = {unit.names for unit in planner.pool.estimate.units}
    children = model.get_submodule(parent)._modules
    names = [f"{parent}.{child}".lstrip(".") for child in children]
    plan = Plan.alone(name for name in names if (name,) in units)
    return least_cost(planner, [plan], budget)


def row(name: str, make, batch: object, part: float = 0.25) -> str:
    """Plan for a budget that lies between the least and no checkpointing."""
    torch.manual_seed(0)
    model = make()
    started = time.perf_counter()
    planner = Planner(model, batch, device="cpu")
    try:
        planner.best(1)
    except InfeasibleBudget as error:
        least = error.minimum_bytes
    budget = least + round(part * (planner.plain.peak_bytes - least))
    started = time.perf_counter()
    report = Planner(model, batch, device="cpu").best(budget)
    seconds = time.perf_counter() - started
    names, whole = called(model, batch), report.forward_flops
    plans = list(every_plan(names)) if len(names) <= 14 else []
    costs = [
        least_cost(planner, list(map(Plan.alone, plans)), budget),
        greedy(planner, budget),
        each(planner, budget),
    ]
    says = ["–" if cost is None else f"{cost / whole:.3f}" for cost in costs]
    says[0] = says[0] if plans else "…"
    measured = measure(model, batch, report.plan, repeats=0, device="cpu").peak_bytes
    peaks = f"{report.peak_bytes:>12,}{measured:>12,}{'!' * (measured > budget)}"
    own = f"{report.recompute_flops / whole:.3f}"
    return (
        f"{name:<24}{len(names):>8}{budget:>12,}{own:>11}{says[0]:>11}{says[1]:>9}"
        f"{says[2]:>9}{peaks}{seconds:>9.2f}"
    )


def show() -> None:
    """Print the rows; costs are parts of a forward."""
    print(HEADER)
    models = SMALL | LARGE | MORE | from_transformers() | from_timm()
    for name, (make, batch) in models.items():
        print(row(name, make, batch), flush=True)


def show_large() -> None:
    """Time a plan, and a front of 50 points, for models as people train them."""
    import transformers as hf

    ids, labels = torch.zeros(8, 128).long(), torch.zeros(8).long()
    texts = {"input_ids": ids, "labels": labels}
    pictures = torch.empty(8, 3, 224, 224, device="meta")
    models = {
        "BERT-base": (lambda: hf.BertForSequenceClassification(hf.BertConfig()), texts),
        "ViT-B": (
            lambda: hf.ViTForImageClassification(hf.ViTConfig()),
            {"pixel_values": pictures, "labels": labels},
        ),
        "U-Net, 67 modules": (
            lambda: UNet(5, 16),
            torch.empty(4, 3, 128, 128, device="meta"),
        ),
    }
    for name, (make, batch) in models.items():
        started = time.perf_counter()
        front = Planner(make, batch).front(50)
        front_s = time.perf_counter() - started
        low, high = front[0].needed_bytes, front[-1].needed_bytes
        started = time.perf_counter()
        Planner(make, batch).best((low + high) // 2)
        plan_s = time.perf_counter() - started
        said = f"{format_bytes(low)} to {format_bytes(high)}, {len(front)} plans"
        print(f"{name:<24}a plan {plan_s:5.1f} s, a front {front_s:5.1f} s: {said}")

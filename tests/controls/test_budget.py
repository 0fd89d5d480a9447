"""The budget's panel: boxes follow slider and field, and hands are not fought."""

import asyncio
import base64
import functools
import math
import random
import re

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.controls import BudgetLab
from helpers.measure import StepReport, predict
from helpers.models import MLP, DocsMLP, UNet, uniform_mlp
from helpers.planner import InfeasibleBudget, best_plan, plan_for, profile
from helpers.units import format_bytes
from tests.controls.test_lab import front_end_click, is_a_full_picture

WIDTHS, ROWS = [64, 128, 128, 32, 128, 64], 8192
NAMES = tuple(f"layer{i}" for i in range(1, len(WIDTHS)))
MIB = 2**20


def chain() -> nn.Sequential:
    return MLP(WIDTHS, "gelu")


def small_panel() -> BudgetLab:
    return BudgetLab(chain, batch=ROWS)


def every_plan(names: tuple[str, ...]):
    yield ()
    for start in range(len(names)):
        for end in range(start + 1, len(names) + 1):
            for rest in every_plan(names[end:]):
                yield (names[start:end], *rest)


@functools.cache
def every_report() -> dict[Plan, StepReport]:
    x = torch.empty(ROWS, WIDTHS[0], device="meta")
    plans = map(Plan, every_plan(NAMES))
    return {plan: predict(chain, x, plan) for plan in plans}


def cost_of(budget_bytes: int) -> int:
    """Find what the cheapest plan recomputes that fits, by trying them all."""
    reports = every_report().values()
    return min(r.recompute_flops for r in reports if r.peak_bytes <= budget_bytes)


def least_bytes() -> int:
    return min(report.peak_bytes for report in every_report().values())


def test_it_opens_without_checkpointing_at_the_end_of_the_slider():
    panel = small_panel()
    peak = every_report()[Plan()].peak_bytes
    assert panel.plan == Plan()
    assert panel.slider.value == panel.slider.max == len(panel.front) - 1
    assert panel.budget_bytes == peak
    assert f"peaks at {format_bytes(peak)}, step ±0 % FLOPs" in panel.budget_finding


def test_each_step_of_the_slider_is_a_plan_that_no_other_beats():
    panel, budgets = small_panel(), []
    for place in range(panel.slider.max + 1):
        panel.slider.value = place
        report = every_report()[panel.plan]
        assert report.recompute_flops == cost_of(report.peak_bytes)
        assert f"peaks at {format_bytes(report.peak_bytes)}" in panel.budget_finding
        assert 0 <= panel.budget_bytes - report.peak_bytes <= MIB / 10
        assert panel.field.value * MIB == pytest.approx(panel.budget_bytes, abs=1)
        assert panel.slider.value == place
        budgets.append(panel.budget_bytes)
    assert len(budgets) > 4 and budgets == sorted(set(budgets))
    costs = {cost_of(report.peak_bytes) for report in every_report().values()}
    assert len(budgets) == len(costs)  # none is left out


def test_the_boxes_show_the_cheapest_plan_that_fits_any_budget():
    panel, chance = small_panel(), random.Random(0)
    for _ in range(20):
        budget = chance.randint(least_bytes(), every_report()[Plan()].peak_bytes)
        panel.budget_bytes = budget
        report = every_report()[panel.plan]
        assert report.peak_bytes <= budget
        assert report.recompute_flops == cost_of(budget)
        assert panel.budget_finding.startswith(
            f"budget {format_bytes(budget)}: the cheapest"
        )


def test_a_budget_may_be_typed_and_the_slider_goes_along():
    panel = small_panel()
    assert panel.unit.value == "MiB"
    panel.field.value = 27.0
    report = every_report()[panel.plan]
    assert report.peak_bytes <= 27 * MIB
    assert report.recompute_flops == cost_of(27 * MIB)
    below, above = panel.front[panel.slider.value : panel.slider.value + 2]
    assert below[0] <= 27 * MIB < above[0]
    assert panel.field.value == 27.0


@pytest.mark.parametrize("typed", [1.0, 0.0, -5.0])
def test_where_nothing_fits_the_least_that_works_is_said_and_offered(typed):
    panel = small_panel()
    panel.slider.value = 1
    before = panel.plan
    panel.field.value = typed
    least = format_bytes(least_bytes())
    assert f"no plan fits; the least that works is {least}" in panel.budget_finding
    assert panel.budget_finding in panel.verdict.value
    assert panel.plan == before
    assert panel.least.description == f"least: {least}"
    panel.least.click()
    assert every_report()[panel.plan].peak_bytes == least_bytes()
    assert panel.slider.value == 0
    assert f"peaks at {least}" in panel.budget_finding


def test_a_flip_by_hand_moves_neither_slider_nor_field():
    panel = small_panel()
    panel.slider.value = 0
    typed, budget = panel.field.value, panel.budget_bytes
    panel.boxes[panel.plan.names[0]].value = False
    report = every_report()[panel.plan]
    over = format_bytes(report.peak_bytes - budget)
    assert f"by hand, peak {format_bytes(report.peak_bytes)} is {over} too" in (
        panel.budget_finding
    )
    panel.slider.value = place = panel.slider.max
    panel.boxes["layer2"].value = True
    assert "by hand" in panel.budget_finding and " fits, step +" in panel.budget_finding
    assert panel.slider.value == place
    assert (panel.field.value, panel.budget_bytes) != (typed, budget)
    panel.boxes["layer2"].value = False
    assert "by hand" not in panel.budget_finding


def test_other_settings_make_another_front_and_the_budget_stays():
    panel = BudgetLab(batch=256, settings={"depth": 5, "width": 64})
    panel.budget_bytes = budget = (panel.front[0][0] + panel.front[-1][0]) // 2
    before, plan = panel.front, panel.plan
    panel.controls["depth"].value = 7
    assert panel.front != before and panel.plan != plan
    assert panel.budget_bytes == budget
    assert panel.history[-1].peak_bytes <= budget
    assert panel.slider.max == len(panel.front) - 1
    panel.controls["batch"].value = 2**16
    assert "no plan fits" in panel.budget_finding
    panel.controls["batch"].value = 256
    assert "the cheapest plan that fits" in panel.budget_finding


def test_other_settings_leave_boxes_that_were_flipped_by_hand():
    panel = BudgetLab(batch=256, settings={"depth": 5, "width": 64})
    panel.boxes["layer2"].value = True
    panel.controls["depth"].value = 4
    assert panel.plan == Plan.alone(["layer2"])
    assert "by hand" in panel.budget_finding


def test_a_wrong_setting_is_said_by_the_lab_and_the_front_stays():
    panel = BudgetLab(batch=256, settings={"depth": 3, "width": 64})
    before = panel.front
    panel.controls["depth"].value = 0
    assert "depth must be" in panel.readout.value
    panel.slider.value = 0
    assert panel.front is before
    assert panel.plan == before[0][2]


def test_a_plan_that_takes_long_is_asked_about():
    panel = BudgetLab(batch=4, settings={"depth": 3, "width": 2})
    panel.controls["depth"].value = 18
    assert "56 modules, and an answer then takes some 2 s" in panel.readout.value
    assert panel.settings["depth"] == panel.controls["depth"].value == 3
    panel.controls["depth"].value = 18
    assert panel.settings["depth"] == 18 and panel.finding in panel.readout.value


def test_a_model_without_layers_is_said_and_nothing_raises():
    panel = BudgetLab(nn.Linear(4, 4), torch.ones(2, 4))
    assert "no layers to tick" in panel.readout.value
    panel.field.value = 27.0
    panel.least.click()
    assert panel.front == []
    assert "no layers to tick" in panel.readout.value


def test_a_model_that_cannot_be_planned_is_said_and_its_boxes_still_work(monkeypatch):
    def refuse(model, *_, **__):
        raise ValueError(f"{type(model).__name__} cannot be planned")

    monkeypatch.setattr("helpers.controls.budget.Planner", refuse)
    panel = BudgetLab(DocsMLP, 32)
    assert "DocsMLP" in panel.verdict.value
    assert panel.slider.disabled and panel.field.disabled and panel.least.disabled
    panel.budget_bytes = 10**9
    panel.boxes["layer2"].value = True
    assert panel.finding.startswith("layer 2 alone")
    assert "DocsMLP" in panel.verdict.value


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_front_is_that_of_the_lab_s_device_and_loss(device):
    def mean(output: torch.Tensor) -> torch.Tensor:
        return (output**2).mean()

    settings = {"depth": 3, "width": 64, "dropout": 0.1}
    panel = BudgetLab(uniform_mlp, 256, settings, device=device, loss=mean)
    x = torch.empty(256, 64, device="meta")
    for peak_bytes, _, plan in panel.front:
        report = predict(
            lambda: uniform_mlp(**settings), x, plan, loss=mean, device=device
        )
        assert report.peak_bytes == peak_bytes
    assert len(panel.front) > 2


def test_without_widgets_there_is_a_picture_and_a_sentence():
    panel = small_panel()
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == panel.budget_finding
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == (
        panel.model_id
    )
    assert is_a_full_picture(base64.b64decode(bundle["image/png"]))


def test_a_drag_from_other_threads_is_answered_once_where_it_ends():
    async def drag() -> tuple[BudgetLab, list]:
        panel, drawn = BudgetLab(chain, batch=ROWS), []
        panel.picture.observe(lambda _: drawn.append(panel.plan), "value")
        for place in (3, 2, 1, 0, 1):
            front_end_click(panel.slider, value=place)
        assert not drawn  # the cell is still running
        await asyncio.sleep(0)
        return panel, drawn

    panel, drawn = asyncio.run(drag())
    assert drawn == [panel.front[1][2]]
    assert panel.slider.value == 1
    assert every_report()[panel.plan].peak_bytes <= panel.budget_bytes


def test_a_move_in_the_middle_of_an_answer_is_not_taken_back():
    async def move() -> BudgetLab:
        panel = BudgetLab(chain, batch=ROWS)
        moves = iter([1])

        def once(_) -> None:
            for place in moves:
                front_end_click(panel.slider, value=place)

        panel.picture.observe(once, "value")
        front_end_click(panel.field, value=24.5)
        await asyncio.sleep(0.2)
        return panel

    panel = asyncio.run(move())
    assert panel.slider.value == 1
    assert panel.plan == panel.front[1][2]


def test_slider_and_field_in_one_burst_the_typed_budget_counts():
    async def both() -> BudgetLab:
        panel = BudgetLab(chain, batch=ROWS)
        front_end_click(panel.slider, value=0)
        front_end_click(panel.field, value=24.5)
        await asyncio.sleep(0.2)
        return panel

    panel = asyncio.run(both())
    assert panel.budget_bytes == round(24.5 * MIB)
    report = every_report()[panel.plan]
    assert report.recompute_flops == cost_of(panel.budget_bytes)


def test_the_slider_takes_the_cheapest_plan_for_its_budget_above_a_gib():
    panel = BudgetLab(batch=20_000, settings={"depth": 8, "width": 1024})
    chain = profile(panel.state.model, panel.state.batch)
    assert panel.front[-1][0] > 2**30
    for place in range(len(panel.front)):
        panel.slider.value = place
        assert panel.plan == best_plan(chain, panel.budget_bytes)


def test_a_model_that_is_no_chain_is_planned_by_its_tree():
    pictures = torch.randn(4, 3, 32, 32)
    panel = BudgetLab(UNet, pictures)
    assert len(panel.front) > 1 and not panel.slider.disabled
    least, most = panel.front[0][0], panel.front[-1][0]
    panel.budget_bytes = (least + most) // 2
    report = predict(UNet, pictures, panel.plan)
    assert panel.plan.segments and report.peak_bytes <= panel.budget_bytes
    assert "the cheapest plan that fits peaks at" in panel.budget_finding
    panel.budget_bytes = least - 1
    assert "no plan fits; the least that works is" in panel.budget_finding
    with pytest.raises(InfeasibleBudget) as nothing_fits:
        plan_for(UNet, pictures, least - 1, tensors=True)
    assert nothing_fits.value.minimum_bytes == least


def test_only_modules_that_have_a_box_are_planned():
    pictures = torch.randn(4, 3, 32, 32)
    panel = BudgetLab(UNet, pictures, tree=False)
    ticked = {name for *_, plan in panel.front for name in plan.names}
    assert ticked and ticked <= {*panel.boxes}
    assert panel.front[0][0] > BudgetLab(UNet, pictures).front[0][0]


def test_above_a_gibibyte_everything_says_two_decimals():
    """A tenth of a GiB would hide what a box does."""
    panel = BudgetLab(batch=65_536, settings={"depth": 8, "width": 1024})
    panel.lab.step.memory.value = 3.5
    panel.least.click()
    panel.lab.against = panel.plan
    panel.boxes["layer3"].value = not panel.boxes["layer3"].value
    texts = [panel.readout.value, panel.verdict.value, panel.least.description]
    texts += [row.kept.value for row in panel.rows.children]
    texts += [str(panel.picture.shown), str(panel.picture.before)]
    texts += [panel._repr_mimebundle_()["text/plain"]]
    panel.controls["batch"].value = 10**9
    texts += [panel.readout.value]
    panel.field.value = 1.0
    texts += [panel.verdict.value]
    found = [re.findall(r"[\d,]+(?:\.\d*)? GiB", text) for text in texts]
    assert all(found[0]) and found[1] and found[2] and found[-1]
    odd = [
        one for some in found for one in some if not re.fullmatch(r".+\.\d\d GiB", one)
    ]
    assert sum(map(len, found)) > 10 and not odd


def test_planning_that_takes_longer_says_so():
    seen, panel = [], BudgetLab(uniform_mlp, 64, {"depth": 2, "width": 16})
    panel.verdict.observe(lambda change: seen.append(change.new), "value")
    panel.controls["depth"].value = 12
    assert "planning, for some 2 s …" in seen[0]
    assert panel.budget_finding in seen[-1] != ""
    seen.clear()
    panel.controls["depth"].value = 2
    assert not any("planning" in text for text in seen)


@pytest.mark.parametrize("budget", [None, "8 apples", True, math.nan, math.inf])
def test_a_budget_that_is_none_leaves_the_last_one(budget):
    panel = BudgetLab(lambda: MLP([64] * 5, "gelu"), 256)
    panel.budget_bytes = "600 KiB"
    assert panel.budget_bytes == 600 * 1024 and panel.plan.segments
    panel.budget_bytes = budget
    assert "memory is a whole number of bytes above 0" in panel.readout.value
    panel.field.value = math.inf
    assert panel.budget_bytes == 600 * 1024 and panel.field.value == 600
    panel.controls["batch"].value = 128
    assert panel.front[-1][0] == panel.history[0].peak_bytes

"""The budget's panel in JupyterLab: slider, field and boxes, by mouse and keys."""

import functools
import re

import pytest
import torch
from playwright.sync_api import Locator, Page, expect

from helpers.checkpointing import Plan
from helpers.controls._findings import finding
from helpers.measure import predict
from helpers.models import uniform_mlp
from helpers.planner import best_plan, pareto, profile
from helpers.units import format_bytes
from tests.browser.page import (
    Panel,
    open_notebook,
    run_all,
)

pytestmark = pytest.mark.browser

MIB = 2**20
SETTINGS = {"depth": 8, "width": 1024, "activation": "gelu"}
CELLS = (
    "from helpers.controls.budget import BudgetLab",
    f"panel = BudgetLab(batch=8192, settings={SETTINGS}); panel",
)


@pytest.fixture(scope="module")
def page(browser, url) -> Page:
    page = open_notebook(browser, url, "cells.ipynb")
    run_all(page)
    return page


@pytest.fixture
def panel(page) -> Panel:
    """The panel without checkpointing, and its slider at the right end."""
    panel = Panel(page)
    change(panel, "depth", 8)
    handle(panel).focus()
    page.keyboard.press("End")
    panel.button("none").click()
    assert_follows(panel, len(front()) - 1)
    return panel


def handle(panel: Panel) -> Locator:
    return panel.root.get_by_role("slider")


def field(panel: Panel) -> Locator:
    """Find the field of any budget: the one beside the unit."""
    return panel.root.locator("input[type=number]").first


def verdict(panel: Panel) -> Locator:
    return panel.root.locator(".budget-lab-verdict [role=status]")


def change(panel: Panel, name: str, value: object) -> None:
    panel.setting(name).fill(str(value))
    panel.setting(name).press("Enter")


@functools.cache
def chain(depth: int = 8):
    x = torch.empty(8192, 1024, device="meta")
    return profile(uniform_mlp(depth, 1024, "gelu"), x)


@functools.cache
def front(depth: int = 8) -> list:
    return pareto(chain(depth))


@functools.cache
def says(plan: Plan, depth: int = 8) -> str:
    x, model = torch.empty(8192, 1024, device="meta"), uniform_mlp(depth, 1024, "gelu")
    return finding(predict(model, x), predict(model, x, plan))


def assert_shows(panel: Panel, plan: Plan, depth: int = 8) -> None:
    """Hold picture, sentence and boxes against the plan."""
    panel.wait_for(says(plan, depth))
    for _ in range(40):  # each widget takes its own message when it comes to it
        if panel.plan() != plan:
            panel.page.wait_for_timeout(50)
    assert panel.plan() == plan


def assert_follows(panel: Panel, place: int, depth: int = 8) -> None:
    """Hold everything against a place of the front."""
    peak_bytes, _, plan = front(depth)[place]
    assert_shows(panel, plan, depth)
    expect(verdict(panel)).to_contain_text(f"peaks at {format_bytes(peak_bytes)}")
    expect(handle(panel)).to_have_attribute("aria-valuenow", re.compile(rf"^{place}\b"))
    typed = float(field(panel).input_value()) * MIB
    assert 0 <= typed - peak_bytes <= MIB / 10 + 1


def test_each_key_is_one_plan_of_the_front(panel):
    page, cells = panel.page, panel.page.locator(".jp-Cell").count()
    handle(panel).focus()
    for place in reversed(range(len(front()) - 1)):
        page.keyboard.press("ArrowLeft")
        assert_follows(panel, place)
    page.keyboard.press("ArrowRight")
    assert_follows(panel, 1)
    page.keyboard.press("Home")
    assert_follows(panel, 0)
    assert page.locator(".jp-Cell").count() == cells
    page.keyboard.press("Tab")
    expect(field(panel)).to_be_focused()
    page.keyboard.press("Tab")
    expect(panel.root.get_by_role("button", name="least")).to_be_focused()


def test_a_drag_ends_at_the_plan_where_the_mouse_lets_go(panel):
    mouse, knob = panel.page.mouse, handle(panel).bounding_box()
    track = panel.root.locator(".noUi-base").bounding_box()
    y, step = knob["y"] + knob["height"] / 2, track["width"] / (len(front()) - 1)
    panel.watch()
    mouse.move(knob["x"] + knob["width"] / 2, y)
    mouse.down()
    for place in (5, 3, 0, 1, 4, 2):
        mouse.move(track["x"] + place * step, y, steps=4)
    mouse.up()
    assert_follows(panel, 2)
    panel.page.wait_for_timeout(500)  # an older answer would come now
    assert_follows(panel, 2)
    seen = panel.watched()
    assert not seen["faults"]
    assert set(seen["sentences"]) <= {says(plan) for _, _, plan in front()}


def test_a_budget_is_typed_and_one_too_small_is_answered_with_the_least(panel):
    field(panel).fill("400")
    field(panel).press("Enter")
    best = best_plan(chain(), 400 * MIB)
    assert_shows(panel, best)
    expect(verdict(panel)).to_contain_text("budget 400.0 MiB: the cheapest plan")
    field(panel).fill("100")
    field(panel).press("Enter")
    least = format_bytes(front()[0][0])
    words = f"budget 100.0 MiB: no plan fits; the least that works is {least}"
    expect(verdict(panel)).to_have_text(words)
    assert_shows(panel, best)
    panel.root.get_by_role("button", name=f"least: {least}").click()
    assert_follows(panel, 0)


def test_boxes_flipped_by_hand_are_judged_and_the_slider_stays(panel):
    handle(panel).focus()
    panel.page.keyboard.press("Home")
    assert_follows(panel, 0)
    typed = field(panel).input_value()
    plan = Plan(front()[0][2].segments[1:])
    for name in front()[0][2].segments[0]:
        panel.box(name).click()
    assert_shows(panel, plan)
    expect(verdict(panel)).to_contain_text("by hand, peak")
    expect(verdict(panel)).to_contain_text("too much")
    expect(handle(panel)).to_have_attribute("aria-valuenow", re.compile(r"^0\b"))
    assert field(panel).input_value() == typed
    handle(panel).focus()
    panel.page.keyboard.press("ArrowRight")
    assert_follows(panel, 1)


def test_another_depth_has_another_front_and_the_budget_stays(panel):
    handle(panel).focus()
    panel.page.keyboard.press("Home")
    assert_follows(panel, 0)
    budget_bytes = round(float(field(panel).input_value()) * MIB)
    change(panel, "depth", 5)
    assert_shows(panel, best_plan(chain(5), budget_bytes), depth=5)
    handle(panel).focus()
    for key, place in (("Home", 0), ("ArrowRight", 1), ("End", len(front(5)) - 1)):
        panel.page.keyboard.press(key)
        assert_follows(panel, place, depth=5)


def test_the_notebook_runs_and_its_panel_answers(browser, url):
    page = open_notebook(browser, url, "notebooks/09_choose_for_a_budget.ipynb")
    run_all(page)
    expect(page.locator('[data-mime-type*="error"]')).to_have_count(0)
    panel = Panel(page)
    handle(panel).focus()
    for key, place in (("End", len(front()) - 1), ("Home", 0)):
        page.keyboard.press(key)
        assert_follows(panel, place)
    page.close()

"""The lab in JupyterLab, worked by mouse and keys: each answer is what predict says."""

import functools
import itertools
import random
import re

import pytest
import torch
from playwright.sync_api import Page, expect

from helpers.checkpointing import Plan
from helpers.controls._findings import finding
from helpers.measure import StepReport, predict
from helpers.models import unequal_blocks, uniform_mlp
from helpers.plots import COLORS
from helpers.timeline import CATEGORIES
from helpers.units import format_bytes
from tests.browser.page import (
    PATIENCE_MS,
    Panel,
    open_notebook,
    run_all,
)

pytestmark = pytest.mark.browser

LARGE = {"depth": 8, "width": 1024, "activation": "gelu", "dropout": 0.0, "batch": 8192}
SMALL = LARGE | {"depth": 4, "width": 256, "batch": 1024}  # measured on any CPU
BLOCKS = {"rows": 512, "width": 256}
NAP = 4  # a cell that sleeps for some seconds
CELLS = (
    "from helpers.controls import LayerLab\nfrom helpers.models import unequal_blocks",
    *(
        f"LayerLab(batch={(sizes := dict(lab)).pop('batch')}, settings={sizes})"
        for lab in (LARGE, SMALL)
    ),
    f"LayerLab(unequal_blocks, {BLOCKS['rows']}, {{'width': {BLOCKS['width']}}})",
    "import time; time.sleep(2)",
)


@pytest.fixture(scope="module")
def labs(browser, url) -> Page:
    page = open_notebook(browser, url, "cells.ipynb")
    run_all(page)
    return page


@pytest.fixture
def large(labs) -> Panel:
    """The large lab, with nothing ticked."""
    return cleared(Panel(labs, 0), LARGE)


@pytest.fixture
def small(labs) -> Panel:
    """The small lab, with nothing ticked."""
    return cleared(Panel(labs, 1), SMALL)


expect.set_options(timeout=PATIENCE_MS)


def cleared(panel: Panel, settings: dict) -> Panel:
    for name, value in settings.items():
        if name != "activation":
            change(panel, name, value)
    panel.button("none").click()
    panel.wait_for(says(Plan(), settings))
    return panel


def change(panel: Panel, name: str, value: object) -> None:
    panel.setting(name).fill(str(value))
    panel.setting(name).press("Enter")


@functools.cache
def _report(plan: Plan, settings: tuple) -> StepReport:
    model_settings = dict(settings)
    rows = model_settings.pop("batch")
    x = torch.empty(rows, model_settings["width"], device="meta")
    return predict(lambda: uniform_mlp(**model_settings), x, plan)


def reports(plan: Plan, settings: dict) -> list[StepReport]:
    """Predict the step without checkpointing and with this plan."""
    return [_report(each, tuple(settings.items())) for each in (Plan(), plan)]


def says(plan: Plan, settings: dict = LARGE) -> str:
    return finding(*reports(plan, settings))


def assert_answered(panel: Panel, plan: Plan, settings: dict = LARGE) -> None:
    """Hold boxes, sentence and picture against what predict says of the plan."""
    panel.wait_for(says(plan, settings))
    assert panel.plan() == plan
    assert panel.sentence() == says(plan, settings)
    for title, report in zip(TITLES, reports(plan, settings), strict=True):
        assert_draws(panel, title, report)


TITLES = "no checkpointing", "this plan"


def assert_draws(panel: Panel, title: str, report: StepReport) -> None:
    """Hold a timeline's peak, and the colours of its areas, against a report."""
    line = report.timeline
    said = f"peak {format_bytes(report.peak_bytes)}"
    expect(panel.timeline(title).get_by_text(said, exact=True)).to_have_count(1)
    rows, start = line.levels(), line.first_allocation
    length, points, hues = len(line.events) + 1 - start, [], []
    for place in range(0, length, max(1, length // 12)):
        low = 0
        for category in CATEGORIES:
            level = rows[category][start + place]
            if level > 0.02 * report.peak_bytes:  # a line's width
                points.append((place, low + level / 2))
                hues.append(COLORS[category])
            low += level
        points.append((place, 1.02 * low))
        hues.append(None)
    peak = line.peak_place + 1 - start, report.peak_bytes
    assert panel.colors_at(title, peak, points) == hues


def test_boxes_and_joins_answer_the_mouse(large):
    large.box("layer3").click()
    assert_answered(large, Plan.alone(["layer3"]))
    expect(large.join("layer3")).to_be_disabled()
    large.box("layer2").click()
    assert_answered(large, Plan.alone(["layer2", "layer3"]))
    large.join("layer3").click()
    assert_answered(large, Plan((("layer2", "layer3"),)))
    large.box("layer3").click()
    assert_answered(large, Plan.alone(["layer2"]))


def test_boxes_and_joins_answer_the_keyboard(large):
    page, cells = large.page, large.page.locator(".jp-Cell").count()
    large.setting("of").focus()
    page.keyboard.press("Tab")
    expect(large.box("layer1")).to_be_focused()
    page.keyboard.press("Space")
    assert_answered(large, Plan.alone(["layer1"]))
    page.keyboard.press("Tab")  # the join between is disabled
    expect(large.box("layer2")).to_be_focused()
    page.keyboard.press("Space")
    assert_answered(large, Plan.alone(["layer1", "layer2"]))
    page.keyboard.press("Shift+Tab")
    expect(large.join("layer2")).to_be_focused()
    page.keyboard.press("Space")
    assert_answered(large, Plan((("layer1", "layer2"),)))
    expect(large.join("layer2")).to_be_focused()
    assert page.locator(".jp-Cell").count() == cells


def test_shortcuts_set_boxes_and_joins(large):
    layers = [f"layer{i}" for i in range(1, 10)]
    large.button("each alone").click()
    assert_answered(large, Plan.alone(layers))
    large.button("all joined").click()
    assert_answered(large, Plan((tuple(layers),)))
    change(large, "of", 4)
    large.button("pieces").click()
    pieces = tuple(layers[:4]), tuple(layers[4:8]), tuple(layers[8:])
    assert_answered(large, Plan(pieces))
    large.button("none").click()
    assert_answered(large, Plan())


def test_another_depth_makes_other_rows_and_keeps_the_ticks(large):
    large.box("layer2").click()
    change(large, "depth", 4)
    assert_answered(large, Plan.alone(["layer2"]), LARGE | {"depth": 4})
    expect(large.rows()).to_have_count(5)
    change(large, "depth", 12)
    large.box("layer11").click()
    plan = Plan.alone(["layer2", "layer11"])
    assert_answered(large, plan, LARGE | {"depth": 12})


def test_a_click_that_ends_typing_is_not_lost(large):
    large.setting("depth").fill("6")
    large.box("layer3").click()  # leaves the field, which changes the depth
    assert_answered(large, Plan.alone(["layer3"]), LARGE | {"depth": 6})


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("depth", 0, "depth must be a whole number from 1 up, not 0"),
        ("batch", -5, "batch must be a whole number from 1 up, not -5"),
        ("dropout", 1.5, "dropout must be at least 0 and below 1, got 1.5"),
    ],
)
def test_a_wrong_size_is_said_and_the_next_flip_works(large, name, value, sentence):
    change(large, name, value)
    expect(large.status).to_have_text(sentence)
    expect(large.setting(name)).to_have_value(str(LARGE[name]).removesuffix(".0"))
    large.box("layer2").click()
    assert_answered(large, Plan.alone(["layer2"]))


def test_a_notebook_runs_and_its_lab_answers(browser, url):
    page = open_notebook(browser, url, "notebooks/03_flip_the_layers.ipynb")
    run_all(page)
    expect(page.locator('[data-mime-type*="error"]')).to_have_count(0)
    # The page's other cells leave this lab as its prose describes it.
    panel = Panel(page)
    # JupyterLab lays out what is in view alone, and the picture is drawn for its size.
    page.locator(".layer-lab").first.scroll_into_view_if_needed()
    assert_answered(panel, Plan((("layer2", "layer3", "layer4"),)))
    panel.button("none").click()
    panel.wait_for(says(Plan()))
    panel.box("layer2").click()
    panel.box("layer3").click()
    assert_answered(panel, Plan.alone(["layer2", "layer3"]))
    panel.join("layer3").click()
    assert_answered(panel, Plan((("layer2", "layer3"),)))
    page.close()


def test_the_lab_of_unequal_blocks_answers(labs):
    panel, blocks = Panel(labs, 2), functools.partial(unequal_blocks, BLOCKS["width"])
    x = torch.empty(BLOCKS["rows"], BLOCKS["width"], device="meta")
    plain, ticked = (
        predict(blocks, x, plan) for plan in (Plan(), Plan.alone(["wide", "narrow"]))
    )
    panel.button("none").click()
    panel.wait_for(finding(plain, plain))
    for name in ticked.plan.names:
        panel.box(name).click()
    panel.wait_for(finding(plain, ticked))


def test_no_click_of_a_burst_is_lost_stale_or_flickers(large):
    chance, ticked = random.Random(0), set()
    large.watch()
    for _ in range(50):
        name = f"layer{chance.randint(1, 8)}"
        large.box(name).click()
        ticked ^= {name}
    last = Plan.alone(sorted(ticked))
    assert_answered(large, last)
    large.page.wait_for_timeout(500)  # an older answer would come now
    assert_answered(large, last)
    seen = large.watched()
    assert seen["frames"] > 20
    assert not seen["faults"]
    assert set(seen["sentences"]) <= right_answers()


def right_answers() -> set[str]:
    """Say what is right of each plan that ticks some of the first eight layers.

    A box in between may be ahead of another: ipywidgets sends one change of a box at
    a time, and holds back the next until the kernel has taken the one before.
    """
    names = [f"layer{i}" for i in range(1, 9)]
    chosen = itertools.product((True, False), repeat=len(names))
    return {says(Plan.alone(itertools.compress(names, some))) for some in chosen}


def run_nap(page: Page) -> None:
    """Start the cell that sleeps."""
    cell = page.locator(".jp-CodeCell").nth(NAP)
    cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    expect(prompt(page)).to_have_text("[*]:")


def prompt(page: Page):
    return page.locator(".jp-CodeCell").nth(NAP).locator(".jp-InputPrompt")


def test_flips_while_a_cell_runs_are_answered_after_it(large):
    run_nap(large.page)
    for name in ("layer2", "layer5", "layer6", "layer5"):
        large.box(name).click()
    expect(prompt(large.page)).to_have_text("[*]:")  # it still runs
    assert_answered(large, Plan.alone(["layer2", "layer6"]))
    expect(prompt(large.page)).to_have_text(re.compile(r"\[\d+\]:"))


def test_settings_and_flips_while_a_cell_runs_make_one_answer(large):
    run_nap(large.page)
    large.box("layer2").click()
    change(large, "depth", 6)
    large.box("layer4").click()
    expect(prompt(large.page)).to_have_text("[*]:")
    plan = Plan.alone(["layer2", "layer4"])
    assert_answered(large, plan, LARGE | {"depth": 6})
    large.box("layer4").click()
    assert_answered(large, Plan.alone(["layer2"]), LARGE | {"depth": 6})


def test_the_measurement_lands_on_the_same_picture(small):
    for plan in (Plan.alone(["layer2"]), Plan.alone(["layer2", "layer3"])):
        small.watch()
        small.box(plan.names[-1]).click()
        assert_answered(small, plan, SMALL)
        expect(small.status).to_contain_text("measured on")
        assert_answered(small, plan, SMALL)
        seen = small.watched()
        assert not seen["faults"]
        assert len(seen["pictures"]) <= 4


def test_a_flip_in_the_middle_of_a_measurement_is_answered(small):
    small.box("layer1").click()
    small.page.wait_for_function(
        "status => /measuring|measured/.test(status.textContent)",
        arg=small.readout.element_handle(),
    )
    small.box("layer4").click()
    assert_answered(small, Plan.alone(["layer1", "layer4"]), SMALL)
    expect(small.status).to_contain_text("measured on")
    assert_answered(small, Plan.alone(["layer1", "layer4"]), SMALL)

"""A measurement in JupyterLab: how far it is, and how it is stopped."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.page import PATIENCE_MS, Panel, open_notebook

pytestmark = pytest.mark.browser

SETTINGS = {"depth": 4, "width": 512, "activation": "gelu"}  # steps of some 0.2 s
CELLS = (
    "from helpers.controls import BudgetLab, LayerLab",
    f"lab = LayerLab(batch=4096, settings={SETTINGS}); lab",
    f"BudgetLab(batch=4096, settings={SETTINGS})",
    "lab.measure()",
)


@pytest.fixture(scope="module")
def page(browser, url) -> Page:
    page = open_notebook(browser, url, "cells.ipynb")
    run_cells(page, 3)
    expect(Panel(page, 1).image).to_be_visible(timeout=PATIENCE_MS)
    return page


def run_cells(page: Page, count: int) -> None:
    """Run the first cells, which the notebook's widgets are in."""
    page.evaluate(
        "count => { jupyterapp.shell.currentWidget.content.activeCellIndex = count }",
        count,
    )
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-above')")


def interrupt_by_menu(panel: Panel) -> None:
    panel.page.get_by_role("menuitem", name="Kernel", exact=True).click()
    panel.page.get_by_role("menuitem", name="Interrupt Kernel").click()


def interrupt_by_the_kernels_api(panel: Panel) -> None:
    panel.page.evaluate(
        "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()"
    )


def press_stop(panel: Panel) -> None:
    panel.button("Stop").click()


def begin(panel: Panel):
    """Measure, and wait until some steps have run."""
    panel.button("Measure").click()
    progress = panel.root.locator(".layer-lab-progress")
    expect(progress).to_contain_text(re.compile(r"step [3-9] of 25"))
    return progress


@pytest.mark.parametrize("number", [0, 1], ids=["LayerLab", "BudgetLab"])
@pytest.mark.parametrize(
    "stop", [interrupt_by_menu, interrupt_by_the_kernels_api, press_stop]
)
def test_it_says_how_far_it_is_and_is_stopped(page, number, stop):
    panel = Panel(page, number)
    panel.button("none").click()
    panel.box("layer2").click()
    expect(panel.status).to_contain_text("layer 2 alone")
    before = panel.sentence(), panel.picture.inner_html(), panel.plan()
    panel.watch()
    progress = begin(panel)
    bar = panel.root.get_by_role("progressbar", name="measuring")
    assert 2 <= int(bar.get_attribute("value")) < int(bar.get_attribute("max")) == 25
    stop(panel)
    expect(panel.status).to_contain_text("the measurement was stopped")
    expect(panel.button("Measure")).to_be_visible()
    expect(progress).to_have_text("")
    assert (panel.sentence(), panel.picture.inner_html(), panel.plan()) == before
    seen = panel.watched()
    assert not seen["faults"], seen["faults"]
    assert len(seen["pictures"]) == len(seen["sentences"]) == 1


def test_a_measurement_from_a_cell_shows_its_steps_and_is_interrupted(page):
    panel = Panel(page)
    panel.button("none").click()
    panel.box("layer3").click()
    expect(panel.status).to_contain_text("layer 3 alone")
    page.evaluate("() => {jupyterapp.shell.currentWidget.content.activeCellIndex = 3}")
    page.evaluate("() => void jupyterapp.commands.execute('notebook:run-cell')")
    progress = panel.root.locator(".layer-lab-progress")
    expect(progress).to_contain_text(re.compile(r"step [3-9] of 25"))
    interrupt_by_the_kernels_api(panel)
    expect(page.locator(".jp-OutputArea")).to_contain_text(["KeyboardInterrupt"])
    expect(panel.status).to_contain_text("the measurement was stopped")
    expect(progress).to_have_text("")
    panel.box("layer2").click()
    expect(panel.status).to_contain_text("layers 2, 3 each alone")

"""The first page's lab works as well in Notebook 7 and in Voilà."""

import re

import nbformat
import pytest
import torch
from playwright.sync_api import Page, expect

from helpers.checkpointing import Plan
from helpers.controls._findings import finding
from helpers.measure import StepReport, predict
from helpers.models import uniform_mlp
from helpers.units import format_bytes
from tests.browser.page import PATIENCE_MS, ROOT, Panel

pytestmark = pytest.mark.browser

BOOK = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
CODE = [cell.source for cell in BOOK.cells if cell.cell_type == "code"]
IMPORTS, SETTINGS, *_ = CODE
CELLS = IMPORTS, SETTINGS, *(cell for cell in CODE if "lab." in cell)


def in_notebook_7(page: Page, url: str) -> None:
    page.goto(f"{url}/notebooks/cells.ipynb")
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    begun = page.locator(".jp-InputPrompt").filter(has_text=re.compile(r"\[[\d*]+\]"))
    while not begun.count():  # the menu is there before the kernel listens
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(2000)


def in_voila(page: Page, url: str) -> None:
    page.goto(f"{url}/voila/render/cells.ipynb")


def report_of(*ticked: str) -> StepReport:
    x = torch.empty(8192, 1024, device="meta")
    return predict(uniform_mlp, x, Plan.alone(ticked))


@pytest.mark.parametrize("opened", [in_notebook_7, in_voila])
def test_a_box_is_flipped_and_the_picture_follows(opened, browser, url):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    opened(page, url)
    panel, none, four = Panel(page), report_of(), report_of("layer4")
    both = report_of("layer2", "layer4")
    panel.wait_for(finding(none, four))  # as the page leaves it
    for box, report in (("layer2", both), ("layer2", four), ("layer4", none)):
        panel.box(box).click()
        panel.wait_for(finding(none, report))
        peak = f"peak {format_bytes(report.peak_bytes)}"
        drawn = panel.timeline("this plan").get_by_text(peak, exact=True)
        expect(drawn).to_have_count(1)
        assert panel.plan() == report.plan

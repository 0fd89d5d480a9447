"""What readers do to a lab in JupyterLab: odd numbers, copies, a closed page."""

import io

import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect

from helpers.checkpointing import Plan
from helpers.controls._findings import finding
from helpers.measure import predict
from helpers.models import uniform_mlp
from tests.browser.page import PATIENCE_MS, Panel, open_notebook, run_all

pytestmark = pytest.mark.browser
expect.set_options(timeout=PATIENCE_MS)

GOOD = {"depth": 4, "width": 512, "batch": 50_000, "dropout": 0}
SIZES = {"depth": 4, "width": 512, "dropout": 0.0}
CELLS = (
    "from helpers.controls import BudgetLab, LayerLab",
    f"lab = LayerLab(batch={GOOD['batch']}, settings={SIZES}); lab",
    f"BudgetLab(batch={GOOD['batch']}, settings={SIZES})",
)
WHOLE = "{} must be a whole number from 1 up, not "
SHARE = "dropout must be at least 0 and below 1, got "


@pytest.fixture(scope="module")
def page(browser, url) -> Page:
    page = open_notebook(browser, url, "cells.ipynb")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    run_all(page)
    expect(Panel(page, 1).image).to_be_visible()
    return page


@pytest.fixture
def panel(page) -> Panel:
    panel = Panel(page)
    panel.button("none").click()
    panel.wait_for(says(Plan()))
    return panel


def says(plan: Plan, rows: int = GOOD["batch"]) -> str:
    x = torch.empty(rows, SIZES["width"], device="meta")
    pair = [predict(lambda: uniform_mlp(**SIZES), x, one) for one in (Plan(), plan)]
    return finding(*pair)


def enter(field, words: str) -> None:
    """Type over what a field says, as a reader does, and press Enter."""
    field.click()
    field.press("Control+A")
    field.press("Backspace")
    field.press_sequentially(words)
    field.press("Enter")


# Odd numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_what_is_no_size_is_refused_in_a_sentence_and_taken_back(panel, name):
    field, most = panel.setting(name), " GiB, and a lab takes 1,024.00 GiB at most"
    many, whole = "makes some 3,000,0", WHOLE.format(name)
    for words, said in {
        "abc": None,  # the browser takes no letters
        "": None,
        "nan": None,
        "-": None,
        "0": whole + "0",
        "-1": whole + "-1",
        "3.7": whole + "3.7",
        "1e300": whole + "1e+300",
        "1e9": {"depth": f"1,000,000,000 {many}", "width": most}.get(name),
        "1000000": {"depth": f"1,000,000 {many}", "width": most}.get(name),
        "1e999": None,
    }.items():
        if name == "batch" and words in ("1e9", "1000000"):
            continue  # which is a batch, and answered
        if name == "dropout" and said and words != "0":
            said = SHARE
        if name == "dropout" and words == "0":
            said = None
        enter(field, words)
        if said:
            expect(panel.status).to_contain_text(said)
        expect(field).to_have_value(str(GOOD[name]))
    panel.box("layer2").click()
    panel.wait_for(says(Plan.alone(["layer2"])))


def test_a_batch_in_powers_of_ten_is_answered(panel):
    field = panel.setting("batch")
    for words, rows in {"1e6": 10**6, "100000000": 10**8}.items():
        enter(field, words)
        panel.wait_for(says(Plan(), rows))
        peak = panel.picture.locator(".after .strong").text_content()
        assert peak == says(Plan(), rows).split(": ")[1] and peak.endswith(" GiB")
        assert float(field.input_value()) == rows
    enter(field, "1e9")
    expect(panel.status).to_contain_text(" GiB, and a lab takes 1,024.00 GiB at most")
    enter(field, str(GOOD["batch"]))
    panel.wait_for(says(Plan()))


def test_the_pieces_and_the_cards_memory_stay_what_they_can_be(panel):
    pieces, unfold = panel.setting("of"), panel.button("Step and card")
    for words, shown in {"0": "1", "-1": "1", "1000000000": "999", "2": "2"}.items():
        enter(pieces, words)
        expect(pieces).to_have_value(shown)
    unfold.focus()
    unfold.press("Enter")
    memory, limit = panel.setting("my GPU, GiB"), panel.picture.locator("text.limit")
    for words, shown, said in (
        ("-1", "0", None),
        ("3.5", "3.5", "my GPU, 3.50 GiB: "),
        ("abc", "3.5", "my GPU, 3.50 GiB: "),
        ("1e9", "1000000", "↑ my GPU, 1,000,000.00 GiB:"),
        ("0", "0", None),
    ):
        enter(memory, words)
        expect(memory).to_have_value(shown)
        if said:
            expect(limit.first).to_contain_text(said)
            expect(panel.status).to_contain_text(said.removeprefix("↑ "))
        else:
            expect(limit).to_have_count(0)
    unfold.press("Enter")
    expect(memory).to_be_hidden()


def test_a_budget_that_is_none_is_answered_with_the_least(page):
    panel = Panel(page, 1)
    field = panel.root.locator("input[type=number]").first
    verdict = panel.root.locator(".budget-lab-verdict [role=status]")
    for words in ("0", "-1"):
        enter(field, words)
        expect(verdict).to_contain_text("no plan fits; the least that works is ")
    for words in ("1e9", "1000000"):
        enter(field, words)
        expect(verdict).to_contain_text("the cheapest plan that fits peaks at ")
    before = verdict.text_content()
    for words in ("abc", "", "nan", "1e999"):
        enter(field, words)
    panel.box("layer2").click()
    expect(verdict).not_to_have_text(before)
    expect(verdict).to_contain_text("by hand, peak ")


# What is taken along -----------------------------------------------------------------


@pytest.fixture
def along(panel) -> Panel:
    """Show a plan of two segments, and the buttons that take it along."""
    for name in ("layer2", "layer3", "layer5"):
        panel.box(name).click()
    panel.join("layer3").click()
    panel.wait_for(says(PLAN))
    if panel.button("Copy code").is_hidden():
        panel.button("Take it along").click()
    return panel


PLAN = Plan((("layer2", "layer3"), ("layer5",)))


def copied(panel: Panel, name: str) -> str:
    """Click on a button, which says so, and read what is in the clipboard then."""
    page, read = panel.page, "() => navigator.clipboard.readText()"
    page.evaluate("() => navigator.clipboard.writeText('nothing')")
    panel.button(name).click()
    expect(panel.button("copied")).to_be_visible()
    expect(panel.button(name)).to_be_visible()  # as it was
    for _ in range(100):
        if (words := page.evaluate(read)) != "nothing":
            return words
        page.wait_for_timeout(50)
    return words


def test_code_and_plan_are_copied(along):
    assert copied(along, "Copy code") == PLAN.code(uniform_mlp(**SIZES))
    assert eval(copied(along, "Copy plan"), {"Plan": Plan}) == PLAN


def test_what_may_not_write_to_the_clipboard_copies_as_well(along):
    along.page.evaluate(
        """() => {
          const {clipboard} = navigator, write = clipboard.writeText.bind(clipboard);
          clipboard.writeText = async words => {
            if (words === "nothing") return write(words);
            throw Error("not allowed");
          };
        }"""
    )
    assert eval(copied(along, "Copy plan"), {"Plan": Plan}) == PLAN
    along.page.evaluate("() => { delete navigator.clipboard.writeText }")


def test_the_picture_is_saved_as_a_file(along):
    with along.page.expect_download() as download:
        along.button("Save picture").click()
    assert download.value.suggested_filename == "layer-lab.png"
    image = Image.open(io.BytesIO(download.value.path().read_bytes()))
    assert image.format == "PNG" and min(image.size) > 700
    assert len(image.convert("RGBA").getcolors(10**6)) > 10


# A kernel's and a page's life --------------------------------------------------------


def test_a_page_that_is_closed_and_opened_again_answers(panel, browser, url):
    panel.box("layer2").click()
    panel.wait_for(says(Plan.alone(["layer2"])))
    panel.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    context = panel.page.context
    again = Panel(open_notebook(browser, url, "cells.ipynb"))
    context.close()
    again.root.scroll_into_view_if_needed()
    again.wait_for(says(Plan.alone(["layer2"])))
    assert again.plan() == Plan.alone(["layer2"])
    again.box("layer3").click()
    again.wait_for(says(Plan.alone(["layer2", "layer3"])))
    restarted(again)


def restarted(panel: Panel) -> None:
    """Restart the kernel: the old panel stays as it is, and a new one answers."""
    said = panel.sentence()
    panel.page.evaluate(
        "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
    )
    panel.box("layer5").click()
    panel.page.wait_for_timeout(300)
    assert panel.sentence() == said
    run_all(panel.page)
    panel.root.scroll_into_view_if_needed()
    panel.wait_for(says(Plan()))
    panel.box("layer5").click()
    panel.wait_for(says(Plan.alone(["layer5"])))
    assert panel.plan() == Plan.alone(["layer5"])

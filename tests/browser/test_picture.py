"""The picture in JupyterLab: what it tells under mouse and keys, and how it looks.

It is looked at as narrow and as large as readers have it, in both themes.
"""

import re

import pytest
import torch
from playwright.sync_api import Page, expect

from helpers.checkpointing import Plan
from helpers.controls._findings import finding
from helpers.measure import predict
from helpers.models import uniform_mlp
from helpers.units import format_bytes
from tests.browser.page import PATIENCE_MS, Panel, open_notebook, run_all

pytestmark = pytest.mark.browser
expect.set_options(timeout=PATIENCE_MS)

SETTINGS = {"depth": 8, "width": 1024, "activation": "gelu"}
ROWS = 13_000  # three-digit MiB in each row
CELLS = (
    "from helpers.controls import BudgetLab, LayerLab\n"
    "from helpers.models.architectures import ResNet\nimport torch",
    f"LayerLab(batch={ROWS}, settings={SETTINGS})",
    f"BudgetLab(batch={ROWS}, settings={SETTINGS})",
    "LayerLab(ResNet((2, 2), 16), torch.empty(8, 3, 32, 32, device='meta'))",
)
NAMES = [f"layer{i}" for i in range(1, 10)]
PAIRS = Plan(tuple(tuple(NAMES[i : i + 2]) for i in range(0, 9, 2)))
# What a window of 1440 pixels shows at 150 % is 960 pixels wide.
WIDTHS = {"1440 px": 1440, "1180 px": 1180, "700 px": 700, "150 %": 960}
THEMES = "JupyterLab Light", "JupyterLab Dark"


@pytest.fixture(scope="module")
def page(browser, url) -> Page:
    page = open_notebook(browser, url, "cells.ipynb")
    page.evaluate("() => jupyterapp.commands.execute('application:toggle-left-area')")
    run_all(page)
    expect(Panel(page, 2).image).to_be_visible()
    compared = Panel(page, 1)
    compared.button("pieces").click()
    compared.wait_for(finding(*reports(PAIRS)))
    compared.button("compare with this").click()
    return page


@pytest.fixture
def panel(page) -> Panel:
    """The first lab at its usual width, with nothing ticked."""
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.mouse.move(0, 0)
    panel = Panel(page)
    panel.button("none").click()
    panel.wait_for(finding(*reports(Plan())))
    return panel


def reports(plan: Plan) -> list:
    x = torch.empty(ROWS, SETTINGS["width"], device="meta")
    return [predict(lambda: uniform_mlp(**SETTINGS), x, one) for one in (Plan(), plan)]


def note(panel: Panel):
    return panel.picture.locator(".note")


# Hovering ----------------------------------------------------------------------------


def test_hovering_tells_what_is_alive_there_and_a_click_pins_it(panel):
    line, report = panel.timeline("this plan"), reports(Plan())[1]
    mark = line.locator("circle").bounding_box()
    mouse = panel.page.mouse
    mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + 60)
    lines = note(panel).inner_text().splitlines()
    assert lines[0] == f"backward of layer9: {format_bytes(report.peak_bytes)} alive"
    largest = report.timeline.at_peak().tensors[0]
    words = f"{format_bytes(largest.bytes)} {largest.category} 13000 × 1024 "
    assert lines[1].startswith(words), lines
    assert lines[2].endswith("in layer1.0"), lines
    mouse.down()
    mouse.up()
    mouse.move(mark["x"] + 100, mark["y"] + 60)
    assert note(panel).inner_text().startswith(lines[0])
    panel.box("layer3").click()  # the next plan is asked at the same place
    expect(note(panel)).to_be_visible()
    panel.wait_for(finding(*reports(Plan.alone(["layer3"]))))
    expect(note(panel)).not_to_contain_text(lines[0])
    line.focus()
    panel.page.keyboard.press("Escape")
    expect(note(panel)).to_be_hidden()


def test_keys_walk_through_the_step(panel):
    page, cells = panel.page, panel.page.locator(".jp-Cell").count()
    panel.timeline("no checkpointing").focus()
    page.keyboard.press("Home")
    expect(note(panel)).to_contain_text("forward of layer1: ")
    first = note(panel).inner_text()
    page.keyboard.press("ArrowRight")
    expect(note(panel)).not_to_have_text(first)
    page.keyboard.press("ArrowLeft")
    assert note(panel).inner_text() == first
    page.keyboard.press("End")
    expect(note(panel)).to_contain_text("backward of layer1: ")
    page.keyboard.press("Tab")
    expect(panel.timeline("this plan")).to_be_focused()
    page.keyboard.press("Tab")
    expect(panel.rings.last).to_be_focused()  # the one that is shown
    assert page.locator(".jp-Cell").count() == cells


def test_a_ring_names_its_plan_and_brings_it_back(panel):
    panel.button("pieces").click()
    said = finding(*reports(PAIRS))
    panel.wait_for(said)
    panel.button("all joined").click()
    expect(panel.status).not_to_contain_text(said)
    ring = panel.picture.get_by_role("button", name=f"bring back {said}", exact=True)
    ring.hover()
    expect(note(panel)).to_contain_text(said)
    ring.click()
    panel.wait_for(said)
    assert panel.plan() == PAIRS
    ring.focus()
    panel.page.keyboard.press("Home")
    expect(note(panel)).to_contain_text("no checkpointing: peak")
    panel.page.keyboard.press("Enter")
    panel.wait_for(finding(*reports(Plan())))
    assert panel.plan() == Plan()


# Comparing ---------------------------------------------------------------------------


@pytest.fixture
def ringed(panel) -> Panel:
    """Show layer 3 alone, after PAIRS."""
    panel.button("pieces").click()
    panel.wait_for(finding(*reports(PAIRS)))
    panel.button("none").click()
    panel.wait_for(finding(*reports(Plan())))
    panel.box("layer3").click()
    panel.wait_for(finding(*reports(Plan.alone(["layer3"]))))
    return panel


def against(plan: Plan, shown: Plan) -> str:
    return finding(reports(plan)[1], reports(shown)[1])


def ring(panel: Panel, plan: Plan, other: Plan = Plan()):
    name = f"bring back {against(other, plan)}"
    return panel.picture.get_by_role("button", name=name, exact=True)


def by_shift(panel: Panel) -> None:
    ring(panel, PAIRS).click(modifiers=["Shift"])


def by_key(panel: Panel) -> None:
    ring(panel, PAIRS).focus()
    expect(note(panel)).to_contain_text("Shift and a click or C compare with it")
    panel.page.keyboard.press("c")


def by_button(panel: Panel) -> None:
    ring(panel, PAIRS).click()
    panel.wait_for(finding(*reports(PAIRS)))
    panel.button("compare with this").focus()
    panel.page.keyboard.press("Enter")
    expect(panel.button("compare with none")).to_be_focused()
    panel.box("layer3").click()  # which parts the pair that it is in
    ring(panel, Plan.alone(["layer3"]), PAIRS).click()


@pytest.mark.parametrize("choose", [by_shift, by_key, by_button])
def test_a_plan_that_was_tried_can_be_the_one_to_compare_with(ringed, choose):
    panel, plan, cells = ringed, Plan.alone(["layer3"]), ".jp-Cell"
    count = panel.page.locator(cells).count()
    expect(panel.button("compare with none")).to_be_hidden()
    choose(panel)
    panel.wait_for(against(PAIRS, plan))
    assert panel.plan() == plan
    title = "other plan: layers 1–2, 3–4, 5–6, 7–8 as segments; 9 alone"
    peak = format_bytes(reports(PAIRS)[1].peak_bytes)
    expect(panel.timeline(title)).to_have_accessible_name(re.compile(f"peak {peak}"))
    expect(panel.picture.locator(".before .strong")).to_have_text(f"peak {peak}")
    for part in ("peaks", "times"):
        expect(panel.picture.locator(f".{part}")).to_contain_text("other")
    panel.box("layer4").click()
    panel.wait_for(against(PAIRS, Plan.alone(["layer3", "layer4"])))
    assert panel.page.locator(cells).count() == count
    panel.button("compare with none").click()
    panel.wait_for(finding(*reports(Plan.alone(["layer3", "layer4"]))))
    expect(panel.timeline("no checkpointing")).to_be_visible()
    expect(panel.button("compare with none")).to_be_hidden()


# How it looks ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=THEMES)
def themed(request, page) -> Page:
    change = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
    page.evaluate(change, request.param)
    is_light = str(request.param == THEMES[0]).lower()
    body = page.locator(f"body[data-jp-theme-light={is_light}]")
    expect(body).to_have_count(1)
    return page


@pytest.fixture(params=WIDTHS.values(), ids=WIDTHS)
def sized(request, themed) -> Page:
    themed.mouse.move(0, 0)
    themed.set_viewport_size({"width": request.param, "height": 1000})
    Panel(themed, 0).button("pieces").click()
    Panel(themed, 1).button("each alone").click()
    expect(Panel(themed, 1).status).to_contain_text(", against layers 1–2")
    themed.wait_for_timeout(500)  # for the layout, and for colours to fade over
    return themed


@pytest.mark.parametrize("number", range(3), ids=["lab", "budget", "tree"])
def test_it_is_good_to_look_at(sized, number):
    lab = sized.locator(".layer-lab").nth(number)
    lab.scroll_into_view_if_needed()
    assert lab.evaluate(FAULTS) == []


def test_the_picture_is_beside_the_controls_or_below(sized):
    panel = Panel(sized)
    controls = panel.root.locator(".layer-lab-controls").bounding_box()
    picture = panel.picture.bounding_box()
    if sized.viewport_size["width"] > 1000:
        assert picture["x"] >= controls["x"] + controls["width"]
        assert controls["width"] < 300
    else:
        assert picture["y"] >= controls["y"] + controls["height"]
        assert controls["height"] < 420  # in two columns
    assert picture["width"] > 500


FAULTS = r"""lab => {
  const faults = [], around = lab.getBoundingClientRect();
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  const rgb = (...layers) => {  // from the ground up
    pen.clearRect(0, 0, 1, 1);
    for (const color of layers) { pen.fillStyle = color; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = color => {
    const [r, g, b] = color.map(c => c / 255)
      .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  const grounds = element => {
    const found = [];
    for (let at = element; at; at = at.parentElement)
      found.unshift(getComputedStyle(at).backgroundColor);
    return found;
  };
  const words = element => [...element.childNodes]
    .filter(node => node.nodeType === 3).map(node => node.textContent.trim()).join("");
  const inside = (a, b, slack) => a.left >= b.left - slack && a.right <= b.right + slack
    && a.top >= b.top - slack && a.bottom <= b.bottom + slack;
  const shown = [...lab.querySelectorAll("*")].filter(one => one.checkVisibility());
  for (const one of shown) {
    const style = getComputedStyle(one), box = one.getBoundingClientRect();
    const said = words(one) || one.className?.baseVal || one.className;
    if (box.width && (box.right > around.right + 1 || box.left < around.left - 1))
      faults.push(`sticks out: ${said}`);
    const scrolls = /auto|scroll/.test(style.overflow);
    const over = one.scrollWidth - one.clientWidth;
    const far = Math.max(over, one.scrollHeight - one.clientHeight);
    const mayScroll = one.matches(".layer-lab-tree, select");
    if (scrolls && !mayScroll && far > 0) faults.push(`scrolls: ${said}`);
    const hides = words(one) && style.overflow !== "visible" && !one.ownerSVGElement;
    if (hides && over > 0) faults.push(`is cut: ${said}`);
    if (!words(one) || one.tagName === "STYLE" || one.closest("[disabled]")) continue;
    const svg = one.ownerSVGElement;
    const behind = one.previousElementSibling;
    const under = svg && behind?.classList.contains("phase")
      ? [getComputedStyle(behind).fill] : [];
    const ground = [...grounds(svg ? svg.parentElement : one), ...under];
    const ink = svg ? style.fill : style.color;
    const ratio = contrast(rgb(...ground, ink), rgb(...ground));
    if (ratio < 4.5) faults.push(`contrast ${ratio.toFixed(1)}: ${said}`);
    if (svg && !inside(box, svg.getBoundingClientRect(), 1))
      faults.push(`is cut: ${said}`);
  }
  for (const svg of lab.querySelectorAll(".layer-lab-picture svg")) {
    const texts = [...svg.querySelectorAll("text")].map(one => [one.textContent,
      one.getBoundingClientRect()]);
    texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 4) faults.push(`${one} lies on ${other}`);
    }));
  }
  for (const row of lab.querySelectorAll(".widget-hbox:has(> .widget-checkbox)"))
    if (row.offsetHeight > 33) faults.push(`wraps: ${row.textContent}`);
  return faults;
}"""

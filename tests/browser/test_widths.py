"""No text of the picture lies on another, however wide it is; JupyterLab is not run."""

import json
from collections.abc import Iterator

import pytest
import torch
from playwright.sync_api import Page

from helpers.checkpointing import Plan
from helpers.controls import LayerLab
from helpers.controls._picture import Picture
from helpers.measure import StepReport
from helpers.models import MLP
from tests.browser.page import chromium, find_browser

pytestmark = pytest.mark.browser

WIDTHS = range(440, 1101, 20)
PLANS = [Plan.alone([f"layer{i}" for i in range(1, n)]) for n in (4, 5, 7)]

PAGE = """<!doctype html><style>%s</style>
<div class="layer-lab"><div class="layer-lab-picture"></div></div>
<script type="module">
const source = new Blob([%s], {type: "text/javascript"});
const {default: {render}} = await import(URL.createObjectURL(source));
const el = document.querySelector(".layer-lab-picture");
window.show = values => {
  const get = name => values[name];
  window.undo?.();
  window.undo = render({el, model: {get, on() {}, off() {}, send() {}}});
};
window.ready = true;
</script>"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if find_browser() is None:
        pytest.skip("no Chromium or Chrome on this machine")
    css, code = Picture._css, Picture._esm
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 1100})
        page.set_content(PAGE % (css, json.dumps(str(code)).replace("</", "<\\/")))
        page.wait_for_function("() => window.ready")
        yield page


def small(rows: int, gib: float = 0.0, others: tuple[Plan, ...] = ()) -> LayerLab:
    lab = LayerLab(batch=rows, settings={"depth": 8, "width": 1024})
    lab.step.memory.value = gib
    return tried(lab, *others)


def tried(lab: LayerLab, *plans: Plan) -> LayerLab:
    for plan in plans:
        lab.plan = plan
    return lab


def compared(rows: int) -> LayerLab:
    lab = small(rows, 0, tuple(PLANS))
    lab.against = PLANS[0]
    return lab


def trained() -> LayerLab:
    """A step with an optimizer's state, measured, of a model with many layers."""
    make = MLP([256] * 14)
    lab = LayerLab(make, torch.randn(4096, 256), optimizer=torch.optim.AdamW)
    lab.plan = Plan.alone(["layer2", "layer3"])
    lab.measure()
    return lab


LABS = {
    "three digits": lambda: small(8192, 0, (PLANS[0],)),
    "GiB": lambda: small(170_000, 0, (PLANS[0],)),
    "other": lambda: compared(8192),
    "fits": lambda: small(8192, 24, (PLANS[0],)),
    "far too little": lambda: small(8192, 0.05, (PLANS[0],)),
    "just too little": lambda: small(8192, 0.55, (PLANS[0],)),
    "trained": trained,
}


@pytest.mark.parametrize("name", LABS)
def test_no_text_lies_on_another_at_any_width(page, name):
    show(page, LABS[name]().picture)
    faults = {width: found for width in WIDTHS if (found := looked_at(page, width))}
    assert not faults


def test_the_line_of_a_limit_is_beside_the_peak_s_words(page):
    lab = small(8192, 0, (PLANS[0],))
    takes: StepReport = lab.history[-1]
    for share in (0.8, 0.9, 0.95, 0.98, 1, 1.02, 1.05, 1.1, 1.2):
        lab.step.memory.value = share * takes.needed_bytes / 2**30
        show(page, lab.picture)
        assert not [*filter(None, (looked_at(page, width) for width in (500, 900)))]


def show(page: Page, picture: Picture) -> None:
    names = "before", "after", "shown", "names", "colors"
    values = {name: getattr(picture, name) for name in names}
    page.evaluate("values => show(values)", json.loads(json.dumps(values)))


def looked_at(page: Page, width: int) -> list[str]:
    """List what is wrong at a width of the picture."""
    return page.evaluate(FAULTS, width)


FAULTS = """async width => {
  const picture = document.querySelector(".layer-lab-picture");
  picture.style.width = `${width}px`;
  const frame = () => new Promise(requestAnimationFrame);
  await frame();
  await frame();
  await frame();
  const faults = [];
  const over = (a, b) => [Math.min(a.right, b.right) - Math.max(a.left, b.left),
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)];
  for (const svg of picture.querySelectorAll("svg")) {
    const around = svg.getBoundingClientRect();
    const found = [...svg.querySelectorAll("text")];
    if (found.length < 4) faults.push(`${svg.classList} is empty`);
    const boxes = found.map(one => [one.textContent, one.getBoundingClientRect(), one]);
    const buttons = [...picture.querySelectorAll("button")].filter(b => !b.hidden)
      .map(one => [one.textContent, one.getBoundingClientRect(), one]);
    boxes.forEach(([one, a, element], i) => {
      const gap = element.matches(".tiny") ? -1.5 : -2;
      for (const [other, b] of [...boxes.slice(i + 1), ...buttons]) {
        const [wide, high] = over(a, b);
        if (wide > gap && high > 3) faults.push(`${one} lies on ${other}`);
      }
      for (const line of svg.querySelectorAll("line.axis, line.limit")) {
        const [wide, high] = over(a, line.getBoundingClientRect());
        const {top} = line.getBoundingClientRect();
        if (wide > 1 && top > a.top + 2 && top < a.bottom - 4)
          faults.push(`${one} is struck through`);
      }
      if (a.left < around.left - 1 || a.right > around.right + 1)
        faults.push(`${one} is cut`);
    });
  }
  return faults;
}"""

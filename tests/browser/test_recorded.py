"""The lab's choice between GPUs in JupyterLab: it names what it shows in grey."""

import pytest
from playwright.sync_api import expect

from tests.browser.page import PATIENCE_MS, Panel, open_notebook, run_all

pytestmark = pytest.mark.browser

GPUS = ("NVIDIA H100 80GB HBM3", "2002-02-02"), ("NVIDIA A100-SXM4-40GB", "2001-01-01")
NEW, OLD = (f"{gpu}, torch 2.13.0+cu130, {date}" for gpu, date in GPUS)
CELLS = (
    f"GPUS = {GPUS!r}",
    """
import dataclasses, functools, tempfile
from pathlib import Path
from helpers.controls import lab as controls
from helpers.recording.recorded import read, write
from tests.recording.made_up import FIXTURE

folder, made_up = Path(tempfile.mkdtemp()), read(FIXTURE)
for share, (gpu, date) in enumerate(GPUS, 1):
    groups = []
    for group in made_up.groups:
        none, *others = group.measured
        none = dataclasses.replace(none, step_ms=none.step_ms / share)
        groups.append(dataclasses.replace(group, measured=(none, *others)))
    words = {"gpu": gpu, "date": date, "torch": "2.13.0+cu130", "made_up": False}
    real = dataclasses.replace(made_up, groups=tuple(groups), **words)
    write(real, folder / f"{gpu}.json")
controls.RecordedChoice = functools.partial(controls.RecordedChoice, folder=folder)
settings = {"depth": 3, "width": 16, "activation": "gelu"}
controls.LayerLab(batch=64, settings=settings)
""",
)


def test_the_reader_chooses_whose_recording_is_shown(browser, url):
    page = open_notebook(browser, url, "cells.ipynb")
    run_all(page)
    panel = Panel(page)
    status, choice = panel.status, panel.setting("recorded")
    expect(status).to_contain_text(f"recorded on {NEW}", timeout=PATIENCE_MS)
    for name in ("layer1", "layer2", "layer3"):
        panel.box(name).click()
    expect(status).to_contain_text("layers 1, 2, 3 each alone", timeout=PATIENCE_MS)
    expect(status).to_contain_text("measured on", timeout=PATIENCE_MS)
    expect(status).to_contain_text(f"recorded on {NEW}")
    shown = [name.removeprefix("NVIDIA ") for name in (NEW, OLD)]
    expect(choice.locator("option")).to_have_text(shown)
    times = panel.picture.get_by_role("figure", name="iteration time")
    before = times.get_attribute("aria-label")
    assert ", recorded " in before
    choice.select_option(index=1)
    expect(status).to_contain_text(f"recorded on {OLD}", timeout=PATIENCE_MS)
    expect(times).not_to_have_attribute("aria-label", before, timeout=PATIENCE_MS)
    assert panel.box("layer2").is_checked(), "the plan stays"
    panel.setting("batch").fill("65")
    panel.setting("batch").press("Enter")
    expect(status).not_to_contain_text("recorded on", timeout=PATIENCE_MS)
    expect(choice).to_be_hidden()

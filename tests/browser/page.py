"""A real JupyterLab in a real browser, and the lab's panel as a reader works it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from helpers.checkpointing import Plan

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000  # no test waits for so long unless it fails


def find_browser() -> str | None:
    """Return the path of a Chromium or Chrome on this machine, or None."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    return None


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the machine's browser, headless and with a profile of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(),
            args=list(FLAGS),
            ignore_default_args=["--hide-scrollbars"],  # a reader sees them
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def jupyter_lab(home: Path) -> Iterator[str]:
    """Serve ``home/root`` by JupyterLab, away from the reader's settings; its URL."""
    (home / "root").mkdir(exist_ok=True)
    page_config = home / "config" / "labconfig" / "page_config.json"
    page_config.parent.mkdir(parents=True)
    news = {"@jupyterlab/apputils-extension:announcements": True}
    page_config.write_text(json.dumps({"disabledExtensions": news}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += ["--LabApp.expose_app_in_browser=True"]
    command += [f"--ServerApp.root_dir={home / 'root'}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(
            command, env=_environment(home), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, server, home / "log.txt")
            yield url
        finally:
            server.terminate()  # it ends its kernels
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _environment(home: Path) -> dict[str, str]:
    """Point Jupyter away from the reader's own files, and ``helpers`` at this tree."""
    own = {key: value for key, value in os.environ.items() if "JUPYTER" not in key}
    return own | {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",  # the browser needs a core as well
    }


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/api/status", timeout=5).close()
            return
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


def write_notebook(path: Path, *sources: str) -> None:
    """Write a notebook of these code cells."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def open_notebook(browser: Browser, url: str, path: str) -> Page:
    """Open a notebook in a page of its own, and wait until its kernel is there."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{url}/lab/tree/{path}?reset")
    page.wait_for_function(
        """() => {
          const panel = window.jupyterapp?.shell?.currentWidget;
          return panel?.sessionContext?.session?.kernel?.status === "idle";
        }"""
    )
    return page


def run_all(page: Page) -> None:
    """Run all cells, as the Run menu does, and wait until the last one is done."""
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")


@dataclass(frozen=True)
class Panel:
    """A ``LayerLab`` on a page, as a reader sees and works it."""

    page: Page
    number: int = 0  # among the page's panels

    @property
    def root(self) -> Locator:
        return self.page.locator(".layer-lab").nth(self.number)

    @property
    def picture(self) -> Locator:
        return self.root.locator(".layer-lab-picture")

    @property
    def image(self) -> Locator:
        """Find what a screen reader calls an image: its name is the finding."""
        return self.picture.get_by_role("img")

    def timeline(self, title: str) -> Locator:
        return self.picture.get_by_role("group", name=f"{title}: peak")

    @property
    def rings(self) -> Locator:
        return self.picture.get_by_role("button")

    @property
    def readout(self) -> Locator:
        return self.root.locator(".layer-lab-readout")

    @property
    def status(self) -> Locator:
        return self.readout.locator("[role=status]")

    def box(self, name: str) -> Locator:
        """Find a layer's box by the name that a screen reader says."""
        return self.root.get_by_role("checkbox", name=name, exact=True)

    def join(self, name: str) -> Locator:
        """Find the toggle that joins a layer with the one before."""
        box = self.page.get_by_role("checkbox", name=name, exact=True)
        return self.rows().filter(has=box).locator(".widget-toggle-button")

    def button(self, name: str) -> Locator:
        return self.root.get_by_role("button", name=name, exact=True)

    def setting(self, name: str) -> Locator:
        return self.root.get_by_label(name, exact=True)

    def rows(self) -> Locator:
        """Find the layers' rows: the smallest boxes with a checkbox in them."""
        return self.root.locator(".widget-hbox:has(> .widget-checkbox)")

    def plan(self) -> Plan:
        """Read the plan off the boxes and joins."""
        segments: list[tuple[str, ...]] = []
        for name, ticked, joined in self.rows().evaluate_all(_READ_ROWS):
            if ticked and joined:
                segments[-1] += (name,)
            elif ticked:
                segments.append((name,))
        return Plan(tuple(segments))

    def sentence(self) -> str:
        """Return what the panel says, without the note in its second line."""
        return self.status.evaluate("status => status.firstChild.textContent")

    def colors_at(
        self, title: str, peak: tuple[int, int], points: list[tuple[int, float]]
    ) -> list[str | None]:
        """Read a timeline's colours at points (place, bytes), by where its peak is."""
        return self.timeline(title).evaluate(_COLORS_AT, [*peak, points])

    def wait_for(self, finding: str) -> None:
        """Wait until both the sentence and the picture say this."""
        expect(self.image).to_have_attribute("aria-label", finding, timeout=PATIENCE_MS)
        expect(self.status).to_contain_text(finding, timeout=PATIENCE_MS)

    def flip_ms(self, name: str) -> float:
        """Click a layer's box; time it until another picture has been painted."""
        box = self.box(name).element_handle()
        return self.root.evaluate(_FLIP, box)

    def watch(self) -> None:
        """Start to look at the picture in every frame, and at every sentence."""
        self.root.evaluate(_WATCH)

    def watched(self) -> dict:
        """Stop; return how many frames there were, the faults in them, and what was
        shown in turn: sentences, and pictures by what they say."""
        return self.root.evaluate("panel => panel.stopWatching()")


# A join is in force when both layers are ticked, which is when it can be clicked.
_READ_ROWS = """rows => rows.map(row => {
  const box = row.querySelector("input[type=checkbox]");
  const join = row.querySelector(".widget-toggle-button");
  const joined = !!join && !join.disabled && join.classList.contains("mod-active");
  return [box.parentElement.textContent, box.checked, joined];
})"""

# The peak's mark and the two ends of its axes tell where a place and a level are.
_COLORS_AT = """(panel, [peakPlace, peakBytes, points]) => {
  const number = (selector, name) => +panel.querySelector(selector).getAttribute(name);
  const left = number(".phase", "x"), low = number("line.axis", "y1");
  const right = number("circle", "cx"), high = number("circle", "cy");
  return points.map(([place, bytes]) => {
    const point = panel.createSVGPoint();
    point.x = left + (right - left) * (place + 0.5) / (peakPlace + 0.5);
    point.y = low + (high - low) * bytes / peakBytes;
    const areas = [...panel.querySelectorAll(".area")];
    return areas.find(area => area.isPointInFill(point))?.getAttribute("fill") ?? null;
  });
}"""

# What is asked of a frame runs before its paint: when the second one after the change
# comes, the new picture's frame is over.
_FLIP = """async (panel, box) => {
  const frame = () => new Promise(requestAnimationFrame);
  const picture = panel.querySelector(".layer-lab-picture .after");
  const changed = new Promise((resolve, reject) => {
    new MutationObserver(resolve).observe(picture, {childList: true});
    setTimeout(reject, 10000, Error("no other picture"));
  });
  const started = performance.now();
  box.click();
  await changed;
  await frame();
  await frame();
  return performance.now() - started;
}"""

# Looks before each paint, and at each sentence.
_WATCH = """panel => {
  const seen = {frames: 0, faults: [], sentences: [], pictures: []};
  const find = selector => panel.querySelector(selector);
  const noteNew = (list, value) => list.at(-1) === value || list.push(value);
  let layout = null;
  const fault = () => {
    const drawn = [...panel.querySelectorAll(".layer-lab-picture svg")];
    if (drawn.length !== 5) return "no picture";
    if (drawn.some(svg => svg.childElementCount < 5)) return "an empty picture";
    const {width, height} = find(".layer-lab-picture").getBoundingClientRect();
    const size = `${width} x ${height}`;
    if (size !== (layout ??= size)) return `size ${size}, not ${layout}`;
  };
  const read = () => {
    const status = find(".layer-lab-readout [role=status]");
    const sentence = status?.firstChild?.textContent ?? "";
    if (!sentence) seen.faults.push("no sentence");
    else if (status.querySelector(".wrong")) seen.faults.push(sentence);
    noteNew(seen.sentences, sentence);
  };
  const look = () => {
    const found = fault();
    if (found) seen.faults.push(found);
    const said = panel.querySelectorAll(".layer-lab-picture .peaks, .times");
    noteNew(seen.pictures, [...said].map(one => one.ariaLabel).join("; "));
    seen.frames += 1;
    frame = requestAnimationFrame(look);
  };
  const reader = new MutationObserver(read);
  const everything = {childList: true, subtree: true, characterData: true};
  reader.observe(find(".layer-lab-readout"), everything);
  let frame = requestAnimationFrame(look);
  panel.stopWatching = () => {
    cancelAnimationFrame(frame);
    reader.disconnect();
    return seen;
  };
}"""

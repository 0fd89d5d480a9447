"""Print how fast the workbook answers: medians, quartiles and ratios, never asserted.

Run by ``make bench``. What is compared runs in turns, so that both meet the same
conditions; the ratio is that of the medians.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from helpers import controls, picture
from helpers.checkpointing import Plan
from helpers.controls import LayerLab
from helpers.dry_run import meta_model
from helpers.measure import measuring_plans, predict
from helpers.models import DocsMLP, uniform_mlp
from helpers.step import training_step
from helpers.timeline import record_timeline
from tests.browser import (
    Panel,
    chromium,
    find_browser,
    jupyter_lab,
    open_notebook,
    run_all,
    write_notebook,
)

SETTINGS = {"depth": 8, "width": 1024, "activation": "gelu"}


def elapsed_ms(work: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def in_turns(runs: int, *works: Callable[[], object]) -> list[list[float]]:
    """Time several works by turns, after two rounds that are not counted."""
    rounds = [[elapsed_ms(work) for work in works] for _ in range(runs + 2)]
    return [list(column) for column in zip(*rounds[2:], strict=True)]


def show(name: str, samples_ms: list[float], target: str = "") -> None:
    """Print one row: median, quartiles, runs, and what it should be."""
    low, median, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
    spread = f"{median:9.2f} ms  ({low:.2f}–{high:.2f}, {len(samples_ms)} runs)"
    print(f"{name:<46}{spread:<44}{target}")


def show_ratio(name: str, one: list[float], other: list[float], target: str) -> None:
    """Print the ratio of two medians."""
    ratio = statistics.median(one) / statistics.median(other)
    print(f"{name:<46}{ratio:9.3f} ×{'':<33}{target}")


def flip_in_the_kernel(runs: int = 60) -> None:
    """Time a flip, from the box's value to the picture's, and where it goes."""
    parts: dict[str, list[float]] = {"predict": [], "draw and encode": []}

    def timed(name: str, work: Callable) -> Callable:
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = work(*args, **kwargs)
            parts[name].append((time.perf_counter() - started) * 1000)
            return result

        return call

    controls.predict = timed("predict", predict)
    draw = picture.LabPicture.draw
    picture.LabPicture.draw = timed("draw and encode", draw)
    lab, chance = LayerLab(settings=SETTINGS), random.Random(0)

    def flip() -> None:
        box = chance.choice(list(lab.boxes.values()))
        box.value = not box.value

    (samples,) = in_turns(runs, flip)
    controls.predict, picture.LabPicture.draw = predict, draw
    show("flip to picture, in the kernel", samples)
    for name, times in parts.items():
        show(f"  of which {name}", times[2:])


# Resolves with the milliseconds from the click to the frame after the new picture.
# (The ninth box is left out: a bare Linear's flip draws the same picture.)
CLICK = """async ([panel, place]) => {
  const picture = () => panel.querySelector(".layer-lab-picture img");
  const box = panel.querySelectorAll("input[type=checkbox]")[place];
  const before = picture().src, started = performance.now();
  const frame = () => new Promise(requestAnimationFrame);
  let blank = 0;
  box.click();
  while (!picture() || picture().src === before) {
    blank += !picture() || !picture().naturalWidth;
    await frame();
  }
  await picture().decode();
  await frame();
  return [performance.now() - started, blank];
}"""


def flip_in_the_browser(runs: int = 40) -> None:
    """Time a flip, from the click to the repainted picture, in JupyterLab."""
    name = "flip to repainted picture, in the browser"
    if find_browser() is None:
        print(f"{name:<46}no Chromium or Chrome on this machine")
        return
    with tempfile.TemporaryDirectory() as folder, jupyter_lab(Path(folder)) as url:
        source = f"from helpers.controls import LayerLab\nLayerLab(settings={SETTINGS})"
        write_notebook(Path(folder) / "root" / "lab.ipynb", source)
        with chromium() as browser:
            page = open_notebook(browser, url, "lab.ipynb")
            run_all(page)
            panel = Panel(page).root.element_handle()
            Panel(page).image.wait_for()
            chance, answers = random.Random(0), []
            for _ in range(runs + 3):
                answers.append(page.evaluate(CLICK, [panel, chance.randrange(8)]))
                page.wait_for_timeout(150)
    times, blank = zip(*answers[3:], strict=True)
    show(name, list(times), "100 ms")
    print(f"{'  blank frames':<46}{sum(blank):9d}{'':<35}0")


def predict_against_memtracker(runs: int = 15) -> None:
    """Time the dry run of 16 layers against PyTorch's own tracker on fake tensors."""
    model = meta_model(lambda: uniform_mlp(16, 1024))
    x = torch.empty(8192, 1024, device="meta")
    mode = FakeTensorMode()
    with mode:
        fake, fake_x = uniform_mlp(16, 1024), torch.empty(8192, 1024)

    def memtracker() -> None:
        tracker = MemTracker()
        tracker.track_external(fake)
        with mode, tracker:
            training_step(fake, fake_x)()

    other, own = in_turns(runs, memtracker, lambda: predict(model, x))
    show("predict, 16 GELU layers", own, "30 ms")
    show("MemTracker on the same step", other)
    show_ratio("  MemTracker to predict", other, own, "5 × or more")


def timeline_overhead(runs: int = 100) -> None:
    """Time a real CPU step of some 10 ms with and without the timeline."""
    model = DocsMLP()
    for rows in (32, 64, 128, 256, 512, 1024):
        batch = torch.randn(rows, 1024), torch.randint(10, (rows,))
        step = training_step(model, batch)
        (samples,) = in_turns(30, step)
        if statistics.median(samples) >= 9:
            break
    bare, watched = in_turns(
        runs, step, lambda: record_timeline(step, model, batch=batch)
    )
    show(f"a step of the docs' MLP, {rows} rows", bare)
    show("the same under the timeline", watched)
    show_ratio("  timeline to bare step", watched, bare, "1.15 × or less")


def time_pass_against_bare_loop(runs: int = 200) -> None:
    """Hold the times that ``measure`` takes against a loop written by hand."""
    model, x = uniform_mlp(4, 256), torch.randn(2048, 256)

    def bare_step() -> None:
        model.zero_grad(set_to_none=True)
        output = model(x)
        output.sum().backward()

    bare: list[float] = []
    measuring = measuring_plans(model, x, [Plan()], repeats=runs)
    while True:
        try:
            next(measuring)
        except StopIteration as finished:
            (report,) = finished.value
            break
        bare.append(elapsed_ms(bare_step))
    bare = bare[-runs:]
    low, high = report.step_ms_quartiles
    show("a bare loop", bare)
    measured = (
        f"{report.step_ms:9.2f} ms  ({low:.2f}–{high:.2f}, {report.repeats} runs)"
    )
    print(f"{'measure, the same step in turns with it':<46}{measured}")
    ratio = report.step_ms / statistics.median(bare)
    print(f"{'  measure to bare loop':<46}{ratio:9.3f} ×{'':<33}within 1 %")


def main() -> None:
    """Print every row."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(f"{'':<46}{'   median (quartiles, runs)':<44}target")
    flip_in_the_kernel()
    flip_in_the_browser()
    predict_against_memtracker()
    timeline_overhead()
    time_pass_against_bare_loop()


if __name__ == "__main__":
    main()

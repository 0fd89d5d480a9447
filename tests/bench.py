"""Print how fast the workbook answers: medians, quartiles and ratios, never asserted.

Run by ``make bench``. What is compared runs in turns, so that both meet the same
conditions; the ratio is that of the medians.
"""

import dataclasses
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from helpers.checkpointing import Plan
from helpers.controls import LayerLab, state
from helpers.dry_run import meta_model
from helpers.measure import measure_plans, predict, training_step
from helpers.models import GPT, DocsMLP, uniform_mlp
from helpers.planner import Chain, best_plan, least_peak_bytes, pareto
from helpers.timeline import record_timeline
from tests.browser import page as browser
from tests.planner import table
from tests.planner.chains import equal_chain, every_plan, mixed_chain, whole_front
from tests.planner.nested import nested_least_cost

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
    quartiles = statistics.quantiles(samples_ms, n=4, method="inclusive")
    show_row(name, quartiles, len(samples_ms), target)


def show_row(name: str, quartiles: list[float], runs: int, target: str = "") -> None:
    """Print a row of quartiles that are known already."""
    low, median, high = quartiles
    spread = f"{median:9.2f} ms  ({low:.2f}–{high:.2f}, {runs} runs)"
    print(f"{name:<46}{spread:<44}{target}")


def show_ratio(name: str, one: list[float], other: list[float], target: str) -> None:
    """Print the ratio of two medians."""
    ratio = statistics.median(one) / statistics.median(other)
    print(f"{name:<46}{ratio:9.3f} ×{'':<33}{target}")


def flip_in_the_kernel(runs: int = 60) -> None:
    """Time a flip, from the box's value to the picture's, and where it goes."""
    lab, chance = LayerLab(settings=SETTINGS), random.Random(0)
    spent_ms: list[dict[str, float]] = []  # in its parts, for each flip

    def timed(name: str, work: Callable) -> Callable:
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = work(*args, **kwargs)
            spent_ms[-1][name] += (time.perf_counter() - started) * 1000
            return result

        return call

    def flip() -> None:
        spent_ms.append({"predict": 0.0, "the picture's numbers": 0.0})
        box = chance.choice(list(lab.boxes.values()))
        box.value = not box.value

    picture = lab.picture
    show_picture = timed("the picture's numbers", picture.show)
    with mock.patch.object(state, "predict", timed("predict", predict)):
        with mock.patch.object(picture, "show", show_picture):
            (samples,) = in_turns(runs, flip)
    show("flip to picture, in the kernel", samples, "20 ms")
    parts = spent_ms[-runs:]
    for name in parts[0]:
        show(f"  of which {name}", [part[name] for part in parts])
    rest = [ms - sum(part.values()) for ms, part in zip(samples, parts, strict=True)]
    show("  of which the rest", rest)


def flip_sends() -> None:
    """Count the bytes that a flip sends for the picture: its numbers, and no names."""
    gpt, ids = GPT(96, 64, vocabulary=100, context=64), torch.randint(100, (2, 64))
    for name, lab, box in (
        ("the docs' MLP", LayerLab(DocsMLP, 8192), "layer2"),
        ("16 layers", LayerLab(settings={"depth": 16}), "layer2"),
        ("a GPT of 96 blocks", LayerLab(gpt, ids), "blocks.3"),
    ):
        lab.boxes[box].value = True
        sent = lab.picture.get_state(["after", "shown"]).values()
        plain = (one if isinstance(one, bytes) else json.dumps(one) for one in sent)
        kilobytes = sum(map(len, plain)) / 1000
        print(f"{f'a flip sends, {name}':<46}{kilobytes:9.1f} kB{'':<32}some kB")


def flip_in_the_browser(runs: int = 40) -> None:
    """Time a flip, from the click to the repainted picture, in JupyterLab."""
    name = "flip to repainted picture, in the browser"
    if browser.find_browser() is None:
        print(f"{name:<46}no Chromium or Chrome on this machine")
        return
    source = f"from helpers.controls import LayerLab\nLayerLab(settings={SETTINGS})"
    with tempfile.TemporaryDirectory() as folder:
        browser.write_notebook(Path(folder) / "root" / "lab.ipynb", source)
        with browser.jupyter_lab(Path(folder)) as url, browser.chromium() as chromium:
            page = browser.open_notebook(chromium, url, "lab.ipynb")
            browser.run_all(page)
            panel = browser.Panel(page)
            panel.image.wait_for()
            samples = browser_flips(panel, runs + 3)[3:]
            panel.watch()  # apart, for looking at each frame takes time as well
            browser_flips(panel, runs)
            seen = panel.watched()
    show(name, samples, "50 ms, 100 ms where busy")
    faults = f"{len(seen['faults']):9d} of {seen['frames']}"
    print(f"{'  blank or jumping frames':<46}{faults:<44}0")


def browser_flips(panel: browser.Panel, runs: int) -> list[float]:
    """Flip boxes by chance; the last is left out: its flip draws the same picture."""
    chance, samples = random.Random(0), []
    for _ in range(runs):
        samples.append(panel.flip_ms(f"layer{chance.randint(1, SETTINGS['depth'])}"))
        panel.page.wait_for_timeout(150)
    return samples


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
    model, sized = DocsMLP(), {}
    for rows in (32, 64, 128, 256, 512):
        batch = torch.randn(rows, 1024), torch.randint(10, (rows,))
        step = training_step(model, batch)
        (samples,) = in_turns(20, step)
        sized[abs(statistics.median(samples) - 10)] = rows, batch, step
    rows, batch, step = sized[min(sized)]
    works = step, lambda: record_timeline(step, model, batch=batch)
    bare, watched = in_turns(runs, *works)
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
    (report,) = measure_plans(
        model,
        x,
        [Plan()],
        repeats=runs,
        between_steps=lambda: bare.append(elapsed_ms(bare_step)),
    )
    bare = bare[-runs:]
    low, high = report.step_ms_quartiles
    show("a bare loop", bare)
    show_row("measure, the same step in turns", [low, report.step_ms, high], runs)
    show_ratio("  measure to bare loop", [report.step_ms], bare, "within 1 %")


def planner_by_length(lengths: tuple[int, ...] = (16, 32, 128)) -> None:
    """Time exact plans, and the whole front, by the number of layers."""
    targets = {32: "20 ms", 128: "200 ms"}
    for n in lengths:
        for name, chain in (
            ("unequal", mixed_chain(n)),
            ("equal", equal_chain(n, 16)),
        ):
            budgets = [point[0] for point in pareto(chain, 6)]
            works = [partial(fresh_plan, chain, budget) for budget in budgets]
            samples = [ms for column in in_turns(3, *works) for ms in column]
            show(f"best_plan, {n} {name} layers", samples, targets.get(n, ""))
    (samples,) = in_turns(5, lambda: pareto(dataclasses.replace(mixed_chain(32)), 50))
    show("pareto, 50 points, 32 unequal layers", samples, "500 ms")


def planner_within_a_gap() -> None:
    """Time plans for long chains within a bound of the best."""
    for n, gap, target in ((512, 0.015, "1000 ms"), (1000, 0.01, "7000 ms")):
        for name, chain in (
            ("unequal", mixed_chain(n)),
            ("equal", equal_chain(n, 16)),
        ):
            least, most = least_peak_bytes(chain), chain.peak_bytes(Plan())
            budgets = [least + (most - least) * tenth // 10 for tenth in (0, 1, 3, 6)]
            samples = [
                elapsed_ms(partial(fresh_plan, chain, budget, gap=gap))
                for budget in budgets
            ]
            label = f"best_plan, {n} {name} layers, gap {100 * gap:g} %"
            show(label, samples, target)


def fresh_plan(chain: Chain, budget_bytes: int, gap: float = 0.0) -> Plan:
    """Plan for a chain whose sums have not been found yet."""
    return best_plan(dataclasses.replace(chain), budget_bytes, gap=gap)


def planner_against_nested(lengths: tuple[int, ...] = (16, 32, 64)) -> None:
    """Time one plan against the nested dynamic program, and compare their costs."""
    for n in lengths:
        chain = mixed_chain(n)
        least, most = least_peak_bytes(chain), chain.peak_bytes(Plan())
        budget = least + (most - least) // 20
        cost = nested_least_cost(chain, budget)
        works = (
            partial(nested_least_cost, chain, budget),
            partial(fresh_plan, chain, budget),
        )
        nested, own = ([elapsed_ms(work) for _ in range(3)] for work in works)
        show(f"nested program, {n} unequal layers, 500 slots", nested)
        show_ratio("  nested program to best_plan", nested, own, "")
        ratio = chain.recompute_cost(best_plan(chain, budget)) / cost
        print(f"{'  cost of best_plan to its':<46}{ratio:9.3f} ×")


def planner_against_every_plan(n: int = 9, chains: int = 5) -> None:
    """Count the points of whole fronts that the planner finds exactly."""
    found = missed = plans = 0
    for seed in range(chains):
        chain = mixed_chain(n, seed)
        every = whole_front(chain)
        own = {point[:2] for point in pareto(chain)}
        found += len(own & {point[:2] for point in every})
        missed += len(own ^ {point[:2] for point in every})
        plans += sum(1 for _ in every_plan(chain))
    counted = f"{missed:9d} of {found + missed} points, of {plans} plans"
    print(f"{'points unlike those of every plan':<46}{counted:<44}0")


def main() -> None:
    """Print every row."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(f"{'':<46}{'   median (quartiles, runs)':<44}target")
    flip_in_the_kernel()
    flip_sends()
    flip_in_the_browser()
    predict_against_memtracker()
    timeline_overhead()
    time_pass_against_bare_loop()
    planner_by_length()
    planner_within_a_gap()
    planner_against_nested()
    planner_against_every_plan()
    table.show_large()
    table.show()


if __name__ == "__main__":
    main()

"""Time modules on a device, run forward, and run again in backward; and whole plans.

The times of modules propose plans, and steps under these plans are timed in turns with
steps under none: what a plan adds is measured, as its bytes are the dry run's.

Each module is checkpointed alone meanwhile, so that backward runs it again as it does
at the end of a segment, up to the last tensor that is needed, and the times are those
of real training steps.
"""

import dataclasses
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import nn

from helpers.checkpointing import Plan, Undo
from helpers.measure import StepReport, measure_plans, time_step_ms, usable_device
from helpers.measure.measured import Run, Setting, check_memory
from helpers.planner._estimate import Unit
from helpers.planner._judge import Judge
from helpers.planner._marks import BEFORE
from helpers.planner.chain import Chain, Stage

REPEATS, WARMUP = 10, 2  # training steps
Segment = tuple[str, ...]


def in_milliseconds(
    chain: Chain, model: nn.Module, batch: object, of_step: dict[str, object]
) -> Chain:
    """Make milliseconds, measured on a device, the costs of a chain's stages."""
    names = [name for name in chain.names if name != BEFORE]
    starting = [stage.name for stage in chain.stages if stage.starts]
    (medians_ms, _), *_ = _passes(model, batch, of_step, names, [starting])

    def timed(stage: Stage) -> Stage:
        full = medians_ms.get((stage.name, False), 0.0)
        last = medians_ms.get((stage.name, True), 0.0 if stage.starts else full)
        costs = {"recompute_cost": full, "last_recompute_cost": min(full, last)}
        return dataclasses.replace(stage, **costs)

    stages = tuple(map(timed, chain.stages))
    return dataclasses.replace(chain, stages=stages, cost_unit="ms")


class Clock:
    """What plans of a model add to its steps, by a device's own clock.

    Attributes:
        added_ms: of the plans that were measured.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge, given = judge, judge.given
        self.model = given if isinstance(given, nn.Module) else given()
        self.added_ms: dict[Plan, float] = {}
        self._reports: dict[Plan, StepReport] = {}
        self._segments_ms: dict[Segment, float] = {}

    def price(self, units: Iterable[Unit]) -> None:
        """Make nanoseconds the costs of units."""
        names = [unit.names for unit in units]
        missing = [one for one in names if one not in self._segments_ms]
        given = self.model, self.judge.batch, self.judge.of_step
        self._segments_ms |= segments_ms(missing, *given)
        for unit in units:
            unit.cost = round(self._segments_ms[unit.names] * 1e6)

    def measured(self, plans: Sequence[Plan]) -> list[StepReport]:
        """Measure steps under plans, in turns with steps under none."""
        missing = [plan for plan in plans if plan not in self.added_ms]
        if missing:
            how = {"device": self.judge.of_step["device"], **self.judge.settings}
            how |= {"repeats": 2 * REPEATS, "shuffle": random.Random(0)}
            how.pop("gpu", None)
            given = self.model, self.judge.batch
            plain, *others = measure_plans(*given, [Plan(), *missing], **how)
            for report in others:
                self._reports[report.plan] = report
                self.added_ms[report.plan] = report.step_ms - plain.step_ms
        return [self._reports[plan] for plan in plans]


def segments_ms(
    segments: Collection[Segment],
    model: nn.Module,
    batch: object,
    of_step: dict[str, object],
) -> dict[Segment, float]:
    """Say how many milliseconds each segment adds to a step.

    That is its modules' forward, the last one's as far as it is run again, and what a
    checkpoint costs itself: what is left of the time that a plan adds.
    """
    names = list(dict.fromkeys(name for segment in segments for name in segment))
    layers = _apart(segment[0] for segment in segments if len(segment) == 1)
    (full_ms, plain_ms), *others = _passes(model, batch, of_step, names, [[], *layers])
    again_ms: dict[str, float] = {}
    rests_ms = []
    for layer, (times_ms, step_ms) in zip(layers, others, strict=True):
        found = {name: times_ms.get((name, True), 0.0) for name in layer}
        again_ms |= found
        rests_ms.append((step_ms - plain_ms - sum(found.values())) / len(layer))
    rest_ms = max(0.0, statistics.median(rests_ms)) if rests_ms else 0.0

    def added(*earlier: str, last: str) -> float:
        full = [full_ms.get((name, False), 0.0) for name in (*earlier, last)]
        return sum(full[:-1]) + min(again_ms.get(last, full[-1]), full[-1]) + rest_ms

    return {segment: added(*segment[:-1], last=segment[-1]) for segment in segments}


def _apart(names: Collection[str]) -> list[list[str]]:
    """Cut names into lists in which none lies in another, the outermost first."""
    layers: list[list[str]] = []
    for name in sorted(names, key=lambda name: name.count(".")):
        for layer in layers:
            if not any(name.startswith(f"{outer}.") for outer in layer):
                layer.append(name)
                break
        else:
            layers.append([name])
    return layers


def _passes(
    model: nn.Module,
    batch: object,
    of_step: dict[str, object],
    names: Sequence[str],
    ticked: Sequence[Sequence[str]],
) -> list[tuple[dict[tuple[str, bool], float], float]]:
    """Take median times of modules, (name, whether run again), and of whole steps."""
    device = usable_device(model, of_step["device"])
    setting = Setting.of(**{n: one for n, one in of_step.items() if n != "gpu"})
    check_memory(model, batch, [Plan()], device, setting)
    with setting.placed(model, batch, device) as (model, batch, setting):
        run = Run(model, batch, device, setting)
        return _medians_ms(run, names, list(map(Plan.alone, ticked)))


def _medians_ms(
    run: Run, names: Sequence[str], plans: list[Plan]
) -> list[tuple[dict[tuple[str, bool], float], float]]:
    """Run plans in turns, so that what else is going on slows them alike."""
    spans: list[tuple[str, bool, Callable[[], float]]] = []
    rows = [(plan, defaultdict(list), []) for plan in plans]
    with Undo() as undo:
        for name in names:
            module = run.model.get_submodule(name)
            _time_forward(undo, module, name, run.device, spans)
        for count in range(WARMUP + REPEATS):
            for plan, times_ms, steps_ms in rows:
                spans.clear()
                with run.applied(plan):
                    step_ms = time_step_ms(run.step, run.device)
                if count < WARMUP:
                    continue
                steps_ms.append(step_ms)
                sums: dict[tuple[str, bool], float] = defaultdict(float)
                for name, again, elapsed_ms in spans:
                    sums[name, again] += elapsed_ms()
                for key, total_ms in sums.items():
                    times_ms[key].append(total_ms)
    median = statistics.median
    return [
        ({key: median(times) for key, times in times_ms.items()}, median(steps_ms))
        for _, times_ms, steps_ms in rows
    ]


def _time_forward(
    undo: Undo, module: nn.Module, name: str, device: str, spans: list
) -> None:
    """Note how long each call of a module's forward takes, also one that is stopped."""
    forward = module.forward

    def run(*args, **kwargs):
        again = torch._C._current_graph_task_id() != -1
        start = _now(device)
        try:
            return forward(*args, **kwargs)
        finally:
            end = _now(device)
            spans.append((name, again, lambda: _elapsed_ms(start, end)))

    undo.replace(module, "forward", run)


def _now(device: str) -> "float | torch.cuda.Event":
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start: "float | torch.cuda.Event", end: object) -> float:
    if isinstance(start, float):
        return (end - start) * 1000
    return start.elapsed_time(end)

"""Many plans, batch sizes and settings in one table, each row predicted or measured.

All plans of one model and batch are measured in one run, their steps in a new order in
each round, so that a slow moment of the machine meets every plan alike. Finished rows
can be kept on disk, and an interrupted sweep then goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from helpers.cache import ReportCache
from helpers.cases import Case, PlanOrRule, make_cases
from helpers.checkpointing import Plan
from helpers.fingerprint import describe, describe_machine, digest, helpers_digest
from helpers.measure import (
    Loss,
    OptimizerFactory,
    StepReport,
    free_memory,
    is_out_of_memory,
    measure_plans,
    memory_bytes,
    predict,
    usable_device,
)
from helpers.progress import progress_bar

NUMBERS = {
    "peak_bytes": "Int64",
    "after_forward_bytes": "Int64",
    "baseline_bytes": "Int64",
    "forward_flops": "Int64",
    "recompute_flops": "Int64",
    "step_ms": "float64",
    "step_ms_low": "float64",
    "step_ms_high": "float64",
    "repeats": "Int64",
}
OUT_OF_MEMORY = "out of memory"
COLUMNS = ("rows", "plan", *NUMBERS, "source", "device", "outcome")


def sweep(
    model_factory: Callable[..., nn.Module],
    make_batch: Callable[[int], object],
    plans: Mapping[str, PlanOrRule] | Sequence[Plan],
    rows: int | Sequence[int],
    *,
    settings: Mapping[str, Sequence] | None = None,
    measured: bool = False,
    device: str | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    repeats: int = 10,
    warmup: int = 2,
    seed: int = 0,
    limit_bytes: int | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
    **checkpoint_options,
) -> pd.DataFrame:
    """Predict or measure a training step for every setting, batch size and plan.

    Args:
        model_factory: called with one combination of ``settings`` as keywords.
        make_batch: called with a number of rows, where new tensors are made on the
            device that they are wanted on; makes ``x`` or ``(x, target)``.
        plans: by label, plans or functions that make one for a model; or just plans.
        rows: batch sizes.
        settings: for each of the factory's arguments the values to try.
        measured: run every step, rather than predict it.
        device: whose step is predicted, by default "cuda"; or where it is run, by
            default the GPU if there is one.
        loss, optimizer, repeats, warmup, checkpoint_options: as in ``measure``.
        seed: of the weights, the batch and the order of the measured steps.
        limit_bytes: a step that needs more counts as out of memory, and is not run.
        cache: a folder in which finished rows are kept, and found again.
        progress: whether a bar shows how far it is.

    Returns:
        A row for each combination. A step that is out of memory has its prediction's
        numbers. ``step_ms`` is a median between the quartiles ``step_ms_low`` and
        ``step_ms_high``; times can be compared within one setting and batch size.

    Raises:
        ValueError: if there is nothing to sweep, or if something does not fit.
    """
    if repeats < 0 or warmup < 0:
        raise ValueError(f"repeats and warmup are 0 or more, got {repeats}, {warmup}")
    settings = dict(settings or {})
    if taken := sorted(set(settings) & set(COLUMNS)):
        raise ValueError(f"{taken[0]!r} is a column of the table; rename the setting")
    cases = list(make_cases(model_factory, make_batch, plans, rows, settings))
    runner = Runner(
        _device(device, measured),
        {"loss": loss, "optimizer": optimizer, **checkpoint_options},
        {"repeats": repeats, "warmup": warmup, "seed": seed} if measured else {},
        math.inf if limit_bytes is None else limit_bytes,
        ReportCache(cache) if cache is not None else None,
    )
    table: list[dict] = []
    ends = list(itertools.accumulate(map(runner.count_steps, cases)))
    with progress_bar(ends[-1], "step", progress) as bar:
        for case, end in zip(cases, ends, strict=True):
            table += runner.rows(case, bar.update)
            bar.update(end - bar.n)  # what was found, or was not run
    return pd.DataFrame(table, columns=[*settings, *COLUMNS]).astype(NUMBERS)


def _device(device: str | None, measured: bool) -> str:
    """Choose the device, and see that steps can be run or predicted for it."""
    if device is None:
        device = "cuda" if not measured or torch.cuda.is_available() else "cpu"
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"a step runs on 'cpu' or 'cuda', not on {kind!r}")
    return usable_device(nn.Identity(), kind) if measured else kind


@dataclass(frozen=True)
class Runner:
    """Runs the steps of a sweep, or finds them in its cache."""

    device: str
    options: dict[str, object]  # of the step
    timing: dict[str, int]  # repeats, warmup and seed; empty if it only predicts
    limit_bytes: float
    cache: ReportCache | None

    def count_steps(self, case: Case) -> int:
        """Count the steps that a case takes."""
        each = 1
        if self.timing:
            each += self.timing["repeats"] + max(1, self.timing["warmup"])
            each += self.device == "cuda"
        return each * len(case.plans)

    def rows(self, case: Case, tick: Callable[[], object]) -> Iterator[dict]:
        """Yield the table's rows of a case; ``tick`` is called for every step."""
        plans = [plan for _, plan in case.plans]
        predicted = [self._predicted(case, plan, tick) for plan in plans]
        limit_bytes = self.limit_bytes
        if self.timing:
            limit_bytes = min(limit_bytes, memory_bytes(self.device))
        fits = [dry is None or dry.peak_bytes <= limit_bytes for dry in predicted]
        reports: Iterator[StepReport | None] = itertools.compress(predicted, fits)
        if self.timing:
            fitting = list(itertools.compress(plans, fits))
            reports = iter(self._measured(case, fitting, tick))
        for (label, _), dry, fit in zip(case.plans, predicted, fits, strict=True):
            report = next(reports) if fit else None
            first = {**case.settings, "rows": case.rows, "plan": label}
            last = {"device": self.device, "outcome": "ok" if report else OUT_OF_MEMORY}
            yield first | _numbers(report or dry) | last

    def _predicted(
        self, case: Case, plan: Plan, tick: Callable[[], object]
    ) -> StepReport | None:
        """Predict a step; None if it can only be measured, as it looks at values."""
        if not self.timing:
            tick()
        key = self._key(case, plan, source="predicted")
        report = self.cache.find(key) if self.cache else None
        if report:
            return report
        with contextlib.suppress(*(ValueError, RuntimeError) if self.timing else ()):
            # What else may be wrong, the measurement says as well.
            report = predict(
                case.model, case.batch, plan, device=self.device, **self.options
            )
            report = dataclasses.replace(report, timeline=None)  # it is large
            if self.cache:
                self.cache.keep(key, report)
        return report

    def _measured(
        self, case: Case, plans: Sequence[Plan], tick: Callable[[], object]
    ) -> list[StepReport | None]:
        """Find plans that were measured together, or measure them together now."""
        together = digest(sorted(plan.segments for plan in plans))
        words = {"source": "measured", "together": together, "timing": str(self.timing)}
        keys = [self._key(case, plan, **words) for plan in plans]
        found = [self.cache.find(key) for key in keys] if self.cache else [None]
        if all(found):
            return found
        reports = self._run(case, plans, tick)
        if self.cache:
            for key, report in zip(keys, reports, strict=True):
                if report:
                    self.cache.keep(key, report)
        return reports

    def _run(
        self, case: Case, plans: Sequence[Plan], tick: Callable[[], object]
    ) -> list[StepReport | None]:
        """Measure plans in one run; None for a plan that runs out of memory."""
        if not plans:
            return []
        repeats, warmup, seed = self.timing.values()
        try:
            return measure_plans(
                *case.made(self.device, seed),
                plans,
                device=self.device,
                repeats=repeats,
                warmup=warmup,
                between_steps=tick,
                shuffle=random.Random(seed),
                **self.options,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            free_memory(self.device)
        if len(plans) == 1:
            return [None]
        alone = [self._run(case, [plan], tick)[0] for plan in plans]
        fits = [plan for plan, report in zip(plans, alone, strict=True) if report]
        if len(fits) == len(plans):
            return alone
        together = iter(self._run(case, fits, tick))
        return [next(together) if report else None for report in alone]

    def _key(self, case: Case, plan: Plan, **words: str) -> dict[str, str]:
        """Name all that a step's numbers depend on."""
        if not self.cache:
            return {}
        return words | case.words | self._words | {"plan": str(plan.segments)}

    @functools.cached_property
    def _words(self) -> dict[str, str]:
        return {
            "machine": describe_machine(self.device, bool(self.timing)),
            "options": describe(self.options),
            "helpers": helpers_digest(),
        }


def _numbers(report: StepReport | None) -> dict[str, object]:
    """Take a report's numbers for the table; what is not known stays empty."""
    if report is None:
        return {"repeats": 0}
    names = [name for name in (*NUMBERS, "source") if hasattr(report, name)]
    low, high = report.step_ms_quartiles or (None, None)
    numbers = {name: getattr(report, name) for name in names}
    return numbers | {"step_ms_low": low, "step_ms_high": high}

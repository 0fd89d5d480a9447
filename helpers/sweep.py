"""Many plans, batch sizes and settings in one table, each row predicted or measured.

Everything is made once on the meta device, so that whatever does not fit is said before
the first step runs. All plans of one model and batch are measured in one run, their
steps in a new order in each round, so that a slow moment of the machine meets every
plan alike.
"""

import contextlib
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, product
from typing import TYPE_CHECKING

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.dry_run import meta_batch, meta_model
from helpers.measure import (
    StepReport,
    free_memory,
    is_out_of_memory,
    measure_plans,
    memory_bytes,
    predict,
    random_numbers_kept,
    usable_device,
)

if TYPE_CHECKING:
    import pandas as pd

Plans = Mapping[str, Plan | Callable[[nn.Module], Plan]] | Sequence[Plan]
Tick = Callable[[], object]
COUNTS = ("peak_bytes", "after_forward_bytes", "baseline_bytes")
COUNTS += ("forward_flops", "recompute_flops")
TIMES = ("step_ms", "step_ms_low", "step_ms_high")
COLUMNS = ("rows", "plan", *COUNTS, *TIMES, "repeats", "source", "device", "outcome")
TYPES = dict.fromkeys(TIMES, "float64") | dict.fromkeys((*COUNTS, "repeats"), "Int64")


def sweep(
    model_factory: Callable[..., nn.Module],
    make_batch: Callable[[int], object],
    plans: Plans,
    rows: int | Sequence[int],
    *,
    settings: Mapping[str, Sequence] | None = None,
    measured: bool = False,
    progress: bool = True,
    **options,
) -> "pd.DataFrame":
    """Predict or measure a training step for every setting, batch size and plan.

    Args:
        model_factory: called with one combination of ``settings`` as keywords.
        make_batch: makes a batch of so many rows, on the default device.
        plans: by label, plans or functions that make one for a model; or just plans.
        settings: for each of the factory's arguments the values to try.
        options: how a step is run, see ``Steps``.

    Returns:
        A row for each combination. A step that is out of memory has its prediction's
        numbers. ``step_ms`` is a median between the quartiles ``step_ms_low`` and
        ``step_ms_high``; times can be compared within one setting and batch size.
    """
    import pandas as pd  # here, since a bare machine with a GPU has neither
    from tqdm.auto import tqdm

    steps, settings = Steps(measured, **options), settings or {}
    cases = list(_cases(model_factory, make_batch, plans, rows, settings))
    each, table = steps.per_plan * len(cases[0].plans), []
    shown = {"unit": "step", "leave": False, "disable": not (progress and _watched())}
    with tqdm(total=each * len(cases), **shown) as bar:
        for done, case in enumerate(cases, 1):
            table += steps.rows(case, bar.update)
            bar.update(done * each - bar.n)  # what was not run
    return pd.DataFrame(table, columns=[*settings, *COLUMNS]).astype(TYPES)


@dataclass(frozen=True)
class Case:
    """One model and batch, and the plans that are compared on them."""

    settings: dict[str, object]
    rows: int
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[], object]
    plans: list[tuple[str, Plan]]  # with labels
    model: nn.Module  # on the meta device
    batch: object  # on the meta device


def _cases(model_factory, make_batch, plans, rows, settings) -> Iterator[Case]:
    """Make a case for each combination."""
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        raise ValueError(
            "model_factory is a function that makes the model, such as uniform_mlp or "
            f"lambda: model; got a {type(model_factory).__name__}"
        )
    _check_settings(model_factory, settings)
    for values in product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        make_model = functools.partial(model_factory, **chosen)
        with torch.random.fork_rng(devices=[]):
            model = meta_model(make_model)
        labelled = _labelled(plans, model)
        for size in _sizes(rows):
            make = functools.partial(make_batch, size)
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                batch = meta_batch(make())
            yield Case(chosen, size, make_model, make, labelled, model, batch)


def _check_settings(factory: Callable, settings: Mapping[str, Sequence]) -> None:
    """Raise ValueError unless the factory takes each setting, and each has values."""
    takes = inspect.signature(factory).parameters.values()
    names = [p.name for p in takes if p.kind is not p.POSITIONAL_ONLY]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in takes)
    for name, values in settings.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(
                "settings are lists of values to try, such as {'depth': [8, 16]}; "
                f"{name!r} has {values!r}"
            )
        if name in COLUMNS:
            raise ValueError(f"{name!r} is a column of the table; rename the setting")
        if name not in names and not takes_all:
            raise ValueError(
                f"{getattr(factory, '__name__', 'the model_factory')} has no setting "
                f"{name!r}; it has: {', '.join(names) or 'none'}"
            )


def _labelled(plans: Plans, model: nn.Module) -> list[tuple[str, Plan]]:
    """Give each plan its label, and make those that are rules."""
    if isinstance(plans, Mapping):
        pairs = list(plans.items())
    elif isinstance(plans, Sequence) and all(isinstance(p, Plan) for p in plans):
        pairs = [(str(plan), plan) for plan in plans]
    else:
        raise ValueError(
            "plans are a list of Plans, or a dict of Plans by label, such as "
            "{'none': Plan(), 'each alone': Plan.alone(names)}"
        )
    if not pairs:
        raise ValueError("there is no plan to sweep; Plan() checkpoints nothing")
    return [(label, _made(label, plan, model)) for label, plan in pairs]


def _made(label: str, plan: object, model: nn.Module) -> Plan:
    """Make the plan of a rule where it is one, and see that it fits the model."""
    made = plan if isinstance(plan, Plan) or not callable(plan) else plan(model)
    if not isinstance(made, Plan):
        raise ValueError(
            f"plan {label!r} is a {type(made).__name__}; a Plan is wanted, or a "
            "function that makes one for a model"
        )
    with checkpointed(model, made):
        return made


def _sizes(rows: int | Sequence[int]) -> list[int]:
    sizes = [rows] if isinstance(rows, int) else list(rows)
    if not sizes:
        raise ValueError("there is no batch size to sweep; give rows, such as (32,)")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"rows are whole numbers of at least 1, got {size!r}")
    return sizes


class Steps:
    """Predicts the steps of a sweep, or runs them.

    Args:
        device: default: "cuda" to predict; to measure, the GPU if there is one.
        seed: of the weights, the batch and the order of the measured steps.
        repeats, warmup, options: as in ``measure``.
    """

    def __init__(
        self,
        measured: bool,
        device: str | None = None,
        seed: int = 0,
        repeats: int = 10,
        warmup: int = 2,
        **options,
    ) -> None:
        if (least := min(repeats, warmup)) < 0:
            raise ValueError(f"repeats and warmup are 0 or more, got {least}")
        if device is None:
            device = "cuda" if not measured or torch.cuda.is_available() else "cpu"
        self.device = str(device).partition(":")[0]
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"a step runs on 'cpu' or 'cuda', not on {self.device!r}")
        if measured:
            usable_device(nn.Identity(), self.device)
        self.measured, self.seed = measured, seed
        self.options = options | {"device": self.device}
        self.runs = {"repeats": repeats, "warmup": warmup}
        real = repeats + max(1, warmup) + 1 + (self.device == "cuda")
        self.per_plan = 1 + real if measured else 1

    def rows(self, case: Case, tick: Tick) -> Iterator[dict]:
        """Yield the table's rows of a case; ``tick`` is called for every step."""
        plans = [plan for _, plan in case.plans]
        predicted = [self._predicted(case, plan, tick) for plan in plans]
        reports = predicted
        if self.measured:
            limit_bytes = memory_bytes(self.device)
            fits = [not dry or dry.needed_bytes <= limit_bytes for dry in predicted]
            run = iter(self._measured(case, [*compress(plans, fits)], tick))
            reports = [next(run) if fit else None for fit in fits]
        for (label, _), dry, report in zip(case.plans, predicted, reports, strict=True):
            row = {**case.settings, "rows": case.rows, "plan": label}
            row |= _numbers(report or dry) | {"device": self.device}
            yield row | {"outcome": "ok" if report else "out of memory"}

    def _predicted(self, case: Case, plan: Plan, tick: Tick) -> StepReport | None:
        """Predict a step; None if it can only be measured, as it looks at values."""
        tick()
        with contextlib.suppress(*(ValueError, RuntimeError) if self.measured else ()):
            # What else may be wrong, the measurement says as well.
            report = predict(case.model, case.batch, plan, **self.options)
            return replace(report, timeline=None, count=None)  # it is large
        return None

    def _measured(
        self, case: Case, plans: list[Plan], tick: Tick
    ) -> list[StepReport | None]:
        """Measure plans in one run; None for a plan that runs out of memory."""
        try:
            return self._run(case, plans, tick) if plans else []
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            free_memory(self.device)
        if len(plans) == 1:
            return [None]
        alone = [self._measured(case, [plan], tick)[0] for plan in plans]
        if all(alone):
            return alone
        together = iter(self._measured(case, [*compress(plans, alone)], tick))
        return [next(together) if report else None for report in alone]

    def _run(self, case: Case, plans: list[Plan], tick: Tick) -> list[StepReport]:
        """Make model and batch, the same ones for the same seed, and measure plans."""
        with random_numbers_kept():
            torch.manual_seed(self.seed)
            with torch.device(self.device):
                model, batch = case.make_model(), case.make_batch()
        how = self.options | self.runs | {"shuffle": random.Random(self.seed)}
        return measure_plans(model, batch, plans, between_steps=tick, **how)


def _numbers(report: StepReport | None) -> dict[str, object]:
    """Take a report's numbers for the table; what is not known stays empty."""
    if report is None:
        return {"repeats": 0}
    names = (*COUNTS, "step_ms", "repeats", "source")
    times = dict(zip(TIMES[1:], report.step_ms_quartiles or (), strict=False))
    return {name: getattr(report, name) for name in names} | times


def _watched() -> bool:
    """Tell whether a reader is there: only then can a notebook's cell ask for input.

    In a notebook that runs to be committed or tested a bar would stay in the file.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if kernel := getattr(shell, "kernel", None):
        return kernel.get_parent("shell").get("content", {}).get("allow_stdin", True)
    return True

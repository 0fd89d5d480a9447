"""What a lab knows, apart from its widgets: a model, and what each plan tried does.

``set`` takes sizes and ``plan`` ticks boxes; ``show`` answers them by a prediction at
once, and ``measuring`` by a measurement, one training step for each ``next``.
"""

from collections.abc import Callable, Generator
from operator import attrgetter

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.controls._answers import Answers
from helpers.controls._bearable import (
    AUTO_FLOPS,
    SizeGuard,
    bearable,
    check_bearable,
    check_tensors,
    what_follows,
    without_data,
)
from helpers.controls._findings import gradients_alarm, measured_note, verified_note
from helpers.controls.ticks import Ticks, children_of, is_flat, modules_of
from helpers.dry_run import meta_model
from helpers.inspection import Inspection, inspect_model
from helpers.measure import (
    StepReport,
    measuring_plans,
    predict,
    random_numbers_kept,
    verifying_plan,
)
from helpers.models import uniform_mlp

REPEATS = 8


def _of_the_answers(*names: str) -> list[property]:
    return [property(attrgetter(f"answers.{name}")) for name in names]


class LabState:
    """A model, its sizes, what is ticked in it, and what each plan tried does.

    Args:
        factory, batch, settings, device, tree: as in ``LayerLab``.
        options: further arguments of ``predict``, by name.

    Attributes:
        values: the sizes that the reader may change: settings, and ``batch`` if it is a
            number of rows.
        model, batch: the present ones, on meta tensors unless they were given.
        ticks: what is ticked and joined, with the inspection of the model.
        answers: what was found at the present sizes: ``tried``, ``shown`` and so on.
    """

    tried, measured, shown = _of_the_answers("tried", "measured", "shown")
    finding, history, reports = _of_the_answers("finding", "history", "reports")

    def __init__(
        self,
        factory: Callable[..., nn.Module] | nn.Module = uniform_mlp,
        batch: object = 8192,
        settings: dict[str, object] | None = None,
        device: str = "cuda",
        tree: bool | None = None,
        options: dict[str, object] | None = None,
    ) -> None:
        self.factory, self.device, self.options = factory, device, options or {}
        self._given_batch = batch
        self.settings = self.values = settings or {}
        if isinstance(batch, int):
            self.values = self.settings | {"batch": batch}
        self.model, self.batch, self.ticks = None, None, Ticks()
        self.tree = self._has_depth() if tree is None else tree
        self.answers, self.guard = Answers(), SizeGuard()
        self._by_key: dict[tuple, Answers] = {}  # for all sizes

    # What the reader sets -------------------------------------------------------------

    def set(self, **values: object) -> None:
        """Take other sizes, and make a model of them; what can stay ticked, stays.

        Raises:
            Exception: if there is no such model; nothing has changed then.
        """
        values = self.values | values
        for name, value in values.items():
            if isinstance(value, int) and not 1 <= value < 2**31:
                raise ValueError(
                    f"{name} must be a whole number from 1 up, not {value:,}"
                )
        settings = {name: values[name] for name in values if name != "batch"}
        self.guard.check(self._model, self.model, self.settings, settings)
        model = self._model(settings)
        batch = self._input(model, values.get("batch"), "meta")
        check_tensors([*model.parameters(), batch])
        self.ticks.fit(self._inspected(model, batch))
        self.values, self.settings = values, settings
        self.model, self.batch = model, batch
        self.answers = self._by_key.setdefault(self.key, Answers())

    @property
    def key(self) -> tuple:
        """What an answer depends on, besides the plan: sizes, step and card."""
        step = ((name, id(value)) for name, value in self.options.items())
        return *self.values.items(), *step

    @property
    def plan(self) -> Plan:
        """What is ticked and joined; may be set."""
        return self.ticks.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        with checkpointed(self.model, plan):
            self.ticks.plan = plan  # unless the segments do not fit the model

    def _model(self, settings: dict[str, object]) -> nn.Module:
        if isinstance(self.factory, nn.Module):
            return self.factory
        return meta_model(lambda: self.factory(**settings))

    def _has_depth(self) -> bool:
        """Say whether a model's children are more than layers; a failure is none."""
        try:
            return not is_flat(self._model(self.settings))
        except Exception:
            return False  # which making it again will say

    def _inspected(self, model: nn.Module, batch: object) -> Inspection:
        """Find what can be ticked; by a look alone where no step has been imagined."""
        if not self.tree:
            return children_of(model)
        try:
            return inspect_model(model, batch, device=self.device, **self.options)
        except Exception:
            found = modules_of(model)
            if self.ticks.inspection.report is not None or not found.layers:
                raise
            return found

    def _input(self, model: nn.Module, rows: int | None, device: str) -> object:
        """Make the batch on a device: random rows, or what was given."""
        given = self._given_batch
        if not isinstance(given, int):
            return given
        linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
        if linear is None:
            raise ValueError("give a tensor as batch: this model has no Linear layer")
        return torch.randn(rows, linear.in_features, device=device)

    # The answer -----------------------------------------------------------------------

    def show(self) -> None:
        """Predict what is ticked; a plan that cannot be predicted is not shown."""
        if self.model is None:
            self.set()  # which says why there is none
        plan = self.plan
        for wanted in (Plan(), plan):
            if wanted not in self.tried:
                self.tried[wanted] = self._predicted(wanted, self.device)
        self.answers.shown = plan

    def _predicted(self, plan: Plan, device: str) -> StepReport:
        try:
            return predict(self.model, self.batch, plan, device=device, **self.options)
        except (RuntimeError, ValueError):
            for reason in self._in_place(plan):
                raise ValueError(reason) from None
            raise

    @property
    def predicted(self) -> bool:
        """Whether the model is predicted at the present sizes."""
        return Plan() in self.tried and self.tried[Plan()].source == "predicted"

    def _in_place(self, plan: Plan) -> list[str]:
        """List why a plan's segments cannot be run again, if they cannot."""
        found = self.ticks.inspection.hazards_of(plan)
        return [str(hazard) for hazard in found if hazard.kind == "in place"]

    @property
    def note(self) -> str:
        """Where the numbers come from, and what becomes of the measurement."""
        if self.shown not in self.measured:
            follows = self.lacks or what_follows(self.tried[self.shown])
            on = f" on {self.options['gpu']}" if "gpu" in self.options else ""
            return f"predicted for a {self.device.upper()} step{on}; {follows}"
        report, base = self.measured[self.shown]
        own = predicted = self.tried[self.shown]
        if report.peak_bytes != predicted.peak_bytes:
            own = self._predicted(self.shown, report.device)
        verified = verified_note(self.answers.verified.get(self.shown))
        return measured_note(report, base, predicted, own) + verified

    @property
    def caution(self) -> str:
        """What is wrong with the plan, or not safe as far as the model is known."""
        alarm = gradients_alarm(self.answers.verified.get(self.shown))
        found = self.ticks.inspection.hazards_of(self.shown)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        said = [*filter(None, [alarm]), *(f"{one}{more}" for one in found[:1])]
        return f". Careful: {'; '.join(said)}" if said else ""

    # The measurement ------------------------------------------------------------------

    @property
    def lacks(self) -> str:
        """Say that there is nothing to run; empty if there is."""
        return without_data(self.factory, self._given_batch)

    @property
    def measured_unasked(self) -> bool:
        """Whether the measurement of what is shown follows by itself."""
        if self.lacks or self.shown in self.measured:
            return False
        return bearable(self.tried[self.shown], AUTO_FLOPS)

    def measuring(self) -> Generator[None, None, None]:
        """Measure what is ticked beside no checkpointing, a training step a turn.

        Then see whether its gradients are as without. It need not be predictable.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.show()
        except Exception:
            if self.model is None or self._in_place(self.plan):
                raise
        plan, model, verified = self.plan, self.factory, None
        if self.lacks:
            raise ValueError(self.lacks)
        if plan in self.tried and Plan() in self.tried:
            check_bearable(self.tried[plan], self.tried[Plan()], device)
        with random_numbers_kept():
            if not isinstance(model, nn.Module):
                model = self.factory(**self.settings)
            batch = self._input(model, self.values.get("batch"), device)
        plans = [plan, Plan()] if plan.segments else [plan]
        how = {n: v for n, v in self.options.items() if n != "gpu"} | {"device": device}
        reports = yield from measuring_plans(
            model, batch, plans, repeats=REPEATS, **how
        )
        if plan.segments:
            verified = yield from verifying_plan(model, batch, plan, **how)
        self.answers.take(reports, verified)

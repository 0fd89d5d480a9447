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
    check_sizes,
    check_tensors,
    random_rows,
    what_follows,
    without_data,
)
from helpers.controls._findings import cautious, measured_note, verified_note
from helpers.controls.ticks import Ticks, inspected, is_flat
from helpers.dry_run import meta_model
from helpers.measure import (
    VERIFYING_STEPS,
    StepReport,
    measuring_plans,
    predict,
    random_numbers_kept,
    steps_of_a_plan,
    verifying_plan,
)
from helpers.models import uniform_mlp

REPEATS = 8
STOPPED = "the measurement was stopped"


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
        steps, stopped: how many the last measurement has, and whether it was stopped.
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
        self.steps, self.stopped, self._against = 0, False, Plan()
        self._by_key: dict[tuple, Answers] = {}  # for all sizes

    # What the reader sets -------------------------------------------------------------

    def set(self, **values: object) -> None:
        """Take other sizes, and make a model of them; what can stay ticked, stays.

        Raises:
            Exception: if there is no such model; nothing has changed then.
        """
        values = self.values | values
        check_sizes(values, self.values)
        settings = {name: values[name] for name in values if name != "batch"}
        self.guard.check(self._model, self.model, self.settings, settings)
        model = self._model(settings)
        batch = self._input(model, values.get("batch"), "meta")
        check_tensors([*model.parameters(), batch])
        how = self.options | {"device": self.device, "deep": self.tree}
        self.ticks.fit(inspected(model, batch, self.ticks.inspection, **how))
        self.values, self.settings = values, settings
        self.model, self.batch = model, batch
        self.answers = self._by_key.setdefault(self.key, Answers())
        if not set(self.against.names) <= set(self.ticks.inspection.layers):
            self._against = Plan()

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

    @property
    def against(self) -> Plan:
        """The plan that others are compared with; may be set."""
        return self._against

    @against.setter
    def against(self, plan: Plan) -> None:
        with checkpointed(self.model, plan):
            self._against = plan

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

    def _input(self, model: nn.Module, rows: int | None, device: str) -> object:
        """Make the batch on a device: random rows, or what was given."""
        given = self._given_batch
        return random_rows(model, rows, device) if isinstance(given, int) else given

    # The answer -----------------------------------------------------------------------

    def show(self) -> None:
        """Predict what is ticked; a plan that cannot be predicted is not shown."""
        if self.model is None:
            self.set()  # which says why there is none
        plan, self.stopped = self.plan, False
        for wanted in (Plan(), self.against, plan):
            if wanted not in self.tried:
                self.tried[wanted] = self._predicted(wanted, self.device)
        self.answers.shown, self.answers.against = plan, self.against

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
        both, stopped = self.answers.together, STOPPED if self.stopped else ""
        if not both and self.shown not in self.measured:
            follows = stopped or self.lacks or what_follows(self.tried[self.shown])
            on = f" on {self.options['gpu']}" if "gpu" in self.options else ""
            return f"predicted for a {self.device.upper()} step{on}; {follows}"
        base, report = both or self.measured[self.shown][:1] * 2
        own = predicted = self.tried[self.shown]
        if report.peak_bytes != predicted.peak_bytes:
            own = self._predicted(self.shown, report.device)
        verified = verified_note(self.answers.verified.get(self.shown))
        note = measured_note(report, base, predicted, own) + verified
        return f"{note}; {stopped}".removesuffix("; ")

    @property
    def caution(self) -> str:
        """What is wrong with the plan, or not safe as far as the model is known."""
        found = self.ticks.inspection.hazards_of(self.shown)
        return cautious(self.answers.verified.get(self.shown), found)

    # The measurement ------------------------------------------------------------------

    @property
    def lacks(self) -> str:
        """Say that there is nothing to run; empty if there is."""
        return without_data(self.factory, self._given_batch)

    @property
    def measured_unasked(self) -> bool:
        """Whether the measurement of what is shown follows by itself."""
        if self.lacks or self.answers.together:
            return False
        return bearable(self.tried[self.shown], AUTO_FLOPS)

    def measuring(self) -> Generator[None, None, None]:
        """Measure what is ticked beside what it is compared with, a step a turn.

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
        compared = [one for one in (plan, self.against) if one.segments]
        plans = [*dict.fromkeys(compared), Plan()]
        how = {n: v for n, v in self.options.items() if n != "gpu"} | {"device": device}
        self.steps = len(plans) * steps_of_a_plan(device, REPEATS)
        self.steps += VERIFYING_STEPS * bool(plan.segments)
        reports = yield from measuring_plans(
            model, batch, plans, repeats=REPEATS, **how
        )
        if plan.segments:
            verified = yield from verifying_plan(model, batch, plan, **how)
        self.answers.take(plan, reports, verified)

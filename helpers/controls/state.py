"""What a lab knows, apart from its widgets: a model, and what each plan tried does.

``set`` takes sizes and ``plan`` ticks boxes; ``show`` answers them by a prediction at
once, and ``measuring`` by a measurement, one training step for each ``next``.
"""

import dataclasses
from collections.abc import Callable, Generator

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.controls._bearable import (
    AUTO_FLOPS,
    bearable,
    check_bearable,
    what_follows,
)
from helpers.controls._findings import finding, measured_note
from helpers.controls.ticks import Ticks, children_of, is_flat
from helpers.dry_run import meta_batch, meta_model
from helpers.inspection import inspect_model, kept_by_module
from helpers.measure import StepReport, measuring_plans, predict, random_numbers_kept
from helpers.models import uniform_mlp

NO_DATA = "this model has no data, so it cannot be measured"
REPEATS = 8

Pair = tuple[StepReport, StepReport]  # of a plan, and of no checkpointing


class LabState:
    """A model, its sizes, what is ticked in it, and what each plan tried does.

    Args:
        factory, batch, settings, device, tree: as in ``LayerLab``.
        options: further arguments of ``predict`` and ``measuring_plans``, by name.

    Attributes:
        values: the sizes that the reader may change: settings, and ``batch`` if it is a
            number of rows.
        model, batch: the present ones, on meta tensors.
        ticks: what is ticked and joined, with the inspection of the model.
        tried, measured: at these sizes, a prediction for each plan tried, and for each
            one measured its report and that of no checkpointing.
        shown: the plan that was answered last, which ``finding`` is about.
    """

    def __init__(
        self,
        factory: Callable[..., nn.Module] | nn.Module = uniform_mlp,
        batch: int | torch.Tensor | tuple | dict = 8192,
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
        self.shown, self.finding = Plan(), ""
        self.tried: dict[Plan, StepReport] = {}
        self.measured: dict[Plan, Pair] = {}
        self._by_key: dict[tuple, tuple[dict, dict]] = {}  # these two, for all sizes

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
        model = self._meta_model(settings)
        batch = self._input(model, values.get("batch"), "meta")
        if self.tree:
            found = inspect_model(model, batch, device=self.device, **self.options)
        else:
            found = children_of(model)
        self.ticks.fit(found)
        self.values, self.settings = values, settings
        self.model, self.batch = model, batch
        key = tuple(values.items())
        self.tried, self.measured = self._by_key.setdefault(key, ({}, {}))

    @property
    def plan(self) -> Plan:
        """What is ticked and joined; may be set."""
        return self.ticks.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        with checkpointed(self.model, plan):
            self.ticks.plan = plan  # unless the segments do not fit the model

    def _meta_model(self, settings: dict[str, object]) -> nn.Module:
        if isinstance(self.factory, nn.Module):
            return meta_model(self.factory)
        return meta_model(lambda: self.factory(**settings))

    def _has_depth(self) -> bool:
        """Say whether a model's children are more than layers; a failure is none."""
        try:
            return not is_flat(self._meta_model(self.settings))
        except Exception:
            return False  # which making it again will say

    def _input(self, model: nn.Module, rows: int | None, device: str) -> object:
        """Make the batch on a device: random rows, or what was given."""
        given = self._given_batch
        if not isinstance(given, int):
            return meta_batch(given) if device == "meta" else given
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
        self.shown = plan
        self.finding = finding(self.tried[Plan()], self.tried[plan])

    @property
    def history(self) -> list[StepReport]:
        """A report for every plan tried at these sizes, measured where it was."""
        return [self.measured.get(plan, [one])[0] for plan, one in self.tried.items()]

    def _predicted(self, plan: Plan, device: str) -> StepReport:
        try:
            return predict(self.model, self.batch, plan, device=device, **self.options)
        except (RuntimeError, ValueError):
            for hazard in self.ticks.inspection.hazards_of(plan):
                if hazard.kind == "in place":
                    raise ValueError(str(hazard)) from None
            raise

    @property
    def reports(self) -> Pair:
        """The predictions of no checkpointing and of this plan; timed if measured."""
        before, after = self.tried[Plan()], self.tried[self.shown]
        if self.shown not in self.measured:
            return before, after
        report, base = self.measured[self.shown]
        return _confirmed(before, base), _confirmed(after, report)

    @property
    def predictions(self) -> list[StepReport]:
        """Every plan tried: no checkpointing first, and this plan last."""
        order = {self.shown: 2, Plan(): 0}
        return sorted(self.tried.values(), key=lambda one: order.get(one.plan, 1))

    @property
    def kept(self) -> tuple[dict[str, int], dict[str, int]]:
        """What each module keeps, by name: under this plan, and without one."""
        pair = self.tried[self.shown], self.tried[Plan()]
        return tuple(kept_by_module(report.timeline) for report in pair)

    @property
    def note(self) -> str:
        """Where the numbers come from, and what becomes of the measurement."""
        if self.shown in self.measured:
            report, base = self.measured[self.shown]
            own = predicted = self.tried[self.shown]
            if report.peak_bytes != predicted.peak_bytes:
                own = self._predicted(self.shown, report.device)
            return measured_note(report, base, predicted, own)
        follows = what_follows(self.tried[self.shown]) if self.has_data else NO_DATA
        return f"predicted for a {self.device.upper()} step; {follows}"

    @property
    def caution(self) -> str:
        """What is not safe in the plan's segments, as far as the model is known."""
        found = self.ticks.inspection.hazards_of(self.shown)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f". Careful: {found[0]}{more}" if found else ""

    # The measurement ------------------------------------------------------------------

    @property
    def has_data(self) -> bool:
        """Whether there is anything to run: not for a model on the meta device."""
        return self.factory is not self.model

    @property
    def measured_unasked(self) -> bool:
        """Whether the measurement of what is shown follows by itself."""
        if not self.has_data or self.shown in self.measured:
            return False
        return bearable(self.tried[self.shown], AUTO_FLOPS)

    def measuring(self) -> Generator[None, None, None]:
        """Measure what is shown beside no checkpointing, a training step a turn."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.shown not in self.tried:
            self.show()  # which says why it could not be
        plan, measured, model = self.shown, self.measured, self.factory
        if not self.has_data:
            raise ValueError(NO_DATA)
        check_bearable(self.tried[plan], self.tried[Plan()], device)
        with random_numbers_kept():
            if not isinstance(model, nn.Module):
                model = self.factory(**self.settings)
            batch = self._input(model, self.values.get("batch"), device)
        plans = [plan, Plan()] if plan.segments else [plan]
        how = {"device": device, "repeats": REPEATS, **self.options}
        reports = yield from measuring_plans(model, batch, plans, **how)
        measured[plan] = (reports[0], reports[-1])


def _confirmed(prediction: StepReport, report: StepReport) -> StepReport:
    """Give a prediction the measured time, and the measurement's word for its bytes."""
    same = prediction.peak_bytes == report.peak_bytes
    return dataclasses.replace(
        prediction,
        source="measured" if same else "predicted",
        step_ms=report.step_ms,
        step_ms_quartiles=report.step_ms_quartiles,
        repeats=report.repeats,
    )

"""A memory budget on a slider, and a lab whose boxes follow it.

Each step of the slider is a point of the planner's front, so that it passes every plan
that is worth having. The front is found once for a model and its settings.
"""

import math
from operator import attrgetter

import ipywidgets as widgets

from helpers.checkpointing import Plan
from helpers.controls._bearable import PLANNED_A_SECOND
from helpers.controls._findings import added_work
from helpers.controls._look import BESIDE, sentence, status
from helpers.controls.lab import LayerLab
from helpers.measure import StepReport
from helpers.planner import InfeasibleBudget, Planner
from helpers.planner.best import whole_bytes
from helpers.plots import memory_unit
from helpers.units import format_bytes

POINTS = 100  # of the front at most: the steps of the slider


def _of_the_lab(*names: str) -> list[property]:
    return [property(attrgetter(f"lab.{name}")) for name in names]


class BudgetLab(widgets.HBox):
    """Choose a memory budget, and the boxes show the cheapest plan that fits.

    >>> lab = BudgetLab(batch=8192, settings={"depth": 8, "width": 1024})
    >>> lab.budget_bytes = 400 * 2**20
    >>> print(lab.plan)
    layer1+layer2+layer3+layer4

    Boxes may still be flipped by hand: the budget stays, and the sentence says whether
    the plan fits.

    Args:
        As in ``LayerLab``.

    Attributes:
        lab: the ``LayerLab``; its ``boxes``, ``plan`` and so on are here as well.
        front: ``(peak_bytes, recompute_flops, plan)``, the least peak first.
        slider: the place of a plan in ``front``.
        field: any budget, in the unit beside it.
        least: a button that takes the least budget that works.
        verdict: one sentence with budget, peak and cost, as in ``budget_finding``.
    """

    boxes, joins, history = _of_the_lab("boxes", "joins", "history")
    picture, readout, finding = _of_the_lab("picture", "readout", "finding")
    settings, controls, recorded = _of_the_lab("settings", "controls", "recorded")
    shortcuts, piece, rows = _of_the_lab("shortcuts", "piece", "rows")
    measure, measure_button, state = _of_the_lab("measure", "measure_button", "state")

    def __init__(self, *args, **kwargs) -> None:
        self.budget_finding, self.front = "", []
        self._front_of = self._planner = None  # the values that the front is of
        self._budget_bytes, self._unit_bytes = 0, 1
        self._planned, self._fits = Plan(), True
        self._follows = True  # whether the boxes show what was planned
        layout = {"flex": "1 1 300px", "max_width": "470px"}
        look = {"description": "budget", "layout": layout}
        self.slider = widgets.IntSlider(readout=False, max=0, disabled=True, **look)
        self.slider.style.description_width = "52px"
        look = {"step": 0.1, "disabled": True, "layout": {"width": "96px"}}
        look["tooltip"] = "budget"
        self.field = widgets.FloatText(**look)
        self.unit = widgets.Label(layout={"width": "36px"})
        look = {"description": "least", "layout": {"width": "170px"}}
        self.least = widgets.Button(disabled=True, **look)
        self.verdict = widgets.HTML().add_class("budget-lab-verdict")
        self.lab = LayerLab(*args, **kwargs)
        self.state.guard.modules_a_second = PLANNED_A_SECOND
        self._answered = {self.slider: 0, self.field: 0.0}  # their values, as answered
        for control in self._answered:
            control.observe(lambda _: self.lab.later(self._moved), "value")
        self.least.on_click(lambda _: self.lab.later(self._take_least))
        row = widgets.HBox([self.slider, self.field, self.unit, self.least])
        row.layout.align_items, row.layout.flex_flow = "center", "row wrap"
        lab = widgets.HBox(self.lab.children, layout=BESIDE)
        whole = widgets.VBox([row, self.verdict, lab])
        whole.layout.flex, whole.layout.min_width = "1", "0"
        super().__init__([whole])
        self.add_class("layer-lab").add_class("budget-lab")
        self.lab.on_shown, self.lab.limit = self._shown, self._limit
        if self.finding:
            self.lab.guarded(self._shown)

    @property
    def plan(self) -> Plan:
        """The plan that the boxes show; may be set."""
        return self.lab.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.lab.plan = plan

    @property
    def budget_bytes(self) -> int:
        """The budget; when it is set, the boxes follow."""
        return self._budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget_bytes: int) -> None:
        self.lab.guarded(lambda: self._take(budget_bytes))

    def _repr_mimebundle_(self, **kwargs) -> dict:
        own = super()._repr_mimebundle_(**kwargs)
        bundle = self.lab._repr_mimebundle_()
        said = self.budget_finding or bundle["text/plain"]
        return bundle | own | {"text/plain": said}

    # The budget -----------------------------------------------------------------------

    def _moved(self) -> None:
        """Answer slider and field where they are not as they were answered."""
        if self.slider.value != self._answered[self.slider]:
            self._answered[self.slider] = self.slider.value
            self._take_point(self.slider.value)
        if self.field.value != self._answered[self.field]:
            n_bytes = self.field.value * self._unit_bytes
            if not abs(n_bytes) < 2**60:  # no number, or none of any GPU
                self.field.value = self._answered[self.field]
                return
            self._answered[self.field] = self.field.value
            self._take(round(n_bytes))

    def _write(self, control: widgets.Widget, value: float) -> None:
        """Write into a control, unless it has been moved since it was last read."""
        if control.value == self._answered[control]:
            self._answered[control] = value
            control.value = value

    def _take_point(self, place: int) -> None:
        """Take a plan of the front, and for a budget its peak."""
        peak_bytes, _, plan = self.front[place]
        self._budget_bytes = round(self._in_units(peak_bytes) * self._unit_bytes)
        self._follow(plan)

    def _take_least(self) -> None:
        if self.front:
            self._take_point(0)
            self._write(self.slider, 0)

    def _take(self, budget_bytes: int) -> None:
        """Take any budget; if no plan fits, the boxes stay as they are."""
        if not self.front:
            return
        self._budget_bytes = budget_bytes = whole_bytes(budget_bytes)
        try:
            plan = self._planner.best(budget_bytes).plan
        except InfeasibleBudget:
            plan = None  # the sentence says what would do
        fitting = sum(peak_bytes <= budget_bytes for peak_bytes, _, _ in self.front)
        self._write(self.slider, max(fitting - 1, 0))
        self._follow(plan)

    def _follow(self, plan: Plan | None) -> None:
        self._fits = plan is not None
        self._planned = plan if self._fits else self.plan
        self.plan = self._planned
        self._write(self.field, self._in_units(self._budget_bytes))
        self._tell()

    def _in_units(self, n_bytes: int) -> float:
        """Give bytes in tenths of the field's unit, not below what they were.

        Half a byte less, because the field's own tenths are no whole bytes.
        """
        return math.ceil(10 * (n_bytes - 0.5) / self._unit_bytes) / 10

    # The lab's answer -----------------------------------------------------------------

    def _shown(self) -> None:
        """Plan anew if the lab shows another model, and judge what it shows."""
        if self.state.key != self._front_of:
            self._find_front()
            if self._follows:
                self._take(self._budget_bytes)
        self._tell()

    def _limit(self, report: StepReport) -> dict[str, object] | None:
        """Draw the budget, and say in the picture whether the plan fits."""
        over = report.peak_bytes > self._budget_bytes
        label = f"budget {format_bytes(self._budget_bytes)}"
        shown = {"bytes": self._budget_bytes, "over": over, "label": label}
        return shown if self.front else None

    def _find_front(self) -> None:
        """Plan for the present model; the budget stays, if there has been one."""
        state, first, self.front = self.state, self._front_of is None, []
        seconds = sum(1 for _ in state.model.modules()) / PLANNED_A_SECOND
        before = self.verdict.value
        if seconds > 1:
            self.verdict.value = status(f"planning, for some {seconds:.0f} s …")
        try:
            how = {"among": state.ticks.inspection.layers, "device": state.device}
            how |= {"tensors": True} | state.options  # as in the picture
            self._planner = planner = Planner(state.model, state.batch, **how)
            reports = planner.front(POINTS)
            self.front = [
                (it.peak_bytes, it.recompute_flops, it.plan) for it in reports
            ]
        except Exception as error:
            reason = f"no plan for a budget: {sentence(error)}"
            self.verdict.value = status(reason, wrong=True)
        except KeyboardInterrupt:
            self.verdict.value = before
            raise
        self._front_of = state.key
        for control in (self.slider, self.field, self.least):
            control.disabled = not self.front
        if self.front:
            self._set_scale()
            if first:
                self._budget_bytes = self.front[-1][0]

    def _set_scale(self) -> None:
        # MiB at most: within a tenth of a GiB there may be several plans.
        top_bytes = min(self.front[-1][0], 2**30 - 1)
        self._unit_bytes, self.unit.value = memory_unit(top_bytes)
        self.least.description = f"least: {format_bytes(self.front[0][0])}"
        last = len(self.front) - 1
        self._answered[self.slider] = min(self._answered[self.slider], last)
        self.slider.max = last

    def _tell(self) -> None:
        """Say what the boxes do to the budget; not while they are ahead of the lab."""
        report = {report.plan: report for report in self.history}.get(self.plan)
        if self.front and report is not None:
            self._follows = report.plan == self._planned
            self.budget_finding = self._sentence(report)
            self.verdict.value = status(self.budget_finding)

    def _sentence(self, report: StepReport) -> str:
        budget = format_bytes(self._budget_bytes)
        if not self._fits:
            least = format_bytes(self.front[0][0])
            return f"budget {budget}: no plan fits; the least that works is {least}"
        peak, spare = report.peak_bytes, self._budget_bytes - report.peak_bytes
        work = added_work(report, report.recompute_flops)
        best = "the cheapest plan that fits"
        if self._follows:
            return f"budget {budget}: {best} peaks at {format_bytes(peak)}, {work}"
        fits = "fits" if spare >= 0 else f"is {format_bytes(-spare)} too much"
        planned = added_work(report, self._planner.cost(self._planned))
        by_hand = f"by hand, peak {format_bytes(peak)} {fits}, {work}"
        return f"budget {budget}: {by_hand}; {best}: {planned}"

"""A memory budget on a slider, and a lab whose boxes follow it.

Each step of the slider is a point of the planner's front, so that it passes every plan
that is worth having. The front is found once for a model and its settings.
"""

import html
import math

import ipywidgets as widgets

from helpers.checkpointing import Plan
from helpers.controls.lab import LayerLab
from helpers.controls.rows import wide
from helpers.measure import StepReport
from helpers.planner import InfeasibleBudget, best_plan, pareto, profile
from helpers.plots._axes import memory_unit
from helpers.units import format_bytes, format_change

POINTS = 100  # of the front at most: the steps of the slider


class BudgetLab(LayerLab):
    """Choose a memory budget, and the boxes show the cheapest plan that fits.

    Boxes may still be flipped by hand: the budget stays, and the sentence says whether
    the plan fits.

    Args:
        As in ``LayerLab``.

    Attributes:
        front: ``(peak_bytes, recompute_flops, plan)``, the least peak first.
        slider: the place of a plan in ``front``.
        field: any budget, in the unit beside it.
        least: a button that takes the least budget that works.
        verdict: one sentence with budget, peak and cost; ``budget_finding`` is its
            text.
    """

    def __init__(self, *args, **kwargs) -> None:
        self.budget_finding, self.front = "", []
        self._front_key = self._chain = None  # what the front is of
        self._budget_bytes, self._unit_bytes = 0, 1
        self._planned, self._fits = Plan(), True
        self._follows = True  # whether the boxes show what was planned
        look = {"description": "budget", "layout": wide(470)}
        self.slider = widgets.IntSlider(readout=False, max=0, **look)
        self.slider.style.description_width = "52px"
        self.field = widgets.FloatText(step=0.1, layout=wide(96))
        self.unit = widgets.Label(layout=wide(36))
        self.least = widgets.Button(layout=wide(170))
        self.verdict = widgets.HTML().add_class("budget-lab-verdict")
        self._place, self._typed = 0, 0.0  # of slider and field, as answered
        for control in (self.slider, self.field):
            control.observe(lambda _: self._later(self._moved), "value")
        self.least.on_click(lambda _: self._later(self._take_least))
        super().__init__(*args, **kwargs)
        row = widgets.HBox([self.slider, self.field, self.unit, self.least])
        row.layout.align_items = "center"
        lab = widgets.HBox(self.children)
        self.children = [widgets.VBox([row, self.verdict, lab], layout={"flex": "1"})]
        self.add_class("budget-lab")

    @property
    def budget_bytes(self) -> int:
        """The budget; when it is set, the boxes follow."""
        return self._budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget_bytes: int) -> None:
        self._guarded(lambda: self._take(budget_bytes))

    def _repr_mimebundle_(self, **kwargs) -> dict:
        bundle = super()._repr_mimebundle_(**kwargs)
        return bundle | {"text/plain": self.budget_finding}

    # The budget -----------------------------------------------------------------------

    def _moved(self) -> None:
        """Answer slider and field where they are not as they were answered."""
        if self.slider.value != self._place:
            self._place = self.slider.value
            self._take_point(self._place)
        if self.field.value != self._typed:
            self._typed = self.field.value
            self._take(round(self._typed * self._unit_bytes))

    def _take_point(self, place: int) -> None:
        """Take a plan of the front, and for a budget its peak."""
        peak_bytes, _, plan = self.front[place]
        self._budget_bytes = round(self._in_units(peak_bytes) * self._unit_bytes)
        self._follow(plan)

    def _take_least(self) -> None:
        self._take_point(0)
        self._move_slider(0)

    def _take(self, budget_bytes: int) -> None:
        """Take any budget; if no plan fits, the boxes stay as they are."""
        if not self.front:
            return
        self._budget_bytes = budget_bytes
        try:
            plan = best_plan(self._chain, budget_bytes)
        except InfeasibleBudget:
            plan = None  # the sentence says what would do
        fitting = sum(peak_bytes <= budget_bytes for peak_bytes, _, _ in self.front)
        self._move_slider(max(fitting - 1, 0))
        self._follow(plan)

    def _follow(self, plan: Plan | None) -> None:
        self._fits = plan is not None
        self._planned = plan if self._fits else self.plan
        self.plan = self._planned
        self._show_in_field()
        self._tell()

    # A control is written only if nobody has moved it since it was last read.

    def _move_slider(self, place: int) -> None:
        if self.slider.value == self._place:
            self._place = place
            self.slider.value = place

    def _show_in_field(self) -> None:
        if self.field.value == self._typed:
            self._typed = self._in_units(self._budget_bytes)
            self.field.value = self._typed

    def _in_units(self, n_bytes: int) -> float:
        """Give bytes in tenths of the field's unit, not below what they were.

        Half a byte less, because the field's own tenths are no whole bytes.
        """
        return math.ceil(10 * (n_bytes - 0.5) / self._unit_bytes) / 10

    # The lab's answer -----------------------------------------------------------------

    def _draw(self) -> None:
        """Draw the lab, and plan anew if it shows another model."""
        super()._draw()
        if self._key() != self._front_key:
            self._find_front()
            if self._follows:
                self._take(self._budget_bytes)
        self._tell()

    def _find_front(self) -> None:
        """Plan for the present model; the budget stays, if there has been one."""
        first, self._front_key = self._front_key is None, self._key()
        try:
            self._chain = profile(
                self._model, self._meta_batch, loss=self._loss, device=self._device
            )
        except ValueError as error:
            self.front = []
            self._say_verdict(str(error).splitlines()[0], wrong=True)
        else:
            self.front = pareto(self._chain, POINTS)
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
        self._place = min(self._place, len(self.front) - 1)
        self.slider.max = len(self.front) - 1

    def _tell(self) -> None:
        """Say what the boxes do to the budget; not while they are ahead of the lab."""
        reports = {report.plan: report for report in self.history}
        report = reports.get(self.plan)
        if self.front and report is not None:
            self._follows = report.plan == self._planned
            self.budget_finding = self._sentence(report)
            self._say_verdict(self.budget_finding)

    def _sentence(self, report: StepReport) -> str:
        budget = format_bytes(self._budget_bytes)
        if not self._fits:
            least = format_bytes(self.front[0][0])
            return f"budget {budget}: no plan fits; the least that works is {least}"
        peak, spare = report.peak_bytes, self._budget_bytes - report.peak_bytes
        extra = _extra(report, report.recompute_flops)
        best = "the cheapest plan that fits"
        if self._follows:
            return f"budget {budget}: {best} peaks at {format_bytes(peak)}, {extra}"
        fits = "fits" if spare >= 0 else f"is {format_bytes(-spare)} too much"
        planned = _extra(report, self._chain.recompute_cost(self._planned))
        by_hand = f"by hand, peak {format_bytes(peak)} {fits}, {extra}"
        return f"budget {budget}: {by_hand}; {best}: {planned}"

    def _say_verdict(self, text: str, wrong: bool = False) -> None:
        color = "#B00020" if wrong else "inherit"
        self.verdict.value = (
            f'<div role="status" aria-live="polite" style="color:{color};'
            f'font-size:14px;line-height:1.4">{html.escape(text)}</div>'
        )


def _extra(report: StepReport, recompute_flops: int) -> str:
    """Say what recomputing adds to a step, three forward passes, as the lab does."""
    step_flops = 3 * report.forward_flops
    return f"step {format_change(step_flops + recompute_flops, step_flops)} FLOPs"

"""The lab: a checkbox for each layer, and a picture of what each flip does.

A flip is answered by a prediction at once. The measurement follows one training step
at a time on the kernel's own event loop, so that it never runs beside a cell (they
would share the random numbers), and the next flip waits for one step at most.
"""

import base64
import dataclasses
import html
import threading
from collections.abc import Callable, Generator

import ipywidgets as widgets
import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.controls._findings import finding
from helpers.controls._idle import IdleWork
from helpers.controls._module_rows import ModuleRows
from helpers.controls._picture import HEIGHT, WIDTH, LabPicture, smaller
from helpers.controls._recorded import RecordedChoice
from helpers.controls.rows import SILENT_ICONS, LayerRows, is_flat, wide
from helpers.dry_run import meta_batch, meta_model
from helpers.inspection import inspect_model
from helpers.measure import (
    Loss,
    StepReport,
    measuring_plans,
    memory_bytes,
    predict,
    random_numbers_kept,
    too_large,
)
from helpers.models import ACTIVATIONS, uniform_mlp
from helpers.units import format_bytes, format_change, format_flops, format_ms

AUTO_FLOPS = 4 * 10**9  # a CPU step of some 100 ms or less: measured unasked
CPU_FLOPS = 60 * 10**9  # … of some seconds: measured on the button; not above
REPEATS = 8


class LayerLab(widgets.HBox):
    """Flip layers' boxes and see peak memory and iteration time change.

    Args:
        model_factory: makes the model, from ``settings`` as keyword arguments.
        batch: rows of a random input, which the reader may change; or a tensor ``x``,
            a dict of keyword arguments, or ``(x, target)``, which stay.
        settings: what the reader may change of the model, with its first value.
        device: whose step is predicted.
        loss: as in ``predict``.
        tree: whether the rows are the model's modules as a tree, instead of its
            children; default: if its children are more than layers of a chain.

    Attributes:
        boxes: a checkbox for each layer, by name.
        joins: a toggle for each layer that can share a segment with the one before;
            it counts when both are ticked.
        recorded: a dropdown of GPUs that have measured this model at this size; it is
            hidden where none has.
        picture, readout: the picture, and one sentence with the finding.
        finding: that sentence as text, from the prediction.
    """

    def __init__(
        self,
        model_factory: Callable[..., nn.Module] | nn.Module = uniform_mlp,
        batch: int | torch.Tensor | tuple | dict = 8192,
        settings: dict[str, object] | None = None,
        device: str = "cuda",
        loss: Loss | None = None,
        tree: bool | None = None,
    ) -> None:
        self._factory, self._batch, self._device = model_factory, batch, device
        self._loss, self._inspection = loss, None
        self.finding = ""
        self._tried: dict[tuple, dict[Plan, StepReport]] = {}
        self._measured: dict[tuple, dict[Plan, tuple[StepReport, StepReport]]] = {}
        # What is shown; clicks come on other threads, so the controls may be ahead.
        self._good: dict[str, object] = {}  # the controls' last usable values
        self._shown = Plan()
        self._pending: Callable | None = None
        self._work = IdleWork(self._guarded)
        self._drawer, self._png = LabPicture(), b""
        if tree is None:
            tree = self._wants_tree(settings or {})
        kind = ModuleRows if tree else LayerRows
        self._rows = kind(lambda: self._later(self._show))
        self.controls = self._make_controls(settings or {})
        self.shortcuts, shortcut_rows = self._make_shortcuts()
        self.measure_button = widgets.Button(
            description="Measure", icon="clock-o", layout=wide(216)
        )
        self.measure_button.on_click(lambda _: self._later(self._toggle_measuring))
        self.recorded = RecordedChoice(lambda: self._later(self._draw))
        self.picture = widgets.HTML().add_class("layer-lab-picture")
        self.readout = widgets.HTML().add_class("layer-lab-readout")
        icons = widgets.HTML(f"<style>{SILENT_ICONS}</style>")
        icons.layout.display = "none"
        left = [*self.controls.values(), shortcut_rows, self._rows]
        left += [self.measure_button, self.recorded, icons]
        right = [self.picture, self.readout]
        super().__init__(
            [
                widgets.VBox(left, layout=wide(336 if tree else 252, flex="0 0 auto")),
                widgets.VBox(right, layout=widgets.Layout(flex="1 1", min_width="0")),
            ]
        )
        self.add_class("layer-lab")
        self._guarded(self._rebuild)

    # What the reader sets, and gets ---------------------------------------------------

    @property
    def boxes(self) -> dict[str, widgets.Checkbox]:
        return self._rows.boxes

    @property
    def joins(self) -> dict[str, widgets.ToggleButton]:
        return self._rows.joins

    @property
    def plan(self) -> Plan:
        """The plan that the boxes and joins show; may be set."""
        return self._rows.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        with checkpointed(self._model, plan):
            self._rows.plan = plan  # unless the segments do not fit the model
        self._guarded(self._show)

    @property
    def settings(self) -> dict[str, object]:
        """What the reader has chosen for the model, by name."""
        return {name: value for name, value in self._good.items() if name != "batch"}

    @property
    def history(self) -> list[StepReport]:
        """A report for every plan tried at these settings, measured where it was."""
        key = self._key()
        measured = {plan: pair[0] for plan, pair in self._measured.get(key, {}).items()}
        tried = self._tried.get(key, {})
        return [measured.get(plan, report) for plan, report in tried.items()]

    def measure(self) -> StepReport:
        """Measure the present plan and no checkpointing now, and show the result."""
        if self.plan != self._shown:
            self._show()
        self._work.run(self._measurement())
        return self._measured[self._key()][self._shown][0]

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """Show the panel; where there are no widgets, its picture or its sentence."""
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = self.finding
        if self._png:
            bundle["image/png"] = base64.b64encode(smaller(self._png)).decode()
        return bundle

    # How it is built ------------------------------------------------------------------

    def _make_controls(self, settings: dict[str, object]) -> dict[str, widgets.Widget]:
        values = dict(settings)
        if isinstance(self._batch, int):
            values["batch"] = self._batch
        controls = {}
        for name, value in values.items():
            look = {"value": value, "description": name, "layout": wide(216)}
            if value in ACTIVATIONS:
                control = widgets.Dropdown(options=list(ACTIVATIONS), **look)
            elif isinstance(value, float):
                control = widgets.FloatText(step=0.1, **look)
            else:
                control = widgets.IntText(**look)
            control.style.description_width = "76px"
            control.observe(lambda _: self._later(self._rebuild), "value")
            controls[name] = control
        return controls

    def _make_shortcuts(self) -> tuple[dict[str, widgets.Button], widgets.VBox]:
        look = {"description": "of", "layout": wide(84, margin="1px")}
        self.piece = widgets.BoundedIntText(2, min=1, max=999, **look)
        self.piece.style.description_width = "24px"
        plans = {
            "none": Plan,
            "each alone": lambda: Plan.alone(self._rows.units),
            "all joined": lambda: self._rows.pieces(len(self._rows.units)),
            "pieces": lambda: self._rows.pieces(self.piece.value),
        }
        buttons = {}
        for text, plan in plans.items():
            pixels = 60 if text == "none" else 76
            look = wide(pixels, margin="1px", padding="0")
            button = widgets.Button(description=text, layout=look)
            button.on_click(lambda _, plan=plan: self._apply(plan()))
            buttons[text] = button
        *first, pieces = buttons.values()
        rows = [widgets.HBox(first), widgets.HBox([pieces, self.piece])]
        return buttons, widgets.VBox(rows, layout=widgets.Layout(margin="4px 0"))

    def _apply(self, plan: Plan) -> None:
        """Set boxes and joins now, before the next click; answer when it is time."""
        self._rows.plan = plan
        self._later(self._show)

    def _rebuild(self) -> None:
        """Take over the present settings; if no model can have them, go back."""
        self._work.stop()
        wanted = {name: control.value for name, control in self.controls.items()}
        try:
            self._make_model(wanted)
        except Exception:
            for name, value in self._good.items():
                self.controls[name].value = value
            raise
        self._good = wanted
        self._find_recorded()
        self._show()

    def _make_model(self, wanted: dict[str, object]) -> None:
        for name, value in wanted.items():
            if isinstance(value, int) and not 1 <= value < 2**31:
                raise ValueError(
                    f"{name} must be a whole number from 1 up, not {value:,}"
                )
        settings = dict(wanted)
        rows = settings.pop("batch", None)
        model = self._meta_model(settings)
        batch = self._input(model, rows, "meta")
        inspection = None
        if isinstance(self._rows, ModuleRows):
            inspection = inspect_model(
                model, batch, loss=self._loss, device=self._device
            )
        self._rows.rebuild(model, inspection)
        self._model, self._meta_batch, self._inspection = model, batch, inspection

    def _find_recorded(self) -> None:
        """Look for what GPUs have measured of this model, where its step is theirs."""
        theirs = self._device == "cuda" and self._loss is None
        rows = self._good.get("batch") if theirs else None
        self.recorded.find(self._factory, self.settings, rows)

    def _meta_model(self, settings: dict[str, object]) -> nn.Module:
        if isinstance(self._factory, nn.Module):
            return meta_model(self._factory)
        return meta_model(lambda: self._factory(**settings))

    def _wants_tree(self, settings: dict[str, object]) -> bool:
        """Say whether a model's children are more than layers; a failure is no tree."""
        try:
            return not is_flat(self._meta_model(settings))
        except Exception:
            return False  # which making it again will say

    def _input(self, model: nn.Module, rows: int | None, device: str) -> object:
        """Make the batch on a device: random rows, or what was given."""
        if not isinstance(self._batch, int):
            return meta_batch(self._batch) if device == "meta" else self._batch
        linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
        if linear is None:
            raise ValueError("give a tensor as batch: this model has no Linear layer")
        return torch.randn(rows, linear.in_features, device=device)

    def _key(self) -> tuple:
        return tuple(self._good.items())

    # A flip ---------------------------------------------------------------------------

    def _later(self, work: Callable[[], None]) -> None:
        """Run work on the main thread: JupyterLab delivers clicks on others.

        While a cell runs, it waits for the cell; a burst of flips is answered once.
        """
        loop = self._work.loop
        if loop is None or threading.current_thread() is threading.main_thread():
            self._guarded(work)
        elif work != self._pending:
            self._pending = work
            loop.call_soon_threadsafe(self._run_pending, work)

    def _run_pending(self, work: Callable[[], None]) -> None:
        self._pending = None
        self._guarded(work)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run work; a failure is one sentence in the panel, not a traceback."""
        try:
            work()
        except Exception as error:
            self._work.stop()
            first_line, *_ = str(error).splitlines() or [type(error).__name__]
            self._say(first_line, wrong=True)
        except KeyboardInterrupt:
            self._work.stop()
            self._say("stopped; flip a box to go on", wrong=True)

    def _show(self) -> None:
        """Predict the present plan, draw it, and let the measurement follow."""
        self._work.stop()
        plan = self._shown = self.plan
        tried = self._tried.setdefault(self._key(), {})
        for wanted in (Plan(), plan):
            if wanted not in tried:
                tried[wanted] = self._predicted(wanted, self._device)
        self._draw()
        known = plan in self._measured.get(self._key(), {})
        if self._work.loop and not known and self._bearable(AUTO_FLOPS):
            self._work.start(self._measurement(), delay_s=0.4)

    def _predicted(self, plan: Plan, device: str) -> StepReport:
        try:
            return predict(
                self._model, self._meta_batch, plan, loss=self._loss, device=device
            )
        except RuntimeError:
            found = self._inspection.hazards_of(plan) if self._inspection else []
            for hazard in found:
                if hazard.kind == "in place":
                    raise ValueError(str(hazard)) from None
            raise

    def _draw(self) -> None:
        plan, key = self._shown, self._key()
        tried, measured = self._tried[key], self._measured.get(key, {})
        before, after = tried[Plan()], tried[plan]
        self.finding, note = finding(before, after), self._predicted_note()
        if plan in measured:
            report, base = measured[plan]
            before, after = _confirmed(before, base), _confirmed(after, report)
            note = self._measured_note(report, base)
        kept = [self._rows.kept(report.timeline) for report in (after, before)]
        self._rows.show_kept(plan, *kept)
        others = [
            report for other, report in tried.items() if other not in (plan, Plan())
        ]
        shown = [tried[Plan()], *others, *[tried[plan]] * bool(plan.segments)]
        self._png = self._drawer.draw(
            before, after, shown, list(measured.values()), self.recorded.pairs
        )
        self._say(self.finding, note + self.recorded.note(plan) + self._caution(plan))
        source = base64.b64encode(self._png).decode()
        self.picture.value = (
            f'<img alt="{html.escape(self.finding)}" width="{WIDTH}" '
            f'style="max-width:100%;height:auto;aspect-ratio:{WIDTH}/{HEIGHT}" '
            f'src="data:image/png;base64,{source}">'
        )

    def _say(self, text: str, note: str = "", wrong: bool = False) -> None:
        color = "#B00020" if wrong else "inherit"
        if note:
            note = f'<br><span style="opacity:.75">{html.escape(note)}</span>'
        self.readout.value = (
            f'<div role="status" aria-live="polite" style="color:{color};'
            f'font-size:14px;line-height:1.4">{html.escape(text)}{note}</div>'
        )

    def _caution(self, plan: Plan) -> str:
        """Say what is not safe in a plan's segments, where the modules are known."""
        found = self._inspection.hazards_of(plan) if self._inspection else []
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f". Careful: {found[0]}{more}" if found else ""

    def _predicted_note(self) -> str:
        note = f"predicted for a {self._device.upper()} step"
        if self._bearable(AUTO_FLOPS):
            return f"{note}; the measurement follows"
        if self._bearable(CPU_FLOPS):
            return f"{note}; Measure runs it on this CPU"
        if self._factory is self._model:
            return f"{note}; this model has no data, so it cannot be measured"
        size = format_flops(self._step_flops())
        return f"{note}; {size} are too much to measure on this CPU"

    # The measurement ------------------------------------------------------------------

    def _step_flops(self) -> int:
        report = self._tried[self._key()][self._shown]
        return 3 * report.forward_flops + report.recompute_flops

    def _bearable(self, flops: int) -> bool:
        if self._factory is self._model:  # on the meta device: there is nothing to run
            return False
        return torch.cuda.is_available() or self._step_flops() <= flops

    def _toggle_measuring(self) -> None:
        if self._work.active:
            self._work.stop()
            self._say(self.finding, "measurement stopped")
        else:
            self._work.start(self._measurement())

    def _measurement(self) -> Generator[None, None, None]:
        """Measure the present plan beside no checkpointing, a training step a turn."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        plan, key = self._shown, self._key()
        self._check_bearable(device)
        model = self._factory
        with random_numbers_kept():
            if not isinstance(model, nn.Module):
                model = self._factory(**self.settings)
            batch = self._input(model, self._good.get("batch"), device)
        self.measure_button.description = "Stop"
        self._say(self.finding, "measuring …")
        try:
            reports = yield from measuring_plans(
                model,
                batch,
                [plan, Plan()] if plan.segments else [plan],
                loss=self._loss,
                device=device,
                repeats=REPEATS,
            )
        finally:
            self.measure_button.description = "Measure"
        self._measured.setdefault(key, {})[plan] = (reports[0], reports[-1])
        self._draw()

    def _check_bearable(self, device: str) -> None:
        if self._factory is self._model:
            raise ValueError("this model has no data, so it cannot be measured")
        if not self._bearable(CPU_FLOPS):
            raise ValueError(
                f"one step of this size is {format_flops(self._step_flops())}, too "
                "much for this CPU: take a batch or a width that needs at most "
                f"{format_flops(CPU_FLOPS)}, or a GPU; the prediction holds without it"
            )
        needed_bytes = self._tried[self._key()][Plan()].allocator_peak_bytes
        if needed_bytes > memory_bytes(device):
            raise MemoryError(too_large(device, needed_bytes))

    def _measured_note(self, report: StepReport, base: StepReport) -> str:
        """Say what was measured, where, and whether it is what was predicted."""
        place, device = "this CPU", report.device
        if device == "cuda":
            place = torch.cuda.get_device_name()
        predicted = self._tried[self._key()][report.plan]
        word = "as predicted"
        if report.peak_bytes != predicted.peak_bytes:
            predicted = self._predicted(report.plan, device)
            word = f"predicted: {format_bytes(predicted.peak_bytes)}"
            if report.peak_bytes == predicted.peak_bytes:
                word = f"as predicted for a {device.upper()} (dropout masks differ)"
        note = f"measured on {place}: {format_bytes(report.peak_bytes)}, {word}"
        if report.scratch_bytes:
            note += f", {format_bytes(report.scratch_bytes)} of kernels' scratch on top"
        note += f"; step {format_ms(report.step_ms)}"
        if report.plan.segments:
            note += f" ({format_change(report.step_ms, base.step_ms)})"
        return f"{note}, median of {report.repeats} runs"


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

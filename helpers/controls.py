"""The lab: a checkbox for each layer, and a picture of what each flip does.

A flip is answered by a prediction at once. The measurement follows one training step
at a time on the kernel's own event loop, so that it never runs beside a cell (they
would share the random numbers), and the next flip waits for one step at most.
"""

import asyncio
import base64
import dataclasses
import html
import threading
from collections.abc import Callable

import ipywidgets as widgets
import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed, follows, layer_names
from helpers.dry_run import meta_batch, meta_model
from helpers.measure import measuring_plans, predict
from helpers.models import ACTIVATIONS, uniform_mlp
from helpers.picture import HEIGHT, WIDTH, LabPicture
from helpers.plots import COLORS
from helpers.report import StepReport
from helpers.step import memory_bytes, too_large
from helpers.units import format_bytes, format_change, format_flops, format_ms

AUTO_FLOPS = 4 * 10**9  # a CPU step of some 100 ms or less: measured unasked
CPU_FLOPS = 60 * 10**9  # … some seconds: measured on the button; not above
REPEATS = 8
INT_LIMIT = 2**31


class LayerLab(widgets.HBox):
    """Flip layers' boxes and see peak memory and iteration time change.

    Args:
        model_factory: makes the model, from ``settings`` as keyword arguments.
        batch: rows of a random input, which the reader may change; or a tensor ``x``,
            or ``(x, target)``, which stay.
        settings: what the reader may change of the model, with its first value.
        device: whose step is predicted.

    Attributes:
        boxes: a checkbox for each layer, by name.
        joins: a toggle for each layer that can share a segment with the one before;
            it counts when both are ticked.
        picture, readout: the picture, and one sentence with the finding.
    """

    def __init__(
        self,
        model_factory: Callable[..., nn.Module] | nn.Module = uniform_mlp,
        batch: int | torch.Tensor | tuple = 8192,
        settings: dict[str, object] | None = None,
        device: str = "cuda",
    ) -> None:
        self._factory, self._batch, self._device = model_factory, batch, device
        self.boxes: dict[str, widgets.Checkbox] = {}
        self.joins: dict[str, widgets.ToggleButton] = {}
        self.finding = ""
        self._busy = False  # while the panel sets its own controls
        self._pending = self._measuring = self._timer = None
        self._good: dict[str, object] = {}  # the controls' last usable values
        self._tried: dict[tuple, dict[Plan, StepReport]] = {}
        self._measured: dict[tuple, dict[Plan, tuple[StepReport, StepReport]]] = {}
        self._drawer, self._png = LabPicture(), b""
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._controls = self._make_controls(settings or {})
        self._rows = widgets.VBox(layout=widgets.Layout(width="auto"))
        self.picture = widgets.HTML(layout=widgets.Layout(width="auto"))
        self.picture.add_class("layer-lab-picture")
        self.readout = widgets.HTML(layout=widgets.Layout(width="auto"))
        self.readout.add_class("layer-lab-readout")
        self.measure_button = widgets.Button(
            description="Measure", icon="clock-o", layout=_wide(216)
        )
        self.measure_button.on_click(lambda _: self._later(self._toggle_measuring))
        left = [*self._controls.values(), self._make_shortcuts(), self._rows]
        super().__init__(
            [
                widgets.VBox(
                    [*left, self.measure_button],
                    layout=widgets.Layout(width="252px", flex="0 0 auto"),
                ),
                widgets.VBox(
                    [self.picture, self.readout],
                    layout=widgets.Layout(flex="1 1 auto", min_width="0"),
                ),
            ]
        )
        self.add_class("layer-lab")
        self._guarded(self._rebuild)

    # What the reader sets -----------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan that the boxes and joins show; may be set."""
        segments: list[tuple[str, ...]] = []
        before = None
        for name, box in self.boxes.items():
            if box.value:
                joined = name in self.joins and self.joins[name].value
                if joined and segments and segments[-1][-1] == before:
                    segments[-1] += (name,)
                else:
                    segments.append((name,))
            before = name
        return Plan(tuple(segments))

    @plan.setter
    def plan(self, plan: Plan) -> None:
        unknown = [name for name in plan.names if name not in self.boxes]
        if unknown:
            raise ValueError(
                f"the lab has no box for {', '.join(map(repr, unknown))}; it has: "
                f"{', '.join(self.boxes)}"
            )
        with checkpointed(self._model, plan):
            pass  # says what is wrong with the segments, if anything is
        joined = {name for segment in plan.segments for name in segment[1:]}
        self._busy = True
        for name, box in self.boxes.items():
            box.value = name in plan.names
        for name, join in self.joins.items():
            join.value = name in joined
        self._busy = False
        self._guarded(self._show)

    @property
    def settings(self) -> dict[str, object]:
        """What the reader has chosen for the model, by name."""
        return {
            name: control.value
            for name, control in self._controls.items()
            if name != "batch"
        }

    @property
    def history(self) -> list[StepReport]:
        """A report for every plan tried at these settings, measured where it was."""
        key = self._key()
        measured = {plan: pair[0] for plan, pair in self._measured.get(key, {}).items()}
        tried = self._tried.get(key, {})
        return [measured.get(plan, report) for plan, report in tried.items()]

    def measure(self) -> StepReport:
        """Measure the present plan and no checkpointing, and show the result."""
        self._stop_measuring()
        try:
            self._start_measuring()
            while self._measuring:
                self._advance()
        finally:
            self._stop_measuring()
        return self._measured[self._key()][self.plan][0]

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """Show the panel; where there are no widgets, its picture or its sentence."""
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = self.finding
        if self._png:
            bundle["image/png"] = base64.b64encode(self._png).decode()
        return bundle

    # How it is built ----------------------------------------------------------------

    def _make_controls(self, settings: dict[str, object]) -> dict[str, widgets.Widget]:
        values = dict(settings)
        if isinstance(self._batch, int):
            values["batch"] = self._batch
        controls = {}
        for name, value in values.items():
            style = {"description": name, "layout": _wide(216)}
            if value in ACTIVATIONS:
                control = widgets.Dropdown(options=list(ACTIVATIONS), value=value)
            elif isinstance(value, float):
                control = widgets.FloatText(value=value, step=0.1)
            else:
                control = widgets.IntText(value=value)
            for trait, setting in style.items():
                setattr(control, trait, setting)
            control.style.description_width = "76px"
            control.observe(lambda _: self._later(self._rebuild), "value")
            controls[name] = control
        return controls

    def _make_shortcuts(self) -> widgets.VBox:
        def button(text: str, plan: Callable[[], Plan], tooltip: str, width: int):
            made = widgets.Button(description=text, tooltip=tooltip)
            made.layout = _wide(width, margin="1px", padding="0")
            made.on_click(lambda _: self._later(lambda: setattr(self, "plan", plan())))
            return made

        self.piece = widgets.BoundedIntText(
            2, min=1, max=999, layout=_wide(52, margin="1px")
        )
        self.piece.tooltip = "layers in a piece"
        self.shortcuts = {
            "none": button("none", Plan, "checkpoint nothing", 60),
            "each alone": button(
                "each alone",
                lambda: Plan.alone(self.boxes),
                "a segment for each layer",
                76,
            ),
            "all joined": button(
                "all joined",
                lambda: self._pieces(len(self.boxes)),
                "all layers in one segment",
                76,
            ),
            "pieces of": button(
                "pieces of",
                lambda: self._pieces(self.piece.value),
                "segments of so many layers",
                76,
            ),
        }
        first, second = list(self.shortcuts.values())[:3], self.shortcuts["pieces of"]
        return widgets.VBox(
            [widgets.HBox(first), widgets.HBox([second, self.piece])],
            layout=widgets.Layout(margin="4px 0"),
        )

    def _pieces(self, size: int) -> Plan:
        """Cut the layers into segments of ``size``, where they are a chain."""
        segments: list[tuple[str, ...]] = []
        for name in self.boxes:
            if segments and name in self.joins and len(segments[-1]) < size:
                segments[-1] += (name,)
            else:
                segments.append((name,))
        return Plan(tuple(segments))

    def _rebuild(self) -> None:
        """Take over the present settings; if no model can have them, go back."""
        self._stop_measuring()
        try:
            self._make_model()
        except Exception:
            self._busy = True
            for name, value in self._good.items():
                self._controls[name].value = value
            self._busy = False
            raise
        self._good = {name: control.value for name, control in self._controls.items()}
        self._show()

    def _make_model(self) -> None:
        """Make the model of the present settings, and a row for each of its layers."""
        for name, control in self._controls.items():
            _check_size(name, control.value)
        settings = self.settings
        if isinstance(self._factory, nn.Module):
            model = meta_model(self._factory)
        else:
            model = meta_model(lambda: self._factory(**settings))
        names = layer_names(model)
        if not names:
            raise ValueError(
                "this model has no layers to tick: none of its children has parameters"
            )
        self._model, self._meta_batch = model, self._input(model, "meta")
        if names != list(self.boxes):
            self._make_rows(names)

    def _make_rows(self, names: list[str]) -> None:
        ticked = {name for name, box in self.boxes.items() if box.value}
        joined = {name for name, join in self.joins.items() if join.value}
        self.boxes.clear()
        self.joins.clear()
        self._kept = {}
        rows = []
        for before, name in zip([None, *names], names, strict=False):
            box = widgets.Checkbox(
                name in ticked, description=name, indent=False, layout=_wide(76)
            )
            box.observe(lambda _: self._later(self._show), "value")
            self.boxes[name] = box
            kept = widgets.HTML(layout=widgets.Layout(width="auto", margin="0 0 0 4px"))
            self._kept[name] = kept
            join: widgets.Widget = widgets.Box(layout=_wide(30))
            if before and follows(self._model, before, name):
                join = widgets.ToggleButton(
                    name in joined, icon="link", tooltip=f"one segment with {before}"
                )
                join.layout = _wide(30, height="22px", padding="0", margin="3px 0")
                join.observe(lambda _: self._later(self._show), "value")
                self.joins[name] = join
            row = widgets.HBox([join, box, kept])
            row.layout = widgets.Layout(align_items="center", height="28px")
            rows.append(row)
        self._rows.children = rows

    def _input(self, model: nn.Module, device: str) -> object:
        """Make the batch on a device: random rows, or what was given."""
        if not isinstance(self._batch, int):
            return meta_batch(self._batch) if device == "meta" else self._batch
        linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
        if linear is None:
            raise ValueError("give a tensor as batch: this model has no Linear layer")
        rows = self._controls["batch"].value
        return torch.randn(rows, linear.in_features, device=device)

    def _key(self) -> tuple:
        return tuple((name, control.value) for name, control in self._controls.items())

    # A flip -------------------------------------------------------------------------

    def _later(self, work: Callable[[], None]) -> None:
        """Run work on the main thread: JupyterLab delivers clicks on others.

        While a cell runs, it waits for the cell; a burst of flips is answered once.
        """
        if self._busy:
            return
        if self._loop is None or threading.current_thread() is threading.main_thread():
            self._guarded(work)
        elif work != self._pending:
            self._pending = work
            self._loop.call_soon_threadsafe(self._run_pending, work)

    def _run_pending(self, work: Callable[[], None]) -> None:
        self._pending = None
        self._guarded(work)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run work; a failure is one sentence in the panel, not a traceback."""
        try:
            work()
        except Exception as error:
            self._stop_measuring()
            self._say(str(error).splitlines()[0], wrong=True)
        except KeyboardInterrupt:
            self._stop_measuring()
            self._say("stopped; flip a box to go on", wrong=True)

    def _show(self) -> None:
        """Predict the present plan, draw it, and let the measurement follow."""
        self._stop_measuring()
        plan, tried = self.plan, self._tried.setdefault(self._key(), {})
        for wanted in (Plan(), plan):
            if wanted not in tried:
                tried[wanted] = predict(
                    self._model, self._meta_batch, wanted, device=self._device
                )
        self._draw()
        if self._loop and plan not in self._measured.get(self._key(), {}):
            if self._bearable(AUTO_FLOPS):
                self._timer = self._loop.call_later(0.4, self._guarded, self._begin)

    def _draw(self) -> None:
        plan, key = self.plan, self._key()
        tried = dict(self._tried[key])
        tried[plan] = tried.pop(plan) if plan.segments else tried[plan]
        before, after = tried[Plan()], tried[plan]
        measured = self._measured.get(key, {})
        if plan in measured:
            after, before = (
                _confirmed(prediction, report)
                for prediction, report in zip(
                    (after, before), measured[plan], strict=True
                )
            )
        self._png = self._drawer.draw(
            before, after, list(tried.values()), list(measured.values())
        )
        self._mark_rows(after, before)
        self.finding = finding(before, after)
        if plan in measured:
            self._say(self.finding, note=self._measured_note(*measured[plan]))
        else:
            self._say(self.finding, note=self._predicted_note())
        source = base64.b64encode(self._png).decode()
        self.picture.value = (
            f'<img alt="{html.escape(self.finding)}" width="{WIDTH}" '
            f'style="max-width:100%;height:auto;aspect-ratio:{WIDTH}/{HEIGHT}" '
            f'src="data:image/png;base64,{source}">'
        )

    def _mark_rows(self, after: StepReport, before: StepReport) -> None:
        """Show each layer's kept bytes, and a bar along each segment."""
        now, then = after.timeline.kept_bytes(), before.timeline.kept_bytes()
        plan = self.plan
        continued = {name for segment in plan.segments for name in segment[1:]}
        for name, row in zip(self.boxes, self._rows.children, strict=True):
            ticked = self.boxes[name].value
            color = COLORS["recomputed"] if ticked else "transparent"
            row.layout.border_left = f"4px solid {color}"
            row.layout.margin = "0" if name in continued else "2px 0 0 0"
            if name in self.joins:
                before_it = list(self.boxes)[list(self.boxes).index(name) - 1]
                both = ticked and self.boxes[before_it].value
                self.joins[name].disabled = not both
            kept = format_bytes(now.get(name, 0))
            style = "font-variant-numeric:tabular-nums"
            if now.get(name, 0) != then.get(name, 0):
                style += f";color:{COLORS['recomputed']};font-weight:bold"
            self._kept[name].value = f'<span style="{style}">keeps {kept}</span>'

    def _say(self, text: str, wrong: bool = False, note: str = "") -> None:
        color = "#B00020" if wrong else "inherit"
        note = (
            f'<br><span style="opacity:.75">{html.escape(note)}</span>' if note else ""
        )
        self.readout.value = (
            f'<div role="status" aria-live="polite" style="color:{color};'
            f'font-size:14px;line-height:1.4">{html.escape(text)}{note}</div>'
        )

    # The measurement ----------------------------------------------------------------

    def _step_flops(self) -> int:
        report = self._tried[self._key()][self.plan]
        return 3 * report.forward_flops + report.recompute_flops

    def _bearable(self, flops: int) -> bool:
        return torch.cuda.is_available() or self._step_flops() <= flops

    def _toggle_measuring(self) -> None:
        if self._measuring:
            self._stop_measuring()
            self._say(self.finding, note="measurement stopped")
        else:
            self._later(self._begin)

    def _begin(self) -> None:
        """Start to measure; go on a step at a time, when the kernel is idle."""
        self._stop_measuring()
        self._start_measuring()
        self._say(self.finding, note="measuring …")
        if self._loop:
            self._timer = self._loop.call_soon(self._guarded, self._go_on)
        else:
            while self._measuring:
                self._advance()

    def _start_measuring(self) -> None:
        if not self._bearable(CPU_FLOPS):
            raise ValueError(
                f"one step of this size is {format_flops(self._step_flops())}, too "
                "much for this CPU: take a batch or a width that needs at most "
                f"{format_flops(CPU_FLOPS)}, or a GPU; the prediction holds without it"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        needed_bytes = self._tried[self._key()][Plan()].peak_bytes
        if needed_bytes > memory_bytes(device):
            raise MemoryError(too_large(device, needed_bytes))
        settings = self.settings
        if isinstance(self._factory, nn.Module):
            model = self._factory
        else:
            with torch.random.fork_rng():
                model = self._factory(**settings)
        plans = [self.plan, Plan()] if self.plan.segments else [Plan()]
        self._measuring = measuring_plans(
            model, self._input(model, device), plans, device=device, repeats=REPEATS
        )
        self.measure_button.description = "Stop"

    def _advance(self) -> None:
        """Run the measurement's next training step; show the result after the last."""
        try:
            next(self._measuring)
        except StopIteration as finished:
            reports = finished.value
            self._stop_measuring()
            measured = self._measured.setdefault(self._key(), {})
            measured[self.plan] = (reports[0], reports[-1])
            self._draw()

    def _go_on(self) -> None:
        if self._measuring:
            self._advance()
        if self._measuring:
            self._timer = self._loop.call_later(0.001, self._guarded, self._go_on)

    def _stop_measuring(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._measuring:
            self._measuring.close()
        self._measuring = self._timer = None
        self.measure_button.description = "Measure"

    def _predicted_note(self) -> str:
        note = f"predicted for a {self._device.upper()} step"
        if self._bearable(AUTO_FLOPS):
            return f"{note}; the measurement follows"
        if self._bearable(CPU_FLOPS):
            return f"{note}; Measure runs it on this CPU"
        size = format_flops(self._step_flops())
        return f"{note}; {size} are too much to measure on this CPU"

    def _measured_note(self, report: StepReport, base: StepReport) -> str:
        predicted = predict(
            self._model, self._meta_batch, report.plan, device=report.device
        )
        same = predicted.peak_bytes == report.peak_bytes
        place = "this CPU"
        if report.device == "cuda":
            place = torch.cuda.get_device_name()
        note = f"measured on {place}: {format_bytes(report.peak_bytes)}, "
        note += "as predicted" if same else "predicted otherwise"
        if report.peak_bytes != self._tried[self._key()][report.plan].peak_bytes:
            note += " for it (a GPU keeps smaller dropout masks)"
        note += f"; step {format_ms(report.step_ms)}"
        if report.plan.segments:
            note += f" ({format_change(report.step_ms, base.step_ms)})"
        return f"{note}, median of {report.repeats} runs"


def finding(before: StepReport, after: StepReport) -> str:
    """Say in one sentence what a plan does to the step without it."""
    peak = format_bytes(after.peak_bytes)
    if not after.plan.segments:
        return f"no checkpointing: peak {peak}"
    saved = after.peak_bytes - before.peak_bytes
    change = format_bytes(saved, signed=True) if saved else "unchanged"
    extra = format_change(
        3 * after.forward_flops + after.recompute_flops, 3 * before.forward_flops
    )
    return f"{describe(after.plan)}: peak {peak} ({change}), step {extra} FLOPs"


def describe(plan: Plan) -> str:
    """Name a plan as one would say it: "layers 2–4 as one segment, 6 alone"."""
    names = plan.names
    numbered = all(name.removeprefix("layer").isdigit() for name in names)

    def short(name: str) -> str:
        return name.removeprefix("layer") if numbered else name

    runs = [
        f"{short(segment[0])}–{short(segment[-1])}"
        for segment in plan.segments
        if len(segment) > 1
    ]
    alone = [short(segment[0]) for segment in plan.segments if len(segment) == 1]
    parts = []
    if runs:
        ending = "as one segment" if len(runs) == 1 else "as segments"
        parts.append(f"{', '.join(runs)} {ending}")
    if alone:
        listed = ", ".join(alone) if len(alone) < 7 else f"{alone[0]}, …, {alone[-1]}"
        parts.append(f"{listed} {'alone' if len(alone) == 1 else 'each alone'}")
    noun = "" if not numbered else "layer " if len(names) == 1 else "layers "
    return noun + "; ".join(parts)


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


def _check_size(name: str, value: object) -> None:
    """Refuse sizes that no model or batch can have, before torch does."""
    if isinstance(value, int) and not 1 <= value < INT_LIMIT:
        raise ValueError(f"{name} must be a whole number from 1 up, not {value:,}")


def _wide(pixels: int, **layout: str) -> widgets.Layout:
    return widgets.Layout(width=f"{pixels}px", **layout)

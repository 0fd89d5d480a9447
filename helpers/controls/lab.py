"""The lab: a checkbox for each layer, and a picture of what each flip does.

A flip is answered by a prediction at once. The measurement follows one training step
at a time on the kernel's own event loop, so that it never runs beside a cell (they
would share the random numbers), and the next flip waits for one step at most.
"""

import base64
import contextlib
import textwrap
import threading
from collections.abc import Callable, Generator
from functools import partial
from operator import attrgetter

import ipywidgets as widgets
import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.controls._buttons import Shortcuts, buttons, folded
from helpers.controls._findings import describe
from helpers.controls._idle import IdleWork
from helpers.controls._look import (
    BESIDE,
    ROOMY,
    WIDE,
    control,
    progress,
    sentence,
    status,
    taken,
)
from helpers.controls._picture import Picture
from helpers.controls._recorded import RecordedChoice
from helpers.controls._step import StepFields
from helpers.controls.rows import Rows
from helpers.controls.state import STOPPED, LabState
from helpers.dry_run import GivenOptimizer
from helpers.measure import Loss, Step, StepReport
from helpers.models import uniform_mlp


class LayerLab(widgets.HBox):
    """Flip layers' boxes and see peak memory and iteration time change.

    >>> lab = LayerLab(batch=8192, settings={"depth": 8, "width": 1024})
    >>> lab.boxes["layer1"].value = True
    >>> print(lab.finding)
    layer 1 alone: peak 576.4 MiB (−32.0 MiB), step +4 % FLOPs

    Args:
        model_factory: makes the model, from ``settings`` as keyword arguments.
        batch: rows of a random input, which the reader may change; or a batch as in
            ``predict``, which stays.
        settings: what the reader may change of the model, with its first value.
        device, loss, optimizer, autocast, step: as in ``predict``.
        tree: whether rows are all modules, as a tree, instead of the model's children;
            default: if its children are more than layers of a chain.

    Attributes:
        state: what it knows, apart from the widgets.
        against: the plan that it is compared with; no checkpointing at first.
        boxes: a checkbox for each layer, by name.
        joins: a toggle for each layer that can share a segment with the one before;
            it counts when both are ticked.
        settings, finding, history: of ``state``, as they are now.
        recorded: a dropdown of GPUs that have measured this model at this size.
        picture, readout: the picture, and the finding with a note below.
        progress: which step of a measurement runs; empty if none does.
        step: fields of the step: ``optimizer``, ``precision``, ``card``, ``memory``.
        limit: tells of a report whether it stays below a limit, which is drawn.
        on_shown: called without arguments after each new picture.
    """

    def __init__(
        self,
        model_factory: Callable[..., nn.Module] | nn.Module = uniform_mlp,
        batch: object = 8192,
        settings: dict[str, object] | None = None,
        device: str = "cuda",
        loss: Loss | None = None,
        tree: bool | None = None,
        *,
        optimizer: GivenOptimizer = None,
        autocast: torch.dtype | None = None,
        step: Step | None = None,
    ) -> None:
        given = {"loss": loss, "step": step}
        self._given = {name: one for name, one in given.items() if one is not None}
        heard = lambda: self.later(self._show), lambda: self.later(self.draw)
        self.step = StepFields(device, optimizer, autocast, *heard)
        options, self.limit = self._step(), self.step.limit
        self.state = LabState(model_factory, batch, settings, device, tree, options)
        self.on_shown: Callable[[], None] = lambda: None
        self._pending: Callable | None = None
        self._work = IdleWork(self.guarded, self._say_stopped)
        self.controls = {n: control(n, v) for n, v in self.state.values.items()}
        for one in self.controls.values():
            one.observe(lambda _: self.later(self._show), "value")
        ticks, tree = self.state.ticks, self.state.tree
        self.rows = Rows(ticks, lambda: self.later(self._show), tree)
        self.measure_button = widgets.Button(icon="clock-o", layout=WIDE)
        self.measure_button.description = "Measure"
        self.measure_button.on_click(lambda _: self.later(self._toggle_measuring))
        self.recorded = RecordedChoice(lambda: self.later(self.draw))
        chosen = self._apply, self._take_other
        self.picture = Picture(*(partial(self._take_chosen, one) for one in chosen))
        self.readout = widgets.HTML().add_class("layer-lab-readout")
        self.progress = widgets.HTML().add_class("layer-lab-progress")
        super().__init__(self._arranged(), layout=BESIDE)
        self.add_class("layer-lab")
        self._wrong = ""  # what the panel says instead of a finding
        self._built = False  # whether the rows are those of the fields' model
        self.guarded(self._show)

    # What the reader sets, and gets ---------------------------------------------------

    boxes = property(attrgetter("rows.boxes"))
    joins = property(attrgetter("rows.joins"))
    settings = property(attrgetter("state.settings"))
    finding = property(attrgetter("state.finding"))
    history = property(attrgetter("state.history"))

    @property
    def plan(self) -> Plan:
        """The plan that the boxes and joins show; may be set."""
        return self.state.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.state.plan = plan
        self.rows.write()
        self.guarded(self._show)

    @property
    def against(self) -> Plan:
        """The plan that others are compared with; may be set."""
        return self.state.against

    @against.setter
    def against(self, plan: Plan) -> None:
        self.state.against = plan
        self.guarded(self._show)

    def measure(self) -> StepReport:
        """Measure the present plan and no checkpointing now, and show the result."""
        try:
            self._work.run(self._measurement())
        except KeyboardInterrupt:
            self._say_stopped()
            raise
        return self.state.measured[self.state.shown][0]

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """Show the panel; where there are no widgets, its picture or its sentence."""
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = self._wrong or self.finding
        if self.picture.png:
            bundle["image/png"] = base64.b64encode(self.picture.png).decode()
        return bundle

    # How it is built ------------------------------------------------------------------

    def _arranged(self) -> list[widgets.Widget]:
        shortcuts = Shortcuts(self.state.ticks.pieces, self._apply)
        self.shortcuts, self.piece = shortcuts.buttons, shortcuts.piece
        copy = self.picture.copy
        work = {
            "Copy code": lambda: copy(self.plan.code(self.state.model), "Copy code"),
            "Copy plan": lambda: copy(repr(self.plan), "Copy plan"),
            "Save picture": self.picture.save,
        }
        along = buttons({text: partial(self.guarded, do) for text, do in work.items()})
        pages = {"Step and card": self.step, "Take it along": along}
        left = [*self.controls.values(), shortcuts, self.rows, self.measure_button]
        controls = widgets.VBox([*left, self.recorded, folded(pages)])
        shown = widgets.VBox([self.readout, self.picture, self.progress], layout=ROOMY)
        return [controls.add_class("layer-lab-controls"), shown]

    def _apply(self, plan: Plan) -> None:
        """Set boxes and joins now, before the next click; answer when it is time."""
        self.state.ticks.plan = plan
        self.rows.write()
        self.later(self._show)

    def _take_other(self, plan: Plan) -> None:
        self.state.against = plan
        self.later(self._show)

    def _take_chosen(self, take: Callable[[Plan], None], plan: Plan) -> None:
        self.guarded(lambda: take(plan))

    def _take_fields(self) -> None:
        """Make a model of what the fields say, and rows for it."""
        state, self._built = self.state, False
        state.options = self._step()
        state.set(**self._fields())
        self.rows.rebuild()
        plain = state.device == "cuda" and not state.options
        rows = state.values.get("batch") if plain else None  # whose step GPUs have run
        self.recorded.find(state.factory, state.settings, rows)
        self._built = True

    def _fields(self) -> dict[str, object]:
        now = self.state.values
        return {name: taken(it.value, now[name]) for name, it in self.controls.items()}

    def _write_fields(self, values: dict[str, object]) -> None:
        for name, one in self.controls.items():
            one.value = values[name]
        self.step.write(self.state.options)

    def _step(self) -> dict[str, object]:
        return self._given | self.step.options

    # A flip ---------------------------------------------------------------------------

    def later(self, work: Callable[[], None]) -> None:
        """Run work on the main thread: JupyterLab delivers clicks on others.

        While a cell runs, it waits for the cell; a burst of flips is answered once.
        """
        loop = self._work.loop
        if loop is None or threading.current_thread() is threading.main_thread():
            self.guarded(work)
        elif work != self._pending:
            self._pending = work
            loop.call_soon_threadsafe(self._run_pending, work)

    def _run_pending(self, work: Callable[[], None]) -> None:
        self._pending = None
        self.guarded(work)

    def guarded(self, work: Callable[[], None]) -> None:
        """Run work; a failure is one sentence in the panel, not a traceback."""
        try:
            with self._work.interruptible():
                work()
        except Exception as error:
            self._fail(sentence(error))
        except KeyboardInterrupt:
            self._fail("stopped; a box or a button goes on")

    def _fail(self, reason: str) -> None:
        """Say what is wrong; a picture of other sizes does not stay beside it."""
        self._work.stop()
        self._wrong, self.readout.value = reason, status(reason, wrong=True)
        if not self.finding:
            self.picture.clear()

    def _show(self) -> None:
        """Predict the present plan, draw it, and let the measurement follow.

        Fields go back where there is no model for them, and after an interrupt; and if
        the step fails that did not before.
        """
        self._work.stop()
        state = self.state
        good, step, was_predicted = state.values, state.options, state.predicted
        try:
            if not self._built or (good, step) != (self._fields(), self._step()):
                self._take_fields()
            state.show()
        except BaseException as error:
            stays = isinstance(error, Exception) and not was_predicted
            if not stays or state.values == good:
                self._built &= step == state.options
                state.options = step
                self._write_fields(good)
            raise
        self.draw()
        if self._work.loop and state.measured_unasked:
            self._work.start(self._measurement(), delay_s=0.4)

    def draw(self) -> None:
        """Draw the answer that there is."""
        if not self.finding:
            return
        state, found = self.state, self.state.answers
        report = state.tried[state.shown]
        note = state.note + self.recorded.note(state.shown, found.pair[0].plan)
        if card := self.step.limit(report):
            note += f"; {card['label']}"
        note += state.ticks.left_out(state.shown) + state.caution
        rows = self.rows.as_text(state.shown)
        around = rows, [self.finding, *textwrap.wrap(note, 160)[:2]]
        # The picture first, so that it is soon there.
        self.picture.show(found, self.recorded.pairs, self.limit(report), around)
        self._wrong, self.readout.value = "", status(self.finding, note)
        self.rows.show_kept(state.shown, *found.kept)
        self.on_shown()

    def _say_of_ticked(self, note: str) -> None:
        """Say what becomes of a plan that may not be shown so far."""
        said = (self.plan == self.state.shown and self.finding) or describe(self.plan)
        self._wrong, self.readout.value = "", status(said, note)

    # The measurement ------------------------------------------------------------------

    def _toggle_measuring(self) -> None:
        if self._work.active:
            self._work.stop()
            self._say_stopped()
        else:
            self._work.start(self._measurement())

    def _say_stopped(self) -> None:
        """Say that a measurement was stopped, beside what was there before."""
        if self._wrong or not self.finding:
            return self._fail(f"{self._wrong}; {STOPPED}".removeprefix("; "))
        self.state.stopped = True
        self.draw()

    def _measurement(self) -> Generator[None, None, None]:
        """Measure the present plan, a training step a turn, and draw it again."""
        before = self._wrong, self.readout.value
        self.measure_button.description = "Stop"
        self._say_of_ticked("measuring …")
        try:
            with contextlib.closing(self.state.measuring()) as steps:
                for number, _ in enumerate(steps, 1):
                    self.progress.value = progress(number, self.state.steps)
                    yield
        except BaseException:
            self._wrong, self.readout.value = before
            raise
        finally:
            self.measure_button.description, self.progress.value = "Measure", ""
        self.draw()

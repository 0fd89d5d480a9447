"""The lab's choice between GPUs that have measured the model that it shows."""

from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
from torch import nn

from helpers.checkpointing import Plan
from helpers.controls._answers import recorded_beside
from helpers.controls._findings import timed_note
from helpers.controls._look import WIDE
from helpers.recording import FOLDER, MODELS, Pair, RecordingError, all_recorded
from helpers.units import format_bytes


class RecordedChoice(widgets.Dropdown):
    """A dropdown of recordings, which is there only where there are some.

    Args:
        changed: called without arguments when the reader chooses another one.
    """

    def __init__(self, changed: Callable[[], None], folder: Path = FOLDER) -> None:
        super().__init__(description="recorded", layout=WIDE | {"display": "none"})
        self.style.description_width = "76px"
        self._folder, self._changed = folder, lambda _: changed()
        self._found: dict[str, dict[Plan, Pair]] = {}
        self._problem = ""
        self.observe(self._changed, "value")

    def find(
        self,
        factory: Callable[..., nn.Module] | nn.Module,
        settings: dict[str, object],
        rows: int | None,
    ) -> None:
        """Look for recordings of a model; what was chosen stays if it is among them.

        Args:
            rows: None where the batch is no number of rows, which nobody recorded.
        """
        name = getattr(factory, "__name__", "")
        self._found, self._problem = {}, ""
        if rows is not None and MODELS.get(name) is factory:
            try:
                found = all_recorded(name, settings, rows, self._folder)
                self._found = {one.label: one.pairs for one in found}
            except RecordingError as error:
                self._problem = str(error)
        labels = list(self._found)
        kept = self.value if self.value in labels else next(iter(labels), None)
        self.unobserve(self._changed, "value")  # this is no reader's choice
        self.options = [(label.removeprefix("NVIDIA "), label) for label in labels]
        self.value = kept
        self.observe(self._changed, "value")
        self.layout.display = "" if labels else "none"

    @property
    def pairs(self) -> dict[Plan, Pair]:
        """What the chosen GPU measured: for each plan its report, and that of none."""
        return self._found.get(self.value, {})

    def note(self, plan: Plan, against: Plan = Plan()) -> str:
        """Name the GPU that measured this plan, and what it measured; else nothing."""
        if self._problem:
            return f"; no recording is shown: {self._problem}"
        if plan not in self.pairs:
            return ""
        base, report = recorded_beside(self.pairs, against, plan)
        note = f"; recorded on {self.value}: {format_bytes(report.peak_bytes)}"
        if report.step_ms is None:
            return note
        return f"{note}, {timed_note(report, base or report)}"

"""Find what real GPUs have measured, for a model of given sizes."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helpers.checkpointing import Plan
from helpers.measure import StepReport
from helpers.recording._set import Step, all_settings
from helpers.recording.file import FOLDER, RecordedCase, Recording, read

Pair = tuple[StepReport, StepReport]


@dataclass(frozen=True)
class Recorded:
    """What one GPU has measured of a model, to be drawn beside what is predicted."""

    label: str = ""  # GPU, torch, date; empty where there is nothing, or no name needed
    pairs: Mapping[Plan, Pair] = field(default_factory=dict, repr=False)

    def pair(self, plan: Plan | str) -> Pair | None:
        """Find a plan's report and that of no checkpointing; its text will do."""
        return self._by_text.get(str(plan))

    @functools.cached_property
    def _by_text(self) -> dict[str, Pair]:
        return {str(plan): pair for plan, pair in self.pairs.items()}


NOTHING = Recorded()


def find_recorded(
    model: str,
    settings: Mapping[str, object],
    rows: int,
    gpu: str = "",
    folder: Path = FOLDER,
) -> Recorded:
    """Find what one GPU has recorded of a model, to hand it to a plot.

    Args:
        model, settings, rows: as in ``recorded``.
        gpu: a part of its label, such as "A100"; default: the newest recording.

    Returns:
        Nothing to draw, if nobody recorded this model in this size.

    Raises:
        ValueError: if no recording is of such a GPU.
    """
    labels = [recording.label for recording in recordings(folder)]
    if gpu and not any(gpu.lower() in label.lower() for label in labels):
        raise ValueError(
            f"no recording is of {gpu!r}; there are: {'; '.join(labels) or 'none'}"
        )
    for label, pairs in recorded(model, settings, rows, folder).items():
        if gpu.lower() in label.lower():
            return Recorded(label, pairs)
    return NOTHING


def recordings(folder: Path = FOLDER) -> list[Recording]:
    """Read what real GPUs have measured, the newest first.

    What was made up for tests is left out.

    Raises:
        RecordingError: if a file there is no recording.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    read_before = [_read_once(file, file.stat().st_mtime_ns) for file in files]
    real = [recording for recording in read_before if not recording.made_up]
    return sorted(real, key=lambda recording: recording.date, reverse=True)


@functools.cache
def _read_once(path: Path, _changed: int) -> Recording:
    return read(path)


def recorded(
    model: str, settings: Mapping[str, object], rows: int, folder: Path = FOLDER
) -> dict[str, dict[Plan, Pair]]:
    """Find what was recorded of a model on so many rows, in float32, no optimizer.

    Args:
        model: the name of its factory, such as "uniform_mlp".
        settings: what the factory is given.

    Returns:
        By the recording's label, for each plan its report and that of no
        checkpointing, its time taken in the same interleaved run.
    """
    try:
        step = Step(model, all_settings(model, dict(settings)), rows)
    except (KeyError, TypeError):  # no model, or no settings, that anyone recorded
        return {}
    found = {}
    for recording in recordings(folder):
        cases = [case for case in recording.cases if case.step == step]
        if pairs := _pairs(cases):
            found[recording.label] = pairs
    return found


def _pairs(cases: list[RecordedCase]) -> dict[Plan, Pair]:
    """Pair each report with that of no checkpointing."""
    reports = {
        case.plan: dataclasses.replace(case.measured, source="recorded")
        for case in cases
        if case.measured
    }
    base = reports.get(Plan())
    return {
        case.plan: (
            reports[case.plan],
            dataclasses.replace(base, step_ms=case.base_ms),
        )
        for case in cases
        if base and case.base_ms and case.plan in reports
    }

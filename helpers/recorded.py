"""Find what real GPUs have measured, for a model of given sizes."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from helpers.checkpointing import Plan
from helpers.recording import FOLDER, RecordedCase, Recording, read
from helpers.recording_set import Step, all_settings
from helpers.report import StepReport

Pair = tuple[StepReport, StepReport]


def recordings(folder: Path = FOLDER) -> list[Recording]:
    """Read what real GPUs have measured; what was made up for tests is left out.

    Raises:
        RecordingError: if a file there is no recording.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    read_before = [_read_once(file, file.stat().st_mtime_ns) for file in files]
    return [recording for recording in read_before if not recording.made_up]


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
        if base and case.plan in reports
    }

"""Reports kept on disk, a file each, and found again by everything they depend on.

A file is written whole or not at all, so an interrupt loses nothing that was finished.
A file that is cut short, or that is not about the step asked for, counts as missing.
"""

import json
import os
import tempfile
from pathlib import Path

from helpers.fingerprint import digest
from helpers.measure import StepReport


class ReportCache:
    """A folder of reports, by key: a dict of strings that says what was run.

    Raises:
        ValueError: if there is no such folder and none can be made.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cache is a folder to keep reports in; {str(folder)!r} cannot be made "
                f"one: {error.strerror}"
            ) from None

    def find(self, key: dict[str, str]) -> StepReport | None:
        """Find the report of this key; None if there is none that can be trusted."""
        try:
            text = self._file(key).read_text("utf-8")
            report = StepReport.from_dict(json.loads(text)["report"])
            return report if text == _text(key, report) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: dict[str, str], report: StepReport) -> None:
        """Write a report under another name first, so that no file is half there."""
        number, name = tempfile.mkstemp(".part", dir=self._folder)
        try:
            with open(number, "w", encoding="utf-8") as file:
                file.write(_text(key, report))
            os.replace(name, self._file(key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _file(self, key: dict[str, str]) -> Path:
        return self._folder / f"{digest(sorted(key.items()))}.json"


def _text(key: dict[str, str], report: StepReport) -> str:
    return json.dumps({"key": key, "report": report.to_dict()}, indent=1)

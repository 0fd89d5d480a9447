"""What a named GPU measured, kept as JSON: written whole, read back, and checked.

``python -m helpers.recording`` (``make record``) measures on this machine's GPU.
"""

import argparse
import dataclasses
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from helpers.allocator import Gpu
from helpers.checkpointing import Plan
from helpers.measure import StepReport
from helpers.recording._schema import (
    CASE,
    FORMAT,
    RECORDING,
    REPORT,
    SEARCH,
    RecordingError,
    check,
)
from helpers.recording._set import Search, Step, all_settings

FOLDER = Path(__file__).parent
OUT_OF_MEMORY = "out of memory"
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class RecordedCase:
    """One step under one plan: predicted, and measured unless it was out of memory."""

    step: Step
    predicted: StepReport  # on the day of the recording
    measured: StepReport | None
    base_ms: float | None  # of no checkpointing, in the same interleaved run

    @property
    def plan(self) -> Plan:
        return self.predicted.plan

    @property
    def key(self) -> tuple:
        """Tell this case from every other one."""
        return str(self.step), self.plan

    def to_dict(self) -> dict:
        return {
            **dataclasses.asdict(self.step),
            "outcome": "measured" if self.measured else OUT_OF_MEMORY,
            "predicted": self.predicted.to_dict(),
            "measured": self.measured and self.measured.to_dict(),
            "base_ms": self.base_ms,
        }


@dataclass(frozen=True)
class RecordedSearch:
    """The largest batch under a limit, predicted and run."""

    search: Search
    predicted_rows: int
    measured_rows: int

    def to_dict(self) -> dict:
        values = dataclasses.asdict(self.search.step)
        del values["rows"]
        return {
            **values,
            "plan": [list(segment) for segment in self.search.plan.segments],
            "limit_bytes": self.search.limit_bytes,
            "predicted_rows": self.predicted_rows,
            "measured_rows": self.measured_rows,
        }


@dataclass(frozen=True)
class Recording:
    """All that one GPU measured with one PyTorch."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    date: str
    processors: int  # multiprocessors, of so many threads each
    threads: int
    settings: dict[str, int]  # repeats and warmup
    made_up: bool = False  # for tests; never shown to a reader
    cases: tuple[RecordedCase, ...] = field(default=(), repr=False)
    searches: tuple[RecordedSearch, ...] = field(default=(), repr=False)

    @property
    def kind(self) -> Gpu:
        """What predictions have to know of the GPU."""
        return Gpu(self.processors, self.threads)

    @property
    def label(self) -> str:
        """Name it as readers see it."""
        return f"{self.gpu}, torch {self.torch}, {self.date}"

    def with_cases(self, cases: list[RecordedCase]) -> "Recording":
        """Add the cases that are not there yet."""
        known = {case.key for case in self.cases}
        new = [case for case in cases if case.key not in known]
        return dataclasses.replace(self, cases=(*self.cases, *new))

    def with_search(self, found: RecordedSearch) -> "Recording":
        return dataclasses.replace(self, searches=(*self.searches, found))

    def has(self, steps_and_plans: list[tuple[Step, Plan]]) -> bool:
        """Say whether all these are there."""
        known = {case.key for case in self.cases}
        return known.issuperset((str(step), plan) for step, plan in steps_and_plans)

    def to_dict(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["cases"] = [case.to_dict() for case in self.cases]
        values["searches"] = [search.to_dict() for search in self.searches]
        return {"format": FORMAT} | values


def file_name(gpu: str, torch_version: str) -> str:
    """Name the file of a GPU and a PyTorch: nvidia-h100_torch-2.13.0-cu130.json."""
    words = re.sub(r"[^a-z0-9.]+", "-", f"{gpu} torch".lower()).strip("-")
    return f"{words}-{torch_version.replace('+', '-')}.json"


# Written and read -------------------------------------------------------------------


def write(recording: Recording, path: Path) -> None:
    """Write a recording, a line a case, under another name first: whole or not at all.

    Raises:
        OSError: if there is no room for it; what was there before stays.
    """
    values = recording.to_dict()
    lists = {name: values.pop(name) for name in ("cases", "searches")}
    lines = json.dumps(values, indent=1)[:-2]
    for name, items in lists.items():
        body = ",\n".join(json.dumps(item) for item in items)
        lines += f',\n "{name}": [\n{body}\n ]' if items else f',\n "{name}": []'
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(".part", dir=path.parent)
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(lines + "\n}\n")
            file.flush()
            os.fsync(number)
        os.chmod(name, 0o644)  # what is temporary is its owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> Recording:
    """Read a recording and check every field of it.

    Raises:
        RecordingError: names the file, and what is wrong with which field.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordingError(
            f"{path} is no JSON, or only a part of one ({error}); take it away, or "
            "put back the whole file"
        ) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise RecordingError(
            f"{path} is no recording: its field 'format' is not {FORMAT!r}"
        )
    check(values, RECORDING, str(path))
    del values["format"]
    cases = [
        _case(item, f"{path}, case {place}")
        for place, item in enumerate(values["cases"], 1)
    ]
    searches = [
        _search(item, f"{path}, search {place}")
        for place, item in enumerate(values["searches"], 1)
    ]
    return Recording(**values | {"cases": tuple(cases), "searches": tuple(searches)})


def _case(values: object, where: str) -> RecordedCase:
    check(values, CASE, where)
    is_measured = values["measured"] is not None
    if is_measured != (values["outcome"] != OUT_OF_MEMORY):
        raise RecordingError(f"{where}: 'outcome' and 'measured' do not fit together")
    reports = {
        name: _report(values[name], f"{where}, {name!r}") if values[name] else None
        for name in ("predicted", "measured")
    }
    if is_measured and reports["measured"].plan != reports["predicted"].plan:
        raise RecordingError(f"{where}: 'plan' is not the same in both reports")
    return RecordedCase(
        _step(values, values["rows"], where), **reports, base_ms=values["base_ms"]
    )


def _report(values: object, where: str) -> StepReport:
    check(values, REPORT, where)
    return StepReport.from_dict(values)


def _search(values: object, where: str) -> RecordedSearch:
    check(values, SEARCH, where)
    plan = Plan(tuple(map(tuple, values["plan"])))
    search = Search(_step(values, 1, where), plan, values["limit_bytes"])
    return RecordedSearch(search, values["predicted_rows"], values["measured_rows"])


def _step(values: dict, rows: int, where: str) -> Step:
    try:
        settings = all_settings(values["model"], values["settings"])
    except TypeError as error:
        raise RecordingError(f"{where}: 'settings' do not fit: {error}") from None
    return Step(
        values["model"], settings, rows, values["optimizer"], values["precision"]
    )


# The command ------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Record this machine's GPU; 1 if that cannot be done, after one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.recording",
        description="Measure on this machine's GPU, for some minutes, what notebooks "
        "show to readers without one. It can be stopped, and goes on where it was.",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write")
    folder = parser.parse_args(arguments).folder
    if reason := _unfit():
        print(reason)
        return 1
    from helpers.recording.record import (
        run,  # which no older PyTorch may be able to import
    )

    return run(folder)


def _unfit() -> str:
    """Say why this machine cannot record; nothing if it can."""
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < OLDEST_TORCH:
        return (
            f"torch {torch.__version__} is too old to record with: predictions are "
            "those of torch 2.11 or newer"
        )
    if not torch.cuda.is_available():
        return (
            "this PyTorch sees no CUDA device, and a recording is what a GPU measured: "
            "run this on a machine with one"
        )
    return ""

"""What GPUs have measured: written whole, read with care, and found for a model."""

import functools
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.measure import StepReport, predict
from helpers.measure.kept import from_json, to_json, write_whole
from helpers.models import MLP, DocsMLP, unequal_blocks, uniform_mlp

FOLDER = Path(__file__).parent
MODELS = {make.__name__: make for make in (DocsMLP, MLP, unequal_blocks, uniform_mlp)}
OPTIMIZERS = {
    "none": None,
    "SGD": torch.optim.SGD,
    "AdamW": partial(torch.optim.AdamW, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
Pair = tuple[StepReport, StepReport]  # of a plan, and of none in the same run


class RecordingError(ValueError):
    """A file is no recording, or not the one that is wanted; says why."""


@dataclass(frozen=True)
class Step:
    """A training step but for its plan: a model on random rows, and its loss a sum."""

    model: Literal[*MODELS]
    settings: dict  # what the model is given; its defaults are filled in
    rows: int
    optimizer: Literal[*OPTIMIZERS] = "none"
    precision: Literal[*PRECISIONS] = "float32"

    def __post_init__(self) -> None:
        given = inspect.signature(MODELS[self.model]).bind(**self.settings)
        given.apply_defaults()
        object.__setattr__(self, "settings", given.arguments)

    def make_model(self) -> nn.Module:
        return MODELS[self.model](**self.settings)

    def make_batch(self) -> torch.Tensor:
        width = self.settings.get("width", 1024)  # the docs' MLP has no settings
        return torch.randn(self.rows, self.settings.get("widths", [width])[0])

    @property
    def options(self) -> dict[str, object]:
        """What ``predict`` and ``measure`` are told beside model, batch and plan."""
        optimizer, autocast = OPTIMIZERS[self.optimizer], PRECISIONS[self.precision]
        return {"optimizer": optimizer, "autocast": autocast}

    def predicted(self, plan: Plan, device: str) -> StepReport:
        with torch.device("meta"):
            batch = self.make_batch()
        return predict(self.make_model, batch, plan, device=device, **self.options)

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.settings.items()]
        words += [f"{self.rows:,} rows", self.optimizer, self.precision]
        usual = (Step.optimizer, Step.precision)
        return ", ".join([self.model, *(word for word in words if word not in usual)])


@dataclass(frozen=True)
class Group:
    """Plans of one step that are measured in one interleaved run."""

    step: Step
    plans: tuple[Plan, ...]
    measured: tuple[StepReport, ...] = ()  # those that were not out of memory

    def __post_init__(self) -> None:
        if not {report.plan for report in self.measured} <= set(self.plans):
            raise ValueError("'measured' has a plan that is none of 'plans'")


@dataclass(frozen=True)
class Recorded:
    """What one GPU has measured of a model, to be drawn beside what is predicted."""

    label: str = ""  # GPU, torch, date; empty where there is nothing, or no name needed
    pairs: Mapping[Plan, Pair] = field(default_factory=dict, repr=False)

    def pair(self, plan: Plan | str) -> Pair | None:
        """Find a plan's report and that of no checkpointing; its text will do."""
        return {str(known): pair for known, pair in self.pairs.items()}.get(str(plan))


NOTHING = Recorded()


@dataclass(frozen=True, kw_only=True)
class Recording:
    """All that one GPU measured with one PyTorch."""

    format: Literal[2] = 2
    gpu: str
    driver: str
    cuda: str
    torch: str
    date: str
    processors: int  # multiprocessors, of so many threads each
    threads: int
    capability: tuple[int, int]
    repeats: int
    warmup: int
    made_up: bool = False  # for tests; never shown to a reader
    groups: tuple[Group, ...] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        return f"{self.gpu}, torch {self.torch}, {self.date}"

    @property
    def file_name(self) -> str:
        """Name its file by GPU and PyTorch: nvidia-h100-torch-2.13.0-cu130.json."""
        words = re.sub(r"[^a-z0-9.]+", "-", f"{self.gpu} torch".lower()).strip("-")
        return f"{words}-{self.torch.replace('+', '-')}.json"

    def of(self, step: Step) -> Recorded:
        """Pair each report of a step with that of no checkpointing in the same run."""
        pairs: dict[Plan, Pair] = {}
        for group in self.groups:
            found = {
                one.plan: replace(one, source="recorded") for one in group.measured
            }
            if group.step == step and (base := found.get(Plan())):
                pairs = {plan: (one, base) for plan, one in found.items()} | pairs
        return Recorded(self.label, pairs)


def write(recording: Recording, path: Path) -> None:
    """Write a recording, a line a report: whole or not at all.

    Raises:
        OSError: if there is no room for it; what was there before stays.
    """
    text = json.dumps(to_json(recording))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, re.sub(r'(?={"(step|peak_bytes)":)', "\n", text) + "\n")


def read(path: Path) -> Recording:
    """Read a recording and check every field of it.

    Raises:
        RecordingError: names the file, and what is wrong with which field.
    """
    try:
        return from_json(Recording, json.loads(path.read_text("utf-8")), path.name)
    except (OSError, ValueError) as error:
        raise RecordingError(
            f"{path} is no recording, or only a part of one ({error}); take it away, "
            "or put back the whole file"
        ) from None


@functools.cache
def _read_once(path: Path, _changed: int) -> Recording:
    return read(path)


def recordings(folder: Path = FOLDER) -> list[Recording]:
    """Read what real GPUs have measured, not what was made up; the newest first."""
    paths = sorted(folder.glob("*.json"))
    found = [_read_once(path, path.stat().st_mtime_ns) for path in paths]
    real = [recording for recording in found if not recording.made_up]
    return sorted(real, key=lambda recording: recording.date, reverse=True)


def all_recorded(
    model: str, settings: Mapping[str, object], rows: int, folder: Path = FOLDER
) -> list[Recorded]:
    """Find what GPUs recorded of a model, in float32 without an optimizer.

    ``model`` is the name of its factory, ``settings`` what the factory is given.
    """
    try:
        step = Step(model, settings, rows)
    except (KeyError, TypeError):  # no model, or no settings, that anyone recorded
        return []
    found = [recording.of(step) for recording in recordings(folder)]
    return [recorded for recorded in found if recorded.pairs]


def find_recorded(
    model: str,
    settings: Mapping[str, object],
    rows: int,
    gpu: str = "",
    folder: Path = FOLDER,
) -> Recorded:
    """Find what one GPU recorded of a model, to hand it to a plot, if one did.

    Args:
        gpu: a part of its label, such as "A100"; default: the newest recording.

    Raises:
        ValueError: if no recording is of such a GPU.
    """
    labels = [recording.label for recording in recordings(folder)]
    named = [label for label in labels if gpu.lower() in label.lower()]
    if gpu and not named:
        there = "; ".join(labels) or "none"
        raise ValueError(f"no recording is of {gpu!r}; there are: {there}")
    found = all_recorded(model, settings, rows, folder)
    return next((one for one in found if one.label in named), NOTHING)

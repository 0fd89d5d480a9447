"""What a recording holds: which models, batch sizes, plans, optimizers, precisions.

A few minutes on a modern GPU: what the notebooks' pictures show, and the lab's first
sizes. Every group has no checkpointing among its plans, whose steps lie between those
of the others.
"""

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.models import MLP, DocsMLP, unequal_blocks, uniform_mlp

MODELS = {
    "DocsMLP": DocsMLP,
    "MLP": MLP,
    "unequal_blocks": unequal_blocks,
    "uniform_mlp": uniform_mlp,
}
OPTIMIZERS = {
    "none": None,
    "SGD": torch.optim.SGD,
    "AdamW": partial(torch.optim.AdamW, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
IN_FEATURES = {
    "DocsMLP": lambda settings: 1024,
    "MLP": lambda settings: settings["widths"][0],
    "unequal_blocks": lambda settings: settings["width"],
    "uniform_mlp": lambda settings: settings["width"],
}
# Plans that notebooks name, draw as a front, or reach with the slider; see `segments`.
NAMED = {
    6: "1, 1-2, 1-3, 1-2 3-4, 1-2 3-4 5",
    8: "1-4, 5-8, 1, 1-2, 1-3, 1-3 5-6, 1-3 5-6 8, 1-4 6-8, 7, 5-6, 3-5, 1-2 3-5, "
    "1-2 3-4 5-6, 1-2 3-4 5-6 7, 1-3 4-6, 1-3 4-5 6-7, 1-2 3-4, 2-4, 6-8",
}
WAIST = [1024, 2048, 2048, 512, 2048, 1024, 10]  # the widths of notebook 09
WAIST_NAMED = (
    "1 2-3 4, 1 2-3, 1-2, 2-3, 1 3 4, 1 4, 1, 4, 1 2 3 4 5 6, 1-3, 1-2 3-4 5-6"
)


@dataclass(frozen=True)
class Step:
    """A training step but for its plan: a model on random rows, and its loss a sum."""

    model: str  # a name in MODELS
    settings: dict[str, object]  # all that the model can be given
    rows: int
    optimizer: str = "none"  # a name in OPTIMIZERS
    precision: str = "float32"  # a name in PRECISIONS

    def make_model(self) -> nn.Module:
        return MODELS[self.model](**self.settings)

    def make_batch(self, rows: int | None = None) -> torch.Tensor:
        """Make random rows, as many as the step has unless told."""
        features = IN_FEATURES[self.model](self.settings)
        return torch.randn(rows or self.rows, features)

    @property
    def options(self) -> dict[str, object]:
        """What ``predict`` and ``measure`` are told beside model, batch and plan."""
        return {
            "optimizer": OPTIMIZERS[self.optimizer],
            "autocast": PRECISIONS[self.precision],
        }

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.settings.items()]
        words += [f"{self.rows:,} rows"]
        words += [self.optimizer] * (self.optimizer != "none")
        words += [self.precision] * (self.precision != "float32")
        return ", ".join([self.model, *words])


@dataclass(frozen=True)
class Group:
    """Plans of one step that are measured in one interleaved run."""

    step: Step
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class Search:
    """A step whose largest batch under a limit is searched for; its rows are 1."""

    step: Step
    plan: Plan
    limit_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", replace(self.step, rows=1))


def all_settings(model: str, settings: dict[str, object]) -> dict[str, object]:
    """Add the defaults of what a model was not given.

    Raises:
        TypeError: if the model has no such setting.
    """
    bound = inspect.signature(MODELS[model]).bind(**settings)
    bound.apply_defaults()
    return bound.arguments


def boxes(names: list[str]) -> tuple[Plan, ...]:
    """Make a plan for each combination of ticks, each layer alone; none comes first."""
    ticks = itertools.product((False, True), repeat=len(names))
    return tuple(Plan.alone(itertools.compress(names, row)) for row in ticks)


def pieces(names: list[str], size: int) -> Plan:
    """Join layers to segments of ``size``."""
    starts = range(0, len(names), size)
    return Plan(tuple(tuple(names[start : start + size]) for start in starts))


def segments(text: str) -> Plan:
    """Read a plan off the numbers of its layers: "1-2 5" joins the first two."""
    ends = [part.split("-") for part in text.split()]
    spans = [range(int(end[0]), int(end[-1]) + 1) for end in ends]
    return Plan(tuple(tuple(f"layer{i}" for i in span) for span in spans))


def groups() -> Iterator[Group]:
    """List what is measured, the quickest first."""
    yield from _small()
    for rows in (32, 8192, 65536):
        plans = boxes(["layer1", "layer2", "layer3"])
        yield Group(Step("DocsMLP", {}, rows), plans)
    yield _named("MLP", {"widths": WAIST, "activation": "gelu"}, 8192, WAIST_NAMED)
    yield _blocks(1024, 4096)
    yield _uniform(6, 1024, 8192, "gelu", 0.0)
    for depth, activation, dropout in itertools.product(
        (8, 16), ("relu", "gelu"), (0.0, 0.1)
    ):
        yield _uniform(depth, 1024, 8192, activation, dropout)
    for activation, precision in itertools.product(("relu", "gelu"), PRECISIONS):
        for optimizer in OPTIMIZERS:
            if (optimizer, precision) != ("none", "float32"):  # which is above
                yield _uniform(
                    8, 1024, 8192, activation, 0.0, optimizer, precision, few=True
                )
    yield Group(_uniform(8, 1024, 8192, "gelu", 0.0).step, boxes(_hidden(8)))
    for depth, activation, dropout in itertools.product(
        (8, 16), ("relu", "gelu"), (0.0, 0.1)
    ):
        yield _uniform(depth, 4096, 2048, activation, dropout)
    for activation in ("relu", "gelu"):  # the lab's own batch, at most of the work
        yield _uniform(8, 4096, 8192, activation, 0.0)


def searches() -> Iterator[Search]:
    """List the largest batches that are searched for."""
    for activation in ("relu", "gelu"):
        group = _uniform(8, 1024, 1, activation, 0.0, few=True)
        for plan in group.plans:
            yield Search(group.step, plan, 2 * 2**30)


def _small() -> Iterator[Group]:
    """List what a CPU can bear as well, in the sizes that notebooks measure on one."""
    for activation in ("relu", "gelu"):
        yield _uniform(8, 256, 512, activation, 0.0)
    widths = [*(width // 8 for width in WAIST[:-1]), WAIST[-1]]
    yield _named("MLP", {"widths": widths, "activation": "gelu"}, 1024, WAIST_NAMED)
    yield _blocks(256, 512)


def _named(model: str, settings: dict[str, object], rows: int, plans: str) -> Group:
    step = Step(model, all_settings(model, settings), rows)
    return Group(step, (Plan(), *map(segments, plans.split(", "))))


def _blocks(width: int, rows: int) -> Group:
    """Make the group of the unequal blocks: none, each one, and two together."""
    names = [name for name, _ in unequal_blocks(4).named_children()]
    ticked = [[], *([name] for name in names), ["wide", "pointwise"]]
    return Group(
        Step("unequal_blocks", {"width": width}, rows), tuple(map(Plan.alone, ticked))
    )


def _hidden(depth: int) -> list[str]:
    return [f"layer{place}" for place in range(1, depth + 1)]


def _uniform(
    depth: int,
    width: int,
    rows: int,
    activation: str,
    dropout: float,
    optimizer: str = "none",
    precision: str = "float32",
    few: bool = False,
) -> Group:
    """Make the group of a uniform MLP: none, each alone, all joined, in pieces."""
    hidden = _hidden(depth)
    sizes = (1, 3) if few else (1, depth, 2, 3, 4)
    if depth == 16 and width == 1024 and not dropout:
        sizes = range(1, depth + 1)
    plans = [Plan(), *(pieces(hidden, size) for size in sizes)]
    if not few and width < 4096:  # as the lab's shortcuts tick them, the last one too
        names = [*hidden, f"layer{depth + 1}"]
        plans += [pieces(names, size) for size in (1, depth + 1, 2, 3, 4)]
        if depth in NAMED and not dropout:
            plans += map(segments, NAMED[depth].split(", "))
    settings = {"depth": depth, "width": width}
    settings |= {"activation": activation, "dropout": dropout}
    step = Step("uniform_mlp", settings, rows, optimizer, precision)
    return Group(step, tuple(dict.fromkeys(plans)))

"""Figures that others published, and what is predicted today for the same steps.

What an allocator says depends on all that a process did before, since blocks are used
again. So it is replayed from the first step on, for all models of one process.

A row of ``figures.json`` has the figure as it was ``published``, with all digits; the
``card``, "?" where none is named, and the ``gpu`` that it is predicted for; ``count``,
of ``COUNTS``, and ``step``, of ``Step``; how many ``steps`` had run, if not several;
whether that version's allocator held cuBLAS's ``workspace``; and, if it is not within
a tenth of a per cent, ``within`` how many, and ``why``.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from helpers.allocator import on_gpu, this_gpu
from helpers.allocator.blocks import Block, CachingAllocator
from helpers.allocator.replay import Replay, workspace_bytes
from helpers.checkpointing import Plan, checkpointed
from helpers.dry_run import as_on
from helpers.measure import training_step
from helpers.recording.published import models
from helpers.recording.recorded import RecordingError
from helpers.timeline import Timeline

if TYPE_CHECKING:
    import pandas as pd

FIGURES, CUDA_CODE = map(Path(__file__).with_name, ("figures.json", "cuda_code.json"))
UNITS = {"B": 1, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
OPTIMIZERS = {
    "none": None,
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}
LOSSES = {
    "cross-entropy": lambda y, to: F.cross_entropy(y.flatten(0, -2), to.flatten()),
    "mean": lambda y: (y[0] if isinstance(y, tuple) else y).mean(),
    "sum": torch.sum,
}


@dataclass(frozen=True)
class Step:
    """A training step as its source has it."""

    model: str  # of ``models``, or of torch.nn
    batch: list[list[int]]  # the shape of x, and of the target
    settings: dict = field(default_factory=dict)  # the model's
    plan: list[str] = field(default_factory=list)  # patterns of modules, each alone
    loss: str = "cross-entropy"
    optimizer: str = "none"
    dtype: str = "float32"  # of weights
    x_dtype: str = "float32"
    autocast: str = ""
    keeps_output: bool = True  # while the next one is made, and not the loss alone
    zero_grad: str = "first"  # or "late", behind forward; or "never"
    makes_x: bool = False  # in the step, with a gradient

    def make_model(self) -> nn.Module:
        make = getattr(models, self.model, None) or getattr(nn, self.model)
        return make(**self.settings).to(getattr(torch, self.dtype))

    def make_batch(self) -> tuple[torch.Tensor, ...]:
        x, *target = self.batch
        x = torch.empty([0] if self.makes_x else x, dtype=getattr(torch, self.x_dtype))
        return x, *(torch.empty(shape, dtype=torch.long) for shape in target)

    def make_loop(self, kept: list[object]) -> Callable:
        """Make one run of the source's loop, ``step(model, batch, optimizer)``.

        Args:
            kept: gets what is in variables until the next run has made its own.
        """
        lower = getattr(torch, self.autocast or "float16")

        def step(model: nn.Module, batch: tuple, optimizer: object) -> None:
            x, *target = batch
            if self.makes_x:
                x = x.new_empty(self.batch[0]).requires_grad_()
            if self.zero_grad == "first":
                model.zero_grad()
            with torch.autocast("cuda", lower, enabled=bool(self.autocast)):
                output = model(x)
                loss = LOSSES[self.loss](output, *target)
            kept[:] = [output, loss] if self.keeps_output else [loss]
            del output
            if self.zero_grad == "late":
                model.zero_grad()
            loss.backward()
            if optimizer:
                optimizer.step()

        return step

    def record(self) -> tuple[Timeline, Timeline]:
        """Record, dry, the first step and one that is like all others."""
        kept: list[object] = []
        with as_on("cuda") as imagined:
            with torch.device("meta"):
                model, batch = self.make_model(), self.make_batch()
            names = [name for name, _ in model.named_modules()]
            names = [one for one in names if any(fnmatch(one, p) for p in self.plan)]
            made = imagined.optimizer(OPTIMIZERS[self.optimizer], model)
            run = training_step(model, batch, None, made, step=self.make_loop(kept))
            with checkpointed(model, Plan.alone(names)):
                first = imagined.record(run, model, batch, made)
                return first, imagined.record(run, model, [batch, kept], made)


# What was printed, by the allocator and the last step.
COUNTS = {
    "max_memory_allocated": lambda a, _: a.most_allocated_bytes,
    "max_memory_reserved": lambda a, _: a.most_reserved_bytes,
    "max_memory_allocated less what was there": lambda a, step: (
        a.most_allocated_bytes - sum(one.bytes for one in step.before)
    ),
    "memory_allocated after the step": lambda _, step: step.events[-1].level_bytes,
}


def counted(rows: list[dict]) -> list[int]:
    """Count what one process printed: its models are made, and then trained in turn."""
    allocator, workspaces, runs, counts = CachingAllocator(), {}, [], []
    for row in rows:
        with on_gpu(row["gpu"]):
            size = workspace_bytes(this_gpu()) if row.get("workspace", True) else 512
            runs.append((Replay(size), *Step(**row["step"]).record()))
    batch: dict[int, Block] = {}  # is the same for all models, and comes first
    for replay, first, _ in runs:
        replay.allocator, replay.workspaces = allocator, workspaces
        for one in sorted(first.before, key=lambda one: one.category != "input"):
            known = batch.get(one.bytes) if one.category == "input" else None
            replay.blocks[one] = known or allocator.allocate(one.bytes)
            if one.category == "input":
                batch[one.bytes] = replay.blocks[one]
    for row, (replay, first, last) in zip(rows, runs, strict=True):
        allocator.most_allocated_bytes = allocator.allocated_bytes
        for step in [first, last, last][: row.get("steps")]:
            replay.run(step)
        counts.append(COUNTS[row["count"]](allocator, step))
        for one, own in replay.blocks.items():
            if one.category not in ("parameter", "gradient", "input"):
                allocator.free(own)
    return counts


def read(path: Path, name: str) -> list[dict] | str:
    """Read one list of a file.

    Raises:
        RecordingError: if the file is not whole.
    """
    try:
        return json.loads(path.read_text("utf-8"))[name]
    except (OSError, ValueError, KeyError) as error:
        raise RecordingError(
            f"{path} is no table, or only a part of one ({error!r}); put back the file"
        ) from None


def figures() -> "pd.DataFrame":
    """Read what others published, and predict the same: in bytes, and in their unit."""
    import pandas as pd  # here, since a bare machine with a GPU has none

    rows = read(FIGURES, "figures")
    processes: dict[object, list[dict]] = {}
    for place, row in enumerate(rows):
        processes.setdefault(row.get("process", place), []).append(row)
    ours = [n_bytes for group in processes.values() for n_bytes in counted(group)]
    found = pd.DataFrame([row for group in processes.values() for row in group])
    sizes = found.unit.map(UNITS)
    theirs = found.published.astype(float) * sizes
    return found.assign(
        theirs_bytes=theirs,
        ours_bytes=ours,
        error_percent=100 * (pd.Series(ours) / theirs - 1),
        ours=[
            f"{n / size:.{len(text.partition('.')[2])}f}"  # with as many digits
            for n, size, text in zip(ours, sizes, found.published, strict=True)
        ],
    )


def times() -> "pd.DataFrame":
    """Read published times, and count the FLOPs of the same plans; both in per cent."""
    import pandas as pd

    found, flops = pd.DataFrame(read(FIGURES, "times")), []
    for step, gpu in zip(found.step, found.gpu, strict=True):
        with on_gpu(gpu):
            flops.append(Step(**step).record()[1].flops)
    again = [100 * one["recompute"] / (3 * one["forward"]) for one in flops]
    more = 100 * (found.checkpointed / found.plain - 1)
    return found.assign(more_time_percent=more, more_flops_percent=again)


def cuda_code() -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Read what PyTorch's own CUDA code counted: cases by card, and some of them."""
    import pandas as pd

    counts, examples = (read(CUDA_CODE, name) for name in ("counts", "examples"))
    found = pd.DataFrame(counts).assign(torch=read(CUDA_CODE, "torch"))
    return found, pd.DataFrame(examples)

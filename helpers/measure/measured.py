"""Measure what a training step needs, by running it.

Every storage that it really allocates is counted. On CUDA another step, which nobody
watches, tells what the allocator itself counts, kernels' scratch included; time comes
from others again.
"""

import contextlib
import dataclasses
import random
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.dry_run import GivenOptimizer, optimizer_of
from helpers.measure._as_found import left_as_found
from helpers.measure._cpu_limit import counted_anew, uncounted
from helpers.measure.device import (
    allocator_bytes,
    begin_anew,
    free_memory,
    memory_bytes,
    placed,
    random_numbers_kept,
    time_step_ms,
    too_large,
    usable_device,
)
from helpers.measure.faults import is_out_of_memory
from helpers.measure.predicted import predict, report_of
from helpers.measure.report import StepReport
from helpers.measure.step import Loss, Step, training_step
from helpers.timeline import record_timeline


@dataclass(frozen=True)
class Setting:
    """How steps are run and measured: see ``measure``, whose options these are."""

    loss: Loss | None = None
    optimizer: GivenOptimizer = None
    autocast: torch.dtype | None = None
    step: Step | None = None
    device: str | None = None
    repeats: int = 10
    warmup: int = 2
    shuffle: random.Random | None = None  # puts each round's plans in another order
    checkpoint: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("repeats", "warmup"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is a whole number from 0 up, not {value!r}")

    @classmethod
    def of(cls, **options: object) -> "Setting":
        """Make a setting of options; what is none of its is ``checkpointed``'s."""
        own = {f.name for f in dataclasses.fields(cls)} - {"checkpoint"}
        others = {name: options.pop(name) for name in options.keys() - own}
        return cls(**options, checkpoint=others)

    def predicted(
        self, model: nn.Module, batch: object, plan: Plan, device: str
    ) -> StepReport:
        """Predict the step that is to be measured."""
        names = "loss", "optimizer", "autocast", "step"
        same = {name: getattr(self, name) for name in names} | self.checkpoint
        return predict(model, batch, plan, device=device, **same)

    @contextlib.contextmanager
    def placed(
        self, model: nn.Module, batch: object, device: str
    ) -> Iterator[tuple[nn.Module, object, "Setting"]]:
        """Put all that a step is made of on a device, and then as it was."""
        parts = {name: getattr(self, name) for name in ("loss", "optimizer", "step")}
        model, batch, *moved = placed(model, device, batch, *parts.values())
        there = dataclasses.replace(self, **dict(zip(parts, moved, strict=True)))
        trains = there.optimizer is not None or there.step is not None
        with left_as_found(model, trains or _updates_itself(model), batch, *moved):
            yield model, batch, there


def _updates_itself(model: nn.Module) -> bool:
    """Say whether a hook of some parameter may run an optimizer in backward."""
    return any(
        parameter._post_accumulate_grad_hooks for parameter in model.parameters()
    )


def measure(
    model: nn.Module,
    batch: object,
    plan: Plan = Plan(),
    *,
    loss: Loss | None = None,
    optimizer: GivenOptimizer = None,
    autocast: torch.dtype | None = None,
    step: Step | None = None,
    device: str | None = None,
    repeats: int = 10,
    warmup: int = 2,
    **checkpoint_options,
) -> StepReport:
    """Measure the peak and the time of one training step, in separate passes.

    >>> from helpers.models import MLP
    >>> model, x = MLP([64, 64, 10], "gelu"), torch.randn(256, 64)
    >>> report = measure(model, x)
    >>> report.peak_bytes == predict(model, x, device="cpu").peak_bytes
    True

    Args:
        model, batch, plan, loss, optimizer, autocast, step: as in ``predict``. The
            model is trained for some steps and then put back: parameters, buffers,
            gradients, attributes; an optimizer of its own, too.
        device: where to run; default: where the model is. Elsewhere a copy is run.
        repeats: timed steps, of which the median and quartiles are reported.
        warmup: steps before anything is measured; at least one is run.
        checkpoint_options: see ``checkpointed``.

    Raises:
        ValueError: if the plan, the batch or the device does not fit.
        torch.OutOfMemoryError: if the step does not fit into the device's memory;
            says how much it needs. The memory is free again.
    """
    how = {"loss": loss, "optimizer": optimizer, "autocast": autocast, "step": step}
    how |= {"device": device, "repeats": repeats, "warmup": warmup}
    (report,) = measure_plans(model, batch, [plan], **how, **checkpoint_options)
    return report


def measure_plans(
    model: nn.Module,
    batch: object,
    plans: Sequence[Plan],
    *,
    between_steps: Callable[[], None] = lambda: None,
    **options,
) -> list[StepReport]:
    """Measure several plans in one interleaved run, so that times can be compared.

    Args:
        between_steps: called before each step; may raise to end the measurement.
        options: as in ``measure``; and ``shuffle``, a ``random.Random`` that puts the
            plans of each round of timed steps in an order of its own.
    """
    measuring = measuring_plans(model, batch, plans, **options)
    while True:
        try:
            next(measuring)
            between_steps()
        except StopIteration as finished:
            return finished.value
        except BaseException:
            measuring.close()
            raise


def measuring_plans(
    model: nn.Module, batch: object, plans: Sequence[Plan], **options
) -> Generator[None, None, list[StepReport]]:
    """Measure as ``measure_plans`` does, one training step for each ``next``.

    Whoever calls can do other things between steps, or ``close`` the measurement: the
    model is put back then too. The reports are the generator's return value.
    """
    setting = Setting.of(**options)
    device = usable_device(model, setting.device)
    needed_bytes, fixed_bytes = check_memory(model, batch, plans, device, setting)
    try:
        return (yield from _steps(model, batch, plans, device, setting))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # The failed step's tensors hang on the refusal's traceback, and are gone only here.
    free_memory(device)
    raise torch.OutOfMemoryError(too_large(device, needed_bytes, fixed_bytes))


def _steps(
    model: nn.Module,
    batch: object,
    plans: Sequence[Plan],
    device: str,
    setting: Setting,
) -> Generator[None, None, list[StepReport]]:
    """Run the steps, and put the model back."""
    with setting.placed(model, batch, device) as (model, batch, setting):
        run, reports = Run(model, batch, device, setting), []
        for plan in plans:
            reports.append((yield from run.bytes_of(plan)))
        times = yield from run.times_of(plans)
    return [
        dataclasses.replace(report, **_summary(times_ms))
        for report, times_ms in zip(reports, times, strict=True)
    ]


def steps_of_a_plan(device: str, repeats: int = 10, warmup: int = 2) -> int:
    """Count the steps that ``measuring_plans`` runs for each plan."""
    on_gpu = device == "cuda"
    return max(1 + on_gpu, warmup) + on_gpu + 1 + repeats


class Run:
    """The steps of a measurement, one for each ``next`` of its generators."""

    def __init__(
        self, model: nn.Module, batch: object, device: str, setting: Setting
    ) -> None:
        self.model, self.batch, self.device = model, batch, device
        self.setting, loss = setting, setting.loss
        self.optimizer = made = optimizer_of(model, setting.optimizer)
        how = loss, made, setting.autocast, setting.step
        self.step = training_step(model, batch, *how)

    @contextlib.contextmanager
    def applied(self, plan: Plan) -> Iterator[None]:
        """Apply a plan for one step, which belongs to nobody else."""
        with uncounted(), random_numbers_kept(), torch.inference_mode(False):
            with checkpointed(self.model, plan, **self.setting.checkpoint):
                with torch.enable_grad():
                    yield

    def bytes_of(self, plan: Plan) -> Generator[None, None, StepReport]:
        """Count a step's bytes, after steps that warm up."""
        model, batch, made = self.model, self.batch, self.optimizer
        on_gpu, counted = self.device == "cuda", {}
        if on_gpu:
            begin_anew(model, batch)
        for _ in range(max(1 + on_gpu, self.setting.warmup)):
            yield
            with self.applied(plan), counted_anew(made):
                self.step()
        if on_gpu:
            yield
            with self.applied(plan):
                state = list(made.state.values()) if made else []
                counted = allocator_bytes(self.step, model, batch, state)
        yield
        with self.applied(plan):
            timeline = record_timeline(self.step, model, batch=batch, optimizer=made)
        report = report_of(timeline, plan, self.device, "measured")
        return dataclasses.replace(report, **counted)

    def times_of(
        self, plans: Sequence[Plan]
    ) -> Generator[None, None, list[list[float]]]:
        """Time each plan's steps, in turns."""
        samples: list[list[float]] = [[] for _ in plans]
        one_round = list(zip(plans, samples, strict=True))
        for _ in range(self.setting.repeats):
            if self.setting.shuffle:
                self.setting.shuffle.shuffle(one_round)
            for plan, times in one_round:
                yield
                with self.applied(plan):
                    times.append(time_step_ms(self.step, self.device))
        return samples


def check_memory(
    model: nn.Module,
    batch: object,
    plans: Sequence[Plan],
    device: str,
    setting: Setting,
) -> tuple[int, int]:
    """Find what steps need at most, and what any would; refuse what has no room."""
    needed_bytes, fixed_bytes = max(
        _needed_bytes(model, batch, plan, device, setting) for plan in plans
    )
    if needed_bytes > memory_bytes(device):
        raise torch.OutOfMemoryError(too_large(device, needed_bytes, fixed_bytes))
    return needed_bytes, fixed_bytes


def _needed_bytes(
    model: nn.Module, batch: object, plan: Plan, device: str, setting: Setting
) -> tuple[int, int]:
    """Predict the peak, and the part of it that no batch and no plan can change.

    0 for a step that cannot be predicted; if it cannot be run either, that will say so.
    """
    try:
        report = setting.predicted(model, batch, plan, device)
    except Exception:
        return 0, 0
    return report.needed_bytes, report.timeline.fixed_bytes


def _summary(times_ms: list[float]) -> dict:
    """Summarise timed steps: median, quartiles, how many."""
    if len(times_ms) < 2:
        quartiles = (times_ms[0],) * 2 if times_ms else None
    else:
        low, _, high = statistics.quantiles(times_ms, n=4, method="inclusive")
        quartiles = (low, high)
    return {
        "step_ms": statistics.median(times_ms) if times_ms else None,
        "step_ms_quartiles": quartiles,
        "repeats": len(times_ms),
    }

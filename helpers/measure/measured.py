"""Measure what a training step needs, by running it.

Every storage that it really allocates is counted. On CUDA another step, which nobody
watches, tells what the allocator itself counts, kernels' scratch included; time comes
from others again.
"""

import contextlib
import dataclasses
import random
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.measure._cpu_limit import counted_anew, uncounted
from helpers.measure.device import (
    allocator_bytes,
    free_memory,
    is_out_of_memory,
    left_as_found,
    memory_bytes,
    placed,
    random_numbers_kept,
    too_large,
    usable_device,
)
from helpers.measure.predicted import OptimizerFactory, predict, report_of
from helpers.measure.report import StepReport
from helpers.measure.step import Loss, time_step_ms, training_step
from helpers.timeline import record_timeline


def measure(
    model: nn.Module,
    batch: object,
    plan: Plan = Plan(),
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    autocast: torch.dtype | None = None,
    device: str | None = None,
    repeats: int = 10,
    warmup: int = 2,
    **checkpoint_options,
) -> StepReport:
    """Measure the peak and the time of one training step, in separate passes.

    Args:
        model, batch, plan, loss, optimizer, autocast: as in ``predict``. The model is
            trained for some steps and then put back: parameters, buffers, gradients,
            mode.
        device: where to run; default: where the model is. Elsewhere a copy is run.
        repeats: timed steps, of which the median and quartiles are reported.
        warmup: steps before anything is measured; at least one is run.
        checkpoint_options: see ``checkpointed``.

    Raises:
        ValueError: if the plan, the batch or the device does not fit.
        torch.OutOfMemoryError: if the step does not fit into the device's memory;
            says how much it needs. The memory is free again.
    """
    (report,) = measure_plans(
        model,
        batch,
        [plan],
        loss=loss,
        optimizer=optimizer,
        autocast=autocast,
        device=device,
        repeats=repeats,
        warmup=warmup,
        **checkpoint_options,
    )
    return report


def measure_plans(
    model: nn.Module,
    batch: object,
    plans: Sequence[Plan],
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    autocast: torch.dtype | None = None,
    device: str | None = None,
    repeats: int = 10,
    warmup: int = 2,
    between_steps: Callable[[], None] = lambda: None,
    shuffle: random.Random | None = None,
    **checkpoint_options,
) -> list[StepReport]:
    """Measure several plans in one interleaved run, so that times can be compared.

    Args and errors: as ``measure``.
        between_steps: called before each step; may raise to end the measurement.
        shuffle: puts the plans of each round of timed steps in an order of its own.
    """
    measuring = measuring_plans(
        model,
        batch,
        plans,
        loss=loss,
        optimizer=optimizer,
        autocast=autocast,
        device=device,
        repeats=repeats,
        warmup=warmup,
        shuffle=shuffle,
        **checkpoint_options,
    )
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
    model: nn.Module,
    batch: object,
    plans: Sequence[Plan],
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    autocast: torch.dtype | None = None,
    device: str | None = None,
    repeats: int = 10,
    warmup: int = 2,
    shuffle: random.Random | None = None,
    **checkpoint_options,
) -> Generator[None, None, list[StepReport]]:
    """Measure as ``measure_plans`` does, one training step for each ``next``.

    Whoever calls can do other things between steps, or ``close`` the measurement: the
    model is put back then too. The reports are the generator's return value.
    """
    device = usable_device(model, device)
    settings = {"loss": loss, "optimizer": optimizer, "autocast": autocast}
    settings |= checkpoint_options
    needed_bytes, fixed_bytes = max(
        _needed_bytes(model, batch, plan, device, settings) for plan in plans
    )
    if needed_bytes > memory_bytes(device):
        raise torch.OutOfMemoryError(too_large(device, needed_bytes, fixed_bytes))
    try:
        return (
            yield from _steps(
                model, batch, plans, device, repeats, warmup, shuffle, **settings
            )
        )
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
    repeats: int,
    warmup: int,
    shuffle: random.Random | None,
    *,
    loss: Loss | None,
    optimizer: OptimizerFactory | None,
    autocast: torch.dtype | None,
    **checkpoint_options,
) -> Generator[None, None, list[StepReport]]:
    """Run the steps of ``measuring_plans``, one for each ``next``."""
    model, batch = placed(model, batch, device)
    with left_as_found(model, trains=optimizer is not None):
        made = optimizer(model.parameters()) if optimizer else None
        step = training_step(model, batch, loss, made, autocast)

        @contextlib.contextmanager
        def applied(plan: Plan) -> Iterator[None]:
            with uncounted(), random_numbers_kept(), torch.enable_grad():
                with checkpointed(model, plan, **checkpoint_options):
                    yield

        reports = []
        for plan in plans:
            for _ in range(max(1, warmup)):
                yield
                with applied(plan), counted_anew(made):
                    step()
            yield
            with applied(plan):
                timeline = record_timeline(step, model, batch=batch, optimizer=made)
            report = report_of(timeline, plan, device, "measured")
            if device == "cuda":
                yield
                with applied(plan):
                    state = list(made.state.values()) if made else []
                    counted = allocator_bytes(step, model, batch, state)
                report = dataclasses.replace(report, **counted)
            reports.append(report)
        samples: list[list[float]] = [[] for _ in plans]
        one_round = list(zip(plans, samples, strict=True))
        for _ in range(repeats):
            if shuffle:
                shuffle.shuffle(one_round)
            for plan, times in one_round:
                yield
                with applied(plan):
                    times.append(time_step_ms(step, device))
    return [
        dataclasses.replace(report, **_summary(times))
        for report, times in zip(reports, samples, strict=True)
    ]


def _needed_bytes(
    model: nn.Module, batch: object, plan: Plan, device: str, settings: dict
) -> tuple[int, int]:
    """Predict the peak, and the part of it that no batch and no plan can change.

    0 for a step that looks at values, which meta tensors lack.
    """
    try:
        report = predict(model, batch, plan, device=device, **settings)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
            return 0, 0
        raise
    return report.allocator_peak_bytes, report.timeline.fixed_bytes


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

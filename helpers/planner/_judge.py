"""Dry runs of one model's steps: the judge of every plan, and what is watched."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from operator import attrgetter

from torch import nn

from helpers.checkpointing import Plan
from helpers.dry_run import as_on, meta_model
from helpers.inspection import Inspection, inspect_model
from helpers.measure import StepReport, predict, training_step
from helpers.planner._lifetimes import Lifetimes, watch_lifetimes
from helpers.timeline import Tracker, state_tensors, tensors_in

STEP = {"loss": None, "optimizer": None, "autocast": None, "step": None}
# What a step is made of, and where it runs; the rest is for checkpoints.
STEP |= {"device": "cuda", "gpu": None}


class Judge:
    """Predicts steps of one model, each plan once.

    Args:
        model, batch, settings: as in ``predict``.
        tensors: whether a step's size is its tensors' peak; else all that it needs.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        batch: object,
        settings: dict[str, object],
        tensors: bool = False,
    ) -> None:
        self.given, is_made = model, isinstance(model, nn.Module)
        self.model, self.batch = model if is_made else meta_model(model), batch
        self.settings = settings
        self.of_step = {name: settings.get(name, usual) for name, usual in STEP.items()}
        self.of_model = self.model, batch, self.of_step
        self.size_of = attrgetter("peak_bytes" if tensors else "needed_bytes")
        self.plain = predict(self.model, batch, **settings)
        self.all: dict[Plan, StepReport | None] = {Plan(): self.plain}

    @property
    def reports(self) -> list[StepReport]:
        """The reports so far, of plans that can be run."""
        return [report for report in self.all.values() if report]

    def report(self, plan: Plan) -> StepReport | None:
        """Predict a step under a plan; None where it fails, or gradients are wrong."""
        if plan not in self.all:
            self.all[plan] = None
            if not self.is_wrong(plan):
                with contextlib.suppress(ValueError):
                    given = self.model, self.batch, plan
                    self.all[plan] = predict(*given, **self.settings)
        return self.all[plan]

    def is_wrong(self, plan: Plan) -> bool:
        """Say whether inspection knows that a plan changes gradients."""
        found = self._inspection
        hazards = found.hazards_of(plan) if found and plan.segments else ()
        return any(hazard.effect == "gradients" for hazard in hazards)

    @functools.cached_property
    def _inspection(self) -> Inspection | None:
        try:
            return inspect_model(self.model, self.batch, **self.of_step)
        except ValueError:  # it knows fewer models than predict
            return None

    def watch(self) -> Lifetimes:
        """Watch one step in which nothing stays saved."""
        with steps_of(*self.of_model) as (imagined, step, model, batch, made):
            tracker = Tracker(model, imagined.devices, imagined.run)
            tracker.expect("input", tensors_in(batch))
            tracker.expect("optimizer_state", state_tensors(made) if made else ())
            return watch_lifetimes(step, model, tracker)


@contextlib.contextmanager
def steps_of(
    model: nn.Module | Callable[[], nn.Module], batch: object, of_step: dict
) -> Iterator[tuple]:
    """Make steps as ``predict`` runs them, after a first one, for what stays.

    Yields the imagined device, a step, and the model, batch and optimizer in it.
    """
    loss, optimizer, autocast, own, device, gpu = of_step.values()
    with as_on(device, autocast, gpu) as imagined:
        model, batch, loss, own = imagined.stand_ins(model, batch, loss, own)
        made = imagined.optimizer(optimizer, model)
        step = training_step(model, batch, loss, made, autocast, own)
        imagined.record(step, model, batch, made)
        yield imagined, step, model, batch, made
        model.zero_grad(set_to_none=True)


def named(model: nn.Module, among: Collection[str] | None) -> frozenset[str] | None:
    """Take names of modules; None for all.

    Raises:
        ValueError: if there is no module of some name.
    """
    if among is None:
        return None
    names = [among] if isinstance(among, str) else list(among)
    there = dict(model.named_modules())
    if missing := [name for name in names if name not in there]:
        raise ValueError(
            f"among lists names of modules, and there is none named {missing[0]!r}; "
            f"there are: {', '.join(filter(None, there)) or 'none'}"
        )
    return frozenset(names)

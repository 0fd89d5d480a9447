"""What a sweep goes through: each combination of settings and batch size, with plans.

Everything is made here once on the meta device, so that whatever does not fit is said
before the first step runs.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.dry_run import meta_batch, meta_model
from helpers.fingerprint import describe
from helpers.measure import random_numbers_kept

PlanOrRule = Plan | Callable[[nn.Module], Plan]


@dataclass(frozen=True)
class Case:
    """One model and batch, and the plans that are compared on them."""

    settings: dict[str, object]
    rows: int
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[], object]
    plans: list[tuple[str, Plan]]  # with labels
    model: nn.Module  # on the meta device
    batch: object  # on the meta device

    @functools.cached_property
    def words(self) -> dict[str, str]:
        """Describe model and batch, as the key of a cache."""
        return {
            "model": describe(self.model),
            "factory": describe(self.make_model),
            "batch": describe(self.batch),
        }

    def made(self, device: str, seed: int) -> tuple[nn.Module, object]:
        """Make model and batch on a device, the same ones for the same seed."""
        with random_numbers_kept():
            torch.manual_seed(seed)
            with torch.device(device):
                return self.make_model(), self.make_batch()


def make_cases(
    model_factory: Callable[..., nn.Module],
    make_batch: Callable[[int], object],
    plans: Mapping[str, PlanOrRule] | Sequence[Plan],
    rows: int | Sequence[int],
    settings: Mapping[str, Sequence],
) -> Iterator[Case]:
    """Make a case for each combination. Args and errors: as ``sweep``."""
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        raise ValueError(
            "model_factory is a function that makes the model, such as uniform_mlp or "
            f"lambda: model; got a {type(model_factory).__name__}"
        )
    _check_settings(model_factory, settings)
    labelled, sizes = _labelled(plans), _sizes(rows)
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        make_model = functools.partial(model_factory, **chosen)
        with torch.random.fork_rng(devices=[]):
            model = meta_model(make_model)
        made = [(label, _made_plan(label, plan, model)) for label, plan in labelled]
        for size in sizes:
            make = functools.partial(make_batch, size)
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                batch = meta_batch(make())
            yield Case(chosen, size, make_model, make, made, model, batch)


def _check_settings(factory: Callable, settings: Mapping[str, Sequence]) -> None:
    """Raise ValueError unless the factory takes each setting, and each has values."""
    for name, values in settings.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(
                f"settings are lists of values to try, such as {{'depth': [8, 16]}}; "
                f"{name!r} has {values!r}"
            )
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # a function in C tells nothing
        return
    takes = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        return
    names = [p.name for p in takes if p.kind is not p.POSITIONAL_ONLY]
    for name in settings:
        if name not in names:
            raise ValueError(
                f"{getattr(factory, '__name__', 'the model_factory')} has no setting "
                f"{name!r}; it has: {', '.join(names) or 'none'}"
            )


def _labelled(
    plans: Mapping[str, PlanOrRule] | Sequence[Plan],
) -> list[tuple[str, PlanOrRule]]:
    """Give each plan its label."""
    if isinstance(plans, Mapping):
        labelled = list(plans.items())
    elif isinstance(plans, Sequence) and all(isinstance(p, Plan) for p in plans):
        labelled = [(str(plan), plan) for plan in plans]
    else:
        raise ValueError(
            "plans are a list of Plans, or a dict of Plans by label, such as "
            "{'none': Plan(), 'each alone': Plan.alone(names)}"
        )
    if not labelled:
        raise ValueError("there is no plan to sweep; Plan() checkpoints nothing")
    return labelled


def _made_plan(label: str, plan: PlanOrRule, model: nn.Module) -> Plan:
    """Make a plan of a rule where it is one, and see that it fits the model."""
    made = plan(model) if not isinstance(plan, Plan) and callable(plan) else plan
    if not isinstance(made, Plan):
        raise ValueError(
            f"plan {label!r} is a {type(made).__name__}; a Plan is wanted, or a "
            "function that makes one for a model"
        )
    with checkpointed(model, made):
        return made


def _sizes(rows: int | Sequence[int]) -> list[int]:
    sizes = [rows] if isinstance(rows, int) else list(rows)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"rows are whole numbers of at least 1, got {size!r}")
    if not sizes:
        raise ValueError("there is no batch size to sweep; give rows, such as (32,)")
    return sizes

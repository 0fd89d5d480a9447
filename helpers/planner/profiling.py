"""Find the numbers of a chain's stages from dry runs of one training step.

Nothing is checkpointed in one run, each stage alone in the next, and as many together
as can be in the last. Between them they show what the arithmetic of ``helpers.chain``
asks for: what is alive where a stage begins and ends, forward and backward, and what
recomputing it needs at the start, inside and at the end of a segment.
"""

import itertools
from collections.abc import Callable, Collection

import torch
from torch import nn

from helpers.checkpointing import (
    Plan,
    checkpointed,
    follows,
    listed_after,
    segments_of,
)
from helpers.dry_run import Imagined, meta_model
from helpers.measure import GivenOptimizer, Loss, Step
from helpers.planner._judge import STEP, steps_of
from helpers.planner._marks import Marks, watch
from helpers.planner._stage_bytes import Runs
from helpers.planner._stage_times import in_milliseconds
from helpers.planner.chain import Chain
from helpers.timeline import Tracker, state_tensors, tensors_in
from helpers.timeline.feeds import Feeds


def profile(
    model: nn.Module | Callable[[], nn.Module],
    batch: object,
    *,
    parent: str | None = None,
    loss: Loss | None = None,
    optimizer: GivenOptimizer = None,
    autocast: torch.dtype | None = None,
    step: Step | None = None,
    device: str = "cuda",
    gpu: str | None = None,
    measured: bool = False,
) -> Chain:
    """Find what each layer of a chain needs and costs.

    Args:
        model, batch, loss, optimizer, step, device, gpu: as in ``predict``.
        autocast: as in ``predict``. It keeps parameters' casts for the whole forward,
            which no stage shows, so that the chain's peaks are estimates.
        parent: the ``nn.Sequential`` or ``nn.ModuleList`` whose children are the
            stages, by its dotted name; default: see ``chain_parent``.
        measured: whether the costs are milliseconds, measured on the device, and not
            FLOPs. The bytes come from dry runs in any case.

    Raises:
        ValueError: if the model holds no chain, or its layers do not feed each other.
    """
    given = loss, optimizer, autocast, step, device, gpu
    of_step = dict(zip(STEP, given, strict=True))
    if not isinstance(model, nn.Module):
        model = model() if measured else meta_model(model)
    parent = chain_parent(model) if parent is None else _listed(model, parent)
    with steps_of(model, batch, of_step) as (imagined, run, meta, fake, made):
        prefix = f"{parent}." * bool(parent)
        names = [prefix + name for name in meta.get_submodule(parent)._modules]
        chain = _dry_runs(imagined, run, meta, fake, made, names)
    if not measured:
        return chain
    return in_milliseconds(chain, model, batch, of_step)


def _listed(model: nn.Module, parent: str) -> str:
    """Take the name of a module with layers in it."""
    modules = dict(model.named_modules())
    if not isinstance(parent, str) or not getattr(modules.get(parent), "_modules", 0):
        lists = [repr(name) for name, module in modules.items() if module._modules]
        raise ValueError(
            f"parent is the name of a module with layers in it, not {parent!r}; "
            f"there are: {', '.join(lists) or 'none'}"
        )
    return parent


def _dry_runs(
    imagined: Imagined,
    step: Callable[[], object],
    model: nn.Module,
    batch: object,
    optimizer: torch.optim.Optimizer | None,
    names: list[str],
) -> Chain:
    """Run the three dry runs, and read the chain off them."""

    def run(plan: Plan, step: Callable[[], object] = step) -> Marks:
        tracker = Tracker(model, imagined.devices, imagined.run)
        tracker.expect("input", tensors_in(batch))
        tracker.expect("optimizer_state", state_tensors(optimizer) if optimizer else ())
        with checkpointed(model, plan):
            return watch(step, model, names, tracker)

    feeds = Feeds(model, names)
    plain = run(Plan(), feeds.following_chain()(step))
    starting = [name for name in names if name not in feeds.in_place()]
    try:
        alone = run(Plan.alone(starting))
    except ValueError:  # an input that somebody changes later cannot be used again
        starting = [name for name in starting if _runs(run, name)]
        alone = run(Plan.alone(starting))
    joined_plan = _joined(feeds, starting)
    try:
        joined = run(joined_plan)
    except ValueError:  # a ModuleList whose owner does more than feed one to the next
        joined, joined_plan = alone, Plan.alone(starting)
    runs = Runs(model, batch, plain, alone, joined, frozenset(starting), joined_plan)
    return runs.chain()


def chain_parent(model: nn.Module) -> str:
    """Name the module whose children are the chain: the model or the longest inside.

    Raises:
        ValueError: if there is none with two children or more.
    """
    found = {
        name: len(module._modules)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        or type(module).forward is nn.Sequential.forward
    }
    longest = "" if "" in found else max(found, key=found.get, default="")
    if found.get(longest, 0) < (2 if longest else 1):
        raise ValueError(
            f"{type(model).__name__} holds no chain: no nn.Sequential or nn.ModuleList "
            "of two layers or more"
        )
    return longest


def _runs(run: Callable[[Plan], Marks], name: str) -> bool:
    """Say whether a layer can be checkpointed alone."""
    try:
        return bool(run(Plan.alone([name])))
    except ValueError:
        return False


def _joined(feeds: Feeds, starting: Collection[str]) -> Plan:
    """Join neighbours into segments as long as can be."""

    def joins(before: str, name: str) -> bool:
        model = feeds.model
        fed = follows(model, before, name) or listed_after(model, before, name)
        return fed and before not in feeds.used_elsewhere

    segments = (
        tuple(itertools.dropwhile(lambda name: name not in starting, segment))
        for segment in segments_of(feeds.names, joins).segments
    )
    return Plan(tuple(filter(None, segments)))

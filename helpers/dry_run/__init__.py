"""Run a training step on a device that is imagined: shapes and lifetimes, no data.

Autograd, checkpointing and the optimizer run as they do on a device, so the storages
come and go as they do there. Meta tensors take the place of real ones. In ``as_on``,
the one door to it all, they meet the device's own choice of kernels and of casts.
"""

import contextlib
import functools
import random
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import optimizer as optimizers

from helpers import lazily
from helpers.allocator import on_gpu, scratch_on
from helpers.checkpointing import Undo
from helpers.dry_run.kernels import (
    choose_kernels,
    follow_autocast,
    shared,
)
from helpers.dry_run.meta import (
    SHAPES,
    SHAPES_ON_CPU,
    meta_batch,
    meta_copies,
    meta_model,
)
from helpers.timeline import Observer, Timeline, counting, record_timeline

if TYPE_CHECKING:
    from helpers.dry_run.copies import Copies

__all__ = [
    "Copies",
    "SHAPES",
    "Imagined",
    "GivenOptimizer",
    "as_on",
    "keep_attributes",
    "meta_batch",
    "meta_model",
    "optimizer_of",
]

GivenOptimizer = torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None
__getattr__ = lazily(__name__, {"Copies": "copies", "keep_attributes": "put_back"})
_fused_devices = optimizers._get_fused_kernels_supported_devices
_in_use: dict[int, object] = {}  # models of the caller's own, with who uses them


@dataclass(frozen=True)
class Imagined:
    """What a step needs to run as on a device; made by ``as_on``."""

    device: str
    run: Callable  # runs an operator, as run(func, args, kwargs)
    scratch: Callable  # tells what an operator takes besides tensors, in bytes
    devices: frozenset[str]  # whose tensors count
    undo: Undo  # at the block's end

    @functools.cached_property
    def copies(self) -> "Copies":
        """What was copied for this step, and is copied once."""
        return meta_copies()

    def stand_ins(
        self, model_or_factory: nn.Module | Callable[[], nn.Module], *others: object
    ) -> list:
        """Put a model, its batch, and what else a step is made of, on the meta device.

        A model that is there already is used as it is, and put back; if another thread
        uses it, a copy is.
        """
        from helpers.dry_run.put_back import keep_attributes, keep_shared

        model = meta_model(model_or_factory, self.copies)
        if model is model_or_factory:
            mine = object()
            self.undo.callback(_let_go, id(model), mine)
            if _in_use.setdefault(id(model), mine) is mine:
                keep_attributes(self.undo, model)
                self.copies.keep(model)
            else:
                model = self.copies.of(model)
        keep_shared(self.undo, model)
        return [model, *map(self.copies.of, others)]

    def optimizer(
        self, given: GivenOptimizer, model: nn.Module
    ) -> torch.optim.Optimizer | None:
        """Make a model's optimizer; on CUDA its default is to work on lists of tensors.

        Source: ``_default_to_fused_or_foreach`` in torch/optim/optimizer.py.
        """
        if given is None:
            return None
        made = optimizer_of(model, self.copies.of(given))
        for group in made.param_groups if self.device == "cuda" else ():
            chosen = group.get("foreach") is not None or group.get("fused")
            if "foreach" in group and not chosen and not group.get("differentiable"):
                group["foreach"] = True
        return made

    def record(
        self,
        step: Callable[[], object],
        model: nn.Module,
        batch: object,
        optimizer: torch.optim.Optimizer | None = None,
        observers: Iterable[Observer] = (),
    ) -> Timeline:
        """Record what a step on meta tensors allocates and frees on this device."""
        how = {"devices": self.devices, "run": self.run, "scratch": self.scratch}
        how |= {"optimizer": optimizer, "observers": observers}
        return record_timeline(step, model, batch=batch, **how)

    def unknown(self, timeline: Timeline) -> tuple[str, ...]:
        """Name the operators whose memory is a library's own choice."""
        from helpers.dry_run.libraries import workspaces  # when it is asked for

        return workspaces({event.allocation.op for event in timeline.events})


@contextlib.contextmanager
def as_on(
    device: str, autocast: torch.dtype | None = None, gpu: str | None = None
) -> Iterator[Imagined]:
    """Run steps on meta tensors, inside the block, as a device would run them.

    Nothing of it is left behind: random numbers, kernels and casts are as before.

    Args:
        device: "cpu" or "cuda".
        autocast: the lower precision that the steps use, if any.
        gpu: the CUDA card, by its name; default: this machine's, or else an H100.

    Raises:
        ValueError: for another device, or an unknown card.
    """
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"predict knows 'cpu' and 'cuda', not {kind!r}")
    # What the host keeps, an optimizer's step count say, is no GPU memory.
    devices = frozenset(("meta",) if kind == "cuda" else ("meta", "cpu"))
    with Undo() as undo:
        undo.enter_context(on_gpu(gpu))
        undo.callback(counting.reset, counting.set(()))
        undo.enter_context(torch.random.fork_rng(devices=[]))
        undo.callback(random.setstate, random.getstate())
        if numpy := sys.modules.get("numpy"):
            undo.callback(numpy.random.set_state, numpy.random.get_state())
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        choose_kernels(undo, kind)
        follow_autocast(undo, kind)
        shared(undo, "fused", _FusedOnMeta)
        run = SHAPES_ON_CPU if kind == "cpu" else SHAPES
        from helpers.dry_run.run_values import with_values  # not for whoever imports us

        run = with_values(undo, run, kind)
        yield Imagined(kind, run, scratch_on(kind), devices, undo)


def optimizer_of(
    model: nn.Module, given: GivenOptimizer
) -> torch.optim.Optimizer | None:
    """Make a model's optimizer, or take the one that is given.

    Raises:
        ValueError: if it is none, or another model's.
    """
    if given is None:
        return None
    made = given
    if callable(given) and not isinstance(given, torch.optim.Optimizer):
        made = given(model.parameters())
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            "optimizer is called with the parameters and makes an optimizer, as "
            f"torch.optim.AdamW does, or is one; not a {type(made).__name__}"
        )
    ours = set(map(id, model.parameters()))
    if any(id(p) not in ours for group in made.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer has parameters that are not this model's; give one of its "
            "own, or what makes one, such as torch.optim.AdamW"
        )
    return made


def _let_go(model: int, user: object) -> None:
    if _in_use.get(model) is user:
        del _in_use[model]


class _FusedOnMeta:
    """Fused optimizers refuse parameters on a device that is not in PyTorch's list."""

    def __init__(self) -> None:
        name = "_get_fused_kernels_supported_devices"
        weakref.finalize(self, setattr, optimizers, name, _fused_devices)
        setattr(optimizers, name, lambda: [*_fused_devices(), "meta"])

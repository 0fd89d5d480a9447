"""Run a training step on a device that is imagined: shapes and lifetimes, no data.

Autograd, checkpointing and the optimizer run as they do on a device, so the storages
come and go as they do there. Meta tensors take the place of real ones. In ``as_on``,
the one door to it all, they meet the device's own choice of kernels and of casts.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import optimizer as optimizers

from helpers.allocator import scratch_on
from helpers.checkpointing import Undo
from helpers.dry_run.kernels import choose_kernels, shared
from helpers.dry_run.meta import SHAPES, meta_batch, meta_model
from helpers.timeline import Observer, Timeline, counting, record_timeline

__all__ = ["SHAPES", "Imagined", "as_on", "meta_batch", "meta_model"]

_fused_devices = optimizers._get_fused_kernels_supported_devices


@dataclass(frozen=True)
class Imagined:
    """What a step needs to run as on a device; made by ``as_on``."""

    device: str
    run: Callable  # runs an operator, as run(func, args, kwargs)
    scratch: Callable  # tells what an operator takes besides tensors, in bytes
    devices: frozenset[str]  # whose tensors count

    def optimizer(
        self, factory: Callable[..., torch.optim.Optimizer] | None, model: nn.Module
    ) -> torch.optim.Optimizer | None:
        """Make a model's optimizer; on CUDA its default is to work on lists of tensors.

        Source: ``_default_to_fused_or_foreach`` in torch/optim/optimizer.py.
        """
        if factory is None:
            return None
        made = factory(model.parameters())
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


@contextlib.contextmanager
def as_on(device: str, autocast: torch.dtype | None = None) -> Iterator[Imagined]:
    """Run steps on meta tensors, inside the block, as a device would run them.

    Nothing of it is left behind: random numbers, kernels and casts are as before.

    Args:
        device: "cpu" or "cuda".
        autocast: the lower precision that the steps use, if any.

    Raises:
        ValueError: for another device.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"predict knows 'cpu' and 'cuda', not {kind!r}")
    # What the host keeps, an optimizer's step count say, is no GPU memory.
    devices = frozenset(("meta",) if kind == "cuda" else ("meta", "cpu"))
    run = SHAPES
    with Undo() as undo:
        undo.callback(counting.reset, counting.set(()))
        undo.enter_context(torch.random.fork_rng(devices=[]))
        undo.enter_context(torch.enable_grad())
        choose_kernels(undo, kind)
        shared(undo, "fused", _FusedOnMeta)
        if autocast:
            from helpers.dry_run.autocast import cast_as_on, without_autocast

            cast_as_on(undo, kind)
            run = without_autocast(SHAPES)
        yield Imagined(kind, run, scratch_on(kind), devices)


class _FusedOnMeta:
    """Fused optimizers refuse parameters on a device that is not in PyTorch's list."""

    def __init__(self) -> None:
        name = "_get_fused_kernels_supported_devices"
        weakref.finalize(self, setattr, optimizers, name, _fused_devices)
        setattr(optimizers, name, lambda: [*_fused_devices(), "meta"])

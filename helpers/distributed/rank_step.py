"""What one rank's training step needs, with DDP or FSDP2 around the model.

Both do things that no operator shows. DDP's buckets are made below Python. FSDP2's
parameters are ``DTensor``s, which say the whole shape and hold a shard; and gathered
parameters come and go by resizing their storage. Here all of it counts. What gloo or
NCCL take for themselves does not: it is no tensor of the step.
"""

import functools
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from helpers.checkpointing import Plan, Undo, checkpointed, torch_2_11
from helpers.measure import Loss, StepReport, report_of, training_step
from helpers.timeline import Observer, Tracker, record_timeline


def measure_step(
    model: nn.Module,
    batch: object,
    plan: Plan = Plan(),
    *,
    loss: Loss | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    **checkpoint_options,
) -> StepReport:
    """Measure the bytes of one training step on this rank; it has no time in it.

    All ranks have to call it, once for each model. The model is trained for some steps,
    and stays so.

    Args:
        model: alone, in DistributedDataParallel, or after ``fully_shard``.
        plan: names the layers of the model, also of one inside DDP.
        batch, loss, optimizer, checkpoint_options: as in ``helpers.measure``.
    """
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    made = optimizer(model.parameters()) if optimizer else None
    step = training_step(model, batch, loss, made)
    device = next(model.parameters()).device.type
    if device == "cpu":
        _communicate_by_copies(model)
    with checkpointed(inside, plan, **checkpoint_options):
        step()  # makes the optimizer's state; DDP then orders its buckets anew
        how = {"optimizer": made, "observers": [_Ranked(_buckets(model, step))]}
        timeline = record_timeline(step, model, batch=batch, **how)
    return report_of(timeline, plan, device, "measured")


def _buckets(model: nn.Module, step: Callable[[], None]) -> list[torch.Tensor]:
    """Find the buckets in which DDP keeps the gradients it sends, by one more step."""
    if not isinstance(model, DistributedDataParallel):
        return []
    found: list[torch.Tensor] = []

    def noting(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        found.append(bucket.buffer())
        return allreduce_hook(None, bucket)  # what DDP does without a hook

    model.register_comm_hook(None, noting)
    step()
    return found[:]  # the hook goes on noting


def _communicate_by_copies(model: nn.Module) -> None:
    """Let FSDP2 communicate by copies, which do not count.

    gloo's threads let go of a tensor a little later than FSDP2 does, each time at
    another moment, so that no two counts would be equal.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_ByCopies(torch_2_11.all_gather))
            module.set_custom_reduce_scatter(_ByCopies(torch_2_11.reduce_scatter))


class _ByCopies:
    """One of FSDP2's ways to communicate, in the form that FSDP2 asks for."""

    def __init__(self, communicate: Callable) -> None:
        self.communicate = communicate

    def allocate(self, size, *, dtype, device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, *, async_op=False, **op):
        with _disable_current_modes():
            copy = output_tensor.clone()
            self.communicate(copy, input_tensor.clone(), group=group, **op)
            output_tensor.copy_(copy)


class _Ranked(Observer):
    """Counts what no operator shows: DDP's buckets, and storages that are resized."""

    def __init__(self, buckets: list[torch.Tensor]) -> None:
        self.buckets = buckets

    def watch(self, tracker: Tracker, undo: Undo) -> None:
        """Follow a storage anew each time that it is resized."""
        tracker.expect("gradient", self.buckets)
        resize_ = torch.UntypedStorage.resize_

        @functools.wraps(resize_)
        def resized(storage: torch.UntypedStorage, n_bytes: int) -> None:
            if storage._cdata in tracker.alive:
                tracker.forget(storage._cdata)
            resize_(storage, n_bytes)
            if n_bytes and storage.device.type in tracker.devices:
                made_by = tracker.phase, "resize_", tracker.module
                allocation = tracker.follow(storage, (0,), *made_by)
                allocation.category = "temporary"
                tracker.log.append(("alloc", allocation, tracker.phase))

        undo.callback(setattr, torch.UntypedStorage, "resize_", resize_)
        torch.UntypedStorage.resize_ = resized


class Collectives(TorchDispatchMode):
    """Counts, inside a with block, how often this rank communicates, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

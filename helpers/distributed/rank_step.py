"""What one rank's training step needs, with DDP or FSDP2 around the model.

Both do things that no operator shows. DDP's buckets are made below Python. FSDP2's
parameters are ``DTensor``s, which say the whole shape and hold a shard; and gathered
parameters come and go by resizing their storage. Here all of it counts. What gloo or
NCCL take for themselves does not: it is no tensor of the step.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import Loss, StepReport, report_of, training_step
from helpers.timeline import Tracker, record_timeline


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
        make_tracker = functools.partial(RankTracker, _buckets(model, step))
        how = {"optimizer": made, "make_tracker": make_tracker}
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
    # The first names are those from PyTorch 2.13 on.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_ByCopies(gather))
            module.set_custom_reduce_scatter(_ByCopies(scatter))


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


class RankTracker(Tracker):
    """A Tracker that sees buckets, shards, and storages that change their size."""

    def __init__(self, buckets: list[torch.Tensor], *args: object) -> None:
        super().__init__(*args)
        self.expect("gradient", buckets)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # DTensor runs it on the shards, and that comes here
        return super().__torch_dispatch__(func, types, args, kwargs)

    def expect(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        super().expect(category, map(local, tensors))

    def _label(self, category: str, tensor: torch.Tensor) -> None:
        super()._label(category, local(tensor))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        resize_ = torch.UntypedStorage.resize_

        @functools.wraps(resize_)
        def resized(storage: torch.UntypedStorage, n_bytes: int) -> None:
            if storage._cdata in self.alive:
                self._freed(storage._cdata, None)
            resize_(storage, n_bytes)
            if n_bytes and storage.device.type in self.devices:
                made = torch.empty(0, dtype=torch.uint8, device=storage.device)
                phase, made_by = self._phase(), ("resize_", self._module())
                allocation = self._watch(storage, made, phase, *made_by)
                allocation.category = "temporary"
                self.log.append(("alloc", allocation, phase))

        torch.UntypedStorage.resize_ = resized
        try:
            with super().watching():
                yield
        finally:
            torch.UntypedStorage.resize_ = resize_


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Take this rank's shard of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Collectives(TorchDispatchMode):
    """Counts, inside a with block, how often this rank communicates, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

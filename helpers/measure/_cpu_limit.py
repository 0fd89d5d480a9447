"""A memory limit for a CPU: an operator that would pass it is refused.

A CPU's allocator knows no limit, so a tracker's count takes its place: a storage counts
from the moment that it is made, or that an operator first reads it, in blocks of 512 B.
What an operator will make is known before it runs, by its shapes alone, so that nothing
above the limit is ever there.
"""

import collections
import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from helpers.checkpointing import Undo
from helpers.dry_run import SHAPES
from helpers.timeline import (
    Allocation,
    Observer,
    Tracker,
    counting,
    state_tensors,
    tensors_in,
)
from helpers.timeline.tracker import LIFT_FRESH
from helpers.units import format_bytes, round_to_block

_in_force: ContextVar[tuple["CpuLimit", ...]] = ContextVar("in_force", default=())


class CpuLimit(Observer):
    """Counts what is alive on the CPU, and refuses what would pass a limit.

    Args:
        optimizers: whose state counts with a model's parameters: no operator reads it
            before their step, and it is there in backward as well.
    """

    def __init__(
        self, limit_bytes: int, optimizers: Iterable[torch.optim.Optimizer] = ()
    ) -> None:
        self.limit_bytes, self.optimizers = limit_bytes, weakref.WeakSet(optimizers)
        self.tracker = Tracker(nn.Module(), frozenset({"cpu"}), observers=[self])
        # A limit may last for many steps, and nobody reads their history.
        self.tracker.log = collections.deque(maxlen=0)
        self.tracker.before = collections.deque(maxlen=0)
        self.held_bytes = 0
        self.fixed_bytes = 0  # parameters with their gradients: no step needs less
        self.model: nn.Module | None = None  # whose forward begins

    def entered(self, module: nn.Module) -> None:
        """Begin another forward pass; another may have failed in any place."""
        tracker = self.tracker
        tracker.in_optimizer = False
        tracker.names = {id(part): name for name, part in module.named_modules()}
        tracker.module_of_node.clear()
        self.model = module

    def before(self, func: Callable, args: tuple, kwargs: dict) -> None:
        """Refuse an operator that would make too much."""
        if self.model is not None:
            model, self.model = self.model, None
            self._expect(model)
        if func is not LIFT_FRESH:
            self.tracker.notice(args, self.tracker.phase)
        wanted_bytes = _new_bytes(func, args, kwargs)
        if self.held_bytes + wanted_bytes > self.limit_bytes:
            op = func.overloadpacket.__name__
            self._refuse(op, self.tracker.module, wanted_bytes)

    def allocating(self, allocation: Allocation) -> None:
        """Count a storage, which its operator's shapes may not have told."""
        if allocation.phase != "before":
            if self.held_bytes + allocation.bytes > self.limit_bytes:
                self._refuse(allocation.op, allocation.module, allocation.bytes)
        self.held_bytes += allocation.bytes

    def freed(self, allocation: Allocation) -> None:
        """Count a storage no longer."""
        self.held_bytes -= allocation.bytes

    def _expect(self, model: nn.Module) -> None:
        """Count a whole model, and its optimizer, before its first operator runs."""
        parameters = set(model.parameters())
        states = [
            tensor
            for optimizer in list(self.optimizers)
            if not parameters.isdisjoint(optimizer.state)
            for tensor in state_tensors(optimizer)
        ]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.tracker.expect("parameter", [*parameters, *model.buffers()])
        self.tracker.expect("optimizer_state", states)
        self.fixed_bytes = sum(
            round_to_block(tensor.untyped_storage().nbytes())
            for tensor in (*parameters, *trained, *states)
            if tensor.device.type == "cpu"
        )

    def _refuse(self, op: str, module: str, wanted_bytes: int) -> None:
        """Say in one sentence who wanted how much, what is alive, what is allowed."""
        wants, phase = "", self.tracker.phase
        if wanted_bytes:
            where = f"{op} in {module}" if module else op
            wants = f"{where} ({phase}) wants {format_bytes(wanted_bytes)}, "
        advice = way_out(self.limit_bytes, self.fixed_bytes)
        if phase == "optimizer":
            advice = "no batch and no plan changes what an optimizer needs"
        raise torch.OutOfMemoryError(
            f"CPU out of memory: {wants}{format_bytes(self.held_bytes)} are alive, "
            f"and the limit is {format_bytes(self.limit_bytes)}; {advice}"
        )

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Refuse, inside the block, what passes the limit."""
        with Undo() as undo:
            undo.callback(_in_force.reset, _in_force.set((*_in_force.get(), self)))
            undo.enter_context(self.tracker.watching(alone=False))
            yield


def living_optimizers() -> list[torch.optim.Optimizer]:
    """List the optimizers that are there, but for those that only hold themselves."""

    def kinds(kind: type) -> set[type]:
        return {kind}.union(*map(kinds, kind.__subclasses__()))

    def found() -> list[torch.optim.Optimizer]:
        return [thing for thing in gc.get_objects() if type(thing) in optimizers]

    optimizers = kinds(torch.optim.Optimizer)
    if found():
        gc.collect()
    return found()


def limit_in_force() -> int | None:
    """Tell the limit that steps on the CPU are held to at present, in bytes."""
    return min((limit.limit_bytes for limit in _in_force.get()), default=None)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Leave out of the count what belongs to no step of the reader's own.

    May be used as a decorator.
    """
    with Undo() as undo:
        undo.callback(counting.reset, counting.set(()))
        if _in_force.get():  # its mode would take time, too
            undo.enter_context(_disable_current_modes())
        yield


@contextlib.contextmanager
def counted_anew(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Hold one step alone to the limit in force, with no more than its optimizer."""
    limit_bytes = limit_in_force()
    with uncounted(), Undo() as undo:
        if limit_bytes is not None:
            limit = CpuLimit(limit_bytes, [optimizer] if optimizer else [])
            undo.enter_context(limit.holding())
        yield


def way_out(limit_bytes: int, fixed_bytes: int) -> str:
    """Say what would fit; ``fixed_bytes`` are there with any batch and any plan."""
    if fixed_bytes > limit_bytes:
        return (
            "no batch is small enough: parameters, gradients and optimizer state alone "
            f"take {format_bytes(fixed_bytes)}"
        )
    return "take a smaller batch, or checkpoint more layers"


def _new_bytes(func: Callable, args: tuple, kwargs: dict) -> int:
    """Tell by shapes alone how many bytes an operator will make on the CPU.

    0 where they do not tell, because it looks at values or knows no meta tensors.
    """
    devices = {tensor.device.type for tensor in tensors_in([args, kwargs])}
    if kwargs.get("device") is not None:
        devices = {kwargs["device"].type}
    if devices != {"cpu"}:
        return 0
    read: set[int] = set()  # addresses of the storages that it is given

    def on_meta(value: object) -> object:
        if isinstance(value, torch.Tensor):
            shape, stride, dtype = value.shape, value.stride(), value.dtype
            value = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            read.add(value.untyped_storage()._cdata)
        elif isinstance(value, tuple | list):
            value = type(value)(map(on_meta, value))
        return torch.device("meta") if isinstance(value, torch.device) else value

    try:
        args = on_meta(args)
        kwargs = {name: on_meta(value) for name, value in kwargs.items()}
        made = list(tensors_in(SHAPES(func, args, kwargs)))
    except Exception:  # if anything is wrong, the operator itself will say so
        return 0
    storages = [tensor.untyped_storage() for tensor in made]
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    return sum(map(round_to_block, (sizes[place] for place in sizes.keys() - read)))

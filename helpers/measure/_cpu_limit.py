"""A memory limit for a CPU: an operator that would pass it is refused.

A CPU's allocator knows no limit, so the tracker's count takes its place: a storage
counts from the moment that it is made, or that an operator first reads it, in blocks
of 512 B. What an operator will make is known before it runs, by its shapes alone, so
that nothing above the limit is ever there.
"""

import collections
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from helpers.dry_run import RememberedShapes
from helpers.timeline import Allocation, Tracker, state_tensors, tensors_in
from helpers.timeline.tracker import LIFT_FRESH, call
from helpers.units import format_bytes, round_to_block

_in_force: ContextVar[tuple["CpuLimit", ...]] = ContextVar("in_force", default=())
is_counted: ContextVar[bool] = ContextVar("is_counted", default=True)
_shapes = RememberedShapes()
# No operator reads their state before their step, and it counts in backward as well.
_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
register_optimizer_step_post_hook(lambda optimizer, *_: _optimizers.add(optimizer))


class CpuLimit(Tracker):
    """Counts what is alive on the CPU, and refuses what would pass a limit.

    Args:
        optimizers: whose state counts with a model's parameters; default: all that are
            alive.
    """

    def __init__(
        self,
        limit_bytes: int,
        optimizers: Iterable[torch.optim.Optimizer] = _optimizers,
    ) -> None:
        super().__init__(nn.Module(), frozenset({"cpu"}), self._run_if_it_fits)
        self.limit_bytes = limit_bytes
        self.optimizers = optimizers
        self.held_bytes = 0
        self.counting = True
        self.fixed_bytes = 0  # parameters with their gradients: no step needs less
        self.entered: nn.Module | None = None  # a model whose forward begins
        # A limit may last for many steps, and nobody reads their history.
        self.log = collections.deque(maxlen=0)
        self.before = collections.deque(maxlen=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.counting:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _run_if_it_fits(self, func: Callable, args: tuple, kwargs: dict) -> object:
        if self.entered is not None:
            model, self.entered = self.entered, None
            self._expect_model(model)
        if func is not LIFT_FRESH:
            self._notice(args, self._phase())
        wanted_bytes = _new_bytes(func, args, kwargs)
        if self.held_bytes + wanted_bytes > self.limit_bytes:
            self._refuse(func.overloadpacket.__name__, self._module(), wanted_bytes)
        return call(func, args, kwargs)

    def _expect_model(self, model: nn.Module) -> None:
        """Count a whole model, and its optimizer, before its first operator runs."""
        parameters = set(model.parameters())
        states = [
            tensor
            for optimizer in list(self.optimizers)
            if not parameters.isdisjoint(optimizer.state)
            for tensor in state_tensors(optimizer)
        ]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.expect("parameter", [*parameters, *model.buffers()])
        self.expect("optimizer_state", states)
        self.fixed_bytes = sum(
            round_to_block(tensor.untyped_storage().nbytes())
            for tensor in (*parameters, *trained, *states)
            if tensor.device.type in self.devices
        )

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        if threading.get_ident() == self.thread and self.counting:
            if len(self.modules) == 1 and torch._C._current_graph_task_id() == -1:
                self.in_optimizer = False  # its step may have failed
                self.names = {id(part): name for name, part in module.named_modules()}
                self.module_of_node.clear()  # of forward passes that are over
                self.entered = module
        super()._enter_module(module, args)

    def _watch(
        self, storage: torch.UntypedStorage, tensor: torch.Tensor, phase: str, *made
    ) -> Allocation:
        n_bytes = round_to_block(storage.nbytes())
        # It is there already where its operator's shapes did not tell.
        if phase != "before" and self.held_bytes + n_bytes > self.limit_bytes:
            self._refuse(*made, n_bytes)
        self.held_bytes += n_bytes
        return super()._watch(storage, tensor, phase, *made)

    def _freed(self, address: int, reference: weakref.ref) -> None:
        self.held_bytes -= self.alive[address].bytes
        super()._freed(address, reference)

    def _refuse(self, op: str, module: str, wanted_bytes: int) -> None:
        """Say in one sentence who wanted how much, what is alive, what is allowed."""
        wants, phase = "", self._phase()
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
        if self.optimizers:
            gc.collect()  # some may be there only because they refer to themselves
        token = _in_force.set((*_in_force.get(), self))
        try:
            with self.watching():
                yield
        finally:
            _in_force.reset(token)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the operators alone inside the block."""
        on_top = _get_current_dispatch_mode() is self
        self.counting = False
        if on_top:  # else whoever came later goes on, and asks in vain
            self.__exit__(None, None, None)
        try:
            yield
        finally:
            if on_top:
                self.__enter__()
            self.counting = True


def limit_in_force() -> int | None:
    """Tell the limit that steps on the CPU are held to at present, in bytes."""
    return min((limit.limit_bytes for limit in _in_force.get()), default=None)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Leave out of the count what belongs to no step of the reader's own.

    May be used as a decorator.
    """
    token = is_counted.set(False)
    try:
        with contextlib.ExitStack() as stack:
            for limit in reversed(_in_force.get()):
                if limit.counting:
                    stack.enter_context(limit.paused())
            yield
    finally:
        is_counted.reset(token)


@contextlib.contextmanager
def counted_anew(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Hold one step alone to the limit in force, with no more than its optimizer."""
    limit_bytes = limit_in_force()
    with uncounted(), contextlib.ExitStack() as stack:
        if limit_bytes is not None:
            limit = CpuLimit(limit_bytes, [optimizer] if optimizer else [])
            stack.enter_context(limit.holding())
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

    args = on_meta(args)
    kwargs = {name: on_meta(value) for name, value in kwargs.items()}
    try:
        made = list(tensors_in(_shapes(func, args, kwargs)))
    except Exception:  # if anything is wrong, the operator itself will say so
        return 0
    storages = [tensor.untyped_storage() for tensor in made]
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    return sum(map(round_to_block, (sizes[place] for place in sizes.keys() - read)))

"""Follow every storage that a training step allocates, from its making to its end.

A ``TorchDispatchMode`` sees every operator on its way to the device, under autograd.
It notes the storage of each output once, and a weak reference on that storage tells
when it is freed. Real tensors and meta tensors (shapes without data) look alike from
here, so the same code measures a CPU step and predicts a CUDA one.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from helpers.units import format_bytes, round_to_block

PHASES = ("forward", "backward", "recompute", "optimizer")
CATEGORIES = (
    "parameter",
    "optimizer_state",
    "input",
    "gradient",
    "activation",
    "recomputed",
    "temporary",
)


ONES_LIKE = torch.ops.aten.ones_like.default
LIFT_FRESH = torch.ops.aten.lift_fresh.default


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage: what made it, and for what. ``bytes`` are whole 512 B blocks."""

    bytes: int
    shape: tuple[int, ...]
    phase: str  # in which it was allocated; "before" the step for what was there
    op: str
    module: str
    category: str = ""

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        made = f"{self.op}{where}, {self.phase}" if self.op else "before the step"
        return f"{format_bytes(self.bytes):>10}  {self.category:<15}  {made}"


def tensors_in(batch: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in a batch, nested in tuples, lists or dicts."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict):
        yield from tensors_in(list(batch.values()))
    elif isinstance(batch, tuple | list):
        for item in batch:
            yield from tensors_in(item)


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from tensors_in(state)


def _is_label(func: torch._ops.OpOverload) -> bool:
    """Say whether it only marks a range for the profiler, as optimizers do."""
    return func.namespace == "profiler"


def call(func: Callable, args: tuple, kwargs: dict) -> object:
    return func(*args, **kwargs)


def no_scratch(func: torch._ops.OpOverload, args: tuple) -> int:
    return 0


def flops_of(func: torch._ops.OpOverload, args: tuple, kwargs: dict, out) -> int:
    """Count FLOPs as ``torch.utils.flop_counter`` does, once for each shape."""
    if func.overloadpacket not in flop_registry:
        return 0
    shapes = _shapes((args, tuple(kwargs.items()), out))
    return _flops_of_shapes(func.overloadpacket, *shapes)


@functools.cache
def _flops_of_shapes(packet, args: tuple, kwargs: tuple, out: tuple) -> int:
    return flop_registry[packet](*args, **dict(kwargs), out_val=out)


def _shapes(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, tuple | list):
        return tuple([_shapes(item) for item in value])
    return value


class Tracker(TorchDispatchMode):
    """Notes storages as operators make them and as they are freed."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out torch.compile's guard around each call: it takes a third of it."""
        return False

    def __init__(
        self,
        model: nn.Module,
        devices: frozenset[str],
        run: Callable,
        scratch: Callable = no_scratch,
    ) -> None:
        super().__init__()
        self.run = run
        self.scratch_of = scratch
        self.model = model
        self.devices = devices
        self.names = {id(module): name for name, module in model.named_modules()}
        self.thread = threading.get_ident()
        self.modules = [""]  # the stack of modules whose forward is running
        self.module_of_node: dict[int, str] = {}  # by autograd sequence number
        self.in_optimizer = False
        self.last_phase = "forward"  # of the last operator
        self.watchers: dict[int, weakref.ref] = {}  # by address of the storage
        self.alive: dict[int, Allocation] = {}  # by address of the storage
        self.before: list[Allocation] = []
        self.log: list[tuple[str, Allocation, str]] = []
        self.scratch: list[tuple[int, int]] = []  # length of the log, and bytes then
        self.flops = dict.fromkeys(PHASES, 0)
        self.expect("parameter", [*model.parameters(), *model.buffers()])
        self.expect("gradient", self._gradients())

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def expect(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were there before the step."""
        for tensor in tensors:
            if tensor.device.type in self.devices:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and storage.nbytes():
                    allocation = self._watch(storage, tensor, "before", "", "")
                    allocation.category = category
                    self.before.append(allocation)

    def _watch(
        self,
        storage: torch.UntypedStorage,
        tensor: torch.Tensor,
        phase: str,
        op: str,
        module: str,
    ) -> Allocation:
        """Start to follow a storage until it is freed."""
        address = storage._cdata
        allocation = Allocation(
            round_to_block(storage.nbytes()), tuple(tensor.shape), phase, op, module
        )
        self.alive[address] = allocation
        self.watchers[address] = weakref.ref(
            storage, functools.partial(self._freed, address)
        )
        return allocation

    def _freed(self, address: int, _: weakref.ref) -> None:
        allocation = self.alive.pop(address)
        del self.watchers[address]
        self.log.append(("free", allocation, self.last_phase))

    def _phase(self) -> str:
        """Tell the phase from autograd's own state: recomputation turns grad on."""
        if torch._C._current_graph_task_id() != -1:
            return "recompute" if torch.is_grad_enabled() else "backward"
        return "optimizer" if self.in_optimizer else "forward"

    def _module(self) -> str:
        """Name the module that is running, or whose backward is."""
        if len(self.modules) == 1 and torch._C._current_graph_task_id() != -1:
            node = torch._C._current_autograd_node()
            return self.module_of_node.get(node._sequence_nr(), "") if node else ""
        return self.modules[-1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self.run(func, args, kwargs)
        if not isinstance(out, torch.Tensor | tuple | list) and _is_label(func):
            return out
        phase = self._phase()
        if phase == "forward" or phase == "recompute":
            node = torch.autograd._get_sequence_nr() - 1
            # Only the first operator after a node was made is that node's own.
            self.module_of_node.setdefault(node, self.modules[-1])
            if func is ONES_LIKE and args[0].requires_grad:
                phase = "backward"  # the gradient that backward() starts from
        self.last_phase = phase
        if func is not LIFT_FRESH:
            self._notice(args, phase)
        self.flops[phase] += flops_of(func, args, kwargs, out)
        for tensor in (out,) if isinstance(out, torch.Tensor) else tensors_in(out):
            storage = tensor.untyped_storage()
            is_new = storage._cdata not in self.alive and storage.nbytes()
            if is_new and tensor.device.type in self.devices:
                allocation = self._watch(
                    storage, tensor, phase, func.overloadpacket.__name__, self._module()
                )
                self.log.append(("alloc", allocation, phase))
        if n_bytes := self.scratch_of(func, args):
            self.scratch.append((len(self.log), n_bytes))
        return out

    def _notice(self, args: tuple, phase: str) -> None:
        """Count what an operator reads and nobody made: it was there before."""
        kinds = {"optimizer": "optimizer_state", "backward": "gradient"}
        category = kinds.get(phase, "input")
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if arg.untyped_storage()._cdata not in self.alive and arg.dim():
                    self.expect(category, (arg,))  # a number in disguise has no dim
            elif isinstance(arg, tuple | list):
                self._notice(arg, phase)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record what happens inside the block, then let go of every storage."""
        removable = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ]
        try:
            with self:
                yield
            for parameter_gradient in self._gradients():
                self._label("gradient", parameter_gradient)
        finally:
            self.watchers.clear()
            for hook in removable:
                hook.remove()

    def _label(self, category: str, tensor: torch.Tensor) -> None:
        allocation = self.alive.get(tensor.untyped_storage()._cdata)
        if allocation is not None:
            allocation.category = category

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        if threading.get_ident() == self.thread:
            self.modules.append(self.names.get(id(module), self.modules[-1]))

    def _leave_module(self, module: nn.Module, args: tuple, output: object) -> None:
        if threading.get_ident() == self.thread:
            self.modules.pop()

    def _enter_optimizer(self, optimizer, args, kwargs) -> None:
        if threading.get_ident() == self.thread:
            self.in_optimizer = True
            self.expect("optimizer_state", state_tensors(optimizer))

    def _leave_optimizer(self, optimizer, args, kwargs) -> None:
        if threading.get_ident() == self.thread:
            self.in_optimizer = False
            for tensor in state_tensors(optimizer):
                self._label("optimizer_state", tensor)

    def categorise(self) -> None:
        """Tell what each storage was for, which shows only when the step is over."""
        backward_events, born_at = 0, {}
        kept = {"forward": "activation", "recompute": "recomputed"}
        for kind, allocation, phase in self.log:
            backward_events += phase == "backward"
            if kind == "alloc":
                born_at[allocation] = backward_events
                if not allocation.category:
                    allocation.category = kept.get(phase, "temporary")
            elif born_at.get(allocation) == backward_events and phase in kept:
                allocation.category = "temporary"  # no backward has seen it

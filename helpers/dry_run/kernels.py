"""Choose, on meta tensors, the kernels that a device would run.

Some functions are one operator on a GPU and another, or several, on a CPU, and these
keep different tensors for backward. On meta tensors PyTorch takes neither; here it
takes the ones of the device that a prediction is for.
"""

import functools
import importlib
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch.amp import autocast_mode
from torch.library import Library

from helpers.checkpointing import Undo

# The device that is imagined; None outside of every prediction, as in other threads.
imagined_device: ContextVar[str | None] = ContextVar("imagined_device", default=None)
# The functions below that were met there, by name.
met: ContextVar[set[str]] = ContextVar("met")
_making = threading.RLock()
_alive: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()
_aten = torch.ops.aten


def shared(undo: Undo, name: str, make: Callable[[], object]) -> None:
    """Hold what ``make`` makes until a block's end, together with all who hold it.

    It acts on the whole process, so that it is made by the first of several threads,
    and undoes itself when the last one lets go.
    """
    with Undo() as lock:  # not the lock's own block, whose end may be interrupted
        lock.enter_context(_making)
        held: list[object] = []  # nobody else may hold it, nor an error's traceback
        undo.callback(held.clear)
        held.append(_alive.get(name) or make())
        _alive[name] = held[0]


def choose_kernels(undo: Undo, device: str) -> None:
    """Choose the kernels that a step on ``device`` would run, until a block's end."""
    shared(undo, "kernels", _registered)
    undo.callback(imagined_device.reset, imagined_device.set(device))
    undo.callback(met.reset, met.set(set()))


# Functions that are made of others, and of other ones on one device than on another.
_COMPOSITES = {
    "scaled_dot_product_attention": "attention",
    "batch_norm": "fused",
    "group_norm": "layers",
    "gru_cell": "fused",
    "lstm_cell": "fused",
    "one_hot": "layers",
    "rms_norm": "fused",
    "lstm.input": "layers",
    "gru.input": "layers",
    "rnn_tanh.input": "layers",
    "rnn_relu.input": "layers",
}


def _registered() -> Library:
    """Register what meta tensors are to run; it ends with the library."""
    library = Library("aten", "IMPL", "AutogradMeta")
    library.impl("dropout", _dropout)
    for name, home in _COMPOSITES.items():
        packet, _, overload = name.partition(".")
        func = getattr(getattr(_aten, packet), overload or "default")
        library.impl(name, functools.partial(_composite, func, home))
    library.impl("mish_backward", _mish_backward)
    library.more = Library("aten", "IMPL", "Meta")
    for name in ("_thnn_fused_gru_cell", "_thnn_fused_gru_cell_backward"):
        func = getattr(_aten, name).default  # which PyTorch has not for meta tensors
        library.more.impl(name, functools.partial(_composite, func, "fused"))
    return library


def _composite(func: torch._ops.OpOverload, home: str, *args, **kwargs) -> object:
    """Run a function as the imagined device does, by a module that is loaded for it."""
    if imagined_device.get() is None:
        return as_ever(func, *args, **kwargs)
    met.get().add(func.overloadpacket.__name__)
    module = importlib.import_module(f"helpers.dry_run.{home}")
    return getattr(module, func.overloadpacket.__name__)(*args, **kwargs)


def as_ever(func: torch._ops.OpOverload, *args, **kwargs) -> torch.Tensor:
    """Run what meta tensors run without us: in a thread that imagines no device."""
    return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _mish_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Run Mish's backward as one operator, as devices do and meta tensors do not."""
    if imagined_device.get() is None:
        return as_ever(_aten.mish_backward.default, gradient, x)
    with torch._C._AutoDispatchBelowAutograd():
        return _aten.mish_backward(gradient, x)


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """Drop out on meta tensors alone, as the CPU or as CUDA's fused kernel does it.

    The fused one keeps a bool mask, 1 byte an element, where a CPU keeps a float one.
    Source: ``is_fused_kernel_acceptable`` in aten/src/ATen/native/Dropout.cpp.
    """
    if imagined_device.get() is None:
        return as_ever(_aten.dropout.default, input, p, train)
    if not train or p == 0:
        return input
    if imagined_device.get() == "cuda" and p < 1:
        return torch.native_dropout(input, p, train)[0]
    noise = torch.empty_like(input).bernoulli_(1 - p)
    return input * (noise.div_(1 - p) if p < 1 else noise)


def on_host(func: torch._ops.OpOverload, out: object) -> object:
    """Put on the host what an operator leaves there, though meta kernels do not.

    Efficient attention's two random numbers lie on the CPU unless a graph is captured.
    Source: ``_efficient_attention_forward`` in native/transformers/cuda/attention.cu.
    """
    if func.overloadpacket is not _aten._scaled_dot_product_efficient_attention:
        return out
    on_cpu = {"dtype": torch.long, "device": "cpu"}
    return (*out[:2], *(torch.empty((), **on_cpu) for _ in range(2)))


# Of these CUDA makes another output than meta kernels say.
OTHERWISE = """binary_cross_entropy col2im glu_backward log_sigmoid_backward
  log_sigmoid_forward mse_loss pixel_unshuffle rrelu_with_noise smooth_l1_loss
  soft_margin_loss""".split()


# Autocast ---------------------------------------------------------------------------

# The switch for the imagined device's autocast, by all its names: one of a device that
# no tensor is on. PyTorch's own for CUDA cannot be switched on where there is no GPU.
SWITCH = "ipu"
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastIPU)
AUTOCAST |= torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_block: ContextVar[weakref.ref[Undo]] = ContextVar("block")  # to act on until its end
_is_on, _set_on = torch.is_autocast_enabled, torch.set_autocast_enabled
_dtype, _set_dtype = torch.get_autocast_dtype, torch.set_autocast_dtype


def follow_autocast(undo: Undo, device: str) -> None:
    """Let ``torch.autocast`` act as on the imagined device, until a block's end.

    One that is on around the block goes on in it.
    """
    shared(undo, "switches", _Switches)
    undo.callback(_block.reset, _block.set(weakref.ref(undo)))
    include = torch._C._dispatch_tls_set_dispatch_key_included
    had = torch._C._dispatch_tls_is_dispatch_key_included("AutocastIPU")
    undo.callback(include, "AutocastIPU", had)
    was_on, dtype = _is_on(device), _dtype(device)
    for kind in (device, SWITCH):  # also as an interrupt may leave them
        undo.callback(_set_dtype, kind, _dtype(kind))
        undo.callback(_set_on, kind, _is_on(kind))
        _set_on(kind, False)
    include("AutocastIPU", True)
    _set_dtype(SWITCH, dtype)
    torch.set_autocast_enabled(SWITCH, was_on)


class _Switches:
    """What ``torch.autocast`` and its like call, for our switch; it ends with this."""

    def __init__(self) -> None:
        for function in (_is_on, _set_on, _dtype, _set_dtype):
            self._put(torch, function.__name__, functools.partial(_ask, function))
        begin, cast = torch.autocast.__init__, autocast_mode._cast

        @functools.wraps(begin)
        def init(made: torch.autocast, device_type: str, *args, **kwargs) -> None:
            begin(made, _switch(device_type), *args, **kwargs)

        def cast_inputs(value: object, device_type: str, dtype: torch.dtype) -> object:
            ours = _switch(device_type) == SWITCH
            return cast(value, "meta" if ours else device_type, dtype)

        self._put(torch.autocast, "__init__", init)
        self._put(autocast_mode, "_cast", cast_inputs)

    def _put(self, owner: object, name: str, value: object) -> None:
        weakref.finalize(self, setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _switch(kind: str) -> str:
    """Return the switch that a device's name means: ours, or its own."""
    device = imagined_device.get()
    return SWITCH if device and kind in (device, "cpu", "meta") else kind


def _ask(function: Callable, device_type: object = "cuda", *value: object) -> object:
    """Call one of torch's functions for our switch, if it is about that."""
    if isinstance(device_type, bool):  # without a name, CUDA is meant
        device_type, value = "cuda", (device_type,)
    kind = _switch(device_type)
    if kind == SWITCH and True in value:
        from helpers.dry_run.autocast import cast_as_on

        cast_as_on(_block.get()())
    return function(kind, *value)

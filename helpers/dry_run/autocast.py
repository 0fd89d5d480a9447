"""Autocast on meta tensors: the casts that a device's autocast would make.

PyTorch's own autocast leaves meta tensors alone. Here every operator that a device's
autocast knows gets a kernel that casts meta tensors as that device would. It lies on a
dispatch key that no tensor has, so it is asked inside ``as_on`` alone, and
there above autograd, where autocast lies; checkpoint's recomputation is no exception.
It is needed where a block of ``torch.autocast`` is entered, and made only then.

Source: aten/src/ATen/autocast_mode.h and autocast_mode.cpp.
"""

import functools
import weakref
from contextvars import ContextVar

import torch
from torch.library import Library

from helpers.checkpointing import Undo
from helpers.dry_run.kernels import AUTOCAST, SWITCH, imagined_device, shared

_clear = torch.clear_autocast_cache
_LISTS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# What is done with an operator on a device's list, if it is not run in float32: it is
# run in the lower precision, in the widest type that it is given, or its result is
# asked for in float32.
LOWER = set(
    "_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d "
    "conv_transpose3d convolution cudnn_convolution cudnn_convolution_transpose "
    "linear matmul mm addmm _addmm_activation mv addmv addr bmm baddbmm addbmm einsum "
    "linalg_vecdot linalg_multi_dot chain_matmul prelu _thnn_fused_lstm_cell lstm_cell "
    "_thnn_fused_gru_cell gru_cell rnn_tanh_cell rnn_relu_cell mkldnn_rnn_layer "
    "_native_multi_head_attention scaled_dot_product_attention "
    "_scaled_dot_product_flash_attention".split()
)
WIDEST = {
    "cpu": {"cat", "stack", "index_copy"},
    "cuda": set(
        "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put "
        "tensordot scatter_add".split()
    ),
}
RESULT = {
    "cpu": set(),
    "cuda": set(
        "prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm "
        "sum norm".split()
    ),
}


# Parameters' casts, each with what it is a cast of. They are kept until the outermost
# autocast block is left.
_casts: ContextVar[dict[int, tuple[torch.Tensor, torch.Tensor]]] = ContextVar("casts")


def cast_as_on(undo: Undo) -> None:
    """Let the switch cast meta tensors where it is on, until a block's end."""
    if _casts.get(None) is not None:
        return  # they are cast already
    shared(undo, "casts", _Installed)
    undo.callback(_casts.reset, _casts.set({}))


class _Installed:
    """A kernel for every operator on a list; all others pass.

    With it, what ``torch.autocast`` calls at its end. Both end with this object.
    """

    def __init__(self) -> None:
        weakref.finalize(self, setattr, torch, "clear_autocast_cache", _clear)
        torch.clear_autocast_cache = _clear_all
        self.others = Library("_", "IMPL", "AutocastIPU")
        self.others.fallback(torch.library.fallthrough_kernel)
        self.listed = Library("aten", "IMPL", "AutocastIPU")
        for func, devices in _listed():
            call = functools.partial(_call, func, devices)
            self.listed.impl(func, call, with_keyset=True)


def _clear_all() -> None:
    _casts.get({}).clear()
    _clear()


@functools.cache
def _listed() -> list[tuple[torch._ops.OpOverload, frozenset[str]]]:
    """List the operators on a device's list, each with those devices."""
    found, has_kernel = [], torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        devices = [kind for kind, key in _LISTS.items() if has_kernel(name, key)]
        if devices and name.startswith("aten::"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
            found.append((func, frozenset(devices)))
    return found


def _call(func: torch._ops.OpOverload, devices: frozenset[str], keys, *args, **kwargs):
    """Call an operator with its arguments as autocast would pass them on."""
    device, name = imagined_device.get(), func.overloadpacket.__name__
    if device not in devices:  # what it calls may be on the list
        return func.redispatch(keys - AUTOCAST, *args, **kwargs)
    if device == "cuda" and name == "binary_cross_entropy":
        raise RuntimeError(
            "binary_cross_entropy may not be run under CUDA's autocast, where it loses "
            "too much; give logits to binary_cross_entropy_with_logits"
        )
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        lower = torch.get_autocast_dtype(SWITCH)
        if name in RESULT[device]:
            if not _is_cast(args[0]) or _dtype_given(func, args, kwargs):
                return func(*args, **kwargs)
            kwargs |= {"dtype": torch.float32}
            return func.overloadpacket(*args, *_left_out(func, args, kwargs), **kwargs)
        dtype = lower if name in LOWER else torch.float32
        if name in WIDEST[device]:
            dtype = torch.float32 if torch.float32 in _dtypes(args) else lower
        cast = functools.partial(_cast, dtype, dtype == lower)
        # The last one first, as compilers order a call's arguments on Linux: the casts'
        # order is the order of their gradients.
        kwargs = {key: cast(arg) for key, arg in kwargs.items()}
        return func(*reversed([cast(arg) for arg in reversed(args)]), **kwargs)


def _is_cast(value: object) -> bool:
    """Say whether it is a tensor that autocast would cast."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return is_float and value.is_meta and value.dtype != torch.float64


def _dtype_given(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    return (dict(zip(names, args, strict=False)) | kwargs).get("dtype") is not None


def _left_out(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> list:
    """List the defaults of arguments left out, which another overload does not know."""
    others = func._schema.arguments[len(args) :]
    return [one.default_value for one in others if one.name not in kwargs]


def _dtypes(value: object) -> set[torch.dtype]:
    if isinstance(value, tuple | list):
        return set().union(*map(_dtypes, value))
    return {value.dtype} if _is_cast(value) else set()


def _cast(dtype: torch.dtype, lower: bool, value: object) -> object:
    """Cast tensors, nested in lists; a parameter's cast to lower precision is kept."""
    if isinstance(value, tuple | list):
        return type(value)(_cast(dtype, lower, item) for item in value)
    if not _is_cast(value) or value.dtype == dtype:
        return value
    is_parameter = value.requires_grad and value.is_leaf and not value._is_view()
    keeps = lower and is_parameter and value.dtype == torch.float32
    if not keeps or not torch.is_autocast_cache_enabled():
        return value.to(dtype)
    casts = _casts.get()
    if id(value) not in casts:
        casts[id(value)] = value, value.to(dtype)
    return casts[id(value)][1]

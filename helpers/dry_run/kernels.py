"""Choose, on meta tensors, the kernels that a device would run.

Some functions are one operator on a GPU and another, or several, on a CPU, and these
keep different tensors for backward. On meta tensors PyTorch takes neither; here it
takes the ones of the device that a prediction is for.
"""

import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch.library import Library
from torch.nn import functional as F

from helpers.checkpointing import Undo

# The device that is imagined; None outside of every prediction, as in other threads.
imagined_device: ContextVar[str | None] = ContextVar("imagined_device", default=None)
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


def _registered() -> Library:
    """Register what meta tensors are to run; it ends with the library."""
    library = Library("aten", "IMPL", "AutogradMeta")
    library.impl("dropout", _dropout)
    library.impl("scaled_dot_product_attention", _attention)
    return library


def _as_ever(func: torch._ops.OpOverload, *args, **kwargs) -> torch.Tensor:
    """Run what meta tensors run without us: in a thread that imagines no device."""
    return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """Drop out on meta tensors alone, as the CPU or as CUDA's fused kernel does it.

    The fused one keeps a bool mask, 1 byte an element, where a CPU keeps a float one.
    Source: ``is_fused_kernel_acceptable`` in aten/src/ATen/native/Dropout.cpp.
    """
    if imagined_device.get() is None:
        return _as_ever(_aten.dropout.default, input, p, train)
    if not train or p == 0:
        return input
    if imagined_device.get() == "cuda" and p < 1:
        return torch.native_dropout(input, p, train)[0]
    noise = torch.empty_like(input).bernoulli_(1 - p)
    return input * (noise.div_(1 - p) if p < 1 else noise)


# Attention --------------------------------------------------------------------------

_HALVES = (torch.float16, torch.bfloat16)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
) -> torch.Tensor:
    """Attend on meta tensors by the fused kernel of a CPU, or of CUDA from Ampere on.

    Source: ``scaled_dot_product_attention`` in native/transformers/attention.cpp.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    composite = _aten.scaled_dot_product_attention.default
    if imagined_device.get() is None:
        return _as_ever(composite, *arguments, **options)
    kernel = _fused_kernel(*arguments)
    if kernel is None or options.get("enable_gqa"):
        return composite.decompose(*arguments, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zero, never = (
            torch.scalar_tensor(number, dtype=query.dtype, device="meta")
            for number in (0.0, -torch.inf)
        )
        attn_mask = torch.where(attn_mask, zero, never)
    return kernel(*arguments[:3], attn_mask, dropout_p, is_causal, options.get("scale"))


def _fused_kernel(
    query, key, value, attn_mask, dropout_p, is_causal
) -> Callable[..., torch.Tensor] | None:
    """Choose a fused kernel; None where only the plain products will do.

    Source: ``use_flash_attention_cpp`` in native/transformers/sdp_utils_cpp.cpp, and
    ``select_sdp_backend`` in native/transformers/cuda/sdp_utils.cpp. cuDNN's, which
    comes first on some cards, keeps the same bytes as flash attention.
    """
    heads = {tensor.shape[-1] for tensor in (query, key, value)}
    plain = query.dim() != 4 or 0 in (*query.shape, *key.shape)
    if plain or any(tensor.stride(-1) != 1 for tensor in (query, key, value)):
        return None
    switches = torch.backends.cuda  # which a CPU obeys, too
    if imagined_device.get() == "cpu":
        dense = query.shape[:2] == key.shape[:2] == value.shape[:2]
        fits = dense and len(heads) == 1 and dropout_p == 0
        return _cpu_flash if fits and switches.flash_sdp_enabled() else None
    is_half = query.dtype in _HALVES
    square = not is_causal or query.shape[2] == key.shape[2]
    fits = is_half and attn_mask is None and len(heads) == 1 and square
    if fits and max(heads) <= 256 and switches.flash_sdp_enabled():
        return _cuda_flash
    aligned = all(size % (8 if is_half else 4) == 0 for size in heads)
    fits = aligned and query.dtype in (*_HALVES, torch.float32)
    return _efficient if fits and switches.mem_efficient_sdp_enabled() else None


def _cpu_flash(query, key, value, attn_mask, dropout_p, is_causal, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _cuda_flash(query, key, value, attn_mask, dropout_p, is_causal, scale):
    size = query.shape[-1]
    inputs = query, key, value
    if size % 8:
        inputs = [F.pad(tensor, (0, 8 - size % 8)) for tensor in inputs]
    return _aten._scaled_dot_product_flash_attention(
        *inputs, dropout_p, is_causal, scale=scale or size**-0.5
    )[0][..., :size]


def _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale):
    inputs = query, key, value
    if attn_mask is not None:
        columns = attn_mask.shape[-1]
        if columns % 16:
            attn_mask = F.pad(attn_mask, (0, -columns % 16))[..., :columns]
        attn_mask = attn_mask.expand(*query.shape[:3], columns)
    keeps = any(tensor.requires_grad for tensor in inputs) and torch.is_grad_enabled()
    return _aten._scaled_dot_product_efficient_attention(
        *inputs, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )[0]


def on_host(func: torch._ops.OpOverload, out: object) -> object:
    """Put on the host what an operator leaves there, though meta kernels do not.

    Efficient attention's two random numbers lie on the CPU unless a graph is captured.
    Source: ``_efficient_attention_forward`` in native/transformers/cuda/attention.cu.
    """
    if func.overloadpacket is not _aten._scaled_dot_product_efficient_attention:
        return out
    return (*out[:2], *(torch.empty((), dtype=torch.long) for _ in range(2)))

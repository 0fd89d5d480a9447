"""Attention on meta tensors, by the fused kernel that a device would choose."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from helpers.allocator import this_gpu
from helpers.dry_run.kernels import imagined_device

_aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
) -> torch.Tensor:
    """Attend on meta tensors by the fused kernel of a CPU, or of a CUDA card.

    Source: ``scaled_dot_product_attention`` in native/transformers/attention.cpp.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    composite = _aten.scaled_dot_product_attention.default
    kernel = _fused_kernel(*arguments, options.get("enable_gqa", False))
    if kernel is None:
        return composite.decompose(*arguments, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _as_numbers(attn_mask, query.dtype)
    return kernel(*arguments[:3], attn_mask, dropout_p, is_causal, options.get("scale"))


def _as_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zero, never = (
        torch.scalar_tensor(number, dtype=dtype, device="meta")
        for number in (0.0, -torch.inf)
    )
    return torch.where(mask, zero, never)


def _fused_kernel(
    query, key, value, attn_mask, dropout_p, is_causal, may_group
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
    is_grouped = may_group and query.shape[1] != key.shape[1]
    if imagined_device.get() == "cpu":
        alike = slice(1 if is_grouped else 2)
        dense = query.shape[alike] == key.shape[alike]
        dense = dense and key.shape[:2] == value.shape[:2]
        fits = dense and len(heads) == 1 and dropout_p == 0
        fits = fits and _mask_fits(attn_mask, query, key)
        return _cpu_flash if fits and switches.flash_sdp_enabled() else None
    # Before Ampere there is no flash attention, and none in bfloat16.
    is_half, recent = query.dtype in _HALVES, this_gpu().capability >= (8, 0)
    square = not is_causal or query.shape[2] == key.shape[2]
    fits = is_half and attn_mask is None and len(heads) == 1 and square
    if fits and recent and max(heads) <= 256 and switches.flash_sdp_enabled():
        return _cuda_flash
    multiple = 8 if is_half else 4 if recent else 1
    aligned = all(size % multiple == 0 for size in heads)
    known = (*_HALVES, torch.float32) if recent else (torch.float16, torch.float32)
    fits = aligned and query.dtype in known and not is_grouped
    return _efficient if fits and switches.mem_efficient_sdp_enabled() else None


def _mask_fits(mask, query, key) -> bool:
    """Say whether a CPU's fused kernel takes a mask: one that learns nothing."""
    if mask is None:
        return True
    if mask.dim() not in (2, 4) or mask.requires_grad:
        return False
    sizes = (*query.shape[:3], key.shape[2])[-mask.dim() :]
    return all(size in (1, full) for size, full in zip(mask.shape, sizes, strict=True))


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
        if columns % 8:
            attn_mask = F.pad(attn_mask, (0, -columns % 8))[..., :columns]
        attn_mask = attn_mask.expand(*query.shape[:3], columns)
    keeps = any(tensor.requires_grad for tensor in inputs) and torch.is_grad_enabled()
    return _aten._scaled_dot_product_efficient_attention(
        *inputs, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )[0]

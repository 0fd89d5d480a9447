"""Attention on meta tensors, by the fused kernel that a device would choose."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from helpers.dry_run.kernels import imagined_device

_aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
) -> torch.Tensor:
    """Attend on meta tensors by the fused kernel of a CPU, or of CUDA from Ampere on.

    Source: ``scaled_dot_product_attention`` in native/transformers/attention.cpp.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    composite = _aten.scaled_dot_product_attention.default
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

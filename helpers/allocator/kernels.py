"""The scratch of kernels that a plain model does without, as PyTorch's code sizes it.

Each rule takes an operator's arguments and the GPU, and tells what it requests, in
order, beside its outputs. Source: the operators' files in aten/src/ATen/native/cuda
and native/transformers/cuda.
"""

import math

import torch

from helpers.allocator.reductions import of_reduction, power_of_two
from helpers.allocator.scratch import Gpu
from helpers.timeline.operators import Requests

_FLOAT = 4  # bytes: what kernels of any precision add up in
_HALVES = torch.float16, torch.bfloat16


def up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def copies(*tensors: torch.Tensor) -> Requests:
    """Copy what does not lie row by row, such as a sum's gradient, expanded."""
    return tuple(x.nbytes for x in tensors if not x.is_contiguous())


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """Say whether channels are the fastest axis, and not the last one."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    is_last = layout and x.is_contiguous(memory_format=layout)
    return layout if is_last and not x.is_contiguous() else torch.contiguous_format


def of_dense(args: tuple, gpu: Gpu) -> Requests:
    """A copy of an input that lies neither row by row nor channels last."""
    return of_dense_gradient(args[:1], gpu)


def of_dense_gradient(args: tuple, gpu: Gpu) -> Requests:
    """A copy of a gradient that does not lie as the input does, row by row say.

    A sum's gradient is such a one: a single number, expanded.
    """
    gradient, *others = args[:2]
    like = others[0] if others and isinstance(others[0], torch.Tensor) else gradient
    like = like if like.dim() == gradient.dim() else gradient
    dense = gradient.is_contiguous(memory_format=layout_of(like))
    return () if dense else (gradient.nbytes,)


def of_average_backward(args: tuple, gpu: Gpu) -> Requests:
    """Which reads it as it lies, in channels_last."""
    plain = layout_of(args[1]) is torch.contiguous_format
    return copies(args[0]) if plain else ()


def of_pool_backward(args: tuple, gpu: Gpu) -> Requests:
    return *of_dense_gradient(args, gpu), *of_dense(args[1:], gpu)


def of_norm_backward(args: tuple, gpu: Gpu) -> Requests:
    return copies(*args[:2])


# Attention --------------------------------------------------------------------------


def of_flash(args: tuple, gpu: Gpu) -> Requests:
    """The state of the random numbers; or sums and outputs for each part of the keys.

    Source: ``set_params_splitkv`` in flash_attn/flash_api.cpp.
    """
    query, key = args[:2]
    if len(args) > 3 and args[3]:
        return (16,)
    batch, heads, queries, width = query.shape
    rows, each = batch * heads * queries, 256 if width <= 64 else 128
    each = each if width <= 128 else 64
    blocks = batch * heads * -(-queries // 64), -(-key.shape[2] // each)
    parts = _parts_of_keys(*blocks, 2 * gpu.processors)
    wide = up(width, 32) if width <= 192 else 256
    sums = parts * rows * _FLOAT
    return () if parts == 1 else (sums, sums * wide)


def _parts_of_keys(blocks: int, of_keys: int, processors: int) -> int:
    """Say in how many parts keys are dealt with at once, to busy most processors."""
    if blocks >= 0.8 * processors:
        return 1
    filled = {}
    for parts in range(1, min(128, processors, of_keys) + 1):
        if parts == 1 or -(-of_keys // parts) != -(-of_keys // (parts - 1)):
            waves = blocks * parts / processors
            filled[parts] = waves / math.ceil(waves)
    enough = 0.85 * max(filled.values())
    return next(parts for parts, share in filled.items() if share >= enough)


def of_flash_backward(args: tuple, gpu: Gpu) -> Requests:
    """A sum for each query, and the query's gradient in float32.

    Heads that share keys and values have gradients for these of their own, first.
    """
    gradient, query, key, _, output = args[:5]
    batch, heads, queries, width = query.shape
    rows = batch * heads * up(queries, 128)
    sums = rows * _FLOAT, rows * up(width, 32 if width <= 128 else 64) * _FLOAT
    own = batch * heads * key.shape[2] * width * key.element_size()
    grouped = () if key.shape[1] == heads else (own, own)
    return *_by_words(gradient), *_by_words(output), *sums, *grouped


def _by_words(tensor: torch.Tensor) -> Requests:
    """Copy what does not lie word by word, and in a word head by head."""
    return copies(tensor.transpose(1, 2))


def of_efficient_backward(args: tuple, gpu: Gpu) -> Requests:
    """A sum for each query, and the tiles of gradients that blocks add to.

    Source: kernel_backward.h among the headers that PyTorch installs.
    """
    gradient, query, key, value = args[:4]
    batch, heads, queries, _ = query.shape
    is_half = query.dtype in _HALVES
    sums = batch * heads * queries * _FLOAT
    whole = gradient.numel() * _FLOAT
    turned = (sums, -sums) if heads > 1 and queries > 1 else ()
    first = (sums,) if is_half else (whole, sums, *turned, -whole)
    width = max(query.shape[-1], value.shape[-1])
    fits = next((most for most in (32, 64, 128) if width <= most), 2**16)
    recent = gpu.capability >= (8, 0)
    high = 128 if fits > 64 and (recent or is_half) else 64
    in_registers = is_half and fits <= high
    wide = 128 if in_registers and recent and fits > 64 else 64
    tiles = -(-queries // high) * -(-query.shape[-1] // wide)
    floats = tiles * (high * wide + 4)
    if is_half and not in_registers:
        columns = up(query.shape[-1], high) + up(value.shape[-1], high)
        floats += _splits(batch * heads, key.shape[2], wide) * wide * columns
    return *_by_words(gradient), *first, batch * heads * up(floats, 4) * _FLOAT


def _splits(parallel: int, keys: int, wide: int) -> int:
    """Say in how many parts the keys are dealt with at once."""
    enough = parallel >= 256 and keys <= 2 * wide
    one = enough or torch.are_deterministic_algorithms_enabled()
    return 1 if one else max(1, min(-(-keys // wide), 200 // parallel))


def of_softmax_backward(args: tuple, gpu: Gpu) -> Requests:
    """The gradient times the output."""
    gradient, output = args[:2]
    return (max(gradient.nbytes, output.nbytes),)


def of_safe_softmax(args: tuple, gpu: Gpu) -> Requests:
    """Which scores are minus infinity, in which rows all are, and a zero."""
    scores, dim = args[:2]
    return scores.numel(), scores.numel() // scores.shape[dim], scores.element_size()


# Norms -----------------------------------------------------------------------------


def of_group_norm(args: tuple, gpu: Gpu) -> Requests:
    """A scale and a shift for each channel."""
    x, weight, bias, batch, channels, size = args[:6]
    if size == 1 or (weight is None and bias is None):
        return ()
    return (batch * channels * _FLOAT,) * 2


def of_group_norm_backward(args: tuple, gpu: Gpu) -> Requests:
    """Sums for each channel and each group."""
    batch, channels, size, groups = args[5:9]
    of_channels, of_groups = (batch * n * _FLOAT for n in (channels, groups))
    if size == 1:
        return of_groups, of_groups
    scaled = () if args[4] is None else (of_channels,)
    return of_channels, of_channels, of_groups, of_groups, *scaled


def of_batch_norm(args: tuple, gpu: Gpu) -> Requests:
    """Parts of the sums of channels, where these are the fastest axis."""
    x, training = args[0], args[5]
    if not training:
        return ()
    if _channels_last(x):
        return _of_parts(x, 4)
    if x.is_contiguous():
        return ()
    whole = (x.numel() * _FLOAT,) if x.dtype in _HALVES else ()
    others = [axis for axis in range(x.dim()) if axis != 1]
    return *whole, *of_reduction((x, others), gpu, 16)


def of_batch_norm_backward(args: tuple, gpu: Gpu) -> Requests:
    """Two sums for each channel, and their parts."""
    gradient, x = args[:2]
    if not _channels_last(x):
        return *_by_channels(gradient), *_by_channels(x)
    sums = x.shape[1] * _FLOAT
    parts = _of_parts(x, 2) if _channels_last(gradient) else ()
    weight = (_FLOAT,) if args[2] is None else ()
    deviations = () if args[6].numel() else (sums,)  # which cuDNN did not keep
    return *deviations, sums, sums, *parts, *weight


def _by_channels(x: torch.Tensor) -> Requests:
    """A copy of what is no view of samples, channels and all the rest."""
    try:
        x.view(*x.shape[:2], -1)
    except RuntimeError:
        return (x.nbytes,)
    return ()


def _channels_last(x: torch.Tensor) -> bool:
    """Say whether channels are the fastest axis; a matrix's are."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last or (x.dim() == 2 and x.is_contiguous())


def _of_parts(x: torch.Tensor, numbers: int) -> Requests:
    """So many numbers for a channel in each block of rows.

    Source: ``flexible_launch_configs`` in native/cuda/Normalization.cuh.
    """
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    wide = min(power_of_two(channels), 32)
    high = min(power_of_two(-(-rows // 16)), 512 // wide)
    if wide * high != 512:
        wide = min(power_of_two(channels), 512 // high)
    blocks = min(-(-rows // (high * 16)), 128)
    if blocks < 8:  # which is not worth it
        return ()
    return numbers * channels * blocks * _FLOAT, -(-channels // wide) * 4

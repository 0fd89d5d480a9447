"""The scratch of kernels that a plain model does without, as PyTorch's code sizes it.

Each rule takes an operator's arguments and the GPU, and tells what it requests, in
order, beside its outputs. Source: the operators' files in aten/src/ATen/native/cuda
and native/transformers/cuda.
"""

import math

import torch

from helpers.allocator.scratch import Gpu
from helpers.timeline.operators import Requests

_FLOAT = 4  # bytes: what kernels of any precision add up in
_HALVES = torch.float16, torch.bfloat16


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def copies(*tensors: torch.Tensor) -> Requests:
    """Copy what does not lie row by row, such as a sum's gradient, expanded."""
    return tuple(x.nbytes for x in tensors if not x.is_contiguous())


def of_dense_gradient(args: tuple, gpu: Gpu) -> Requests:
    """A copy of a gradient that does not lie as the input does, row by row say.

    A sum's gradient is such a one: a single number, expanded.
    """
    gradient, *others = args[:2]
    axes, like = gradient.dim(), others[0] if others else None
    if axes not in (4, 5):
        return copies(gradient)
    layout = torch.channels_last if axes == 4 else torch.channels_last_3d
    like = like if isinstance(like, torch.Tensor) and like.dim() == axes else gradient
    if like.is_contiguous() or not like.is_contiguous(memory_format=layout):
        layout = torch.contiguous_format
    dense = gradient.is_contiguous(memory_format=layout)
    return () if dense else (gradient.nbytes,)


def of_average_backward(args: tuple, gpu: Gpu) -> Requests:
    """Which reads it as it lies, in channels_last."""
    return of_dense_gradient(args, gpu) if args[1].is_contiguous() else ()


# Attention --------------------------------------------------------------------------


def of_flash(args: tuple, gpu: Gpu) -> Requests:
    """The state of the random numbers."""
    return (16,) if len(args) > 3 and args[3] else ()


def of_flash_backward(args: tuple, gpu: Gpu) -> Requests:
    """A sum for each query, and the query's gradient in float32.

    Heads that share keys and values have gradients for these of their own, first.
    """
    gradient, query, key, _, output = args[:5]
    batch, heads, queries, width = query.shape
    rows = batch * heads * _up(queries, 128)
    sums = rows * _FLOAT, rows * _up(width, 32 if width <= 128 else 64) * _FLOAT
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
        columns = _up(query.shape[-1], high) + _up(value.shape[-1], high)
        floats += _splits(batch * heads, key.shape[2], wide) * wide * columns
    return *_by_words(gradient), *first, batch * heads * _up(floats, 4) * _FLOAT


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


# Embeddings and norms ---------------------------------------------------------------


def of_embedding_backward(args: tuple, gpu: Gpu) -> Requests:
    """Where there are few ids, they are dealt with as they come."""
    gradient, ids, rows, _, is_scaled = args[:5]
    copy = of_dense_gradient(args, gpu)
    if ids.numel() <= 3072 and not is_scaled:
        return copy
    return *copy, *_of_sorted(gradient, ids, rows, is_scaled)


def of_bag_backward(args: tuple, gpu: Gpu) -> Requests:
    gradient, ids, rows, is_scaled, mode = args[0], args[1], *args[6:9]
    copy = of_dense_gradient(args, gpu)
    return copy if mode == 2 else (*copy, *_of_sorted(gradient, ids, rows, is_scaled))


def _of_sorted(gradient, ids, rows: int, is_scaled: bool) -> Requests:
    """Sort the ids, and add up the rows of each in parts of ten."""
    count, each = ids.numel(), ids.nbytes
    kinds = min(count, rows)
    parts = count // 10 + kinds
    sums = parts * gradient.shape[-1] * _FLOAT
    kinds *= ids.element_size()
    places = parts * ids.element_size()
    counts = (each,) if is_scaled else ()
    return each, each, *counts, each, 8, kinds, kinds, 8, places, sums


def of_index_put(args: tuple, gpu: Gpu) -> Requests:
    """Sort the places where something is added, so that each is written by one."""
    tensor, places, values, *adds = args[:4]
    if not (adds and adds[0]):
        return ()
    found = [place for place in places if place is not None]
    rows = math.prod(torch.broadcast_shapes(*(place.shape for place in found)))
    left = [n for n, place in zip(tensor.shape, places, strict=False) if place is None]
    count = rows * math.prod(left) * math.prod(tensor.shape[len(places) :])
    is_whole = values.numel() == count and values.is_contiguous()
    copy = () if is_whole else (count * values.element_size(),)
    return rows * 8, *copy, rows * 8, rows * 8, rows * 8, 1


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
    return () if x.is_contiguous() or x.dtype not in _HALVES else (x.numel() * _FLOAT,)


def of_batch_norm_backward(args: tuple, gpu: Gpu) -> Requests:
    """Two sums for each channel, and their parts."""
    gradient, x = args[:2]
    if not _channels_last(x):
        return ()
    sums = x.shape[1] * _FLOAT
    parts = _of_parts(x, 2) if _channels_last(gradient) else ()
    weight = (_FLOAT,) if args[2] is None else ()
    deviations = () if args[6].numel() else (sums,)  # which cuDNN did not keep
    return *deviations, sums, sums, *parts, *weight


def _channels_last(x: torch.Tensor) -> bool:
    """Say whether channels are the fastest axis; a matrix's are."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last or (x.dim() == 2 and x.is_contiguous())


def _of_parts(x: torch.Tensor, numbers: int) -> Requests:
    """So many numbers for a channel in each block of rows.

    Source: ``flexible_launch_configs`` in native/cuda/Normalization.cuh.
    """
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    wide = min(_power_of_two(channels), 32)
    high = min(_power_of_two(-(-rows // 16)), 512 // wide)
    if wide * high != 512:
        wide = min(_power_of_two(channels), 512 // high)
    blocks = min(-(-rows // (high * 16)), 128)
    if blocks < 8:  # which is not worth it
        return ()
    return numbers * channels * blocks * _FLOAT, -(-channels // wide) * 4


def _power_of_two(number: int) -> int:
    """Round down to a power of two, from 1 up."""
    return 1 << (max(number, 1).bit_length() - 1)

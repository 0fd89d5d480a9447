"""The scratch of kernels that a plain model does without, as PyTorch's code sizes it.

Each rule takes an operator's arguments and the GPU, and tells what it requests, in
order, beside its outputs. Source: the operators' files in aten/src/ATen/native/cuda
and native/transformers/cuda.
"""

import math

import torch

from helpers.allocator.scratch import WORKSPACE, Gpu
from helpers.timeline.operators import Requests

_FLOAT = 4  # bytes: what kernels of any precision add up in
_HALVES = torch.float16, torch.bfloat16


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def of_dense_gradient(args: tuple, gpu: Gpu) -> Requests:
    """A copy of a gradient that does not lie row by row, such as a sum's, expanded."""
    gradient = args[0]
    dense = gradient.is_contiguous()
    if gradient.dim() in (4, 5):
        layout = torch.channels_last if gradient.dim() == 4 else torch.channels_last_3d
        dense = dense or gradient.is_contiguous(memory_format=layout)
    return () if dense else (_bytes(gradient),)


# Attention --------------------------------------------------------------------------


def of_flash_backward(args: tuple, gpu: Gpu) -> Requests:
    """A sum for each query, and the query's gradient in float32."""
    batch, heads, queries, width = args[1].shape
    rows = batch * heads * _up(queries, 128)
    return rows * _FLOAT, rows * _up(width, 32 if width <= 128 else 64) * _FLOAT


def of_efficient_backward(args: tuple, gpu: Gpu) -> Requests:
    """A sum for each query, and the tiles of gradients that blocks add to.

    Source: kernel_backward.h among the headers that PyTorch installs.
    """
    gradient, query, key, value = args[:4]
    batch, heads, queries, _ = query.shape
    is_half = query.dtype in _HALVES
    sums = batch * heads * queries * _FLOAT
    whole = gradient.numel() * _FLOAT
    first = (sums,) if is_half else (whole, sums, sums, -sums, -whole)
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
    return *first, batch * heads * _up(floats, 4) * _FLOAT


def _splits(parallel: int, keys: int, wide: int) -> int:
    """Say in how many parts the keys are dealt with at once."""
    enough = parallel >= 256 and keys <= 2 * wide
    one = enough or torch.are_deterministic_algorithms_enabled()
    return 1 if one else max(1, min(-(-keys // wide), 200 // parallel))


def of_softmax_backward(args: tuple, gpu: Gpu) -> Requests:
    """The gradient times the output."""
    gradient, output = args[:2]
    return (max(_bytes(gradient), _bytes(output)),)


def of_safe_softmax(args: tuple, gpu: Gpu) -> Requests:
    """Which scores are minus infinity, in which rows all are, and a zero."""
    scores, dim = args[:2]
    return scores.numel(), scores.numel() // scores.shape[dim], scores.element_size()


# Embeddings and norms ---------------------------------------------------------------


def of_embedding_backward(args: tuple, gpu: Gpu) -> Requests:
    """Sort the ids, and add up the rows of each in parts of ten."""
    gradient, ids, rows = args[:3]
    count, copy = ids.numel(), of_dense_gradient(args, gpu)
    if count <= 3072:
        return copy
    each, kinds = _bytes(ids), min(count, rows)
    parts = count // 10 + kinds
    sums = parts * (gradient.numel() // count) * _FLOAT
    kinds *= ids.element_size()
    places = parts * ids.element_size()
    return *copy, each, each, each, 8, kinds, kinds, 8, places, sums


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


# Convolutions, where cuDNN is switched off ------------------------------------------


def of_convolution(args: tuple, gpu: Gpu) -> Requests:
    """The patches of one sample, as a matrix."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args[:9]
    if torch.backends.cudnn.enabled:
        return ()  # a workspace of its own choice
    return _patches(x, weight, stride, padding, dilation, transposed, groups)


def of_convolution_backward(args: tuple, gpu: Gpu) -> Requests:
    """What forward takes, and a copy of a gradient that is one number expanded."""
    gradient, x, weight, _, stride, padding, dilation, transposed, _, groups = args[:10]
    copied = of_dense_gradient(args, gpu)
    if torch.backends.cudnn.enabled:
        return copied
    patches = _patches(x, weight, stride, padding, dilation, transposed, groups)
    return *copied, *patches


def _patches(x, weight, stride, padding, dilation, transposed, groups) -> Requests:
    if groups == x.shape[1] and groups > 1 and not transposed:
        return ()  # each channel by itself, by a kernel of its own
    steps = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    if transposed:
        columns = weight[0].numel() * math.prod(x.shape[2:])
    else:
        sizes = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps)
        columns = weight[0].numel() * math.prod(sizes)
    return columns * x.element_size(), WORKSPACE

"""The scratch of kernels that sort ids: an embedding's backward, and ``index_put``.

Source: EmbeddingBackwardKernel.cu, EmbeddingBag.cu and Indexing.cu in
aten/src/ATen/native/cuda, and CUB's own of CUDA 13, whose tuning goes by the card's
capability.
"""

import math

import torch

from helpers.allocator.kernels import of_dense_gradient, up
from helpers.allocator.scratch import OUTPUT, Gpu
from helpers.timeline.operators import Requests

_FLOAT = 4  # bytes: what kernels of any precision add up in
# How many numbers a block of threads deals with, before Ampere, on it, and later; by
# the bytes of each.
_SORTED = {8: (2816, 3840, 4608), 4: (11_776, 6528, 6528)}
_UNIQUE = {8: (320, 1344, 4928), 4: (704, 2816, 7168)}
_SCANNED = {8: 896, 4: 1920}


def of_embedding_backward(args: tuple, gpu: Gpu) -> Requests:
    """Where there are few ids, they are dealt with as they come."""
    gradient, ids, rows, _, is_scaled = args[:5]
    copy = of_dense_gradient(args, gpu)
    if ids.numel() <= 3072 and not is_scaled:
        return copy
    return *copy, *_of_sorted(gradient, ids, rows, is_scaled, False, gpu)


def of_bag_backward(args: tuple, gpu: Gpu) -> Requests:
    gradient, ids, rows, is_scaled, mode = args[0], args[1], *args[6:9]
    copy = of_dense_gradient(args, gpu)
    if mode == 2:
        return copy
    return *copy, *_of_sorted(gradient, ids, rows, is_scaled, True, gpu)


def _of_sorted(gradient, ids, rows, is_scaled, is_bag, gpu: Gpu) -> Requests:
    """Sort the ids, and add up the rows of each in parts of ten."""
    count, each, item_bytes = ids.numel(), ids.nbytes, ids.element_size()
    sort = _sort_bytes(count, item_bytes, rows.bit_length(), gpu)
    counts = (each,) if is_scaled else ()
    first = each, each, *counts, each, sort, -sort, -each, OUTPUT
    unique = _states(count, _by_card(_UNIQUE[item_bytes], gpu), 16)
    kinds = min(count, rows)
    found = each, 8, each, unique, -unique, -each
    scan = _states(kinds, _SCANNED[item_bytes], 2 * item_bytes)
    of_kinds = kinds * item_bytes
    offsets = of_kinds, of_kinds, scan, -scan, 8
    parts, width = count // 10 + kinds, gradient.shape[-1]
    row_bytes = width * max(_FLOAT, gradient.element_size())
    sums = parts * row_bytes
    if not is_bag and _is_added_at_once(parts, kinds, width, gpu):
        sums, is_half = parts * item_bytes, gradient.element_size() < _FLOAT
        offsets += (rows * row_bytes,) if is_half else ()
    return *first, *found, *offsets, parts * item_bytes, sums


def _is_added_at_once(parts: int, kinds: int, width: int, gpu: Gpu) -> bool:
    """Say whether parts are added where they belong, as there are few rows."""
    warps = -(-width // 32) * 32
    blocks = -(-kinds * warps // min(warps, 1024))
    few = blocks < 4 * gpu.processors and parts > 4 * blocks
    return few and not torch.are_deterministic_algorithms_enabled()


def of_index_put(args: tuple, gpu: Gpu) -> Requests:
    """Sort the places where something is added, so that each is written by one."""
    tensor, places, values, *adds = args[:4]
    if not (adds and adds[0]):
        return ()
    found = [place for place in places if place is not None]
    rows = math.prod(torch.broadcast_shapes(*(place.shape for place in found)))
    left = [n for n, place in zip(tensor.shape, places, strict=False) if place is None]
    size = math.prod(tensor.shape[len(places) :])
    count = rows * math.prod(left) * size
    is_whole = values.numel() == count and values.is_contiguous()
    copy = () if is_whole else (count * values.element_size(),)
    bits = ((tensor.numel() - 1) // max(size, 1)).bit_length()
    each = rows * 8
    return each, *copy, each, each, each, _sort_bytes(rows, 8, bits, gpu)


# CUB --------------------------------------------------------------------------------


def _sort_bytes(count: int, item_bytes: int, bits: int, gpu: Gpu) -> int:
    """What a radix sort of keys and values takes: 8 bits at once, in one sweep."""
    if count <= (2304 if item_bytes == 8 else 4864):
        return 1
    passes = -(-bits // 8)
    blocks = -(-count // _by_card(_SORTED[item_bytes], gpu))
    copies = 2 * up(count * item_bytes, 256) if passes > 1 else 0
    return passes * 2048 + blocks * 1024 + copies + 256 + 255


def _states(count: int, tile: int, word_bytes: int) -> int:
    """What a scan's blocks tell each other: a word each, and 32 more."""
    return up(up((-(-count // tile) + 32) * word_bytes, 256) + 255, 256) + 255


def _by_card(of_each: tuple[int, int, int], gpu: Gpu) -> int:
    return of_each[min(max(gpu.capability[0], 7), 9) - 7]

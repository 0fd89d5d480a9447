"""What operators keep for themselves on the way: copies, and numbers not yet summed.

Each rule takes an operator's arguments and the GPU, and tells what it requests beside
its outputs. Source: the operators' files in aten/src/ATen/native and native/cuda.
"""

import math

import torch

from helpers.allocator.kernels import copies, layout_of
from helpers.allocator.reductions import of_reduction
from helpers.allocator.scratch import OUTPUT, WORKSPACE, Gpu
from helpers.timeline.operators import Requests

_NONE = 0  # a loss's reduction: none


def _reduces(args: tuple, place: int) -> bool:
    """Say whether a loss is one number, by the argument at a place; default: a mean."""
    return len(args) <= place or args[place] != _NONE


# Losses -----------------------------------------------------------------------------


def of_loss(args: tuple, gpu: Gpu) -> Requests:
    """The loss of each number, and what their mean takes."""
    if not _reduces(args, 2):
        return ()
    sizes = torch.broadcast_shapes(args[0].shape, args[1].shape)
    losses = args[0].new_empty(sizes)
    return losses.nbytes, *of_reduction((losses,), gpu)


def of_distance(args: tuple, gpu: Gpu) -> Requests:
    sizes = torch.broadcast_shapes(args[0].shape, args[1].shape)
    return (math.prod(sizes) * args[0].element_size(),)


def of_bce(args: tuple, gpu: Gpu) -> Requests:
    """The mean, which is copied to where the losses were."""
    place = 3 if len(args) > 2 and not isinstance(args[2], int) else 2
    if not _reduces(args, place):
        return ()
    return args[0].element_size(), *of_reduction((args[0],), gpu)


def of_bce_with_logits(args: tuple, gpu: Gpu) -> Requests:
    """Logarithms of the probabilities, the losses, and what their mean takes."""
    n_bytes = args[0].nbytes
    if not _reduces(args, 4):
        return (n_bytes,)
    return n_bytes, n_bytes, *of_reduction((args[0],), gpu)


def of_soft_margin_backward(args: tuple, gpu: Gpu) -> Requests:
    return args[1].nbytes, args[1].nbytes


def of_margin(args: tuple, gpu: Gpu) -> Requests:
    """The loss of each row."""
    x, place = args[0], 2 if isinstance(args[2], int) and len(args) == 3 else 5
    rows = x.shape[0] if x.dim() > 1 else 1
    return (rows * x.element_size(),) if _reduces(args, place) else ()


# Reductions -------------------------------------------------------------------------


def of_place(args: tuple, gpu: Gpu) -> Requests:
    """A largest or smallest number's parts have its place beside it."""
    x, dim = args[0], args[1] if len(args) > 1 else None
    return of_reduction((x, None if dim is None else [dim]), gpu, 16)


def of_pair(args: tuple, gpu: Gpu) -> Requests:
    """A smallest and a largest number."""
    x, dim = args[0], args[1] if len(args) > 1 else None
    dims = None if dim is None else [dim]
    return of_reduction((x, dims), gpu, 2 * x.element_size())


def of_deviation(args: tuple, gpu: Gpu) -> Requests:
    """Parts are a mean, squares and two counts."""
    return of_reduction(args[:2], gpu, 16)


def of_extreme(args: tuple, gpu: Gpu) -> Requests:
    return of_reduction(args[:2], gpu, args[0].element_size())


def of_norm(args: tuple, gpu: Gpu) -> Requests:
    return of_reduction((args[0], args[2] if len(args) > 2 else None), gpu)


# Copies -----------------------------------------------------------------------------


def of_contiguous(args: tuple, gpu: Gpu) -> Requests:
    return copies(args[0])


def of_all_contiguous(args: tuple, gpu: Gpu) -> Requests:
    return copies(*(x for x in args if isinstance(x, torch.Tensor)))


def of_rrelu(args: tuple, gpu: Gpu) -> Requests:
    """What comes in and what goes out, row by row."""
    return 2 * copies(args[0])


def of_largest(args: tuple, gpu: Gpu) -> Requests:
    """What comes in and what goes out, with its places, row by row."""
    x, sizes = args
    if layout_of(x) is torch.contiguous_format:
        return ()
    count = math.prod(x.shape[:-2]) * math.prod(sizes)
    return count * x.element_size(), count * 8, x.nbytes


def of_largest_backward(args: tuple, gpu: Gpu) -> Requests:
    """What comes in, and what goes out, row by row."""
    gradient, x, places = args
    plain = layout_of(x) is torch.contiguous_format
    return *copies(gradient, places), *(() if plain else (x.nbytes,))


def of_running(args: tuple, gpu: Gpu) -> Requests:
    """A copy in the type that is asked for, or that a sum of integers has."""
    x, _, dtype = (*args, None)[:3]
    dtype = dtype or (x.dtype if x.is_floating_point() else torch.long)
    return () if dtype is x.dtype else (x.numel() * dtype.itemsize,)


def of_chance(args: tuple, gpu: Gpu) -> Requests:
    """The chances in float32."""
    x = args[0]
    return (x.numel() * 4,) if x.element_size() == 2 else ()


def of_resized(args: tuple, gpu: Gpu) -> Requests:
    """What comes in and what goes out, row by row."""
    x, sizes = args[:2]
    if x.is_contiguous():
        return ()
    return math.prod((*x.shape[:2], *sizes)) * x.element_size(), x.nbytes


def of_copy(args: tuple, gpu: Gpu) -> Requests:
    return (args[0].nbytes,)


def of_patches(args: tuple, gpu: Gpu) -> Requests:
    """What is made as large as the input, before it grows."""
    return *copies(args[0]), args[0].nbytes, OUTPUT


def of_power(args: tuple, gpu: Gpu) -> Requests:
    """The number that is raised."""
    return (8,)


# Along an axis ----------------------------------------------------------------------


def of_logsumexp(args: tuple, gpu: Gpu) -> Requests:
    """The exponentials, and the largest of each row."""
    x, dims = args[0], args[1]
    rows = x.numel() // math.prod(x.shape[dim] for dim in dims)
    return x.nbytes, rows * x.element_size()


def of_sort(args: tuple, gpu: Gpu) -> Requests:
    """The places, before they are copied to each row."""
    x, dim = args[0], args[1] if len(args) > 1 else -1
    return (x.shape[dim] * 8,)


def of_unfold_backward(args: tuple, gpu: Gpu) -> Requests:
    _, sizes, dim = args[:3]
    return (sizes[dim] * 8,)


def of_renorm(args: tuple, gpu: Gpu) -> Requests:
    """A factor for each part."""
    return (args[0].shape[args[2]] * args[0].element_size(),)


def of_affine_grid(args: tuple, gpu: Gpu) -> Requests:
    """The places before they are moved, each with a 1."""
    theta, (rows, _, *sizes) = args[:2]
    return (rows * math.prod(sizes) * (len(sizes) + 1) * theta.element_size(),)


# Pairs of rows ----------------------------------------------------------------------


def of_trilinear(args: tuple, gpu: Gpu) -> Requests:
    """Products of the first two, and of all, for one place of the axis in turn.

    An axis is summed over as soon as the third does not have it.
    """
    factors, added, summed = args[:3], args[3:6], args[6]
    turn = args[7] if len(args) > 7 else 1
    sizes = []
    for x, axes in zip(factors, added, strict=True):
        for axis in axes:
            x = x.unsqueeze(axis)
        sizes.append(x.shape)
    left = [axis for axis in range(len(sizes[0])) if axis != turn]
    first, both = (
        math.prod(
            max(size[axis] for size in sizes[:count])
            for axis in left
            if not (axis in summed and (count == 3 or axis in added[2]))
        )
        for count in (2, 3)
    )
    item_bytes = factors[0].element_size()
    return first * item_bytes, both * item_bytes, WORKSPACE


def of_cdist_backward(args: tuple, gpu: Gpu) -> Requests:
    gradient, rows, others = args[:3]
    parts = gradient.numel() * rows.shape[-1] * rows.element_size()
    return *copies(gradient, rows, others), parts


def of_pdist_backward(args: tuple, gpu: Gpu) -> Requests:
    rows, width = args[1].shape
    return ((rows - 1) * rows * width * args[1].element_size(),)

"""The scratch of convolutions, where cuDNN is switched off.

A sample's patches are written out as a matrix, and multiplied. cuDNN's own workspace is
its own choice. Source: ConvolutionMM2d.cu, NaiveDilatedConvolution.cu and
NaiveConvolutionTranspose2d.cu in aten/src/ATen/native/cuda.
"""

import math

import torch

from helpers.allocator.kernels import copies, of_dense_gradient
from helpers.allocator.reductions import of_reduction
from helpers.allocator.scratch import WORKSPACE, Gpu
from helpers.timeline.operators import Requests
from helpers.units import round_to_block


def of_convolution(args: tuple, gpu: Gpu) -> Requests:
    """A sample's patches, and ones that spread a bias."""
    x, weight, bias, stride, padding, dilation, transposed, more, groups = args[:9]
    if torch.backends.cudnn.enabled:
        return ()
    if _is_depthwise(x, groups, transposed):
        return copies(x, weight)
    plain = [*stride, *dilation, *weight.shape[2:]] == [1] * 3 * len(stride)
    if plain and len(stride) < 3 and not any(padding) and not transposed:
        return *copies(x, weight), WORKSPACE  # they are the sample itself
    ones: Requests = ()
    if transposed and bias is not None:
        steps = zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, more, strict=True
        )
        sizes = (
            (n - 1) * s - 2 * p + d * (k - 1) + m + 1 for n, k, s, p, d, m in steps
        )
        ones = (math.prod(sizes) * x.element_size(),)
    patches = _patches(x, weight, stride, padding, dilation, transposed)
    return *copies(x, weight), patches, *ones, WORKSPACE


def of_convolution_backward(args: tuple, gpu: Gpu) -> Requests:
    """What forward takes, and a copy of a gradient that is one number expanded."""
    gradient, x, weight, _, stride, padding, dilation, transposed, _, groups = args[:10]
    if torch.backends.cudnn.enabled:
        return of_dense_gradient(args, gpu)
    copied, biases = copies(gradient, x, weight), gradient.shape[1]
    if args[10][0] and _is_depthwise(x, groups, transposed):
        copied = copies(gradient, weight)  # the input's was freed before its gradient
    n_bytes = biases * x.element_size() if args[10][2] else 0
    if _is_depthwise(x, groups, transposed):  # the biases' gradient comes after them
        after = round_to_block(n_bytes)
        copied = tuple(size - after for size in copied if size > after)
        freed = tuple(-size for size in copied)
        others = [axis for axis in range(x.dim()) if axis != 1]
        sums = of_reduction((gradient, others), gpu) if n_bytes else ()
        return *copied, *freed, *sums
    patches = _patches(x, weight, stride, padding, dilation, transposed)
    is_naive = max(dilation) > 1 or len(stride) == 3
    sums = (n_bytes,) if is_naive and not transposed and n_bytes else ()
    return *copied, patches, *sums, WORKSPACE


def _is_depthwise(x: torch.Tensor, groups: int, transposed: bool) -> bool:
    """Say whether each channel is dealt with by itself, by a kernel of its own."""
    return groups == x.shape[1] and groups > 1 and not transposed


def _patches(x, weight, stride, padding, dilation, transposed) -> int:
    steps = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    if transposed:
        columns = weight[0].numel() * math.prod(x.shape[2:])
    else:
        sizes = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps)
        columns = weight[0].numel() * math.prod(sizes)
    return columns * x.element_size()

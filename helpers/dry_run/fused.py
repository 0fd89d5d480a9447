"""Layers that CUDA runs as one operator, and meta tensors as several.

Source: aten/src/ATen/native/layer_norm.cpp, RNN.cpp and Normalization.cpp.
"""

import math

import torch
from torch import Tensor

from helpers.dry_run.kernels import as_ever, imagined_device, met

_aten = torch.ops.aten
_LAST = torch.channels_last, torch.channels_last_3d
_BY_ROWS = _aten.glu_backward, _aten.pixel_unshuffle, _aten.rrelu_with_noise


def rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Normalise by one kernel, if the weight is of the input's type."""
    layout = torch._prims_common.suggest_memory_format(input)
    is_plain = not input.is_complex() and layout not in _LAST
    alike = weight is None or weight.dtype == input.dtype
    if imagined_device.get() == "cpu" or not (is_plain and alike):
        return as_ever(_aten.rms_norm.default, input, normalized_shape, weight, eps)
    return _RMSNorm.apply(input, normalized_shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """RMS norm by CUDA's operators, which on meta tensors have no gradients."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        # With grad on, or a tracker would not take a recomputation for one.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            out, rstd = _aten._fused_rms_norm(x, shape, weight, eps)
        ctx.shape = shape
        ctx.save_for_backward(x, rstd, weight)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, rstd, weight = ctx.saved_tensors
        asked = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        made = _aten._fused_rms_norm_backward(grad, x, ctx.shape, rstd, weight, asked)
        return made[0], None, made[1], None


def lstm_cell(input: Tensor, hx: list[Tensor], w_ih, w_hh, b_ih=None, b_hh=None):
    if imagined_device.get() == "cpu":
        return as_ever(_aten.lstm_cell.default, input, hx, w_ih, w_hh, b_ih, b_hh)
    gates = input.matmul(w_ih.t()), hx[0].matmul(w_hh.t())
    return _aten._thnn_fused_lstm_cell(*gates, hx[1], b_ih, b_hh)[:2]


def gru_cell(input: Tensor, hx: Tensor, w_ih, w_hh, b_ih=None, b_hh=None):
    if imagined_device.get() == "cpu":
        return as_ever(_aten.gru_cell.default, input, hx, w_ih, w_hh, b_ih, b_hh)
    gates = input.matmul(w_ih.t()), hx.matmul(w_hh.t())
    return _aten._thnn_fused_gru_cell(*gates, hx, b_ih, b_hh)[0]


def _thnn_fused_gru_cell(input_gates, hidden_gates, hx, b_ih=None, b_hh=None) -> tuple:
    """Make what the fused kernel makes: the next state, and its workspace."""
    return torch.empty_like(hx), hx.new_empty(len(hx), hx.shape[1] * 5)


def _thnn_fused_gru_cell_backward(gradient, workspace, has_bias: bool) -> tuple:
    """Make the gradients of the gates, of the state and of the biases."""
    rows, width = gradient.shape
    of_gates = [workspace.new_empty(rows, width * 3) for _ in range(2)]
    of_biases = [gradient.new_empty(width * 3) if has_bias else None for _ in range(2)]
    return *of_gates, torch.empty_like(gradient), *of_biases


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Leave it to cuDNN where CUDA does.

    Source: ``_select_batch_norm_backend``.
    """
    given = input, weight, bias, running_mean, running_var, training, momentum, eps
    if imagined_device.get() == "cpu" or not _is_cudnns(*given):
        return as_ever(_aten.batch_norm.default, *given, cudnn_enabled)
    layout = torch._prims_common.suggest_memory_format(input)
    if layout in _LAST and training:
        met.get().add("persistent_batch_norm")
    return _aten.cudnn_batch_norm(input.contiguous(memory_format=layout), *given[1:])[0]


def _is_cudnns(input, weight, bias, mean, var, training, momentum, eps) -> bool:
    if weight is None or bias is None or not torch.backends.cudnn.enabled:
        return False
    types = {input.dtype, weight.dtype}
    halves = torch.float16 in types and weight.dtype != torch.float32
    tracked = (mean is None) == (var is None) and (training or mean is not None)
    rows = len(input) <= (880_801 if training else 65_535)
    fits = rows and 2 < input.dim() and 0 < input.numel() < 2**31
    return fits and tracked and torch.bfloat16 not in types and not halves


def as_cuda_makes(func: torch._ops.OpOverload, args: tuple, answer: object) -> object:
    """Correct what a meta kernel says of an output, where CUDA's makes another.

    Args:
        answer: as ``describe`` makes it.
    """
    x = args[0]
    if func.overloadpacket is _aten.log_sigmoid_forward:  # its buffer is a CPU's
        return answer[0], [answer[1][0], (torch.Size([0]), (1,), x.dtype, None)]
    if func.overloadpacket is _aten.log_sigmoid_backward:  # as the gradient lies
        return answer[0], torch.empty_like(x).stride(), *answer[2:]
    if func.overloadpacket in _BY_ROWS:
        return answer[0], torch.empty(answer[0], device="meta").stride(), *answer[2:]
    shape, stride, dtype, _ = answer  # as large as the input, and then made smaller
    return shape, stride, dtype, max(math.prod(shape), x.numel()) * dtype.itemsize

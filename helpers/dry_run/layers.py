"""Recurrent layers and group norm on meta tensors, by the operators that a CPU runs.

A CPU multiplies a whole sequence by the input's weights at once, and leaves an LSTM to
oneDNN. CUDA leaves all of them to cuDNN, which takes memory of its own choice; for it
they are run step by step, as meta tensors run them.

Source: aten/src/ATen/native/RNN.cpp, mkldnn/RNN.cpp and group_norm.cpp, and
``native_group_norm`` in tools/autograd/derivatives.yaml.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.dry_run.kernels import as_ever, imagined_device

_aten = torch.ops.aten
_ONE_DNN = (torch.float32, torch.bfloat16, torch.float16)


def lstm(input: Tensor, hx: list[Tensor], params: list[Tensor], *options) -> tuple:
    if imagined_device.get() == "cuda":
        return as_ever(_aten.lstm.input, input, hx, params, *options)
    is_projected = hx[0].shape != hx[1].shape
    if input.dtype in _ONE_DNN and not is_projected and torch.backends.mkldnn.enabled:
        return _by_one_dnn(input, hx, params, *options)
    states = list(zip(hx[0].unbind(0), hx[1].unbind(0), strict=True))
    output, states = _layers(_lstm_cell, input, states, params, is_projected, *options)
    hy, cy = zip(*states, strict=True)
    output = output.transpose_(0, 1) if options[-1] else output
    cy = torch.stack(cy)  # the last argument first, as compilers order a call's
    return output, torch.stack(hy), cy


def gru(input: Tensor, hx: Tensor, params: list[Tensor], *options) -> tuple:
    return _of_one_state(_aten.gru.input, _gru_cell, input, hx, params, *options)


def rnn_tanh(input: Tensor, hx: Tensor, params: list[Tensor], *options) -> tuple:
    cell = _rnn_cell(torch.tanh)
    return _of_one_state(_aten.rnn_tanh.input, cell, input, hx, params, *options)


def rnn_relu(input: Tensor, hx: Tensor, params: list[Tensor], *options) -> tuple:
    cell = _rnn_cell(torch.relu)
    return _of_one_state(_aten.rnn_relu.input, cell, input, hx, params, *options)


def _of_one_state(func, cell: Callable, input, hx, params, *options) -> tuple:
    if imagined_device.get() == "cuda":
        return as_ever(func, input, hx, params, *options)
    output, states = _layers(cell, input, hx.unbind(0), params, False, *options)
    states = torch.stack(states)
    return output.transpose_(0, 1) if options[-1] else output, states


def _layers(
    cell: Callable,
    input: Tensor,
    states: Sequence,
    params: list[Tensor],
    is_projected: bool,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, list]:
    """Run layers, each in one direction or in both."""
    input = input.transpose(0, 1) if batch_first else input
    directions, size = 1 + bidirectional, 2 + 2 * has_biases + is_projected
    weights = [params[i : i + size] for i in range(0, len(params), size)]
    last = []
    for layer in range(num_layers):
        here = slice(layer * directions, (layer + 1) * directions)
        input, ends = _layer(cell, input, states[here], weights[here], has_biases)
        last += ends
        if dropout and train and layer < num_layers - 1:
            input = torch.dropout(input, dropout, True)
    return input, last


def _layer(
    cell: Callable, input: Tensor, states: Sequence, weights: list, has_biases: bool
) -> tuple[Tensor, list]:
    """Run the steps of a layer in its directions; what they read goes at their end."""
    made, outputs, ends = [], [], []
    for backwards, (state, own) in enumerate(zip(states, weights, strict=True)):
        w_ih, w_hh, *more = own
        b_ih, b_hh, *project = more if has_biases else (None, None, *more)
        steps = F.linear(input, w_ih, b_ih).unbind(0)
        made.append([])  # they are held until both directions are through
        for step in reversed(steps) if backwards else steps:
            state = cell(step, state, w_hh, b_hh, *project)
            made[-1].append(state[0] if isinstance(state, tuple) else state)
        outputs.append(torch.stack(made[-1][::-1] if backwards else made[-1]))
        ends.append(state)
    return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0], ends


def _gru_cell(step: Tensor, hidden: Tensor, w_hh, b_hh) -> Tensor:
    given, kept = step.unsafe_chunk(3, 1), F.linear(hidden, w_hh, b_hh)
    kept = kept.unsafe_chunk(3, 1)
    reset = kept[0].add_(given[0]).sigmoid_()
    update = kept[1].add_(given[1]).sigmoid_()
    new = given[2].add(kept[2].mul_(reset)).tanh_()
    return (hidden - new).mul_(update).add_(new)


def _rnn_cell(activation: Callable) -> Callable:
    def cell(step: Tensor, hidden: Tensor, w_hh, b_hh) -> Tensor:
        return activation(F.linear(hidden, w_hh, b_hh).add_(step))

    return cell


def _lstm_cell(step: Tensor, state: tuple, w_hh, b_hh, project=None) -> tuple:
    hidden, memory = state
    gates = F.linear(hidden, w_hh, b_hh).add_(step).unsafe_chunk(4, 1)
    enter, forget = gates[0].sigmoid_(), gates[1].sigmoid_()
    new, leave = gates[2].tanh_(), gates[3].sigmoid_()
    memory = (forget * memory).add_(enter * new)
    hidden = leave * memory.tanh()
    return hidden if project is None else hidden @ project.t(), memory


def _by_one_dnn(
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple:
    """Run an LSTM's layers, each an operator of its own."""
    input = (input.transpose(0, 1) if batch_first else input).contiguous()
    hx, cx = (state.contiguous() for state in hx)
    size, directions, hy, cy = 2 + 2 * has_biases, 1 + bidirectional, [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            weights = params[place * size : (place + 1) * size]
            if not has_biases:
                zeros = [torch.zeros_like(weight) for weight in reversed(weights)]
                weights = [*weights, *reversed(zeros)]
            states = hx[place], cx[place]
            how = num_layers, has_biases, bool(bidirectional), batch_first, train
            made = _aten.mkldnn_rnn_layer(
                input, *weights, *states, direction > 0, [], 2, hx.shape[2], *how
            )
            outputs.append(made[0])
            hy.append(made[1])
            cy.append(made[2])
        del made
        input = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            input = torch.dropout(input, dropout, True)
    hy, cy = torch.stack(hy), torch.stack(cy)
    return input.transpose(0, 1) if batch_first else input, hy, cy


# Group norm -------------------------------------------------------------------------


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalise groups; a CPU leaves channels_last as it is."""
    arguments = input, num_groups, weight, bias, eps, cudnn_enabled
    layout = torch._prims_common.suggest_memory_format(input)
    plain = torch.contiguous_format
    if imagined_device.get() == "cuda" or layout == plain:
        return as_ever(_aten.group_norm.default, *arguments)
    return _GroupNorm.apply(input.contiguous(memory_format=layout), *arguments[1:5])


class _GroupNorm(torch.autograd.Function):
    """Group norm in channels_last, whose gradients PyTorch makes contiguous on meta."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps):
        rows, channels, *sizes = x.shape
        ctx.sizes = rows, channels, torch.Size(sizes).numel(), groups
        # With grad on, or a tracker would not take a recomputation for one.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            out, mean, rstd = _aten.native_group_norm(x, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight = ctx.saved_tensors
        layout = torch._prims_common.suggest_memory_format(x)
        grad, (asked, _, *others, _) = (
            grad.contiguous(memory_format=layout),
            ctx.needs_input_grad,
        )
        made = _aten.native_group_norm_backward(
            grad, x, mean, rstd, weight, *ctx.sizes, [asked, *others]
        )
        return made[0], None, made[1], made[2], None


def one_hot(input: Tensor, num_classes: int = -1) -> Tensor:
    """Mark classes in zeros; a CPU looks for the least and the largest one before."""
    if imagined_device.get() == "cpu":
        _, largest = torch.aminmax(input)
    elif num_classes == -1:
        largest = input.max()
    if num_classes == -1:
        num_classes = int(largest) + 1
    marks = input.new_zeros(*input.shape, num_classes)
    return marks.scatter_(-1, input.unsqueeze(-1), 1)

"""Steps under the compiler's memory budget: the bytes of a real CPU step, no more."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from helpers.compiled import CompiledModel, measure_compiled, predict_compiled
from helpers.measure import predict, training_step
from helpers.models import uniform_mlp

ROWS, WIDTH = 256, 64


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.gelu(self.linear(self.norm(x)))


class Broken(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self[0](x)
        torch._dynamo.graph_break()
        return self[1](x)


def mlp() -> nn.Sequential:
    return uniform_mlp(3, WIDTH, "gelu")


def residual() -> nn.Sequential:
    return nn.Sequential(Residual(), Residual(), Residual())


@functools.cache
def predicted(factory, budget: float):
    return predict_compiled(factory, torch.empty(ROWS, WIDTH, device="meta"), budget)


@pytest.mark.parametrize(
    ("factory", "budget"), [(mlp, 1.0), (mlp, 0.5), (mlp, 0.0), (residual, 0.3)]
)
def test_a_real_step_has_the_bytes_and_flops_that_were_predicted(factory, budget):
    model, x = factory(), torch.randn(ROWS, WIDTH)
    report = measure_compiled(model, x, budget)
    assert report.source == "measured"
    expected = dataclasses.replace(predicted(factory, budget), source="measured")
    assert report.to_dict() == expected.to_dict()


def test_a_compiled_step_has_the_gradients_of_a_plain_one():
    # In double precision, as a compiled graph may add up in another order.
    model, x = residual().double(), torch.randn(ROWS, WIDTH, dtype=torch.double)
    training_step(CompiledModel(model, x, 0.3), x)()
    gradients = [parameter.grad for parameter in model.parameters()]
    training_step(model, x)()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_budget_bounds_what_forward_saves_and_not_the_peak():
    reports = [predicted(mlp, budget) for budget in (1.0, 0.5, 0.0)]
    saved = [report.after_forward_bytes for report in reports]
    assert saved[0] > saved[1] > saved[2]
    peaks = [report.peak_bytes for report in reports]
    assert peaks[1] < peaks[0] and peaks[1] < peaks[2]


def test_recompute_is_what_backward_multiplies_beyond_an_uncompiled_one():
    assert predicted(mlp, 1.0).recompute_flops == 0
    assert predicted(mlp, 0.5).recompute_flops == 0  # GELU alone is run again
    plain = predict(mlp, torch.empty(ROWS, WIDTH, device="meta"))
    hidden_flops = 3 * 2 * ROWS * WIDTH * WIDTH
    assert predicted(mlp, 0.0).forward_flops == plain.forward_flops
    assert predicted(mlp, 0.0).recompute_flops == hidden_flops


def test_a_batch_with_targets():
    x = torch.empty(ROWS, WIDTH, device="meta")
    target = torch.empty(ROWS, dtype=torch.long, device="meta")
    report = predict_compiled(mlp, (x, target), 0.5)
    assert report.peak_bytes > predicted(mlp, 0.5).peak_bytes  # the softmax


class Outputs(nn.Module):
    """Takes keyword arguments, and returns several things."""

    def __init__(self, form) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.form = form

    def forward(self, x, *, scale=1.0):
        hidden = nn.functional.gelu(self.first(x * scale))
        return self.form(self.last(hidden), hidden, x)


FORMS = [
    lambda out, hidden, x: out,
    lambda out, hidden, x: (out, hidden),
    lambda out, hidden, x: {"logits": out, "none": None, "n": 3, "hidden": [hidden]},
    lambda out, hidden, x: (out, x),
    lambda out, hidden, x: (out, out.flatten(), out),
]


@pytest.mark.parametrize(
    ("form", "scale", "has_target"),
    [(FORMS[0], {}, True), (FORMS[2], {"scale": 2.0}, False)]
    + [(FORMS[1], {"scale": torch.ones(WIDTH)}, True)],
)
def test_batches_and_outputs_of_every_form(form, scale, has_target):
    model, x = Outputs(form), {"x": torch.randn(32, WIDTH), **scale}
    target = torch.zeros(32, dtype=torch.long)
    batch = (x, target) if has_target else x
    report = predict_compiled(model, batch)
    assert report.peak_bytes == measure_compiled(model, batch).peak_bytes
    if not scale:
        assert predict_compiled(model, (x["x"], target)).to_dict() == report.to_dict()


@pytest.mark.parametrize("form", FORMS)
def test_outputs_come_back_in_their_form(form):
    model, x = Outputs(form), torch.randn(32, WIDTH)
    found, expected = CompiledModel(model, {"x": x})(x=x), model(x=x)
    leaves, how = tree_flatten(expected)
    found, same_form = tree_flatten(found)
    assert same_form == how
    for one, other in zip(found, leaves, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_that_is_none_is_refused():
    for batch in (torch.ones(1), torch.ones(1), 3), {3}:
        with pytest.raises(ValueError, match="a batch is a tensor x"):
            measure_compiled(mlp(), batch)


def test_a_model_is_left_as_it_was():
    model, x = mlp(), torch.randn(ROWS, WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_compiled(model, x, 0.5)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_budget_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="a share from 0 to 1, not 400"):
        predict_compiled(mlp, torch.empty(ROWS, WIDTH, device="meta"), 400)


def test_a_model_that_is_two_graphs_is_refused():
    def broken():
        return Broken(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    with pytest.raises(ValueError, match="compiled into 2 graphs"):
        predict_compiled(broken, torch.empty(ROWS, WIDTH, device="meta"))

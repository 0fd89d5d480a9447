"""A model that refers to itself, or to tensors that are not its own, is followed."""

import functools
import types

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.measure import measure, predict
from helpers.models import MLP

X = torch.randn(4, 16)


def with_a_lambda(model: nn.Module) -> None:
    model.forward = lambda x: model.layer2(model.layer1(x))


def with_a_wrapper_inside(model: nn.Module) -> None:
    forward = model.layer1.forward
    model.layer1.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [with_a_lambda, with_a_wrapper_inside])
def test_a_function_that_refers_to_the_model_is_followed(change):
    model = MLP([16, 16, 4])
    change(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    for plan in (Plan(), Plan.alone(["layer1"])):
        peak = predict(model, X, plan, device="cpu").peak_bytes
        assert peak == measure(model, X, plan, repeats=0).peak_bytes
    assert forwards == [vars(module).get("forward") for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: types.MethodType(
            lambda self, x: self.layer2(self.layer1(x)), model
        ),
        lambda model: functools.partial(nn.Sequential.forward, model),
        lambda model: model.forward,
    ],
    ids=["method", "partial", "its own"],
)
def test_what_a_copy_can_follow_is_run(replace):
    model = MLP([16, 16, 4])
    peak = predict(model, X).peak_bytes
    model.forward = replace(model)
    assert predict(model, X).peak_bytes == peak
    assert measure(model, X, repeats=1).peak_bytes == peak


def test_a_real_tensor_in_a_forward_counts():
    model = MLP([16, 16, 4])
    model.layer1.forward = lambda x: x + torch.ones(16)
    peak = predict(model, X, device="cpu").peak_bytes
    assert peak == measure(model, X, repeats=0).peak_bytes

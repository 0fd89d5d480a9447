"""What a step says where a model refers to itself in a way that no copy can follow."""

import functools
import types

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.measure import measure, predict
from helpers.models import MLP
from helpers.planner import profile

X = torch.randn(4, 16)


def with_a_lambda(model: nn.Module) -> None:
    model.forward = lambda x: model.layer2(model.layer1(x))


def with_a_wrapper_inside(model: nn.Module) -> None:
    forward = model.layer1.forward
    model.layer1.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("run", [predict, profile])
@pytest.mark.parametrize("change", [with_a_lambda, with_a_wrapper_inside])
def test_a_function_that_refers_to_the_model_is_named(run, change):
    model = MLP([16, 16, 4])
    change(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    with pytest.raises(ValueError, match="or to another model .*types.MethodType"):
        run(model, X)
    assert forwards == [vars(module).get("forward") for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("change", [with_a_lambda, with_a_wrapper_inside])
def test_and_is_measured(change):
    model = MLP([16, 16, 4])
    change(model)
    assert measure(model, X, repeats=0).peak_bytes


def test_it_is_named_inside_a_segment_too():
    model = MLP([16, 16, 4])
    with_a_wrapper_inside(model)
    with pytest.raises(ValueError, match="layer 'layer1' refers to a real tensor"):
        predict(model, X, Plan.alone(["layer1"]))


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


def test_a_real_tensor_in_a_forward_is_named():
    model = MLP([16, 16, 4])
    model.layer1.forward = lambda x: x + torch.ones(16)
    with pytest.raises(ValueError, match="layer 'layer1' refers to a real tensor"):
        predict(model, X)

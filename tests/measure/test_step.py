"""What a step says where a model refers to itself in a way that no copy can follow."""

import functools
import types

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import measure, predict
from helpers.models import MLP
from helpers.planner import profile

X = torch.randn(4, 16)


def with_a_lambda(model: nn.Module) -> str:
    model.forward = lambda x: model.layer2(model.layer1(x))
    return "the forward of the model is"


def with_a_wrapper_inside(model: nn.Module) -> str:
    forward = model.layer1.forward
    model.layer1.forward = lambda x: 2 * forward(x)
    return "the forward of 'layer1' is"


@pytest.mark.parametrize("run", [predict, measure, profile])
@pytest.mark.parametrize("change", [with_a_lambda, with_a_wrapper_inside])
def test_a_function_that_refers_to_the_model_is_named(run, change):
    model = MLP([16, 16, 4])
    words = change(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    with pytest.raises(ValueError, match=f"{words} .*types.MethodType"):
        run(model, X)
    assert forwards == [vars(module).get("forward") for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_named_inside_a_segment_too():
    model = MLP([16, 16, 4])
    words = with_a_wrapper_inside(model)
    with pytest.raises(ValueError, match=words):
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


def test_a_tensor_on_another_device_is_no_fault_of_a_function():
    model = MLP([16, 16, 4])
    forward = checkpointed  # refers to no module
    model.layer1.forward = lambda x: x + torch.ones(16) * (forward is not None)
    with pytest.raises(ValueError, match="does not fit this model at layer 'layer1'"):
        predict(model, X)

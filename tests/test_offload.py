"""Saved tensors on the host: what the device holds, what travels, right gradients."""

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import measure, predict, training_step
from helpers.models import GPT, uniform_mlp
from helpers.offload import Offloaded

ROWS, WIDTH = 256, 64
BF16 = torch.bfloat16


def transformer() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(100, (4, 32))
    return GPT(3, WIDTH, 4, vocabulary=100, context=32), (ids, ids)


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("ticked", [[], ["model.blocks.0", "model.blocks.1"]])
def test_predicted_is_measured(autocast, parameters, ticked):
    model, batch = transformer()
    away = Offloaded(model, parameters=parameters)
    how = {"plan": Plan.alone(ticked), "autocast": autocast, "device": "cpu"}
    measured = measure(away, batch, repeats=0, **how)
    expected = predict(away, batch, **how)
    assert measured.peak_bytes == expected.peak_bytes
    assert measured.after_forward_bytes == expected.after_forward_bytes
    assert measured.categories == expected.categories
    assert expected.peak_bytes < predict(model, batch, autocast=autocast).peak_bytes


def test_what_travels_by_hand():
    """Each Linear saves its input and its weight, each GELU its input."""
    with torch.device("meta"):
        chain = uniform_mlp(3, WIDTH, "gelu")
    x = torch.empty(ROWS, WIDTH, device="meta")
    activation, weights = 4 * ROWS * WIDTH, 4 * (2 * WIDTH * WIDTH + 10 * WIDTH)
    # x needs no gradient, so that the first Linear does not save its weight.
    for parameters, expected in (
        (False, 7 * activation),
        (True, 7 * activation + weights),
    ):
        away = Offloaded(chain, parameters=parameters)
        report = predict(away, x)
        assert away.moved_bytes == expected
        assert report.recompute_flops == 0


def test_beside_boxes_only_inputs_travel():
    with torch.device("meta"):
        away = Offloaded(uniform_mlp(3, WIDTH, "gelu"), parameters=False)
    x = torch.empty(ROWS, WIDTH, device="meta")
    segments = tuple((f"model.layer{i}",) for i in (1, 2, 3))
    predict(away, x, Plan(segments))
    assert away.moved_bytes == 4 * 4 * ROWS * WIDTH  # of three layers and of the head


@pytest.mark.parametrize("autocast", [None, BF16])
def test_gradients_are_those_of_the_plain_model(autocast):
    model, batch = transformer()
    training_step(model, batch, autocast=autocast)()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    away = Offloaded(model)
    with checkpointed(away, Plan.alone(["model.blocks.1"])):
        training_step(away, batch, autocast=autocast)()
    for gradient, parameter in zip(plain, model.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)
    assert away.moved_bytes > 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(6, 4),
        torch.randn(6, 4).t(),
        torch.randn(6, 4)[:, 1:3],
        torch.randn(4).expand(6, 4),
        torch.randn(6, 1, 4).bfloat16(),
        torch.arange(6),
        torch.rand(6) > 0.5,
        torch.tensor(3.0),
        torch.empty(0, 4),
    ],
    ids=[
        "plain",
        "turned",
        "gaps",
        "expanded",
        "bf16",
        "int",
        "bool",
        "number",
        "empty",
    ],
)
def test_any_tensor_comes_back(tensor):
    made = []

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, kept):
            ctx.save_for_backward(kept)
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            made.append(ctx.saved_tensors[0])
            return gradient, None

    class Model(nn.Module):
        def forward(self, x):
            return Saves.apply(x, tensor)

    Offloaded(Model())(torch.ones(1, requires_grad=True)).backward()
    (back,) = made
    assert torch.equal(back, tensor) and back.dtype == tensor.dtype
    assert back.untyped_storage()._cdata != tensor.untyped_storage()._cdata


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_holds_what_was_predicted_and_what_save_on_cpu_leaves():
    model, batch = transformer()
    away = Offloaded(model)
    measured = measure(away, batch, device="cuda", repeats=0)
    assert measured.peak_bytes == predict(away, batch).peak_bytes

    class SavedOnCpu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids):
            with torch.autograd.graph.save_on_cpu():
                return self.model(ids)

    theirs = measure(SavedOnCpu(), batch, device="cuda", repeats=0)
    assert theirs.peak_bytes == measured.peak_bytes

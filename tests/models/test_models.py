"""The models: the docs' MLP layer by layer, and MLPs of any widths."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.models import MLP, DocsMLP, TanhGELU, unequal_blocks, uniform_mlp

FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def test_the_docs_mlp_has_the_docs_layers_and_forward():
    model, x = DocsMLP(), torch.randn(3, 1024)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "layer1.weight": (1024, 1024),
        "layer1.bias": (1024,),
        "layer2.weight": (1024, 1024),
        "layer2.bias": (1024,),
        "layer3.weight": (10, 1024),
        "layer3.bias": (10,),
    }
    weights = dict(model.named_parameters())
    by_hand = x
    for layer in ("layer1", "layer2", "layer3"):
        by_hand = by_hand @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        by_hand = by_hand if layer == "layer3" else by_hand.clamp(min=0)
    torch.testing.assert_close(model(x), by_hand)
    assert isinstance(model.relu, nn.ReLU)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_an_mlp_is_a_chain_of_named_layers(activation):
    model, x = MLP([6, 5, 4, 3], activation), torch.randn(2, 6)
    assert [name for name, _ in model.named_children()] == [
        "layer1",
        "layer2",
        "layer3",
    ]
    by_hand = x
    for layer in (model.layer1, model.layer2):
        assert type(layer) is nn.Sequential and len(layer) == 2
        by_hand = FUNCTIONS[activation](
            F.linear(by_hand, layer[0].weight, layer[0].bias)
        )
    assert type(model.layer3) is nn.Linear
    assert torch.equal(model(x), model.layer3(by_hand))
    assert [p.shape[0] for p in model.parameters()] == [5, 5, 4, 4, 3, 3]


def test_dropout_comes_after_each_activation_if_any():
    model = MLP([6, 5, 4, 3], dropout=0.25)
    for layer in (model.layer1, model.layer2):
        kinds = [type(module) for module in layer]
        assert kinds == [nn.Linear, nn.ReLU, nn.Dropout]
        assert layer[2].p == 0.25
    assert not any(isinstance(m, nn.Dropout) for m in MLP([6, 5, 3]).modules())


def test_two_widths_make_a_lone_linear():
    assert [type(child) for child in MLP([6, 3])] == [nn.Linear]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([6],), "at least two"),
        (([6, 0],), "positive"),
        (([6, 2.5],), "whole"),
        (([6, 3], "swish"), "relu, gelu, silu, tanh"),
        (([6, 3], "relu", 1.0), "below 1"),
        (([6, 3], "relu", -0.1), "at least 0"),
    ],
)
def test_what_makes_no_mlp_says_why(arguments, words):
    with pytest.raises(ValueError, match=words):
        MLP(*arguments)


def test_a_uniform_mlp_has_equal_hidden_layers_and_ten_outputs():
    model = uniform_mlp(3, 16, "tanh", 0.5)
    weights = [p.shape for p in model.parameters() if p.dim() == 2]
    assert weights == [(16, 16), (16, 16), (16, 16), (10, 16)]
    assert [type(module) for module in model.layer2] == [nn.Linear, nn.Tanh, nn.Dropout]
    for depth in (0, 2.0):
        with pytest.raises(ValueError, match="depth"):
            uniform_mlp(depth)


def test_tanh_gelu_is_gelu_by_a_tanh_and_keeps_four_tensors():
    h, kept = torch.randn(64, 8, requires_grad=True), set()

    def note(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = TanhGELU()(h)
    torch.testing.assert_close(out, F.gelu(h, approximate="tanh"))
    assert len(kept) == 4  # h, the tanh, and the two factors of the product


def test_unequal_blocks_follow_each_other():
    model, x = unequal_blocks(8), torch.randn(3, 8)
    shapes = [x.shape[1]]
    for block in model:
        x = block(x)
        shapes.append(x.shape[1])
    assert shapes == [8, 8, 8, 8, 8, 32]
    weights = {
        name: sum(p.numel() for p in b.parameters())
        for name, b in model.named_children()
    }
    assert max(weights, key=weights.get) == "wide"
    assert min(weights, key=weights.get) == "pointwise"
    for width in (3, 8.0):
        with pytest.raises(ValueError, match="at least 4"):
            unequal_blocks(width)

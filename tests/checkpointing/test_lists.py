"""What a joined layer of a list hands on: right or refused, whatever is asked of it."""

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan, PlanFault, checkpointed
from helpers.measure import predict

LAYERS = {"l": lambda: nn.Linear(8, 8), "i": nn.Identity, "n": lambda: nn.LayerNorm(8)}


class Owner(nn.Module):
    """Feeds layers into each other, and asks something of what each returns."""

    def __init__(self, ask, kinds="lll") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(LAYERS[kind]() for kind in kinds)
        self.ask = ask

    def forward(self, x):
        for layer in self.layers:
            before, x = x, layer(x)
            x = self.ask(x, before)
        return x


def unless(wrong):
    """Ask what is false without a plan: where it is not, gradients are others."""
    return lambda x, before: x * 2 if wrong(x, before) else x


RIGHT = {  # by the layer's own output, so that the plan is right as well
    "nothing": lambda x, before: x,
    "isinstance": unless(lambda x, _: not isinstance(x, torch.Tensor)),
    "is_tensor": unless(lambda x, _: not torch.is_tensor(x)),
    "type": unless(lambda x, _: type(x) is not torch.Tensor),
    "class": unless(lambda x, _: x.__class__ != torch.Tensor),
    "is": unless(lambda x, before: x is before),
    "id": unless(lambda x, before: id(x) == id(before)),
    "None": unless(lambda x, _: x is None),
    "callable": unless(lambda x, _: callable(x)),
    "a parameter": unless(lambda x, _: isinstance(x, nn.Parameter)),
    "a tuple": unless(lambda x, _: isinstance(x, tuple)),
    "hasattr": unless(lambda x, _: not hasattr(x, "shape") or hasattr(x, "logits")),
    "shape": unless(lambda x, _: x.shape != (4, 8) or x.size(0) != 4 or x.ndim != 2),
    "length": unless(lambda x, _: len(x) != 4),
    "dtype": unless(lambda x, _: x.dtype != torch.float32),
    "floating": unless(lambda x, _: not x.is_floating_point()),
    "device": unless(lambda x, _: x.device.type not in ("cpu", "meta")),
    "strides": unless(lambda x, _: x.stride() != (8, 1) or not x.is_contiguous()),
    "requires_grad": unless(lambda x, _: not x.requires_grad),
    "grad_fn": unless(lambda x, _: x.grad_fn is None or x.is_leaf),
    "in a dict": unless(lambda x, _: {x: 1}.get(x) != 1),
}
ACTS = {
    "relu": lambda x: x.relu(),
    "sum": lambda x: x + 1,
    "branch": lambda x: x * 2 if x.mean() > -9 else x,
    "in place": lambda x: x.add_(1),
    "a hook": lambda x: x.register_hook(lambda g: g * 2) and x,
    "retain_grad": lambda x: x.retain_grad() or x,
    "backward": lambda x: x.sum().backward(retain_graph=True) or x,
    "an attribute": lambda x: setattr(x, "scale", 2) or x,
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "a copy": lambda x: x.clone(),
    "bool": lambda x: x if x.any() else x * 2,
    "print": lambda x: repr(x) and x,
    "a list of it": lambda x: torch.stack([x, x])[0],
    "storage": lambda x: x.untyped_storage() and x,
    "numbers": lambda x: x.detach().numpy().sum() and x,
    "scripted": torch.jit.script(nn.ReLU()),
}


def gradients(model, plan, x):
    model.zero_grad()
    with checkpointed(model, plan):
        out = model(x)
        out.square().sum().backward()
    return [out, *(parameter.grad for parameter in model.parameters())]


def joined(model, n):
    return Plan((tuple(f"layers.{place}" for place in range(n)),))


@pytest.mark.parametrize("question", RIGHT)
def test_a_question_is_answered_as_by_the_layers_own_output(question):
    model, x = Owner(RIGHT[question]), torch.randn(4, 8)
    expected = gradients(model, Plan(), x)
    for n in (2, 3):
        found = gradients(model, joined(model, n), x)
        assert all(map(torch.equal, found, expected))
        assert predict(model, x, joined(model, n), device="cpu").recompute_flops


@pytest.mark.parametrize(
    "answer",
    [
        lambda x, before: isinstance(x, torch.Tensor),
        lambda x, before: torch.is_tensor(x),
        lambda x, before: type(x) is torch.Tensor,
        lambda x, before: x is not before,
        lambda x, before: hasattr(x, "relu"),
    ],
)
def test_who_acts_on_the_answer_is_refused(answer):
    model = Owner(lambda x, before: x.relu() if answer(x, before) else x)
    x = torch.randn(4, 8)
    with pytest.raises(PlanFault, match="uses what 'layers.0' returns for more"):
        gradients(model, joined(model, 2), x)
    with pytest.raises(ValueError, match="uses what 'layers.0' returns for more"):
        predict(model, x, joined(model, 2))


@pytest.mark.parametrize("act", ACTS)
def test_what_acts_on_it_is_refused(act):
    model, x = Owner(lambda x, before: ACTS[act](x)), torch.randn(4, 8)
    with pytest.raises((PlanFault, RuntimeError)) as raised:
        gradients(model, joined(model, 2), x)
    if act != "scripted":  # where PyTorch's interpreter tells it in its own words
        assert "'layers.0' returns" in str(raised.value)
        assert type(raised.value) is PlanFault
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kinds", ["ill", "lil", "lli", "iil", "liil", "lnii", "iiii"])
@pytest.mark.parametrize("question", ["nothing", "is"])
def test_a_layer_that_returns_its_very_input(kinds, question):
    asked = []

    def ask(x, before):
        asked.append(x is before)
        return x

    model = Owner(ask if question == "is" else RIGHT["nothing"], kinds)
    x = torch.randn(4, 8, requires_grad=True)
    expected = gradients(model, Plan(), x)
    plain = asked.copy()
    for n in range(2, len(kinds) + 1):
        asked.clear()
        found = gradients(model, joined(model, n), x)
        assert all(map(torch.equal, found, expected))
        assert asked == plain


def test_what_is_handed_on_can_be_asked_for_once():
    """A layer that is called twice draws two dropouts: one answer would be wrong."""
    model = Owner(None)
    model.forward = lambda x: (
        model.layers[1](h := model.layers[0](x)) + model.layers[1](h)
    )
    with pytest.raises(PlanFault, match="'layers.1' is not fed what 'layers.0'"):
        gradients(model, joined(model, 2), torch.randn(4, 8))


def test_nothing_of_a_step_stays_behind():
    model, x = Owner(RIGHT["nothing"], "illi"), torch.randn(4, 8, requires_grad=True)
    with checkpointed(model, joined(model, 3)):
        out = model(x)
        made = [layer.forward.run for layer in model.layers[:3]]
        links = made[0].__self__.links
        assert len(links) == 1, "the segment's output, which is alive"
        del out
        assert not len(links)


def test_a_layer_with_another_kind_of_tensor_is_refused():
    class Sparse(nn.Module):
        def forward(self, x):
            return x.to_sparse()

    class Other(torch.Tensor):
        pass

    class Kind(nn.Module):
        def forward(self, x):
            return x.as_subclass(Other)

    for layer in (Sparse(), Kind()):
        model = Owner(RIGHT["nothing"])
        model.layers[0] = layer
        with pytest.raises(PlanFault, match="and not a tensor of the plain kind"):
            with checkpointed(model, joined(model, 2)):
                model(torch.randn(4, 8))

"""Situations that people reported of PyTorch's checkpointing, as small inputs.

Under each plan gradients are those of the plain step, to the bit, or one sentence says
why there is no such plan.
"""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from helpers import checkpointing, from_scratch
from helpers.checkpointing import Plan, PlanFault, checkpointed

F = nn.functional


class Chain(nn.Sequential):
    """A chain of layers that are functions with a weight."""

    def __init__(self, *functions) -> None:
        super().__init__(*map(Layer, functions))


class Layer(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self.linear, x)


class Scaled(torch.autograd.Function):
    """Keeps one tensor as it should, and one on ctx."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.factor = x.exp()
        return x * ctx.factor

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * ctx.factor * (1 + x)


def halved(linear, x):
    """Saves in half precision, by hooks of its own."""
    with saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        return linear(x).tanh()


def tied():
    model = Chain(*[lambda linear, x: linear(x).tanh()] * 4)
    model[3].linear.weight = model[0].linear.weight
    return model


def six_times():
    layer = Layer(lambda linear, x: linear(x).tanh())
    return nn.Sequential(*[layer] * 6)


class Looped(nn.Module):
    """A list of one layer, which comes six times."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 8)
        self.layers = nn.ModuleList([layer] * 6)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat) / 8)

    def forward(self, x):
        return torch.fft.ifft(torch.fft.fft(x) @ self.weight).real


def as_tuple(linear, given):
    x, kept = given if isinstance(given, tuple) else (given, None)
    return linear(x).tanh(), x if kept is None else kept + x


def as_dict(linear, given):
    given = given if isinstance(given, dict) else {"x": given, "n": 0, "mask": None}
    return {**given, "x": linear(given["x"]).tanh(), "n": given["n"] + 1}


def total(value):
    """Sum whatever requires a gradient."""
    tensors = torch.utils._pytree.tree_leaves(value)
    return sum(t.square().sum() for t in tensors if isinstance(t, torch.Tensor))


class State(NamedTuple):
    voltage: torch.Tensor
    current: torch.Tensor | None


class Unrolled(nn.Module):
    """A cell with a named tuple of states, unrolled in time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x):
        state, seen = State(x, None), []
        for _ in range(5):
            spikes, state = self.cell(x, state)
            seen.append(spikes)
        return torch.stack(seen), state.voltage


class Cell(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x, state):
        current = super().forward(x) + (0 if state.current is None else state.current)
        voltage = 0.9 * state.voltage + current
        return voltage.sigmoid(), State(voltage, current)


def once(model, x):
    total(model(x)).backward()


def twice_in_one_loss(model, x):
    total(model(x) * model(x.flip(0))).backward()


def backward_twice(model, x):
    loss = total(model(x))
    loss.backward(retain_graph=True)
    loss.backward()


def in_anomaly_mode(model, x):
    with torch.autograd.detect_anomaly():
        once(model, x)


kept = []


def refers_to_its_output(linear, x):
    kept[:] = [linear(x).tanh()]
    return kept[0]


def tanh(linear, x):
    return linear(x).tanh()


JOINED, ALONE = Plan((("0", "1"),)), Plan.alone(["0", "1"])
PLANS = [JOINED, ALONE, Plan((("0",), ("1", "2")))]
SITUATIONS = {  # what a model is, how it is trained, and plans where these do not fit
    "pytorch#4298, one loss of two runs": (Chain, [tanh] * 3, twice_in_one_loss),
    "guided-diffusion#144, backward twice": (Chain, [tanh] * 3, backward_twice),
    "detect_anomaly": (Chain, [tanh] * 3, in_anomaly_mode),
    "pytorch#115255, hooks of its own": (Chain, [halved] * 3, once),
    "bitsandbytes#2034, a Function last": (
        Chain,
        [lambda linear, x: Scaled.apply(linear(x))] * 3,
        once,
    ),
    "pytorch#84413, refers to its output": (Chain, [refers_to_its_output] * 3, once),
    "pytorch#19260, tuples": (Chain, [as_tuple] * 3, once),
    "fairscale#802, dicts": (Chain, [as_dict] * 3, once),
    "DeepSpeed#2103, tied weights": (tied, [], once),
    "DeepSpeed#2103, six times": (six_times, [], once),
    "peft#1142, LoRA": (lambda: nn.Sequential(LoRA(), LoRA(), LoRA()), [], once),
    "complex weights, FFT": (
        lambda: nn.Sequential(Spectral(), nn.Tanh(), Spectral()),
        [],
        once,
    ),
    "norse#39, a named tuple": (Unrolled, [], once, Plan.alone(["cell"])),
    "DeepSpeed#2103, in a list": (
        Looped,
        [],
        once,
        Plan.alone(["layers.0"]),
        Plan.alone(["layers.0", "layers.3"]),
    ),
}


def gradients(model, train, plan=Plan(), x=None, **options):
    x = torch.linspace(-1, 1, 32).view(4, 8) if x is None else x
    model.zero_grad()
    torch.manual_seed(0)
    with checkpointed(model, plan, **options):
        train(model, x)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None and torch.equal(found[name], gradient), name


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("by", [checkpointing.checkpoint, from_scratch.checkpoint])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_gradients_are_those_of_the_plain_step(situation, by, monkeypatch):
    monkeypatch.setattr("helpers.checkpointing.checkpoint", by)
    torch.manual_seed(0)
    make, given, train, *plans = SITUATIONS[situation]
    model = make(*given)
    expected = gradients(model, train)
    for plan in plans or PLANS:
        assert_same(gradients(model, train, plan), expected)


def test_one_layer_of_a_list_is_not_its_own_neighbour():
    with pytest.raises(PlanFault, match="checkpoint a layer that comes twice alone"):
        gradients(Looped(), once, Plan((("layers.0", "layers.1"),)))


# pytorch#119590: selective checkpointing, and operators in place ---------------------


@pytest.mark.parametrize("use", ["plan", "torch"])
@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([torch.ops.aten.addmm.default], "has been mutated"),
        ([torch.ops.aten.relu_.default], "has been mutated"),
        ([torch.ops.aten.tanh.default], ""),
        ([], ""),
    ],
)
def test_a_policy_with_operators_in_place_is_right_or_told(saved, words, use):
    torch.manual_seed(0)
    model = Chain(lambda linear, x: linear(x).relu_(), tanh, tanh)
    expected = gradients(model, once)
    contexts = partial(create_selective_checkpoint_contexts, saved)

    def by_hand(model, x):
        first_two = nn.Sequential(*list(model)[:2])
        both = partial(checkpointing.checkpoint, first_two, use_reentrant=False)
        total(model[2](both(x, context_fn=contexts))).backward()

    def run():
        if use == "torch":
            return gradients(model, by_hand)
        return gradients(model, once, JOINED, context_fn=contexts)

    if not words:
        return assert_same(run(), expected)
    with pytest.raises(RuntimeError, match=words):
        run()


# OLMo-core#828: random numbers that are not kept -------------------------------------


def test_dropout_without_its_random_numbers_gives_other_gradients():
    """It is what the option asks for; the docstring of ``checkpointed`` says it."""
    torch.manual_seed(0)
    model = Chain(lambda linear, x: F.dropout(linear(x)).tanh(), tanh, tanh)
    expected = gradients(model, once)
    assert_same(gradients(model, once, JOINED), expected)
    other = gradients(model, once, JOINED, preserve_rng_state=False)
    assert not torch.equal(other["0.linear.weight"], expected["0.linear.weight"])
    assert "dropout" in checkpointed.__doc__
    for module in model:
        module.function = tanh
    expected = gradients(model, once)
    assert_same(gradients(model, once, JOINED, preserve_rng_state=False), expected)


# pytorch#6959: very many, and very deep ----------------------------------------------


class Deep(nn.Module):
    """A module inside a module, each with a layer of its own."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.inside = Deep(depth - 1) if depth > 1 else nn.Tanh()

    def forward(self, x):
        return self.layer(self.inside(x)).tanh()


def test_a_chain_of_a_thousand_segments():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Tanh() for _ in range(1000)), nn.Linear(8, 8))
    x = torch.linspace(-1, 1, 32).view(4, 8).requires_grad_()
    expected = gradients(model, once, x=x)
    plan = Plan.alone(map(str, range(1000)))
    assert_same(gradients(model, once, plan, x=x), expected)


def test_twelve_blocks_within_each_other():
    torch.manual_seed(0)
    model, x = Deep(12), torch.randn(4, 8)
    expected = gradients(model, once, x=x)

    def within(depth):
        if depth == 12:
            return gradients(model, once, x=x)
        with checkpointed(model, Plan.alone([".".join(["inside"] * (depth + 1))])):
            return within(depth + 1)

    assert_same(within(0), expected)

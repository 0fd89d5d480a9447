"""``verify`` finds what a plan changes, and nothing else; all is as before."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.measure import verify
from helpers.models import MLP
from tests.model_state import assert_same, state_of

X = torch.randn(16, 8)
FIRST, SECOND = Plan.alone(["0"]), Plan.alone(["1"])


class Writes(nn.Linear):
    """Takes a dict, writes into it and hands it on."""

    def forward(self, state):
        state["x"] = torch.tanh(super().forward(state["x"]))
        return state


class Stateful(nn.Linear):
    """Keeps a plain tensor between calls."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.potential = torch.zeros(8)

    def forward(self, x):
        y = super().forward(x)
        self.potential = 0.9 * self.potential + y.detach().mean(0)
        return torch.tanh(y - self.potential)


class Draws(nn.Linear):
    """Draws from generators that no checkpoint puts back."""

    def forward(self, x):
        return torch.tanh(super().forward(x) * random.random() * np.random.rand())


class Own(nn.Linear):
    """Takes its turn's number from an iterator, which nobody can put back."""

    turns = itertools.count(1)

    def forward(self, x):
        return torch.tanh(super().forward(x) / next(self.turns))


class Held(nn.Linear):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.torch, self.python = torch.Generator(), random.Random(0)
        self.numpy = np.random.default_rng(0)

    def forward(self, x):
        drawn = self.python.random() + self.numpy.random()
        return torch.tanh(
            super().forward(x) * torch.rand(1, generator=self.torch) + drawn
        )


class Dict(nn.Sequential):
    def forward(self, x):
        return super().forward({"x": x})["x"]


def writers() -> list[nn.Module]:
    return [Writes(8, 8) for _ in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": torch.optim.AdamW},
        {"autocast": torch.bfloat16},
        {"loss": lambda output: output.square().mean()},
        {"use_reentrant": True},
        {"early_stop": False},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_a_sound_plan_changes_no_bit(settings):
    model = MLP([8, 8, 8, 4], "gelu", dropout=0.3)
    for parameter in model[0].parameters():  # reentrant, behind what needs a gradient
        parameter.requires_grad_(not settings.get("use_reentrant"))
    x = X.clone().requires_grad_()
    found = verify(model, x, Plan((("layer1", "layer2"),)), **settings)
    assert found.same and found.reproducible
    assert str(found) == "gradients and buffers as without, bit by bit"


@pytest.mark.parametrize(
    ("make", "gradients", "buffers"),
    [
        (lambda: Dict(*writers()), True, set()),
        (lambda: nn.Sequential(Stateful(), nn.Linear(8, 4)), True, {"0.potential"}),
        (lambda: nn.Sequential(Draws(8, 8), nn.Linear(8, 4)), True, set()),
        (lambda: nn.Sequential(Held(), nn.Linear(8, 4)), True, set()),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)),
            False,
            {"0.running_mean", "0.running_var", "0.num_batches_tracked"},
        ),
    ],
    ids=["dict", "attribute", "random", "generators", "BatchNorm"],
)
def test_what_a_plan_changes_is_found(make, gradients, buffers):
    model = make()
    before, drawn = state_of(model), (random.getstate(), torch.get_rng_state())
    found = verify(model, X, SECOND if isinstance(model, Dict) else FIRST)
    assert bool(found.gradients) == gradients
    assert set(found.buffers) == buffers
    assert found.reproducible and not found.same
    assert "differ" in str(found) and "\n" not in str(found)
    assert_same(state_of(model), before)
    assert drawn[0] == random.getstate() and torch.equal(
        drawn[1], torch.get_rng_state()
    )
    assert verify(model, X, Plan()).same


def test_a_step_that_does_not_equal_itself_says_so():
    found = verify(nn.Sequential(Own(8, 8), nn.Linear(8, 4)), X, FIRST)
    assert not found.reproducible
    assert "without the plan, too" in str(found)


def test_without_the_random_state_dropout_is_found():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    plan = Plan((("0", "1"),))
    assert verify(model, X, plan).same
    found = verify(model, X, plan, preserve_rng_state=False)
    assert {"0.weight", "0.bias"} <= set(found.gradients)


def test_a_gradient_that_never_comes_differs_without_end():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    found = verify(model, X, FIRST, use_reentrant=True)
    assert found.gradients == {"0.weight": float("inf"), "0.bias": float("inf")}


def test_gradients_of_a_step_that_drops_them_are_compared():
    def step(model, batch, optimizer):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = Dict(*writers())
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    found = verify(model, X, SECOND, step=step, optimizer=optimizer)
    assert found.gradients and not optimizer.state


def test_a_step_without_backward_is_refused():
    with pytest.raises(ValueError, match="never calls backward"):
        verify(MLP([8, 8, 4]), X, Plan(), step=lambda model, batch, _: model(batch))

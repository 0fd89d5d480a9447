"""What a model's classes and functions share with others is as before, and counts.

A cache filled with tensors that have no data would stop the reader's next step; a
generator or a counter that went on would make a step another one each time.
"""

import functools

import pytest
import torch
from torch import nn

from helpers import Plan, inspect_model, plan_for, predict, verify
from helpers.measure import measure

X = torch.randn(16, 32)
CPU = {"device": "cpu"}
CACHE: dict[int, torch.Tensor] = {}
LOG: list[torch.Tensor] = []
COUNTS, GENERATOR = [0], torch.Generator().manual_seed(1)
number = 0


@functools.lru_cache
def rope(rows: int, width: int) -> torch.Tensor:
    return torch.arange(rows)[:, None] * torch.ones(width)


class Shares(nn.Linear):
    count, seen = 0, {}

    def __init__(self) -> None:
        super().__init__(32, 32)

    def forward(self, x, kept={}):  # noqa: B006
        global number
        number += 1
        Shares.count += 1
        COUNTS[0] += 1
        if 0 not in CACHE:
            CACHE[0] = torch.ones(32)
        kept[0] = Shares.seen["x"] = x.detach()
        LOG.append(kept[0])
        drawn = torch.rand(32, generator=GENERATOR) * CACHE[0] * Shares.count
        return (super().forward(x + rope(*x.shape)) * drawn).tanh()


def shared() -> tuple:
    state = GENERATOR.get_state().tolist()
    held = len(CACHE), len(LOG), *COUNTS, number, Shares.count, len(Shares.seen)
    return held, state, rope.cache_info().currsize, Shares.forward.__defaults__


def test_a_step_leaves_it_as_it_was_and_verify_sees_through_it():
    model, plan, before = nn.Sequential(Shares(), Shares()), Plan.alone(["0"]), shared()
    predicted = predict(model, X, **CPU)
    assert shared() == before
    assert measure(model, X, repeats=0).peak_bytes == predicted.peak_bytes
    assert shared() == before
    inspect_model(model, X)
    found = verify(model, X, plan)
    assert shared() == before
    assert found.reproducible and set(found.gradients) >= {"0.weight", "0.bias"}
    assert plan_for(model, X, predicted.peak_bytes, **CPU).plan == Plan()
    model(X).sum().backward()  # with data


def test_a_generator_in_a_closure_of_forward_is_seen():
    generator = torch.Generator().manual_seed(1)

    class Draws(nn.Linear):
        def forward(self, x):
            drawn = torch.rand(x.shape, generator=generator)
            return torch.tanh(super().forward(x) * drawn)

    model, state = nn.Sequential(Draws(32, 32), nn.Linear(32, 4)), generator.get_state()
    found = verify(model, X, Plan.alone(["0"]))
    assert found.reproducible and found.gradients
    assert torch.equal(state, generator.get_state())


@pytest.mark.parametrize("run", [predict, functools.partial(measure, repeats=0)])
def test_what_a_hook_keeps_for_the_loss_is_kept_in_no_variable_of_the_readers(run):
    model, kept = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), {}

    def keep(module, args, output):
        kept["output"] = output.detach()

    model[0].register_forward_hook(keep)
    mine = kept
    for _ in range(2):
        run(model, X, loss=lambda output: output.sum() + kept["output"].sum(), **CPU)
        assert kept is mine and not kept
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_thing_that_cannot_be_put_back_keeps_no_other_from_it():
    class Stubborn(dict):
        def clear(self):
            raise RuntimeError("no")

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    model.own = Stubborn()
    model.register_forward_hook(lambda *_: model.own.update(x=1))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no"):
        measure(model, X, optimizer=torch.optim.SGD, repeats=0)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())

"""Inputs that cannot be right: one sentence each, which says what would be."""

import dataclasses

import pytest
import torch
from torch import nn

from helpers import Plan, inspect_model, plan_for, predict, verify
from helpers.measure import measure
from helpers.planner import InfeasibleBudget, front_for

X, PLAN = torch.randn(8, 16), Plan.alone(["0"])


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))


def inferred() -> nn.Sequential:
    with torch.inference_mode():
        return net()


def verified(model, batch, **how):
    return verify(model, batch, PLAN, **how)


RUNS = [predict, measure, verified, inspect_model]
MODELS = {
    "has no parameters yet": lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU()),
    "a ModuleList has no forward": lambda: nn.ModuleList([nn.Linear(16, 16)]),
    "inference": inferred,
}
BATCHES = {"not NoneType": None, "not Batch": Batch(X), "not str": "x"}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("words", MODELS)
def test_a_model_that_no_step_is_made_of(run, words):
    with pytest.raises(ValueError, match=words):
        run(MODELS[words](), X)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("words", BATCHES)
def test_a_batch_of_another_kind(run, words):
    with pytest.raises(ValueError, match=f"a batch is a tensor x.*{words}"):
        run(net(), BATCHES[words])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "mse"}, "loss is called with the output, and 'mse' is no function"),
        ({"loss": nn.MSELoss}, "is no function"),
        ({"optimizer": "adam"}, "or is one; not a str"),
    ],
)
def test_a_loss_or_an_optimizer_that_is_none(run, options, words):
    with pytest.raises(ValueError, match=words):
        run(net(), X, **options)


@pytest.mark.parametrize("run", [measure, verified])
def test_what_has_no_data_is_not_run(run):
    words = "what is on the meta device has no data to run; predict it"
    for model, x in ((net().to("meta"), X), (net(), X.to("meta"))):
        with pytest.raises(ValueError, match=words):
            run(model, x)
        with pytest.raises(ValueError, match=words):
            run(model, x, device="cpu")


@pytest.mark.parametrize("gpu", [5, "P5000", ["A100"]])
def test_an_unknown_card(gpu):
    with pytest.raises(ValueError, match="gpu is one of T4, "):
        predict(net(), X, gpu=gpu)


@pytest.mark.parametrize("parent", ["nope", "0", 5])
def test_a_parent_that_holds_no_layers(parent):
    with pytest.raises(ValueError, match="parent is the name of a module with layers"):
        plan_for(net(), X, 2_000, parent=parent)


@pytest.mark.parametrize("points", [0, -1, 1.5, "3"])
def test_a_number_of_points_that_is_none(points):
    with pytest.raises(ValueError, match="points is a whole number from 1 up"):
        front_for(net(), X, points)


def test_where_nothing_may_be_ticked_no_plan_fits():
    model = nn.Sequential(nn.EmbeddingBag(50, 16))
    ids = torch.randint(50, (8, 4))
    peak = predict(model, ids, device="cpu").peak_bytes
    with pytest.raises(InfeasibleBudget) as raised:
        plan_for(model, ids, peak - 1, device="cpu")
    assert raised.value.minimum_bytes == peak
    assert [one.plan for one in front_for(model, ids, device="cpu")] == [Plan()]


def test_a_step_inside_inference_mode_trains_all_the_same():
    model, peak = net(), predict(net(), X, device="cpu").peak_bytes
    with torch.inference_mode():
        assert predict(model, X, device="cpu").peak_bytes == peak
        assert measure(model, X, repeats=0).peak_bytes == peak


def test_an_input_that_is_trained_is_compared():
    class Draws(nn.Module):
        def forward(self, x):
            return x * torch.rand(16, generator=generator).exp()

    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(Draws(), nn.Tanh()).requires_grad_(False)
    prompt = nn.Parameter(torch.randn(8, 16))
    assert verify(model, prompt, Plan()).same
    assert set(verify(model, prompt, PLAN).gradients) == {"batch[0]"}


def test_a_front_is_for_the_card_that_is_named():
    model, x = net().bfloat16(), X.bfloat16()
    for gpu in ("T4", "A100"):
        assert front_for(model, x, gpu=gpu)[-1].plan == Plan()
        assert plan_for(model, x, "1 GiB", gpu=gpu).plan == Plan()
